//! Command lines that are refused before KVM or another host is asked for anything: a status other than 0, one sentence that names
//! what is wrong, and nothing left behind. What is refused later is in `tests/tests/e2e/cli.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod common;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use common::{end_and_stderr, vmft};
use tempfile::TempDir;

/// A kernel that nobody gets to look at.
const KERNEL: &str = "--kernel /none/vmlinuz";

/// A directory for claims and files, with the id that stays in a claims directory for good.
fn directory() -> (TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().display().to_string();
    (directory, path)
}

/// Writes a file with these permission bits.
fn write(directory: &Path, name: &str, text: &str, mode: u32) {
    let file = directory.join(name);
    fs::write(&file, text).unwrap();
    fs::set_permissions(file, Permissions::from_mode(mode)).unwrap();
}

/// Names, lengths and permission bits of what is in a directory, but for the id of a claims directory.
fn traces(directory: &Path) -> Vec<(String, u64, u32)> {
    let mut found: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| {
            let (entry, metadata) =
                entry.map(|entry| (entry.file_name(), entry.metadata().unwrap())).unwrap();
            (entry.to_string_lossy().into_owned(), metadata.len(), metadata.permissions().mode())
        })
        .filter(|(name, ..)| name != "vmft-id")
        .collect();
    found.sort();
    found
}

/// Fails unless `vmft` refuses the command line with this status, in a sentence that holds all of `says`, and leaves `directory` as
/// it was.
fn refused(directory: &TempDir, line: &str, code: i32, says: &[&str]) {
    let before = traces(directory.path());
    let (status, stderr) = end_and_stderr(&mut vmft(line));
    assert_eq!(status.code(), Some(code), "`{line}`: {stderr}");
    // What is said on the way is not the refusal.
    let is_news = |line: &&str| line.contains(" INFO ") || line.contains(" WARN ");
    let said: Vec<&str> = stderr.lines().filter(|line| !is_news(line)).collect();
    let start = if code == 2 { "error: " } else { "vmft: " };
    assert!(said.first().is_some_and(|sentence| sentence.starts_with(start)), "`{line}`: {stderr}");
    // What is said of a wrong command line goes on in more lines: what is missing, and how it should be.
    assert!(code == 2 || said.len() == 1, "`{line}` says more: {stderr}");
    for what in says {
        assert!(said.join("\n").contains(what), "`{line}` does not say '{what}': {stderr}");
    }
    assert_eq!(traces(directory.path()), before, "`{line}` left something behind");
}

#[test]
fn wrong_command_lines_are_refused() {
    let (directory, path) = directory();
    let run = format!("run {KERNEL} --memory-mib");
    let pair = format!("--arbiter dir:{path} --listen 127.0.0.1:0 {KERNEL}");
    for (line, code, says) in [
        ("walk", 2, &["walk"][..]),
        ("run --kernel /images/vmlinuz --frobnicate", 2, &["--frobnicate"]),
        ("run", 2, &["--kernel"]),
        ("replay", 2, &["FILE"]),
        (&format!("primary {KERNEL} --arbiter dir:{path}"), 2, &["--listen"]),
        (&format!("{run} much"), 2, &["--memory-mib", "much"]),
        (&format!("{run} 99999999999999999999"), 2, &["--memory-mib"]),
        (&format!("{run} 0"), 1, &["--memory-mib 0", "between 32 and"]),
        (&format!("{run} 16"), 1, &["--memory-mib 16", "between 32 and"]),
        (&format!("{run} 999999999"), 1, &["--memory-mib 999999999", "between 32 and"]),
        (&format!("{run} 128 --tap tap0 --mac 52:54:00:12:34"), 2, &["--mac", "six bytes"]),
        (&format!("{run} 128 --tap tap0 --mac 53:54:00:12:34:56"), 2, &["--mac", "must be even"]),
        (&format!("primary {pair} --timeout-ms 1"), 2, &["--timeout-ms"]),
        (&format!("{run} 128 --defer-ms 0"), 2, &["--defer-ms", "1..=1000"]),
        (&format!("{run} 128 --defer-ms 1001"), 2, &["--defer-ms", "1..=1000"]),
        (
            &format!("record {path}/r {KERNEL} --position here"),
            2,
            &["--position", "auto, pmu, checkpoint or step"],
        ),
        (
            &format!("primary {pair} --heartbeat-ms 300 --timeout-ms 500"),
            1,
            &["--heartbeat-ms 300 is too long for --timeout-ms 500", "a third"],
        ),
        (
            &format!("primary {pair} --name ../guest"),
            1,
            &["'../guest' is not a guest name", "use 1 to 64 of"],
        ),
        (&format!("backup --arbiter dir:{path} --connect nowhere"), 2, &["--connect", "nowhere"]),
    ] {
        refused(&directory, line, code, says);
    }
}

#[test]
fn wrong_arbiters_and_fences_are_refused() {
    let (directory, path) = directory();
    write(directory.path(), "file", "", 0o644);
    // Nobody listens there any more.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let primary = format!("primary --listen 127.0.0.1:0 {KERNEL} --arbiter");
    for (line, code, says) in [
        (&*format!("{primary} {path}"), 2, &["--arbiter", "dir:"][..]),
        ("doctor --arbiter zookeeper:a", 2, &["--arbiter", "'zookeeper' is no kind of arbiter"]),
        ("doctor --arbiter etcd:192.0.2.9", 2, &["--arbiter", "has no port", "192.0.2.9:2379"]),
        (
            &format!("{primary} etcd:{closed}"),
            1,
            &[&format!("etcd:{closed} does not answer"), "Connection refused", "correct --arbiter"],
        ),
        (&format!("{primary} dir:{path}/none"), 1, &["none' does not exist", "create it"]),
        (&format!("{primary} dir:{path}/file"), 1, &["file' is not a directory"]),
        (
            &format!("{primary} dir:{path} --fence-cmd fence"),
            2,
            &["--fence-cmd", "'fence' is not the absolute path"],
        ),
        (
            &format!("{primary} dir:{path} --fence-cmd {path}/fence"),
            1,
            &["--fence-cmd", &format!("'{path}/fence' cannot be run"), "No such file"],
        ),
    ] {
        refused(&directory, line, code, says);
    }
}

#[test]
fn wrong_addresses_are_refused() {
    let (directory, path) = directory();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap();
    let standby = format!("standby --arbiter dir:{path} --listen 127.0.0.1:0");
    let primary = format!("primary {KERNEL} --arbiter dir:{path}");
    for (line, code, says) in [
        (standby.clone(), 2, &["--hosts"][..]),
        (
            format!("{standby} --hosts host-b:7000"),
            2,
            &["--hosts", "'host-b:7000' is not an IP address", "ADDR:PORT"],
        ),
        (
            format!("{primary} --listen 127.0.0.1:7000 --hosts [2001:db8::1]:7000"),
            1,
            &["--hosts names [2001:db8::1]:7000", "--listen 127.0.0.1:7000", "both must be IPv4"],
        ),
        (format!("{primary} --listen {taken}"), 1, &[&format!("{taken} (TCP)"), "in use", "--listen"]),
        (format!("{primary} --insecure --listen 192.0.2.250:7000"), 1, &["192.0.2.250:7000", "of this host"]),
    ] {
        refused(&directory, &line, code, says);
    }
}

#[test]
fn unusable_keys_are_refused() {
    let (directory, path) = directory();
    for (name, text, mode) in [
        ("text", "not a key\n", 0o600),
        ("read-by-all.key", "", 0o644),
        ("cut.key", "vmft-key 1\nkey 00010203\n", 0o600),
    ] {
        write(directory.path(), name, text, mode);
    }
    let backup = format!("backup --arbiter dir:{path} --connect");
    let primary = format!("primary {KERNEL} --arbiter dir:{path} --listen");
    let with_key = format!("{backup} 192.0.2.1:7000 --key-file {path}");
    let open = ["is not a loopback address", "vmft keygen FILE", "--key-file", "--insecure"];
    for (line, code, says) in [
        ("keygen".into(), 2, &["FILE"][..]),
        (format!("keygen {path}/text"), 1, &["text' exists already", "another name"]),
        (format!("keygen {path}/none/key"), 1, &["none/key' cannot be made", "No such file"]),
        (format!("{with_key}/none"), 1, &["none' does not exist", "vmft keygen"]),
        (with_key.clone(), 1, &["is not a regular file"]),
        (format!("{with_key}/read-by-all.key"), 1, &["read-by-all.key'", "mode 0644", "chmod 600"]),
        (format!("{with_key}/cut.key"), 1, &["cut.key' cannot be used as a key", "damaged", "Copy it"]),
        (format!("{with_key}/text"), 1, &["text' cannot be used as a key", "not a key file of vmft"]),
        (format!("{with_key}/text --insecure"), 2, &["--key-file", "--insecure", "cannot be used with"]),
        (format!("{primary} 192.0.2.1:7000"), 1, &open),
        (format!("{primary} 0.0.0.0:7000"), 1, &open),
        (format!("{backup} 192.0.2.1:7000"), 1, &open),
        (format!("{backup} 127.0.0.1:7000 --listen 192.0.2.1:7000"), 1, &open),
    ] {
        refused(&directory, &line, code, says);
    }
    let (status, stderr) = end_and_stderr(&mut vmft(&format!("keygen {path}/made.key")));
    assert!(status.success(), "{stderr}");
    let made = fs::metadata(directory.path().join("made.key")).unwrap();
    assert_eq!(made.permissions().mode() & 0o7777, 0o600, "others may read the key");
}
