//! What becomes of a backup whose link has ended: the takeover, from the last message of the primary to the image.
//!
//! Owns: the order of these steps, and the repetition of each. Must never: claim before `pair/protocol` says so, let a guest
//! continue before all steps are done, or wait for the log, the console or the storage on the way to the claim.
//!
//! ```text
//!   link ended
//!      │
//!      ▼          stopped, dismissed, retired ─────────────────────────────> Stopped
//!   Judge ────────the guest has ended ─────────────────────────────────────> LifeOver
//!    │  ^ └───────the claim is lost ───────────────────────────────────────> Lost
//!    │  └──────────── the primary may still be silent: wait until that is over, or no answer to the claim
//!    ├─ to be claimed ──> Look ── the image is another's ──────────────────> Barred (nothing is claimed)
//!    │                     └─ it is the primary's, or nobody says ──> Claim ──> Judge
//!    └─ won ──> Fence ─┬─ stopped ─────────────────────────────────────────> NotLive
//!                      └─ done, or not needed ──> Take ─┬─ another's, stopped ──> NotLive
//!                                                       └─ taken ──────────> Won
//! ```
//! Threads: runs on `log-receiver`; `claim` and `image` are tried on threads of their own, since they may hang. Locks: none.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;

use super::inflow::{Inflow, Left, LinkEnd};
use crate::change;
use crate::control::{Monitor, Standing, protocol as control};
use crate::host::owner::Ownership;
use crate::host::spawn;
use crate::pair::claims::claimant::Claimant;
use crate::pair::claims::fence::{Fence, Occasion};
use crate::pair::claims::image_owner::SharedImage;
use crate::pair::liveness::heartbeat::Heartbeats;
use crate::pair::protocol::{Backup, Next, Verdict};
use crate::run::{StopSignal, VcpuHandle};

/// Pause between two attempts to take the image.
const AGAIN: Duration = Duration::from_millis(200);

/// What became of a backup.
pub(super) enum Ended {
    /// The guest is this monitor's in `view`, and so is its image.
    Won {
        /// The view that was claimed.
        view: u64,
        /// The image, if it is a file that the guest may write.
        owned: Option<Ownership>,
        /// When it was noticed that a takeover is needed.
        noticed: Instant,
    },
    /// The guest is this monitor's in `view`, and does not run.
    NotLive {
        /// The view that was claimed.
        view: u64,
        /// Why.
        why: Barred,
    },
    /// Nothing was claimed, because the disk image is not the primary's any more.
    Barred(String),
    /// The guest is another's, and why.
    Lost(String),
    /// The guest's life is over.
    LifeOver,
    /// The operator stopped this monitor or had it let go, or it left by itself. Nothing was claimed.
    Stopped,
}

/// Why a guest does not go live though its view was won.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Barred {
    /// The operator stopped this monitor while it waited for this.
    Stopped(&'static str),
    /// The image is not the guest's, and why.
    Image(String),
}

/// Where a takeover is.
enum Step {
    Judge,
    Look { view: u64 },
    Claim { view: u64 },
    Fence { view: u64 },
    Take { view: u64 },
    Done(Ended),
}

/// A backup's takeover, should there be reason for one.
pub(super) struct Takeover {
    /// Where the log came from, and the protocol's machine.
    pub(super) inflow: Arc<Inflow>,
    /// Tell for how long the primary has been silent.
    pub(super) heartbeats: Arc<Heartbeats>,
    /// Asks the arbiter.
    pub(super) claimant: Claimant,
    /// What the guest needs besides the claim.
    pub(super) preparation: Preparation,
    /// What an operator sees.
    pub(super) monitor: Arc<Monitor>,
    /// The guest's thread, which has to stop if the guest is another's.
    pub(super) vcpu: VcpuHandle,
}

impl Takeover {
    /// Runs it; `end` is how the link ended.
    pub(super) fn run(mut self, end: &LinkEnd) -> Ended {
        let noticed = Instant::now();
        // An answer from here would let the primary act on; whoever claims is silent first.
        self.heartbeats.fall_silent();
        self.say(end);
        let (mut step, mut looked) = (Step::Judge, false);
        loop {
            step = match step {
                Step::Judge => self.judge(noticed, looked),
                Step::Look { view } => {
                    // Only before the first attempt: one that is made takes the guest from a primary that may still live.
                    looked = true;
                    self.look(view)
                }
                Step::Claim { view } => {
                    let answer = self.claimant.ask(view, None);
                    self.inflow.protocol(|backup| backup.claim_says(answer));
                    Step::Judge
                }
                Step::Fence { view } => match self.preparation.fence(end) {
                    Ok(()) => Step::Take { view },
                    Err(why) => Step::Done(Ended::NotLive { view, why }),
                },
                Step::Take { view } => Step::Done(match self.preparation.take() {
                    Ok(owned) => Ended::Won { view, owned, noticed },
                    Err(why) => Ended::NotLive { view, why },
                }),
                Step::Done(ended) => return self.conclude(ended),
            }
        }
    }

    fn say(&self, end: &LinkEnd) {
        let view = self.inflow.protocol(|backup| backup.view());
        let standing = |role, cause| Standing { role, view, protected: false, cause };
        match (end, self.next()) {
            (LinkEnd::Lost { why, .. }, Next::Wait | Next::Claim { .. }) => {
                let standing = standing(control::Role::Backup, why.clone());
                change!(warn, self.monitor, PrimaryLost, standing, "primary lost");
            }
            (LinkEnd::Dismissed, _) => {
                let standing = standing(control::Role::None, "the operator of the primary wants it".into());
                change!(
                    info,
                    self.monitor,
                    Dismissed,
                    standing,
                    "dismissed: the primary continues without this backup"
                );
            }
            _ => {}
        }
    }

    fn next(&self) -> Next {
        let (silent_for, cut_off) = (self.heartbeats.silent_for(), self.heartbeats.is_cut_off());
        let stopped = self.preparation.stop.is_set();
        self.inflow.protocol(|backup| backup.next(silent_for, cut_off, stopped))
    }

    fn judge(&self, noticed: Instant, looked: bool) -> Step {
        match self.next() {
            Next::Wait => {
                let (silent_for, cut_off) = (self.heartbeats.silent_for(), self.heartbeats.is_cut_off());
                let time = self.inflow.protocol(|backup| backup.look_again_after(silent_for, cut_off));
                self.inflow.wait(&self.preparation.stop, time);
                Step::Judge
            }
            Next::Claim { view } if looked => Step::Claim { view },
            Next::Claim { view } => Step::Look { view },
            Next::Done(Verdict::GuestEnded) => Step::Done(Ended::LifeOver),
            Next::Done(Verdict::Stopped) => Step::Done(Ended::Stopped),
            Next::Done(Verdict::Lost) => Step::Done(Ended::Lost(self.claimant.why_lost())),
            Next::Done(Verdict::Won) => {
                tracing::debug!(after_ms = noticed.elapsed().as_millis() as u64, "the claim is won");
                Step::Fence { view: self.inflow.protocol(|backup| backup.view()) + 1 }
            }
        }
    }

    fn look(&self, view: u64) -> Step {
        match self.preparation.objection() {
            None => Step::Claim { view },
            Some(why) => {
                self.inflow.protocol(Backup::retire);
                Step::Done(Ended::Barred(why))
            }
        }
    }

    fn conclude(&self, ended: Ended) -> Ended {
        if matches!(ended, Ended::Lost(_) | Ended::NotLive { .. } | Ended::Barred(_)) {
            // The guest may be far behind, or nowhere that leads back.
            self.inflow.abandon();
            self.vcpu.kick();
        }
        ended
    }
}

/// What makes sure, once a claim is won, that the old primary can do no harm, and that the image is ours.
pub(super) struct Preparation {
    /// `--fence-cmd`.
    pub(super) fence: Option<Fence>,
    /// What it is told.
    pub(super) occasion: Occasion,
    /// The image with which this backup was accepted.
    pub(super) image: Option<SharedImage>,
    /// What the image's record will say.
    pub(super) record: String,
    /// How long a claim waits for the storage to say whether the image is still the primary's. Taking it asks again.
    pub(super) look_timeout: Duration,
    /// The operator's stop.
    pub(super) stop: Arc<StopSignal>,
}

impl Preparation {
    /// Why this backup must not claim the guest: its image is certainly not the primary's any more. The claim does not
    /// wait for storage that does not answer.
    fn objection(&self) -> Option<String> {
        let image = self.image.clone()?;
        let (answer, answered) = bounded(1);
        let look = move || {
            // Nobody waits for a late answer.
            let _ = answer.send(image.fault().map(|error| image.in_words(&error)));
        };
        spawn("image", look).ok()?;
        answered.recv_timeout(self.look_timeout).ok().flatten()
    }

    /// Fences the primary, unless it is at rest.
    fn fence(&mut self, end: &LinkEnd) -> Result<(), Barred> {
        let LinkEnd::Lost { why, primary } = end else { return Ok(()) };
        let Some(fence) = self.fence.as_ref().filter(|_| *primary != Left::AtRest) else { return Ok(()) };
        self.occasion.reason.clone_from(why);
        if fence.until_done(&self.occasion, &self.stop) {
            Ok(())
        } else {
            Err(Barred::Stopped("--fence-cmd"))
        }
    }

    /// Takes the image.
    fn take(&self) -> Result<Option<Ownership>, Barred> {
        let Some(image) = &self.image else { return Ok(None) };
        let mut said = false;
        loop {
            match image.take(&self.record) {
                Ok(owned) => return Ok(Some(owned)),
                Err(error) if error.is_certain() => return Err(Barred::Image(image.in_words(&error))),
                Err(error) if !std::mem::replace(&mut said, true) => tracing::error!(
                    owner = %image.owner_path().display(),
                    "the disk image cannot be taken, so the guest waits; trying again: {error}"
                ),
                Err(_) => {}
            }
            if self.stop.wait(AGAIN) {
                return Err(Barred::Stopped("its disk image"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use tempfile::TempDir;

    use super::*;
    use crate::host::disk::{Caching, Disk};
    use crate::host::owner::Owned;
    use crate::pair::claims::image_owner::image_to_write;
    use crate::pair::claims::image_owner::testing::claim;
    use crate::run::StopKind;

    /// A primary with an image, and a backup that it has accepted.
    struct Case {
        directory: TempDir,
        primary: Ownership,
        preparation: Preparation,
    }

    impl Case {
        /// The backup has the image as `name`, which `link` makes of its path.
        fn new(name: &str, link: impl FnOnce(&Path, &Path)) -> Self {
            let directory = TempDir::new().unwrap();
            let path = directory.path().join("web.img");
            fs::write(&path, [0; 512]).unwrap();
            let disk = |path: &Path| Disk::open_unlocked(path, false, Caching::Host).unwrap();
            let image = image_to_write(Some(&disk(&path))).unwrap().unwrap();
            let primary = Ownership::take(&image, claim("web", 1, 1).as_bytes(), None).unwrap();
            let named = directory.path().join(name);
            link(&path, &named);
            let (image, _, mark) = SharedImage::find(&disk(&named)).unwrap().unwrap();
            drop(mark);
            let occasion = Occasion {
                guest: "web".into(),
                view: 3,
                peer_host: "alpha".into(),
                peer_address: [192, 0, 2, 1].into(),
                reason: String::new(),
            };
            let (record, stop) = (claim("web", 3, 2), Arc::default());
            let look_timeout = Duration::from_secs(60);
            let preparation =
                Preparation { fence: None, occasion, image: Some(image), record, look_timeout, stop };
            Self { directory, primary, preparation }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().canonicalize().unwrap().join(name)
        }

        /// Fails unless nothing is claimed, and nothing taken after a claim all the same, because of `why`.
        fn assert_barred(self, why: &str) {
            let record = || fs::read(self.directory.path().join("web.img.vmft-owner")).ok();
            let before = record();
            let objection = self.preparation.objection().unwrap();
            assert!(objection.contains(why), "{objection}");
            let Err(Barred::Image(barred)) = self.preparation.take() else {
                panic!("the image was taken, or waited for");
            };
            assert_eq!((barred, record()), (objection, before));
        }
    }

    fn same(_: &Path, _: &Path) {}

    #[test]
    fn the_image_of_the_join_is_taken_through_a_link_too() {
        let symlink = |path: &Path, link: &Path| std::os::unix::fs::symlink(path, link).unwrap();
        for case in [Case::new("web.img", same), Case::new("link.img", symlink)] {
            assert_eq!(case.preparation.objection(), None);
            let Ok(Some(owned)) = case.preparation.take() else {
                panic!("not taken");
            };
            assert!(matches!((case.primary.ask(), owned.ask()), (Owned::No, Owned::Yes)));
        }
    }

    #[test]
    fn an_image_whose_record_was_removed_is_not_taken() {
        let case = Case::new("web.img", same);
        fs::remove_file(case.path("web.img.vmft-owner")).unwrap();
        case.assert_barred("has another owner than before: it has no record of an owner");
    }

    #[test]
    fn an_image_that_another_has_taken_since_is_not_taken() {
        for (guest, view, number) in [("mail", 1, 9), ("web", 2, 9)] {
            let case = Case::new("web.img", same);
            let record = claim(guest, view, number);
            fs::write(case.path("new"), &record).unwrap();
            fs::rename(case.path("new"), case.path("web.img.vmft-owner")).unwrap();
            assert!(matches!(case.primary.ask(), Owned::No));
            case.assert_barred(&format!(
                "its owner is guest '{guest}' of host alpha (process 17, view {view})"
            ));
        }
    }

    #[test]
    fn an_image_that_was_replaced_since_is_not_taken() {
        let case = Case::new("web.img", same);
        fs::copy(case.path("web.img"), case.path("copy.img")).unwrap();
        fs::rename(case.path("copy.img"), case.path("web.img")).unwrap();
        case.assert_barred("was replaced or removed");
        // The link leads to another file; the image that was opened is taken.
        let symlink = |path: &Path, link: &Path| std::os::unix::fs::symlink(path, link).unwrap();
        let case = Case::new("link.img", symlink);
        fs::copy(case.path("web.img"), case.path("copy.img")).unwrap();
        fs::remove_file(case.path("link.img")).unwrap();
        std::os::unix::fs::symlink(case.path("copy.img"), case.path("link.img")).unwrap();
        assert_eq!(case.preparation.objection(), None);
        assert!(matches!(case.preparation.take(), Ok(Some(_))));
    }

    #[test]
    fn an_image_that_has_got_another_name_is_not_taken() {
        let case = Case::new("web.img", same);
        fs::hard_link(case.path("web.img"), case.path("hard.img")).unwrap();
        case.assert_barred("has 2 names (hard links)");
    }

    #[test]
    fn storage_that_does_not_tell_is_no_reason_against_a_claim() {
        let case = Case::new("web.img", same);
        // As if it were not mounted.
        fs::rename(case.path("web.img"), case.path("away.img")).unwrap();
        assert_eq!(case.preparation.objection(), None);
        case.preparation.stop.set(StopKind::Leave);
        let waited = case.preparation.take();
        assert!(matches!(waited, Err(Barred::Stopped("its disk image"))));
    }
}
