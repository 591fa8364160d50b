//! Taking the disk image: by a guest that is started, and by a backup that takes over.
//!
//! Owns: which record the image must have before it is taken. Must never: take an image from anybody but the owner that it had
//! when this monitor looked at it first.
//! Threads: the callers'. Locks: none.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::claim::{Claims, Owner, Record, read_record};
use super::image_identity::{introduce, owner_in_words};
use crate::host::backends::Resources;
use crate::host::disk::Disk;
use crate::host::image::{Image, Mark};
use crate::host::owner::{self, Ownership, TakeError};
use crate::pair::PairError;

/// The disk image with which a backup was accepted.
#[derive(Clone)]
pub(in crate::pair) struct SharedImage {
    image: Arc<Image>,
    /// The record of its owner: the primary, unless it refuses this backup.
    owner: Option<Arc<[u8]>>,
}

impl SharedImage {
    /// The image of `disk`, and what a primary is told of it. The mark has to stay until the primary has answered.
    pub(in crate::pair) fn find(
        disk: &Disk,
    ) -> Result<Option<(Self, ft_log::HelloImage, Option<Mark>)>, PairError> {
        let Some(image) = disk.image()? else { return Ok(None) };
        let owner = owner::read(&image).map_err(PairError::Take)?;
        let (introduction, mark) = introduce(&image, owner.as_deref());
        let shared = Self { image: Arc::new(image), owner: owner.map(Arc::from) };
        Ok(Some((shared, introduction, mark)))
    }

    /// What is wrong with the image for certain, as far as the storage says.
    pub(in crate::pair) fn fault(&self) -> Option<TakeError> {
        if let Err(error) = self.image.check() {
            return error.is_certain().then_some(error.into());
        }
        let found = owner::read(&self.image).ok()?;
        (found.as_deref() != self.owner.as_deref()).then_some(TakeError::Other { found })
    }

    pub(in crate::pair) fn in_words(&self, error: &TakeError) -> String {
        in_words(&self.image, error)
    }

    /// Where its owner's record lies.
    pub(in crate::pair) fn owner_path(&self) -> PathBuf {
        owner::path_of(self.image.path())
    }

    /// Takes the image from its owner, under `record`.
    pub(in crate::pair) fn take(&self, record: &str) -> Result<Ownership, TakeError> {
        Ownership::take(&self.image, record.as_bytes(), self.owner.as_deref())
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

/// The record that the image for a guest that is started has now; `None`: none. Refuses an image that another guest, or
/// another life of this one, has not given back.
pub(in crate::pair) fn check_image(
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
pub(in crate::pair) fn image_to_write(disk: Option<&Disk>) -> Result<Option<Arc<Image>>, PairError> {
    let Some(disk) = disk.filter(|disk| !disk.read_only()) else { return Ok(None) };
    let Some(image) = disk.image()? else { return Ok(None) };
    image.check()?;
    Ok(Some(Arc::new(image)))
}

/// Takes the image for a guest that is started, in a view that was won, from who had it `former`ly. If that fails, the view
/// has ended.
pub(in crate::pair) fn take_disk(
    (claims, owner): (&Claims, &Owner),
    view: u64,
    image: Option<Arc<Image>>,
    former: Option<&[u8]>,
    resources: &mut Resources,
) -> Result<(), PairError> {
    let Some((image, disk)) = image.zip(resources.disk.as_mut()) else { return Ok(()) };
    match Ownership::take(&image, claims.record(view, owner).as_bytes(), former) {
        Ok(owned) => {
            disk.own(owned);
            Ok(())
        }
        Err(error) => {
            // Nobody has run the guest in it, and nobody will.
            claims.end(view, owner)?;
            Err(PairError::NotTaken(in_words(&image, &error)))
        }
    }
}

#[cfg(test)]
pub(in crate::pair) mod testing {
    use super::*;
    use crate::pair::claims::claim::{ClaimRole, write_record};

    /// The record of a claim by the owner of this number.
    pub fn claim(guest: &str, view: u64, number: u8) -> String {
        let owner = owner(number);
        write_record(&Record { guest: guest.into(), view, owner, backup: None })
    }

    /// One of several.
    pub fn owner(number: u8) -> Owner {
        Owner { host: "alpha".into(), pid: 17, uuid: [number; 16], role: ClaimRole::Primary }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::TempDir;

    use super::testing::{claim, owner};
    use super::*;
    use crate::pair::claims::arbiter::{ArbiterSpec, EtcdFiles};

    #[test]
    fn a_guest_is_started_with_an_image_that_nobody_has() {
        let (directory, arbiter) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let spec = ArbiterSpec::Directory(arbiter.path().to_owned());
        let claims = Claims::open(&spec, &EtcdFiles::default(), "web").unwrap();
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
