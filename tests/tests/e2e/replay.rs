//! Recordings of real guests replay equal, on another host, and damaged ones are refused.
//!
//! `VMFT_REPLAYS` is the number of boots that are recorded and replayed (default 3), and how often the recording of a
//! busy guest is replayed (default 1).

use std::fs;

use vmft_tests::client::Config;
use vmft_tests::harness::{Case, TestResult};
use vmft_tests::hosts::{Ending, HostError, Output, archive_with_init};
use vmft_tests::pair::{Guest, LONG, Monitor, SERVICE_READY, SHORT, Site, Volume, count_from_environment};
use vmft_tests::recordings::{assert_equal, record, recording, replay, replay_on, stop};

use crate::SITES;

/// The tests.
pub const CASES: &[Case] = &[
    Case::on_hosts("user_mode_rdtsc_replays", user_mode_rdtsc_replays),
    Case::on_hosts("boots_to_service_replay_equal", boots_to_service_replay_equal),
    Case::on_hosts("busy_network_and_disk_replay_equal", busy_network_and_disk_replay_equal),
    Case::on_hosts("damaged_recordings_are_refused", damaged_recordings_are_refused),
];

fn boots_to_service_replay_equal() -> TestResult {
    let rounds = count_from_environment("VMFT_REPLAYS", 3);
    SITES.run(|site| {
        let mut previous: Option<(Monitor, Output, Volume)> = None;
        for _ in 0..rounds {
            let volume = site.volume()?;
            let recorder = record(site, &Guest::default(), &volume)?;
            recorder.wait_for_line(SERVICE_READY, LONG)?;
            let recorded = stop(&recorder)?;
            // Host 2 replays the one while host 1 records the next.
            if let Some((replayer, recorded, volume)) = previous.take() {
                assert_equal(&replayer, &recorded, 5_000)?;
                fs::remove_dir_all(&volume.local)?;
            }
            previous = Some((replay(site, &volume)?, recorded, volume));
        }
        let (replayer, recorded, _) = previous.ok_or("VMFT_REPLAYS is 0")?;
        assert_equal(&replayer, &recorded, 5_000)
    })
}

fn busy_network_and_disk_replay_equal() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let guest = Guest { work: "busy", ..Guest::default() };
        let recorder = record(site, &guest, &volume)?;
        recorder.wait_for_line(SERVICE_READY, LONG)?;
        let client = site.client(Config { window: 4, value_len: 500, ..Config::default() })?;
        // Each takes some sixty exits or more.
        assert!(client.wait_for_replies(250, LONG), "the guest does not answer");
        recorder.wait_for_line("vmft-work: busy round 2", LONG)?;
        let report = client.stop(SHORT);
        site.check(&report)?;
        println!("{}", report.summary());
        let recorded = stop(&recorder)?;
        let replays = count_from_environment("VMFT_REPLAYS", 1);
        for first in (0..replays).step_by(2) {
            // The last of an odd number is alone, on the host that did not record.
            let hosts = [2, 1].into_iter().take((replays - first) as usize);
            let replayers =
                hosts.map(|host| replay_on(host, site, &volume)).collect::<Result<Vec<_>, HostError>>()?;
            replayers.iter().try_for_each(|replayer| assert_equal(replayer, &recorded, 20_000))?;
        }
        Ok(())
    })
}

/// Records the guest that only reads the time stamp counter, on host 1.
fn record_counter_guest(site: &mut Site, volume: &Volume) -> Result<Output, Box<dyn std::error::Error>> {
    let program = fs::read(env!("CARGO_BIN_EXE_vmft-tsc-guest"))?;
    fs::write(volume.local.join("initrd"), archive_with_init(&program))?;
    let initrd = format!("{}/initrd", volume.path);
    let kernel = site.kernel();
    let arguments =
        ["record", &recording(volume), "--kernel", &kernel, "--initrd", &initrd, "--memory-mib", "128"];
    let recorder = site.start(1, &arguments.map(String::from))?;
    let recorded = recorder.wait(LONG)?;
    assert_eq!(recorded.ending, Ending::Exited(0), "{:?}", recorded.stderr);
    Ok(recorded)
}

fn user_mode_rdtsc_replays() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        let recorded = record_counter_guest(site, &volume)?;
        for who in ["before the fork", "child", "parent"] {
            let start = format!("vmft-tsc: {who}: sum ");
            let line = recorded.stdout.iter().find(|line| line.starts_with(&start));
            let line = line.ok_or_else(|| format!("no '{start}' in {:?}", recorded.stdout))?.trim_end();
            assert!(line.ends_with(", 0 of 100 fell"), "{line}");
            println!("{line}");
        }
        let line = recorded.stdout.iter().find(|line| line.starts_with("vmft-tsc: rdtscp on "));
        let line = line.ok_or_else(|| format!("no RDTSCP in {:?}", recorded.stdout))?.trim_end();
        println!("{line}");
        let documented =
            ["vmft-tsc: rdtscp on AMD: supplied, with 0 in TSC_AUX", "vmft-tsc: rdtscp on Intel: SIGILL"];
        assert!(documented.contains(&line), "docs/determinism.md says something else: {line}");
        let replayer = replay(site, &volume)?;
        assert_equal(&replayer, &recorded, 1_000)
    })
}

fn damaged_recordings_are_refused() -> TestResult {
    SITES.run(|site| {
        let volume = site.volume()?;
        record_counter_guest(site, &volume)?;
        let whole = fs::read(volume.local.join("recording"))?;
        let len = whole.len();
        let flipped = |at: usize| {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            (format!("byte {at} of {len} flipped"), bytes)
        };
        let cut = |at: usize| (format!("cut off at {at} of {len}"), whole[..at].to_vec());
        // Magic, version, first frame's header, snapshot, log, end.
        let mut damaged: Vec<_> =
            [0, 8, 12, 14, 20, len / 3, 2 * len / 3, len - 5_000, len - 10, len - 1].map(flipped).into();
        damaged.extend([0, 7, 12, 1_000, len / 2, len - 5_000, len - 1].map(cut));
        // Both hosts at once.
        for pair in damaged.chunks(2) {
            let replayers = pair.iter().zip(1..).map(|((_, bytes), host)| {
                let name = format!("damaged{host}");
                fs::write(volume.local.join(&name), bytes)?;
                Ok(site.start(host, &["replay".to_owned(), format!("{}/{name}", volume.path)])?)
            });
            let replayers = replayers.collect::<Result<Vec<_>, Box<dyn std::error::Error>>>()?;
            for (host, ((what, _), replayer)) in (1..).zip(pair.iter().zip(&replayers)) {
                let file = format!("{}/damaged{host}", volume.path);
                assert_refused(what, &file, &replayer.wait(LONG)?);
            }
        }
        Ok(())
    })
}

fn assert_refused(what: &str, file: &str, replayed: &Output) {
    let said = replayed.stderr.iter().find(|line| line.starts_with("vmft: "));
    println!("{what}: {}", said.map_or("", String::as_str));
    let Ending::Exited(status) = replayed.ending else { panic!("{what}: {}", replayed.ending) };
    assert!(status == 1 || status == 4, "{what}: status {status}");
    assert!(said.is_some_and(|line| line.contains(file)), "{what}: {:?}", replayed.stderr);
    let panicked = replayed.stderr.iter().any(|line| line.contains("panicked"));
    assert!(!panicked, "{what}: {:?}", replayed.stderr);
}
