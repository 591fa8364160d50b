//! Says what was given in the place of a kernel or an initrd, and what to do.
//!
//! Owns: the sentences. Must never: decide that a kernel is good; [`super::image`] and the passes over it do.

use std::path::Path;

use crate::file_kind::FileKind;

/// What `bytes` are, which are neither an ELF file nor a bzImage, and what to do: the end of a sentence.
pub(super) fn in_place_of_kernel(bytes: &[u8], path: &Path) -> String {
    let kind = FileKind::of(bytes);
    let path = path.display();
    let what_to_do = match kind {
        FileKind::Compressed { .. } => {
            let command = kind.unpack_command().unwrap_or_default();
            format!("Unpack it first: {command} {path} >vmlinux")
        }
        FileKind::Pe { machine: "x86-64", unified: true } => format!(
            "Take the kernel out of it (objcopy -O binary --only-section=.linux {path} vmlinuz), in the same way its \
             .initrd and .cmdline"
        ),
        FileKind::Pe { machine: "x86-64", unified: false } => {
            "Give a Linux kernel (vmlinuz); a unified kernel image (UKI) holds one".into()
        }
        FileKind::Pe { .. } | FileKind::OtherKernel(_) => "Only kernels for x86-64 run here".into(),
        FileKind::CutOff => "Copy it again".into(),
        FileKind::VirtualDisk(_) => {
            format!(
                "Give a kernel here; the disk goes to --disk, after qemu-img convert -O raw {path} disk.img"
            )
        }
        FileKind::RawDisk(_) => "Give it with --disk, and its kernel (vmlinuz) here".into(),
        FileKind::Cpio => "Give it with --initrd".into(),
        FileKind::Archive(_) => "Unpack it and give the kernel in it (vmlinuz)".into(),
        FileKind::Empty
        | FileKind::Elf
        | FileKind::BzImage
        | FileKind::Script
        | FileKind::Text
        | FileKind::Unknown => "Give a vmlinux (ELF) or a bzImage (vmlinuz) for x86-64".into(),
    };
    format!("{kind}. {what_to_do}")
}

/// What `bytes` are, if Linux can unpack them as initrd in no case.
pub(super) fn in_place_of_initrd(bytes: &[u8]) -> Option<FileKind> {
    let kind = FileKind::of(bytes);
    match kind {
        // An image of a file system was an initrd before there was an initramfs.
        FileKind::Compressed { .. } | FileKind::Cpio | FileKind::RawDisk(_) | FileKind::Unknown => None,
        FileKind::Empty
        | FileKind::Elf
        | FileKind::BzImage
        | FileKind::OtherKernel(_)
        | FileKind::Pe { .. }
        | FileKind::CutOff
        | FileKind::VirtualDisk(_)
        | FileKind::Archive(_)
        | FileKind::Script
        | FileKind::Text => Some(kind),
    }
}
