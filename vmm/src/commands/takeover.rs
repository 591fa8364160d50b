//! Between the claim and the guest: what makes sure that the old primary can do no harm, and that the image is ours.
//!
//! Owns: the order of these steps, and their repetition. Must never: let a guest go on before all of them are done.
//!
//! ```text
//!   primary: claim won ──────────────────────> image taken ──> the guest runs
//!   backup:  claim won ──> --fence-cmd said 0 ──> image taken ──> the guest goes on
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::pair::{PairError, Side};
use crate::ft::backup::Left;
use crate::ft::claim::read_record;
use crate::ft::fence::{Fence, Occasion};
use crate::host::owner::{self, Ownership};
use crate::outlet::Resources;

/// Pause between two attempts to take the image.
const AGAIN: Duration = Duration::from_millis(200);

/// What a backup does once it has won.
pub(super) struct Takeover {
    fence: Option<Fence>,
    occasion: Occasion,
    image: Option<PathBuf>,
    record: String,
    stop: Arc<AtomicBool>,
}

impl Takeover {
    /// For the view and the peer of `occasion`.
    pub(super) fn new(side: &Side, occasion: Occasion, image: Option<&Path>, stop: Arc<AtomicBool>) -> Self {
        let record = side.claims.record(occasion.view, &side.owner);
        Self { fence: side.fence.clone(), occasion, image: image.map(Path::to_owned), record, stop }
    }

    /// Fences the `primary` that was lost for the reason `why`, unless it is at rest, and takes the image. Err: the
    /// operator stopped this monitor while it waited for what is named.
    pub(super) fn prepare(mut self, why: &str, primary: Left) -> Result<Option<Ownership>, &'static str> {
        let stopped = || self.stop.load(Ordering::Relaxed);
        if let Some(fence) = self.fence.as_ref().filter(|_| primary != Left::AtRest) {
            self.occasion.reason = why.to_owned();
            if !fence.until_done(&self.occasion, stopped) {
                return Err("--fence-cmd");
            }
        }
        let Some(image) = &self.image else { return Ok(None) };
        let mut said = false;
        loop {
            match Ownership::take(image, self.record.as_bytes()) {
                Ok(owned) => return Ok(owned),
                Err(error) if !std::mem::replace(&mut said, true) => tracing::error!(
                    owner = %owner::path_of(image).display(),
                    "the disk image cannot be taken, so the guest waits; trying again: {error}"
                ),
                Err(_) => {}
            }
            if stopped() {
                return Err("its disk image");
            }
            std::thread::sleep(AGAIN);
        }
    }
}

/// Refuses an image that another guest, or another life of this one, has not given back.
pub(super) fn check_image(image: &Path, guest: &str, view: u64) -> Result<(), PairError> {
    let record = owner::path_of(image);
    let found = owner::read(image);
    let Some(found) = found.map_err(|source| PairError::ImageOwner { record: record.clone(), source })?
    else {
        return Ok(());
    };
    match read_record(&found) {
        Ok(found) if found.guest == guest && found.view < view => Ok(()),
        Ok(found) => Err(PairError::ImageOwned {
            image: image.to_owned(),
            record,
            guest: found.guest,
            view: found.view,
            holder: Box::new(found.owner),
        }),
        Err(why) => Err(PairError::ImageOwnerDamaged { record, why }),
    }
}

/// Takes the image for a guest that is started, in a view that was won. If that fails, the view has ended.
pub(super) fn take_disk(
    side: &Side,
    view: u64,
    image: Option<&Path>,
    resources: &mut Resources,
) -> Result<(), PairError> {
    let Some((image, disk)) = image.zip(resources.disk.as_mut()) else { return Ok(()) };
    match Ownership::take(image, side.claims.record(view, &side.owner).as_bytes()) {
        Ok(owned) => {
            owned.into_iter().for_each(|owned| disk.own(owned));
            Ok(())
        }
        Err(source) => {
            // Nobody has run the guest in it, and nobody will.
            side.claims.end(view, &side.owner)?;
            Err(PairError::ImageOwner { record: owner::path_of(image), source })
        }
    }
}
