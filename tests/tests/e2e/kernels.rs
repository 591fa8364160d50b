//! Debian's newest kernel boots to the service, and its recording replays equal.
//!
//! `VMFT_KERNELS` names other kernels in its place: directories made by `guest-images/build.sh guest`, with colons
//! between them. For `scripts/kernels.sh --boot`.

use std::fs;
use std::path::{Path, PathBuf};

use vmft_tests::harness::{Case, Need, TestResult};
use vmft_tests::hosts;
use vmft_tests::pair::{Guest, LONG, SERVICE_READY, Site};
use vmft_tests::recordings::{assert_equal, record_with, replay, stop};

use crate::SITES;

const NEEDS: &[Need] = &[Need::Root, Need::Tun, Need::Qemu, Need::DebianArchive];

/// The tests.
pub const CASES: &[Case] = &[Case::with(
    NEEDS,
    "debians_newest_kernel_boots_and_replays_equal",
    debians_newest_kernel_boots_and_replays_equal,
)];

fn debians_newest_kernel_boots_and_replays_equal() -> TestResult {
    let kernels: Vec<PathBuf> = match std::env::var_os("VMFT_KERNELS") {
        Some(list) => std::env::split_paths(&list).collect(),
        None => vec![hosts::newest_kernel()?],
    };
    let mut failed = 0;
    for kernel in &kernels {
        let result = SITES.run(|site| boot_and_replay(site, kernel));
        let said = match &result {
            Ok(()) => "replays equal".to_owned(),
            Err(error) => format!("FAILED: {error}"),
        };
        println!("{}: {said}", kernel.display());
        failed += usize::from(result.is_err());
    }
    if failed == 0 { Ok(()) } else { Err(format!("{failed} of {} kernels failed", kernels.len()).into()) }
}

fn boot_and_replay(site: &mut Site, kernel: &Path) -> TestResult {
    let volume = site.volume()?;
    for name in ["vmlinuz", "guest.cpio.gz"] {
        fs::copy(kernel.join(name), volume.local.join(name))?;
    }
    let mut options = site.guest_options(&Guest::default(), &volume);
    for (name, file) in [("--kernel", "vmlinuz"), ("--initrd", "guest.cpio.gz")] {
        let at =
            options.iter().position(|option| option == name).ok_or("the guest has no kernel or no initrd")?;
        options[at + 1] = format!("{}/{file}", volume.path);
    }
    let recorder = record_with(site, &options, &volume)?;
    recorder.wait_for_line(SERVICE_READY, LONG)?;
    let recorded = stop(&recorder)?;
    let replayer = replay(site, &volume)?;
    // Newer kernels boot with fewer exits: 7.3 with some 2,000.
    assert_equal(&replayer, &recorded, 1_000)?;
    fs::remove_dir_all(&volume.local)?;
    Ok(())
}
