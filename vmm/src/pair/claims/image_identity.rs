//! Whether a backup has the primary's disk image, and not another like it.
//!
//! Owns: what a primary demands of a backup's image, and how owners are called in sentences. Must never: take two images
//! for the same because of their paths, sizes or contents; or be asked by a thread that the guest waits for, since the
//! storage is asked.
//!
//! The backup says which owner's record is beside its image, and which mark it has left there (`host/image.rs`). The
//! record has to be the primary's own, so that another guest's image is called by its name. The mark has to be beside the
//! primary's image, too: a copy may have a copy of the record.

use std::path::Path;
use std::sync::Arc;

use ft_log::{Hello, HelloDisk, HelloImage, MAX_OWNER_BYTES, MAX_PATH_BYTES, MAX_TEXT_BYTES};

use crate::host::image::{Image, Mark};
use crate::host::owner::{Owned, Ownership};
use crate::pair::claims::claim::read_record;

const SAME_FILE: &str = "Give both the same file, on storage that both hosts see";

/// What a primary demands of a backup's disk.
pub enum Demand {
    /// Nothing but its size: there is no disk, or nobody writes to it.
    Size,
    /// That it is a block device. Nobody can tell which.
    Device,
    /// That it is this image.
    Image(Arc<Ownership>),
}

impl Demand {
    /// Why the backup that said `hello` has another disk, if it has. May take as long as the storage does.
    pub fn refusal(&self, hello: &Hello) -> Option<String> {
        let image = hello.disk.as_ref().and_then(|HelloDisk { image, .. }| image.as_ref());
        let host = &hello.host_name;
        match (self, image) {
            (Self::Size, _) | (Self::Device, None) => None,
            (Self::Device, Some(HelloImage { path, .. })) => Some(format!(
                "Backup host {host} has the file {path:?} for a disk, the primary a block device. {SAME_FILE}"
            )),
            (Self::Image(owned), None) => Some(format!(
                "Backup host {host} has a block device for a disk, the primary the file {:?}. {SAME_FILE}",
                owned.image().path()
            )),
            (Self::Image(owned), Some(image)) => differs(owned, image, host),
        }
    }
}

fn differs(owned: &Ownership, backup: &HelloImage, host: &str) -> Option<String> {
    let own = owned.image();
    if let Err(error) = own.check() {
        return Some(format!("no backup can have the primary's disk image: {error}"));
    }
    match owned.ask() {
        Owned::Yes => {}
        Owned::No => {
            return Some(format!(
                "the primary's own disk image, {:?}, was taken by another monitor",
                own.path()
            ));
        }
        Owned::Unknown(error) => {
            return Some(format!(
                "the storage of the primary's disk image, {:?}, fails: {error}",
                own.path()
            ));
        }
    }
    let HelloImage { path, owner, mark } = backup;
    let other = |why: String| {
        format!(
            "Backup host {host}'s disk image {path:?} is not the primary's, {:?}: {why}. {SAME_FILE}",
            own.path()
        )
    };
    if owner != owned.record() {
        return Some(other(owner_in_words(Some(&owner[..]).filter(|owner| !owner.is_empty()))));
    }
    let id = match mark {
        Ok(id) => id,
        Err(why) => {
            return Some(format!("Backup host {host} cannot show that its image is the primary's: {why}"));
        }
    };
    match own.has_mark(id) {
        Ok(true) => None,
        Ok(false) => Some(other("the record of its owner is a copy, as the image is".to_owned())),
        Err(error) => Some(other(format!("nobody can tell, because the storage fails ({error})"))),
    }
}

/// What the record `found` beside an image says, as the end of a sentence.
pub fn owner_in_words(found: Option<&[u8]>) -> String {
    match found.map(read_record) {
        None => "it has no record of an owner beside it".to_owned(),
        Some(Ok(record)) => format!(
            "its owner is guest '{}' of host {} (process {}, view {})",
            record.guest, record.owner.host, record.owner.pid, record.view
        ),
        Some(Err(why)) => format!("the record of its owner is damaged ({why})"),
    }
}

/// What a backup says of its image, whose owner's record is `owner`. The mark stays until it is dropped.
pub fn introduce(image: &Image, owner: Option<&[u8]>) -> (HelloImage, Option<Mark>) {
    let marked = image.check().map_err(|error| error.to_string()).and_then(|()| {
        image
            .leave_mark()
            .map_err(|error| format!("nothing can be written beside '{}': {error}", image.path().display()))
    });
    let (id, mark) = match marked {
        Ok(mark) => (Ok(mark.id()), Some(mark)),
        Err(why) => (Err(shortened(why, MAX_TEXT_BYTES)), None),
    };
    let path = shortened(path_in_words(image.path()), MAX_PATH_BYTES);
    let mut owner = owner.unwrap_or_default().to_vec();
    owner.truncate(MAX_OWNER_BYTES);
    (HelloImage { path, owner, mark: id }, mark)
}

fn path_in_words(path: &Path) -> String {
    path.display().to_string()
}

/// The first `limit_bytes` of `text`, which need not all be there.
pub fn shortened(mut text: String, limit_bytes: usize) -> String {
    text.truncate(text.floor_char_boundary(limit_bytes));
    text
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::path::PathBuf;

    use tempfile::TempDir;

    use super::*;
    use crate::host::owner;

    struct Case {
        directory: TempDir,
        owned: Arc<Ownership>,
    }

    fn record(guest: &str, view: u64) -> String {
        let uuid = "07".repeat(16);
        format!(
            "vmft-claim 2\nguest {guest}\nview {view}\nrole primary\nhost alpha\npid 17\nuuid {uuid}\nbackup none\nend\n"
        )
    }

    fn image(path: &Path) -> Arc<Image> {
        Arc::new(Image::of(path, &File::open(path).unwrap()).unwrap().unwrap())
    }

    impl Case {
        /// A primary of the guest "web" with an image.
        fn new() -> Self {
            let directory = TempDir::new().unwrap();
            let path = directory.path().join("web.img");
            fs::write(&path, [0; 512]).unwrap();
            let owned = Ownership::take(&image(&path), record("web", 1).as_bytes(), None).unwrap();
            Self { directory, owned: Arc::new(owned) }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().canonicalize().unwrap().join(name)
        }

        /// What the primary says to a backup with the image `name`, and whether nothing is left behind.
        fn says(&self, name: &str) -> Option<String> {
            let image = image(&self.path(name));
            let found = owner::read(&image).unwrap();
            let files = || fs::read_dir(self.directory.path()).unwrap().count();
            let before = files();
            let (introduction, mark) = introduce(&image, found.as_deref());
            let disk = Some(HelloDisk { len_bytes: 512, image: Some(introduction) });
            let hello = Hello { host_name: "beta".into(), disk, ..Hello::default() };
            let refusal = Demand::Image(Arc::clone(&self.owned)).refusal(&hello);
            drop(mark);
            assert_eq!(files(), before, "a mark is left");
            assert_eq!(Demand::Size.refusal(&hello), None);
            assert!(Demand::Device.refusal(&hello).unwrap().contains("the primary a block device"));
            refusal
        }

        /// Fails unless a backup with the image `name` is refused as one with another image, for the reason `why`.
        fn assert_other(&self, name: &str, why: &str) {
            let expected = format!(
                "Backup host beta's disk image {:?} is not the primary's, {:?}: {why}. {SAME_FILE}",
                self.path(name),
                self.path("web.img")
            );
            assert_eq!(self.says(name), Some(expected));
        }
    }

    #[test]
    fn the_primarys_own_image_is_accepted_through_a_link_too() {
        let case = Case::new();
        std::os::unix::fs::symlink(case.path("web.img"), case.path("link.img")).unwrap();
        assert_eq!(case.says("web.img"), None);
        assert_eq!(case.says("link.img"), None);
    }

    #[test]
    fn a_copy_is_refused_with_or_without_a_copy_of_the_record() {
        let case = Case::new();
        fs::copy(case.path("web.img"), case.path("copy.img")).unwrap();
        case.assert_other("copy.img", "it has no record of an owner beside it");
        fs::copy(case.path("web.img.vmft-owner"), case.path("copy.img.vmft-owner")).unwrap();
        case.assert_other("copy.img", "the record of its owner is a copy, as the image is");
        fs::write(case.path("copy.img.vmft-owner"), "vmft-claim 2\n").unwrap();
        case.assert_other("copy.img", "the record of its owner is damaged (it is cut off)");
    }

    #[test]
    fn the_image_of_another_guest_or_tenure_is_refused_by_name() {
        let case = Case::new();
        for (guest, view) in [("mail", 1), ("web", 3)] {
            let name = format!("{guest}-{view}.img");
            fs::write(case.path(&name), [0; 512]).unwrap();
            let theirs =
                Ownership::take(&image(&case.path(&name)), record(guest, view).as_bytes(), None).unwrap();
            let owner = format!("its owner is guest '{guest}' of host alpha (process 17, view {view})");
            case.assert_other(&name, &owner);
            assert!(matches!(theirs.ask(), Owned::Yes));
        }
    }

    #[test]
    fn hard_links_and_replaced_images_are_refused_whoever_has_them() {
        let case = Case::new();
        fs::hard_link(case.path("web.img"), case.path("hard.img")).unwrap();
        for name in ["web.img", "hard.img"] {
            let refusal = case.says(name).unwrap();
            assert!(
                refusal.starts_with("no backup can have the primary's") && refusal.contains("has 2 names")
            );
        }
        fs::remove_file(case.path("hard.img")).unwrap();
        assert_eq!(case.says("web.img"), None);
        fs::copy(case.path("web.img"), case.path("other.img")).unwrap();
        fs::rename(case.path("other.img"), case.path("web.img")).unwrap();
        assert!(case.says("web.img").unwrap().contains("was replaced or removed"));
    }

    #[test]
    fn a_primary_that_does_not_own_its_image_any_more_takes_no_backup() {
        let case = Case::new();
        fs::remove_file(case.path("web.img.vmft-owner")).unwrap();
        assert!(case.says("web.img").unwrap().contains("was taken by another monitor"));
    }

    #[test]
    fn a_device_is_no_file() {
        let case = Case::new();
        let disk = Some(HelloDisk { len_bytes: 512, image: None });
        let hello = Hello { host_name: "beta".into(), disk, ..Hello::default() };
        let refusal = Demand::Image(case.owned).refusal(&hello).unwrap();
        assert!(refusal.starts_with("Backup host beta has a block device"), "{refusal}");
        assert_eq!(Demand::Device.refusal(&hello), None);
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(shortened("aä".into(), 2), "a");
        assert_eq!(shortened("aä".into(), 3), "aä");
    }
}
