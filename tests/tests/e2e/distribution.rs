//! `run-ft.sh` with guests that are not the demo's: a distribution from its own disk, and one that never gets ready.

use std::path::Path;
use std::{env, fs, process};

use vmft_tests::demo::{self, DemoError, Options, Report};
use vmft_tests::harness::{Case, Need, TestResult};
use vmft_tests::hosts::make_debian_disk;

const NEEDS: &[Need] = &[Need::Root, Need::Tun, Need::Qemu, Need::Debootstrap];

/// The tests.
pub const CASES: &[Case] = &[
    Case::with(NEEDS, "debian_12_survives_a_killed_primary", debian_12_survives_a_killed_primary),
    Case::on_hosts("guest_that_is_not_ready_is_not_killed", guest_that_is_not_ready_is_not_killed),
];

/// As `./run-ft.sh` with these arguments.
fn run(arguments: &[&str]) -> Result<Report, Box<dyn std::error::Error>> {
    println!("./run-ft.sh {}", arguments.join(" "));
    let options = Options::parse(arguments.iter().map(|argument| (*argument).to_owned()))?;
    Ok(demo::run(&options.ok_or("help was asked for")?)?)
}

/// sshd of a Debian that boots from its own disk: its connection from before the kill goes on.
fn debian_12_survives_a_killed_primary() -> TestResult {
    let file = env::temp_dir().join(format!("vmft-debian-{}.img", process::id()));
    let outcome = make_debian_disk("bookworm", &file).map_err(Into::into).and_then(|made| {
        let text = |path: &Path| path.display().to_string();
        let [kernel, initrd, disk] = [&made.kernel, &made.initrd, &made.disk].map(|path| text(path));
        // The time-out is that of the other tests on emulated hosts.
        run(&[
            &kernel,
            "--initrd",
            &initrd,
            "--disk",
            &disk,
            "--cmdline",
            "root=/dev/vda rw",
            "--memory-mib",
            "512",
            "--ready",
            "22",
            "--timeout-ms",
            "2000",
            "--boot-limit-s",
            "300",
        ])
    });
    // It is there or not.
    let _ = fs::remove_file(&file);
    let report = outcome?;
    println!("{report}");
    assert_eq!(report.failures(), Vec::<String>::new());
    let text = report.to_string();
    for said in [
        "looked for  TCP port 22, ready after ",
        "opened before the kill: open, and the service answered its end",
        "opened after the takeover: open, and the service answered its end",
    ] {
        assert!(text.contains(said), "the report does not say '{said}'");
    }
    Ok(())
}

fn guest_that_is_not_ready_is_not_killed() -> TestResult {
    let error = match run(&["--backend", "qemu", "--ready", "no such text", "--boot-limit-s", "3"]) {
        Err(error) => error,
        Ok(report) => return Err(format!("it came to a report: {report}").into()),
    };
    let not_ready = error.downcast_ref::<DemoError>();
    assert!(matches!(not_ready, Some(DemoError::NotReady { limit_s: 3, .. })), "{error}");
    let text = error.to_string();
    assert!(text.contains("nothing was killed") && text.contains("'no such text' on the console"), "{text}");
    Ok(())
}
