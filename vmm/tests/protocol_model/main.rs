//! The pair's protocol, explored: the monitor's own state machines in a world of faults, by `stateright`.
//!
//! Owns: what must hold in every state that faults within a budget can lead to; and that it does not hold when a rule is
//! left out. `VMFT_MODEL=long` raises the budgets (`make test-long`).
//!
//! What the world is, and what it leaves out, is in `world.rs` and docs/protocol.md.

mod fair;
mod steps;
mod views;
mod world;

use std::collections::BTreeSet;
use std::time::Duration;

use stateright::{Checker, HasDiscoveries, Model, Property};
use steps::{Left, Step};
use vmft::pair::protocol::{Next, Timing, Verdict};
use world::{Flaw, Following, Monitor, TICK, Wiring, World};

/// A model: hosts, budgets and wiring.
struct Pair {
    hosts: usize,
    left: Left,
    wiring: Wiring,
    /// The property that is expected to break; all of them if none is.
    breaks: Option<&'static str>,
}

impl Model for Pair {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.hosts, self.left, &self.wiring)]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        world.steps(steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut next = world.clone();
        next.take(step, &self.wiring);
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let all = [
            Property::always(ONE_ACTS, one_acts),
            Property::always(IMPLIED, outputs_are_implied),
            Property::always(SURVIVES, outputs_survive),
            Property::always(NO_USE, |_, world: &World| !world.useless_lives),
            Property::always(MEMBERS, |_, world: &World| world.records.iter().all(|record| record.by_member)),
            Property::always(RECORDED, |_, world: &World| {
                world.hosts.iter().all(|host| is_recorded(world, host))
            }),
            Property::always(OWN_VIEW, |_, world: &World| !world.foreign),
            Property::always(OWN_LOG, |_, world: &World| !world.refused),
            Property::always(RESUMES, |pair: &Self, world| {
                !somebody_could(world) || world.serves_again(&pair.wiring)
            }),
        ];
        all.into_iter().filter(|property| self.breaks.is_none_or(|breaks| breaks == property.name)).collect()
    }
}

const ONE_ACTS: &str = "at most one monitor of any view lets output out";
const IMPLIED: &str = "whoever may let output out has the state that all outputs before came from";
const SURVIVES: &str = "who may take the guest over has all that was let out";
const NO_USE: &str = "a guest that is of no use never goes live";
const MEMBERS: &str = "the primary of a view was primary or backup in the one before";
const RECORDED: &str = "who has the guest is named by the record of its view";
const OWN_VIEW: &str = "a backup takes entries of its own view only";
const OWN_LOG: &str = "a backup is sent what it may take: its view's log, from where its guest stands";
const RESUMES: &str = "while a member of the latest view is healthy and the arbiter answers, service resumes";

/// Frozen monitors included, since they go on without notice.
fn one_acts(pair: &Pair, world: &World) -> bool {
    !world.overlap && (0..world.hosts.len()).filter(|host| world.may_act(*host, &pair.wiring)).count() <= 1
}

fn outputs_are_implied(pair: &Pair, world: &World) -> bool {
    let implied = |(place, host): (usize, &world::Host)| match &host.monitor {
        Monitor::Primary(running) if world.may_act(place, &pair.wiring) => {
            running.guest.starts_with(&world.released)
        }
        _ => true,
    };
    !world.contradiction && world.hosts.iter().enumerate().all(implied)
}

fn is_recorded(world: &World, host: &world::Host) -> bool {
    match &host.monitor {
        Monitor::Backup(following) if following.loaded => world
            .records
            .iter()
            .any(|record| record.view == following.view && record.backup == Some(following.life)),
        Monitor::Primary(running) => {
            let is_own = |record: &world::Record| record.primary == running.life;
            world.records.iter().any(|record| record.view == running.machine.view() && is_own(record))
        }
        _ => true,
    }
}

/// So whichever of the pair fails, the other one goes on with it.
fn outputs_survive(_: &Pair, world: &World) -> bool {
    let has_all = |host: &world::Host| match &host.monitor {
        Monitor::Backup(following) if may_take_over(world, following) => {
            following.guest.starts_with(&world.released)
        }
        _ => true,
    };
    world.hosts.iter().all(has_all)
}

/// It has the guest, and the view that it would claim is free, or its own.
fn may_take_over(world: &World, following: &Following) -> bool {
    let latest = world.latest();
    let free = latest.view == following.view || latest.primary == following.life;
    let out = matches!(following.next, Next::Done(Verdict::Lost | Verdict::Stopped));
    following.loaded && !following.useless && free && !out
}

/// A member of the latest view is healthy.
fn somebody_could(world: &World) -> bool {
    let latest = world.latest();
    world.hosts.iter().filter(|host| !host.frozen).any(|host| match &host.monitor {
        Monitor::Off => false,
        Monitor::Primary(running) => running.life == latest.primary,
        Monitor::Backup(following) => may_take_over(world, following),
    })
}

fn is_long() -> bool {
    std::env::var("VMFT_MODEL").is_ok_and(|value| value == "long")
}

/// Explores everything; fails with the steps to the first state that must not be.
fn holds(name: &str, hosts: usize, short: Left, long: Left) {
    let left = if is_long() { long } else { short };
    let pair = Pair { hosts, left, wiring: Wiring::default(), breaks: None };
    let checker = pair.checker().threads(threads()).spawn_bfs().join();
    println!("{name}: {} states, {} steps deep", checker.unique_state_count(), checker.max_depth());
    checker.assert_properties();
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

/// Fails unless `flaw`, or whatever else is wrong with `wiring` and `left`, breaks `property`.
fn breaks_with(property: &'static str, left: Left, wiring: Wiring) {
    breaks_on(2, property, left, wiring);
}

fn breaks_on(hosts: usize, property: &'static str, left: Left, wiring: Wiring) {
    let pair = Pair { hosts, left, wiring, breaks: Some(property) };
    let found = HasDiscoveries::AnyOf(BTreeSet::from([property]));
    let checker = pair.checker().threads(threads()).finish_when(found).spawn_bfs().join();
    let path = checker.discovery(property).expect("the model cannot tell this wiring from the right one");
    println!("{:?}: {} states, then:", wiring.flaw, checker.unique_state_count());
    for step in path.into_actions() {
        println!("  {step:?}");
    }
}

fn breaks(flaw: Flaw, property: &'static str, left: Left) {
    breaks_with(property, left, Wiring { flaw: Some(flaw), ..Wiring::default() });
}

/// A pair forms and does something.
fn quiet(ticks: u8) -> Left {
    Left { ticks, entries: 2, joins: 1, ..Left::default() }
}

/// A pair forms.
fn bare(ticks: u8) -> Left {
    Left { entries: 0, ..quiet(ticks) }
}

#[test]
fn crashes() {
    let long = Left { crashes: 1, joins: 2, doubts: 1, ..quiet(4) };
    holds("a crash", 2, Left { doubts: 0, ..long }.with_ticks(3), long);
}

#[test]
fn unanswered_claims() {
    let left = Left { crashes: 1, doubts: 1, ..quiet(3) };
    holds("a crash and an unanswered claim", 2, left, Left { doubts: 2, ..left }.with_ticks(4));
}

#[test]
fn joins_without_an_answer() {
    let left = Left { crashes: 1, doubts: 1, joins: 2, ..quiet(1) };
    holds(
        "a backup that the arbiter may have recorded, and a crash",
        2,
        left,
        Left { doubts: 2, cuts: 1, ..left }.with_ticks(2),
    );
}

#[test]
fn freezes() {
    let left = Left { freezes: 1, ..quiet(3) };
    holds("a freeze", 2, left, Left { repeats: 1, ..left }.with_ticks(4));
}

#[test]
fn slow_clocks() {
    let left = Left { freezes: 1, drift: 1, entries: 1, ..quiet(3) };
    holds("a freeze and a clock that falls behind", 2, left, left.with_ticks(5));
}

#[test]
fn cuts() {
    let left = Left { cuts: 1, doubts: 1, ..quiet(3) };
    holds("a cut link and an unanswered claim", 2, left, left.with_ticks(5));
}

#[test]
fn sides_that_hear_nobody_else() {
    let left = Left { turns_deaf: 1, cuts: 1, entries: 1, ..quiet(5) };
    let long = Left { turns_deaf: 2, entries: 2, ..left }.with_ticks(4);
    holds("a cut link, and sides that wait for longer and no longer", 2, left, long);
}

#[test]
fn repeated_heartbeats() {
    let left = Left { cuts: 1, repeats: 1, ..quiet(3) };
    holds("a cut link and a heartbeat that comes twice", 2, left, left.with_ticks(5));
}

#[test]
fn broken_connections() {
    let left = Left { breaks: 1, doubts: 1, ..quiet(2) };
    holds("a connection that breaks for one side", 2, left, Left { drift: 1, ..left }.with_ticks(4));
}

#[test]
fn three_hosts() {
    let left = Left { crashes: 2, joins: 2, ..quiet(2) };
    holds("two crashes on three hosts", 3, left, Left { joins: 3, ..left }.with_ticks(3));
}

#[test]
fn stops() {
    let left = Left { stops: 1, ..quiet(2) };
    holds("an operator's order", 2, left, Left { joins: 2, doubts: 1, ..left }.with_ticks(4));
}

#[test]
fn slow_backups() {
    let left = Left { lags: 1, joins: 2, ..quiet(3) };
    holds("a backup that stays behind", 2, left, Left { doubts: 1, ..left }.with_ticks(4));
}

#[test]
fn useless_backups() {
    let left = Left { useless: 1, crashes: 1, ..quiet(3) };
    let long = Left { joins: 2, doubts: 1, ..left }.with_ticks(4);
    holds("a backup whose guest is of no use, and a crash", 2, left, long);
}

#[test]
fn what_is_meant_to_happen_happens() {
    for (what, left, seen) in [
        ("a takeover", Left { crashes: 1, ..quiet(3) }, taken_over as fn(&World) -> bool),
        ("outputs while a backup follows", quiet(1), |world| {
            let follows =
                |host: &world::Host| matches!(&host.monitor, Monitor::Backup(following) if following.loaded);
            world.released.len() == 2 && world.hosts.iter().any(follows)
        }),
        ("a backup left behind", Left { lags: 1, ..quiet(0) }, |world| {
            let goes_on = |host: &world::Host| matches!(&host.monitor, Monitor::Primary(running) if running.machine.view() == 3);
            world.left.lags == 0 && world.hosts.iter().any(goes_on)
        }),
        ("a second pair", Left { crashes: 1, joins: 2, ..quiet(3) }, |world| {
            taken_over(world)
                && world
                    .hosts
                    .iter()
                    .any(|host| matches!(&host.monitor, Monitor::Backup(following) if following.loaded))
        }),
    ] {
        let pair = Seen { pair: Pair { hosts: 2, left, wiring: Wiring::default(), breaks: None }, seen };
        let checker = pair.checker().finish_when(HasDiscoveries::Any).spawn_bfs().join();
        assert!(checker.discovery("seen").is_some(), "{what} is never seen");
    }
}

fn taken_over(world: &World) -> bool {
    world.hosts.iter().any(|host| matches!(&host.monitor, Monitor::Primary(running) if running.life != 1))
}

/// Looks for one state.
struct Seen {
    pair: Pair,
    seen: fn(&World) -> bool,
}

impl Model for Seen {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        self.pair.init_states()
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        self.pair.actions(world, steps);
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        self.pair.next_state(world, step)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::sometimes("seen", |model: &Self, world| (model.seen)(world))]
    }
}

#[test]
fn a_release_before_the_acknowledgement_is_found() {
    breaks(Flaw::ReleaseBeforeAck, SURVIVES, quiet(2));
}

#[test]
fn a_lease_that_nobody_asks_is_found() {
    breaks(Flaw::NoLease, ONE_ACTS, Left { freezes: 1, entries: 1, ..quiet(4) });
}

#[test]
fn a_lease_from_the_receipt_of_answers_is_found() {
    breaks(Flaw::LeaseFromReceipt, ONE_ACTS, Left { freezes: 1, ..bare(5) });
}

#[test]
fn a_lease_longer_than_the_patience_is_found() {
    let right = Wiring::default();
    let timing = Timing { lease: 5 * TICK, ..right.timing };
    breaks_with(ONE_ACTS, Left { freezes: 1, ..bare(5) }, Wiring { timing, ..right });
}

#[test]
fn a_clock_beyond_the_assumption_is_found() {
    breaks_with(ONE_ACTS, Left { drift: 2, ..bare(5) }, Wiring::default());
}

#[test]
fn a_view_that_several_can_have_is_found() {
    breaks(Flaw::NoTestAndSet, ONE_ACTS, Left { cuts: 1, ..bare(4) });
}

#[test]
fn a_claim_by_who_is_no_member_is_found() {
    breaks(Flaw::ClaimsAnother, MEMBERS, Left { cuts: 1, ..bare(4) });
}

#[test]
fn taking_silence_for_a_win_is_found() {
    breaks(Flaw::SilenceIsAWin, ONE_ACTS, Left { cuts: 1, doubts: 1, ..bare(4) });
}

#[test]
fn going_on_without_a_claim_is_found() {
    breaks(Flaw::NoClaim, ONE_ACTS, Left { cuts: 1, ..bare(4) });
}

#[test]
fn closing_the_connection_too_early_is_found() {
    breaks(Flaw::ClosesTooEarly, ONE_ACTS, Left { breaks: 1, ..quiet(2) });
}

#[test]
fn answering_while_claiming_is_found() {
    breaks(Flaw::AnswersWhileClaiming, ONE_ACTS, Left { drift: 1, ..bare(5) });
}

#[test]
fn a_claim_before_the_silence_is_found() {
    breaks(Flaw::ClaimsAtOnce, ONE_ACTS, Left { breaks: 1, ..quiet(2) });
}

#[test]
fn a_guest_of_no_use_that_goes_live_is_found() {
    breaks(Flaw::RetiredClaims, NO_USE, Left { useless: 1, ..bare(4) });
}

#[test]
fn going_live_before_all_is_executed_is_found() {
    breaks(Flaw::GoesLiveTooEarly, IMPLIED, Left { crashes: 1, ..quiet(2) });
}

#[test]
fn a_pair_without_a_record_is_found() {
    breaks(Flaw::PairsUnrecorded, MEMBERS, Left { crashes: 1, ..bare(0) });
    breaks(Flaw::PairsUnrecorded, RECORDED, bare(0));
    breaks(Flaw::SilenceIsAWin, MEMBERS, Left { crashes: 1, doubts: 1, ..bare(0) });
}

#[test]
fn a_record_that_does_not_name_the_backup_is_found() {
    breaks(Flaw::NamesNobody, MEMBERS, Left { crashes: 1, ..bare(0) });
    breaks(Flaw::NamesNobody, RECORDED, bare(0));
}

#[test]
fn a_record_that_names_another_backup_is_found() {
    breaks(Flaw::AnyBackupIsNamed, MEMBERS, Left { crashes: 1, doubts: 1, joins: 2, ..bare(0) });
}

#[test]
fn a_guest_from_before_the_start_of_the_log_is_found() {
    breaks(Flaw::EarlySnapshot, SURVIVES, quiet(0));
    breaks(Flaw::EarlySnapshot, OWN_LOG, quiet(0));
}

#[test]
fn entries_of_another_view_are_found_and_refused() {
    let left = Left { lags: 1, joins: 2, entries: 1, ..quiet(0) };
    let wiring = Wiring { flaw: Some(Flaw::TakesAnyView), ..Wiring::default() };
    breaks_on(3, OWN_VIEW, left, wiring);
    let wiring = Wiring { flaw: Some(Flaw::SendsToAll), ..wiring };
    breaks_on(3, OWN_LOG, left, wiring);
    // Whoever looks at the view comes to no harm.
    let pair = Pair { hosts: 3, left, wiring, breaks: None };
    let checker = pair.checker().threads(threads()).spawn_bfs().join();
    let broken: Vec<_> = checker.discoveries().into_keys().collect();
    assert_eq!(broken, [OWN_LOG]);
}

#[test]
fn an_acknowledgement_that_counts_for_the_next_backup_is_found() {
    let left = Left { lags: 1, joins: 2, entries: 2, ..quiet(0) };
    let wiring = Wiring { flaw: Some(Flaw::AnyEpoch), ..Wiring::default() };
    breaks_on(3, SURVIVES, left, wiring);
}

#[test]
fn waiting_for_a_backup_that_is_gone_is_found() {
    let right = Wiring::default();
    let timing = Timing { timeout: 100 * TICK, loading_timeout: 100 * TICK, ..right.timing };
    breaks_with(RESUMES, Left { crashes: 1, ..quiet(1) }, Wiring { timing, ..right });
}

#[test]
fn the_lease_is_shorter_than_the_patience() {
    for timeout_ms in [20, 500, 60_000] {
        let timing = Timing::new(Duration::from_millis(timeout_ms), Duration::from_secs(5));
        assert!(timing.lease < timing.timeout && timing.timeout <= timing.loading_timeout);
    }
}
