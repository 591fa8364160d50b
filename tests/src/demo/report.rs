//! What the demo saw, and whether all of it was as it must be.
//!
//! No I/O and no clock. A report with [`Report::failures`] must never read like a success.

use std::fmt;
use std::time::Duration;

use super::options::Ready;
use super::watch::{ANSWER_LIMIT, Connections, Seen};
use crate::client::{self, Gaps};

/// The result of a demo.
#[derive(Debug)]
pub struct Report {
    /// What the hosts were, and why these.
    pub(super) hosts: String,
    /// The guest.
    pub(super) guest: String,
    /// Name of the host whose monitor was killed.
    pub(super) killed: String,
    /// Number of backups that the guest had, one after the other.
    pub(super) backups: usize,
    /// Name of the host that took over, by its monitor's own words.
    pub(super) successor: Option<String>,
    /// Time from the monitor's noticing to the takeover, as it says.
    pub(super) takeover_ms: Option<u64>,
    /// How the guest was seen to go on.
    pub(super) evidence: Evidence,
}

/// How the guest was seen to go on.
#[derive(Debug)]
pub(super) enum Evidence {
    /// A client was at work all the time.
    Traffic(Box<Traffic>),
    /// No client; the guest was looked at from outside.
    Watched(Watched),
}

/// What a guest is judged by if there is no client of the demo's service.
#[derive(Debug)]
pub(super) enum LookedFor {
    /// What the user named, and how long after its start the guest had it.
    Ready(Ready, Duration),
    /// Nothing was named, and there is no demo service.
    Nothing {
        /// Why there was no client.
        why: String,
        /// Whether the default guest's service had to answer.
        service_expected: bool,
    },
}

impl fmt::Display for LookedFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LookedFor::Ready(ready, after) => write!(f, "{ready}, ready after {:.0} s", after.as_secs_f64()),
            LookedFor::Nothing { why, .. } => write!(f, "nothing (--ready), and {why}"),
        }
    }
}

/// What was looked for, and what was seen of the guest after the takeover.
#[derive(Debug)]
pub(super) struct Watched {
    /// By what it is judged.
    pub(super) looked_for: LookedFor,
    /// `None`: nobody took over.
    pub(super) after: Option<After>,
}

/// A guest after the takeover.
#[derive(Debug)]
pub(super) struct After {
    /// Its position, and a later one; or why there is none.
    pub(super) moved: Result<(u64, u64), String>,
    /// The connections to its port, if it is judged by one.
    pub(super) connections: Option<Connections>,
}

/// What the client saw, and the log behind it.
#[derive(Debug)]
pub(super) struct Traffic {
    /// All requests.
    pub(super) client: client::Report,
    /// Requests answered before the kill.
    pub(super) answered_before: usize,
    /// The pauses.
    pub(super) gaps: Gaps,
    /// Bytes of log per second of traffic before the kill.
    pub(super) log_bytes_per_s: Option<f64>,
    /// Acknowledged writes that the service did not have at the end, or why that is not known.
    pub(super) missing: Result<Vec<String>, String>,
    /// The same of the disk image; `None` where this machine does not see it.
    pub(super) disk: Option<Result<DiskVerdict, String>>,
}

/// What the disk image has.
#[derive(Debug)]
pub(super) struct DiskVerdict {
    /// Writes, numbered without a gap.
    pub(super) writes: usize,
    /// Acknowledged writes that it does not have.
    pub(super) missing: Vec<String>,
}

impl Report {
    /// All that was not as it must be, as sentences. Empty: the demo succeeded.
    pub fn failures(&self) -> Vec<String> {
        let mut failures = Vec::new();
        if self.successor.is_none() {
            failures.push("No host took over.".to_owned());
        }
        match &self.evidence {
            Evidence::Traffic(traffic) => traffic.failures(&mut failures),
            Evidence::Watched(watched) => watched.failures(&mut failures),
        }
        failures
    }
}

impl Watched {
    fn failures(&self, failures: &mut Vec<String>) {
        if let LookedFor::Nothing { why, service_expected: true } = &self.looked_for {
            failures.push(format!("No client was run: {why}."));
        }
        let Some(after) = &self.after else { return };
        if let Err(why) = &after.moved {
            failures.push(format!("The guest does not move after the takeover: {why}."));
        }
        let Some(Connections { before, kept, fresh }) = &after.connections else { return };
        for (which, seen) in [("from before the kill", kept), ("opened after the takeover", fresh)] {
            match seen {
                Seen::Broken(why) => failures.push(format!("The connection {which} is broken: {why}.")),
                // A service that never answered is not expected to.
                Seen::Silent if *before == Seen::Answered => {
                    let limit_s = ANSWER_LIMIT.as_secs();
                    failures.push(format!("The connection {which} was not answered within {limit_s} s."));
                }
                Seen::Silent | Seen::Answered => {}
            }
        }
    }
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "looked for  {}", self.looked_for)?;
        let Some(After { moved, connections }) = &self.after else { return Ok(()) };
        if let Ok((from, to)) = moved {
            writeln!(f, "execution   continues on the new host: position {from}, then {to}")?;
        }
        if let Some(Connections { before, kept, fresh }) = connections {
            writeln!(f, "connection  opened before the kill: {}", words(kept))?;
            writeln!(f, "connection  opened after the takeover: {}", words(fresh))?;
            if *before != Seen::Answered {
                writeln!(f, "            before the kill: {}", words(before))?;
            }
        }
        writeln!(f, "not judged  what the guest's programs and its disk hold")
    }
}

fn words(seen: &Seen) -> String {
    match seen {
        Seen::Answered => "open, and the service answered its end".to_owned(),
        Seen::Silent => "not reset; the service does not answer its end".to_owned(),
        Seen::Broken(why) => format!("broken: {why}"),
    }
}

impl Traffic {
    fn failures(&self, failures: &mut Vec<String>) {
        let client = &self.client;
        for (what, numbers) in [
            ("lost", &client.lost),
            ("repeated", &client.repeated),
            ("answered out of order", &client.out_of_order),
        ] {
            if let Some(first) = numbers.first() {
                failures.push(format!("{} requests were {what}, the first was {first}.", numbers.len()));
            }
        }
        if let Some(first) = client.wrong.first() {
            failures.push(format!("{} replies were wrong, the first was: {first}", client.wrong.len()));
        }
        if let Some(why) = &client.broken {
            failures.push(format!("The client's connection broke: {why}."));
        }
        if client.samples.iter().filter(|sample| sample.replied.is_some()).count() <= self.answered_before {
            failures.push("No request was answered after the kill.".into());
        }
        if self.log_bytes_per_s.is_none() {
            failures.push("The primary did not say how much log it sent.".into());
        }
        let places = [("service", Some(self.missing.as_ref())), ("disk", self.disk_missing())];
        for (place, missing) in places {
            match missing {
                Some(Err(why)) => failures.push(format!("What the {place} has is not known: {why}")),
                Some(Ok(missing)) => failures.extend(
                    missing.iter().map(|write| format!("The {place} lacks an acknowledged write: {write}.")),
                ),
                None => {}
            }
        }
    }

    fn disk_missing(&self) -> Option<Result<&Vec<String>, &String>> {
        self.disk.as_ref().map(|disk| disk.as_ref().map(|verdict| &verdict.missing))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let failures = self.failures();
        writeln!(f, "hosts       {}", self.hosts)?;
        writeln!(f, "guest       {}", self.guest)?;
        if self.backups > 1 {
            writeln!(f, "backups     {}: those before the last one were lost before the kill", self.backups)?;
        }
        writeln!(f, "killed      the monitor on {}, by SIGKILL", self.killed)?;
        match (&self.successor, self.takeover_ms) {
            (Some(host), Some(ms)) => writeln!(f, "took over   {host}, {ms} ms after it noticed")?,
            (Some(host), None) => writeln!(f, "took over   {host}")?,
            (None, _) => writeln!(f, "took over   nobody")?,
        }
        match &self.evidence {
            Evidence::Traffic(traffic) => traffic.fmt(f)?,
            Evidence::Watched(watched) => watched.fmt(f)?,
        }
        for failure in &failures {
            writeln!(f, "FAILED      {failure}")?;
        }
        let result = match &self.evidence {
            _ if !failures.is_empty() => "FAILED",
            Evidence::Traffic(_) => "the guest survived, and its client noticed no more than a pause",
            Evidence::Watched(Watched { looked_for: LookedFor::Ready(Ready::Port(_), _), .. }) => {
                "the guest survived, and so did its connection and its service"
            }
            Evidence::Watched(_) => "the guest survived, as far as its execution shows",
        };
        write!(f, "result      {result}")
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client = &self.client;
        writeln!(
            f,
            "blackout    {:.0} ms (longest pause before the kill: {:.0} ms)",
            self.gaps.after_ms, self.gaps.before_ms
        )?;
        writeln!(
            f,
            "requests    {} on one TCP connection, {} of them answered before the kill; {:.0}/s, median {:.1} ms",
            client.samples.len(),
            self.answered_before,
            client.replies_per_s,
            client.p50_ms
        )?;
        let (lost, repeated, misplaced) =
            (client.lost.len(), client.repeated.len(), client.out_of_order.len());
        writeln!(f, "lost / repeated / out of order   {lost} / {repeated} / {misplaced}")?;
        if let Ok(missing) = &self.missing {
            writeln!(
                f,
                "service     lacks {} of {} acknowledged keys",
                missing.len(),
                client.acknowledged.len()
            )?;
        }
        match &self.disk {
            Some(Ok(disk)) => writeln!(
                f,
                "disk        has {} writes, each once and in order; lacks {} of {} acknowledged keys",
                disk.writes,
                disk.missing.len(),
                client.acknowledged.len()
            )?,
            Some(Err(_)) => {}
            None => writeln!(f, "disk        not looked at: it is on the other machines")?,
        }
        if let Some(rate) = self.log_bytes_per_s {
            writeln!(f, "log         {rate:.0} bytes/s under this traffic")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::Duration;

    use super::*;
    use crate::client::Sample;

    const MS: Duration = Duration::from_millis(1);

    fn samples(replied_ms: &[u32]) -> Vec<Sample> {
        let sample =
            |(number, ms): (u64, &u32)| Sample { number, sent: Duration::ZERO, replied: Some(*ms * MS) };
        (1..).zip(replied_ms).map(sample).collect()
    }

    fn traffic() -> Traffic {
        let client = client::Report {
            samples: samples(&[10, 20, 300]),
            lost: Vec::new(),
            repeated: Vec::new(),
            out_of_order: Vec::new(),
            wrong: Vec::new(),
            broken: None,
            blackout_ms: 280.0,
            p50_ms: 1.0,
            p99_ms: 1.0,
            replies_per_s: 10.0,
            acknowledged: BTreeMap::from([("a".into(), "x".into())]),
            unacknowledged: BTreeMap::new(),
        };
        Traffic {
            gaps: Gaps::of(&client.samples, 100 * MS),
            client,
            answered_before: 2,
            log_bytes_per_s: Some(5000.0),
            missing: Ok(Vec::new()),
            disk: Some(Ok(DiskVerdict { writes: 3, missing: Vec::new() })),
        }
    }

    fn report(evidence: Evidence) -> Report {
        Report {
            hosts: "two hosts".into(),
            guest: "a guest".into(),
            killed: "host 1".into(),
            backups: 1,
            successor: Some("host 2".into()),
            takeover_ms: Some(100),
            evidence,
        }
    }

    fn spoilt(spoil: impl FnOnce(&mut Traffic)) -> Report {
        let mut traffic = traffic();
        spoil(&mut traffic);
        report(Evidence::Traffic(Box::new(traffic)))
    }

    #[test]
    fn blackout_is_the_gap_that_the_kill_made() {
        let gaps = Gaps::of(&samples(&[0, 500, 510, 520, 800, 810]), 515 * MS);
        assert_eq!(gaps, Gaps { after_ms: 280.0, before_ms: 500.0 });
        assert_eq!(Gaps::of(&[], MS), Gaps { after_ms: 0.0, before_ms: 0.0 });
    }

    #[test]
    fn clean_run_is_a_success() {
        let report = spoilt(|_| {});
        assert_eq!(report.failures(), Vec::<String>::new());
        let text = report.to_string();
        assert!(text.contains("blackout    280 ms") && text.contains("0 / 0 / 0"), "{text}");
        assert!(text.ends_with("no more than a pause") && !text.contains("FAILED"), "{text}");
    }

    #[test]
    fn anything_that_is_not_right_is_a_failure() {
        let no_successor = Report { successor: None, ..spoilt(|_| {}) };
        let spoilt = [
            no_successor,
            spoilt(|traffic| traffic.client.lost = vec![3]),
            spoilt(|traffic| traffic.client.repeated = vec![2]),
            spoilt(|traffic| traffic.client.out_of_order = vec![2]),
            spoilt(|traffic| traffic.client.wrong = vec!["OK 1 7".into()]),
            spoilt(|traffic| traffic.client.broken = Some("reset".into())),
            spoilt(|traffic| traffic.answered_before = 3),
            spoilt(|traffic| traffic.log_bytes_per_s = None),
            spoilt(|traffic| traffic.missing = Ok(vec!["a must be x".into()])),
            spoilt(|traffic| traffic.missing = Err("reset".into())),
            spoilt(|traffic| traffic.disk = Some(Ok(DiskVerdict { writes: 0, missing: vec!["a".into()] }))),
            spoilt(|traffic| traffic.disk = Some(Err("no log".into()))),
        ];
        for report in spoilt {
            assert_eq!(report.failures().len(), 1, "{report}");
            assert!(report.to_string().ends_with("FAILED"), "{report}");
        }
    }

    const ANSWERED: Connections =
        Connections { before: Seen::Answered, kept: Seen::Answered, fresh: Seen::Answered };

    fn port() -> LookedFor {
        LookedFor::Ready(Ready::Port(std::num::NonZeroU16::MIN), Duration::from_secs(61))
    }

    fn watched(
        looked_for: LookedFor,
        moved: Result<(u64, u64), String>,
        seen: Option<Connections>,
    ) -> Report {
        let after = Some(After { moved, connections: seen });
        report(Evidence::Watched(Watched { looked_for, after }))
    }

    #[test]
    fn guest_with_a_port_is_judged_by_its_connections() {
        let judged = |connections| watched(port(), Ok((7, 9)), Some(connections));
        let clean = judged(ANSWERED);
        assert_eq!(clean.failures(), Vec::<String>::new());
        let text = clean.to_string();
        for said in ["looked for  TCP port 1, ready after 61 s", "opened before the kill: open", "7, then 9"]
        {
            assert!(text.contains(said), "{said}: {text}");
        }
        assert!(text.ends_with("and so did its connection and its service"), "{text}");

        let broken = || Seen::Broken("reset".into());
        for connections in [
            Connections { kept: broken(), ..ANSWERED },
            Connections { fresh: broken(), ..ANSWERED },
            Connections { kept: Seen::Silent, ..ANSWERED },
            Connections { fresh: Seen::Silent, ..ANSWERED },
            Connections { before: Seen::Silent, kept: broken(), fresh: Seen::Silent },
        ] {
            let report = judged(connections);
            assert_eq!(report.failures().len(), 1, "{report}");
            assert!(report.to_string().ends_with("FAILED"), "{report}");
        }
        // What it did not do before the kill it need not do after.
        let silent = Connections { before: Seen::Silent, kept: Seen::Silent, fresh: Seen::Silent };
        assert!(judged(silent.clone()).failures().is_empty());
        assert!(judged(silent).to_string().contains("before the kill: not reset"));
    }

    #[test]
    fn guest_that_does_not_move_has_not_survived() {
        let text = || LookedFor::Ready(Ready::Text("login:".into()), Duration::from_secs(3));
        assert!(watched(text(), Ok((7, 9)), None).failures().is_empty());
        for looked_for in [text(), port()] {
            let connections = matches!(looked_for, LookedFor::Ready(Ready::Port(_), _)).then_some(ANSWERED);
            let report = watched(looked_for, Err("its position was 7 for 30 s".into()), connections);
            assert_eq!(report.failures().len(), 1, "{report}");
            assert!(report.to_string().contains("FAILED      The guest does not move"), "{report}");
        }
    }

    #[test]
    fn report_says_what_was_not_looked_at() {
        let nothing =
            |service_expected| LookedFor::Nothing { why: "no one answers".into(), service_expected };
        let unnamed = watched(nothing(false), Ok((7, 9)), None);
        assert!(unnamed.failures().is_empty(), "{unnamed}");
        let text = unnamed.to_string();
        assert!(text.contains("looked for  nothing") && text.contains("not judged"), "{text}");
        assert!(text.ends_with("as far as its execution shows"), "{text}");
        // The default guest must have its service.
        assert_eq!(watched(nothing(true), Ok((7, 9)), None).failures().len(), 1);
    }

    #[test]
    fn lost_backups_are_told() {
        let mut report = watched(port(), Ok((7, 9)), Some(ANSWERED));
        assert!(!report.to_string().contains("\nbackups"));
        report.backups = 2;
        assert!(report.to_string().contains("\nbackups     2"));
    }

    #[test]
    fn nobody_who_takes_over_is_one_failure() {
        let evidence = Evidence::Watched(Watched { looked_for: port(), after: None });
        let report = Report { successor: None, ..report(evidence) };
        assert_eq!(report.failures(), ["No host took over."]);
        assert!(report.to_string().ends_with("FAILED"));
    }
}
