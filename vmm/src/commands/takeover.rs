//! Between the claim and the guest: what makes sure that the old primary can do no harm, and that the image is ours.
//!
//! Owns: the order of these steps, and their repetition. Must never: let a guest go on before all of them are done.
//!
//! ```text
//!   primary: claim won ──────────────────────> image taken ──> the guest runs
//!   backup:  claim won ──> --fence-cmd said 0 ──> image taken ──> the guest goes on
//! ```

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::bounded;

use super::pair::{PairError, Side};
use crate::ft::backup::Left;
use crate::ft::claim::{Claims, Record, read_record};
use crate::ft::fence::{Fence, Occasion};
use crate::ft::image::{introduce, owner_in_words};
use crate::host::disk::Disk;
use crate::host::image::{Image, Mark};
use crate::host::owner::{self, Ownership, TakeError};
use crate::host::spawn;
use crate::outlet::Resources;

/// Pause between two attempts to take the image.
const AGAIN: Duration = Duration::from_millis(200);

/// The disk image with which a backup was accepted.
#[derive(Clone)]
pub(super) struct SharedImage {
    image: Arc<Image>,
    /// The record of its owner: the primary, unless it refuses this backup.
    owner: Option<Arc<[u8]>>,
}

impl SharedImage {
    /// The image of `disk`, and what a primary is told of it. The mark has to stay until the primary has answered.
    pub(super) fn find(disk: &Disk) -> Result<Option<(Self, ft_log::HelloImage, Option<Mark>)>, PairError> {
        let Some(image) = disk.image()? else { return Ok(None) };
        let owner = owner::read(&image).map_err(PairError::Take)?;
        let (introduction, mark) = introduce(&image, owner.as_deref());
        let shared = Self { image: Arc::new(image), owner: owner.map(Arc::from) };
        Ok(Some((shared, introduction, mark)))
    }

    /// What is wrong with the image for certain, as far as the storage says.
    fn fault(&self) -> Option<TakeError> {
        if let Err(error) = self.image.check() {
            return error.is_certain().then_some(error.into());
        }
        let found = owner::read(&self.image).ok()?;
        (found.as_deref() != self.owner.as_deref()).then_some(TakeError::Other { found })
    }

    fn in_words(&self, error: &TakeError) -> String {
        in_words(&self.image, error)
    }
}

/// Why an image is not taken.
fn in_words(image: &Image, error: &TakeError) -> String {
    match error {
        TakeError::Other { found } => format!(
            "disk image '{}' has another owner than before: {}",
            image.path().display(),
            owner_in_words(found.as_deref())
        ),
        other => other.to_string(),
    }
}

/// Why a guest does not go live though its view was won.
pub(super) enum Barred {
    /// The operator stopped this monitor while it waited for this.
    Stopped(&'static str),
    /// The image is not the guest's, and why.
    Image(String),
}

/// What a backup does once it has won.
pub(super) struct Takeover {
    fence: Option<Fence>,
    occasion: Occasion,
    image: Option<SharedImage>,
    record: String,
    /// How long a claim waits for the storage to say whether the image is still the primary's. `prepare` asks again.
    look_timeout: Duration,
    stop: Arc<AtomicBool>,
}

impl Takeover {
    /// For the view and the peer of `occasion`.
    pub(super) fn new(
        side: &Side,
        occasion: Occasion,
        image: Option<SharedImage>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let record = side.claims.record(occasion.view, &side.owner);
        let look_timeout = side.timing.timeout / 2;
        Self { fence: side.fence.clone(), occasion, image, record, look_timeout, stop }
    }

    /// Why this backup must not claim the guest: its image is certainly not the primary's any more. The claim does not
    /// wait for storage that does not answer.
    pub(super) fn objection(&self) -> Option<String> {
        let image = self.image.clone()?;
        let (answer, answered) = bounded(1);
        let look = move || {
            // Nobody waits for a late answer.
            let _ = answer.send(image.fault().map(|error| image.in_words(&error)));
        };
        spawn("image", look).ok()?;
        answered.recv_timeout(self.look_timeout).ok().flatten()
    }

    /// Fences the `primary` that was lost for the reason `why`, unless it is at rest, and takes the image.
    pub(super) fn prepare(mut self, why: &str, primary: Left) -> Result<Option<Ownership>, Barred> {
        let stopped = || self.stop.load(Ordering::Relaxed);
        if let Some(fence) = self.fence.as_ref().filter(|_| primary != Left::AtRest) {
            self.occasion.reason = why.to_owned();
            if !fence.until_done(&self.occasion, stopped) {
                return Err(Barred::Stopped("--fence-cmd"));
            }
        }
        let Some(shared) = &self.image else { return Ok(None) };
        let mut said = false;
        loop {
            match Ownership::take(&shared.image, self.record.as_bytes(), shared.owner.as_deref()) {
                Ok(owned) => return Ok(Some(owned)),
                Err(error) if error.is_certain() => return Err(Barred::Image(shared.in_words(&error))),
                Err(error) if !std::mem::replace(&mut said, true) => tracing::error!(
                    owner = %owner::path_of(shared.image.path()).display(),
                    "the disk image cannot be taken, so the guest waits; trying again: {error}"
                ),
                Err(_) => {}
            }
            if stopped() {
                return Err(Barred::Stopped("its disk image"));
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// The record that the image for a guest that is started has now; `None`: none. Refuses an image that another guest, or
/// another life of this one, has not given back.
pub(super) fn check_image(
    path: &Path,
    claims: &Claims,
    guest: &str,
    view: u64,
) -> Result<Option<Vec<u8>>, PairError> {
    let (found, place) = owner::find(path).map_err(PairError::Take)?;
    let Some(record) = found else { return Ok(None) };
    let owner = match read_record(&record) {
        Ok(owner) => owner,
        Err(why) => return Err(PairError::ImageOwnerDamaged { record: place, why }),
    };
    if owner.guest == guest && owner.view < view && is_of(claims, &owner)? {
        return Ok(Some(record));
    }
    Err(PairError::ImageOwned {
        image: path.to_owned(),
        record: place,
        guest: owner.guest,
        view: owner.view,
        holder: Box::new(owner.owner),
    })
}

/// Did `owner` take its image in a view that it has claimed at this arbiter? A guest at another one may have the same name,
/// and run.
fn is_of(claims: &Claims, owner: &Record) -> Result<bool, PairError> {
    let claim = claims.read(owner.view)?;
    Ok(claim.is_some_and(|claim| claim.owner.uuid == owner.owner.uuid))
}

/// The image of a guest that is started, which it may write, found fit.
pub(super) fn image_to_write(disk: Option<&Disk>) -> Result<Option<Arc<Image>>, PairError> {
    let Some(disk) = disk.filter(|disk| !disk.read_only()) else { return Ok(None) };
    let Some(image) = disk.image()? else { return Ok(None) };
    image.check()?;
    Ok(Some(Arc::new(image)))
}

/// Takes the image for a guest that is started, in a view that was won, from who had it `former`ly. If that fails, the view
/// has ended.
pub(super) fn take_disk(
    side: &Side,
    view: u64,
    image: Option<Arc<Image>>,
    former: Option<&[u8]>,
    resources: &mut Resources,
) -> Result<(), PairError> {
    let Some((image, disk)) = image.zip(resources.disk.as_mut()) else { return Ok(()) };
    match Ownership::take(&image, side.claims.record(view, &side.owner).as_bytes(), former) {
        Ok(owned) => {
            disk.own(owned);
            Ok(())
        }
        Err(error) => {
            // Nobody has run the guest in it, and nobody will.
            side.claims.end(view, &side.owner)?;
            Err(PairError::NotTaken(in_words(&image, &error)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;
    use crate::config::EtcdArgs;
    use crate::ft::arbiter::ArbiterSpec;
    use crate::ft::claim::{ClaimRole, Owner, write_record};
    use crate::host::disk::Caching;
    use crate::host::owner::Owned;

    fn claim(guest: &str, view: u64, number: u8) -> String {
        let owner = owner(number);
        write_record(&Record { guest: guest.into(), view, owner, backup: None })
    }

    fn owner(number: u8) -> Owner {
        Owner { host: "alpha".into(), pid: 17, uuid: [number; 16], role: ClaimRole::Primary }
    }

    /// A primary with an image, and a backup that it has accepted.
    struct Case {
        directory: TempDir,
        primary: Ownership,
        takeover: Takeover,
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
            let takeover = Takeover { fence: None, occasion, image: Some(image), record, look_timeout, stop };
            Self { directory, primary, takeover }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().canonicalize().unwrap().join(name)
        }

        /// Fails unless nothing is claimed, and nothing taken after a claim all the same, because of `why`.
        fn assert_barred(self, why: &str) {
            let record = || fs::read(self.directory.path().join("web.img.vmft-owner")).ok();
            let before = record();
            let objection = self.takeover.objection().unwrap();
            assert!(objection.contains(why), "{objection}");
            let Err(Barred::Image(barred)) = self.takeover.prepare("it was lost", Left::Unsure) else {
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
            assert_eq!(case.takeover.objection(), None);
            let Ok(Some(owned)) = case.takeover.prepare("it was lost", Left::Unsure) else {
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
        assert_eq!(case.takeover.objection(), None);
        assert!(matches!(case.takeover.prepare("it was lost", Left::Unsure), Ok(Some(_))));
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
        assert_eq!(case.takeover.objection(), None);
        case.takeover.stop.store(true, Ordering::Relaxed);
        let waited = case.takeover.prepare("it was lost", Left::Unsure);
        assert!(matches!(waited, Err(Barred::Stopped("its disk image"))));
    }

    #[test]
    fn a_guest_is_started_with_an_image_that_nobody_has() {
        let (directory, arbiter) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let spec = ArbiterSpec::Directory(arbiter.path().to_owned());
        let claims = Claims::open(&spec, &EtcdArgs::default(), "web").unwrap();
        claims.claim(1, &owner(1), None).unwrap();
        claims.end(1, &owner(1)).unwrap();
        let path = directory.path().join("web.img");
        fs::write(&path, [0; 512]).unwrap();
        let link = directory.path().join("link.img");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let check = || check_image(&link, &claims, "web", 3);
        assert_eq!(check().unwrap(), None);
        assert_eq!(check_image(&directory.path().join("none"), &claims, "web", 3).unwrap(), None);
        let record = directory.path().join("web.img.vmft-owner");
        // Its own, of a view that has ended.
        let own = claim("web", 1, 1);
        fs::write(&record, &own).unwrap();
        assert_eq!(check().unwrap(), Some(own.into_bytes()));
        // Another guest's; its own at another arbiter; its own in a view that is still to come.
        for found in [claim("mail", 1, 1), claim("web", 1, 9), claim("web", 3, 1)] {
            fs::write(&record, &found).unwrap();
            let refused = check().unwrap_err();
            assert!(matches!(refused, PairError::ImageOwned { .. }), "{refused}");
            assert!(refused.to_string().contains("web.img.vmft-owner"), "{refused}");
        }
        fs::write(&record, "vmft-claim 2\n").unwrap();
        assert!(matches!(check().unwrap_err(), PairError::ImageOwnerDamaged { .. }));
    }
}
