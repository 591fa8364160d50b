//! Records a guest on one test host and replays it on another.
//!
//! Owns: the commands for it and what counts as an equal replay. Must never: pass a replay that only ended well.

use nix::sys::signal::Signal;

use crate::harness::TestResult;
use crate::hosts::{Ending, HostError, Output};
use crate::pair::{Guest, LONG, Monitor, SHORT, Site, Volume};

/// The recording in a volume, as the hosts see it.
pub fn recording(volume: &Volume) -> String {
    format!("{}/recording", volume.path)
}

/// Starts to record the default guest on host 1.
pub fn record(site: &mut Site, guest: &Guest, volume: &Volume) -> Result<Monitor, HostError> {
    record_with(site, &site.guest_options(guest, volume), volume)
}

/// Starts to record a guest with these options on host 1.
pub fn record_with(site: &mut Site, options: &[String], volume: &Volume) -> Result<Monitor, HostError> {
    let mut arguments = vec!["record".to_owned(), recording(volume)];
    arguments.extend_from_slice(options);
    site.start(1, &arguments)
}

/// Starts to replay on host 2.
pub fn replay(site: &mut Site, volume: &Volume) -> Result<Monitor, HostError> {
    replay_on(2, site, volume)
}

/// Starts to replay on a host.
pub fn replay_on(host: u8, site: &mut Site, volume: &Volume) -> Result<Monitor, HostError> {
    site.start(host, &["replay".to_owned(), "--console".to_owned(), recording(volume)])
}

/// Stops a recording, which must then be whole.
pub fn stop(recorder: &Monitor) -> Result<Output, HostError> {
    recorder.kill(Signal::SIGTERM)?;
    let recorded = recorder.wait(SHORT)?;
    assert_eq!(recorded.ending, Ending::Exited(0), "{:?}", recorded.stderr);
    Ok(recorded)
}

/// Waits for a replay; it must have found the recording's digests and written the same to the console.
pub fn assert_equal(replayer: &Monitor, recorded: &Output, anchors_min: u64) -> TestResult {
    let replayed = replayer.wait(LONG)?;
    assert_eq!(replayed.ending, Ending::Exited(0), "{:?}", replayed.stderr);
    let text = replayed.stdout.join("\n");
    let (console, verdict) = text.split_once("replay equal: ").ok_or("there is no verdict")?;
    println!("replay equal: {verdict}");
    assert_eq!(console.trim_end(), recorded.stdout.join("\n").trim_end(), "the console differs");
    let anchors: u64 = verdict.split(' ').next().unwrap_or_default().parse()?;
    assert!(anchors >= anchors_min, "only {anchors} anchors");
    Ok(())
}
