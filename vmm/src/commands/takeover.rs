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
/// How long the claim waits for the storage to say whether the image is still the primary's. It says it again after the claim.
const LOOK_TIMEOUT: Duration = Duration::from_millis(100);

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
        Self { fence: side.fence.clone(), occasion, image, record, stop }
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
        answered.recv_timeout(LOOK_TIMEOUT).ok().flatten()
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
