//! What `vmft doctor` says of a test host, of one without a usable KVM, and of what is around it.

use std::fs;
use std::time::Instant;

use serde_json::Value;
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Ending, Link, Output};
use vmft_tests::pair::{Guest, LONG, SHORT, Site};

use crate::SITES;

/// Each line on a test host, and what it may say. QEMU's nested SVM never fires breakpoints, opens a window
/// one instruction early now and then, and has no counters.
const LINES: [(&str, &[&str]); 16] = [
    ("kvm", &["ok"]),
    ("nested paging", &["ok"]),
    ("capabilities", &["ok"]),
    ("cpu", &["ok"]),
    ("single-step", &["ok"]),
    ("breakpoints", &["degraded"]),
    ("interrupt window", &["ok", "degraded"]),
    ("cr4.tsd trap", &["ok"]),
    ("cpuid masking", &["ok"]),
    ("msr filter", &["ok"]),
    ("dirty log", &["ok"]),
    ("pmu", &["degraded"]),
    ("pmu counts", &["not-measured"]),
    ("pmu skid", &["not-measured"]),
    ("pmu errata", &["not-measured"]),
    ("perf_event_paranoid", &["ok"]),
];
const IN_GUESTS: [&str; 7] = [
    "single-step",
    "breakpoints",
    "interrupt window",
    "cr4.tsd trap",
    "cpuid masking",
    "msr filter",
    "dirty log",
];

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("a_test_host_is_fit_for_checkpoints", a_test_host_is_fit_for_checkpoints),
    Case::on_hosts("an_unfit_kvm_is_refused_by_all_in_the_same_words", unfit_hosts),
    Case::on_hosts("the_shared_directory_is_measured_and_left_as_it_was", the_shared_directory),
    Case::on_hosts("the_way_to_the_peer_is_measured", the_way_to_the_peer),
];

fn doctor(site: &mut Site, line: &str) -> Result<Output, Box<dyn std::error::Error>> {
    let words: Vec<String> = format!("doctor {line}").split_whitespace().map(String::from).collect();
    Ok(site.start(1, &words)?.wait(LONG)?)
}

/// The line with this name.
fn line<'a>(output: &'a Output, name: &str) -> &'a str {
    let starts = |line: &&String| line.strip_prefix(name).is_some_and(|rest| rest.starts_with("  "));
    output.stdout.iter().find(starts).unwrap_or_else(|| panic!("no line '{name}': {:?}", output.stdout))
}

fn assert_verdict(output: &Output, verdict: &str) {
    output.stdout.iter().for_each(|line| println!("{line}"));
    assert_eq!(output.stdout.last().map(String::as_str), Some(format!("verdict: {verdict}").as_str()));
    assert_eq!(output.ending, Ending::Exited(i32::from(verdict == "unfit")), "{:?}", output.stderr);
}

fn a_test_host_is_fit_for_checkpoints() -> TestResult {
    SITES.run(|site| {
        let started = Instant::now();
        let output = doctor(site, "")?;
        println!("{} ms", started.elapsed().as_millis());
        assert_verdict(&output, "fit (checkpoint)");
        assert_eq!(output.stderr, Vec::<String>::new());

        let json = doctor(site, "--json")?;
        assert!(json.success(), "{:?}", json.stderr);
        let report: Value = serde_json::from_str(&json.stdout.join("\n"))?;
        assert_eq!(report["verdict"], "fit (checkpoint)");
        let checks = report["checks"].as_array().ok_or("no list of checks")?;
        assert_eq!(checks.len() + 1, output.stdout.len(), "as many as there are lines");
        for (name, verdicts) in LINES {
            let check = checks.iter().find(|check| check["name"] == name).ok_or(format!("no '{name}'"))?;
            let verdict = check["verdict"].as_str().ok_or("no verdict")?;
            assert!(verdicts.contains(&verdict), "{check}");
            assert_eq!(check["advice"].is_string(), verdict == "degraded", "{check}");
            assert!(check["seen"].as_str().is_some_and(|seen| !seen.is_empty()), "{check}");
            // A window may be early in one run and not in another.
            if verdicts.len() == 1 {
                assert!(line(&output, name).contains(&verdict.replace('-', " ")), "{name}");
            }
        }
        Ok(())
    })
}

/// What the monitor says when it refuses, from "vmft: " to what only it adds.
fn unfit_hosts() -> TestResult {
    SITES.run(|site| {
        let software = ("mount -t tmpfs none /sys/module; mkdir /sys/module/kvm_pvm", "umount /sys/module");
        let absent = ("mv /dev/kvm /dev/kvm.away", "mv /dev/kvm.away /dev/kvm");
        let shadow =
            ("rmmod kvm_amd; insmod /modules/kvm-amd.ko npt=0", "rmmod kvm_amd; insmod /modules/kvm-amd.ko");
        for ((before, after), name, words) in [
            (software, "kvm", &["it is kvm-pvm", "a host with VT-x or AMD-V is needed"][..]),
            (shadow, "nested paging", &["parameter npt of kvm_amd", "load kvm_amd with npt=1"]),
            (absent, "kvm", &["cannot open /dev/kvm: No such file", "modprobe kvm-intel"]),
        ] {
            let under = |command: &str| format!("{before}; /images/vmft {command}; s=$?; {after}; exit $s");
            let kernel = site.kernel();
            let refusal =
                site.host(1).run(&["sh", "-c", &under(&format!("run --kernel {kernel}"))], SHORT)?;
            let output = site.host(1).run(&["sh", "-c", &under("doctor")], SHORT)?;
            assert_verdict(&output, "unfit");
            assert!(line(&output, name).contains("failed"), "{:?}", output.stdout);
            for words in words {
                assert!(line(&output, name).contains(words), "{:?}", output.stdout);
                assert!(output.stderr.join("\n").contains(words), "{:?}", output.stderr);
                assert!(refusal.stderr.join("\n").contains(words), "{:?}", refusal.stderr);
            }
            for name in IN_GUESTS {
                assert!(line(&output, name).contains("not measured"), "{:?}", output.stdout);
            }
        }
        Ok(())
    })
}

fn the_shared_directory() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let names = || fs::read_dir(&volume.local).map(|entries| entries.count());
        let before = names()?;
        let output = doctor(site, &format!("--arbiter dir:{}", volume.path))?;
        assert_verdict(&output, "fit (checkpoint)");
        let seen = line(&output, "arbiter");
        assert!(seen.contains("a name is created once only; fsync takes"), "{seen}");
        assert_eq!(names()?, before, "the doctor left something behind");

        for (path, words) in [
            ("/images", ["'/images' cannot be written", "Read-only file system"]),
            ("/shared/none", ["'/shared/none' does not exist", "create it on storage that both hosts see"]),
            ("/images/vmft", ["'/images/vmft' is not a directory", "--arbiter"]),
        ] {
            let output = doctor(site, &format!("--arbiter dir:{path}"))?;
            assert_verdict(&output, "unfit");
            let seen = line(&output, "arbiter");
            assert!(seen.contains("failed") && words.iter().all(|words| seen.contains(words)), "{seen}");
            assert!(line(&output, "dirty log").contains("ok"), "the host itself is as it was");
        }
        Ok(())
    })
}

fn the_way_to_the_peer() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let primary = site.start_primary(1, &Guest::default(), &volume)?;
        let port = site.log_address(1);
        let listening = "until netstat -ltn | grep -q ':7000 '; do usleep 10000; done";
        site.host(1).run(&["sh", "-c", listening], LONG)?;
        let output = doctor(site, &format!("--peer {port}"))?;
        assert_verdict(&output, "fit (checkpoint)");
        let seen = line(&output, "peer");
        assert!(seen.contains(&format!("{port} answers within")), "{seen}");
        assert_eq!(primary.ending(), None, "the primary goes on");

        let own = site.host(1).address(Link::Log);
        for silent in [format!("{own}:7999"), "10.78.0.250:7000".into()] {
            let output = doctor(site, &format!("--peer {silent}"))?;
            assert_verdict(&output, "unfit");
            let seen = line(&output, "peer");
            assert!(
                seen.contains(&format!("{silent} does not answer")) && seen.contains("--listen"),
                "{seen}"
            );
        }
        Ok(())
    })
}
