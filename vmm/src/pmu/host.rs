//! What the host's kernel says of its performance counters.
//!
//! Owns: what is read of `/sys` and `/proc` for that. Must never: change it.

use std::fs;
use std::path::Path;

use super::events::CoreKind;

/// `PERF_TYPE_RAW` of `perf_event_open(2)`.
const TYPE_RAW: u32 = 4;
/// Where the kernel describes its event sources.
const SOURCES: &str = "/sys/bus/event_source/devices";
/// Bits of a capability set (`linux/capability.h`).
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;

/// The counters of the cores on which guests should run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPmu {
    /// `perf_event_attr.type` of their raw events.
    pub perf_type: u32,
    /// Which cores they are.
    pub core: CoreKind,
    /// The processors that have them; `None`: all.
    pub cpus: Option<Vec<usize>>,
}

impl HostPmu {
    /// This host's. `None`: the kernel drives no counters.
    pub fn find() -> Option<Self> {
        Self::find_in(Path::new(SOURCES))
    }

    fn find_in(sources: &Path) -> Option<Self> {
        let hybrid = sources.join("cpu_core");
        if let Some(perf_type) = read_trimmed(&hybrid.join("type")).and_then(|text| text.parse().ok()) {
            let cpus = read_trimmed(&hybrid.join("cpus")).and_then(|text| parse_cpus(&text));
            return Some(Self { perf_type, core: CoreKind::Performance, cpus });
        }
        sources.join("cpu").exists().then_some(Self {
            perf_type: TYPE_RAW,
            core: CoreKind::Performance,
            cpus: None,
        })
    }
}

/// Do counters freeze in system management mode? `None`: this kernel or CPU has no such setting.
pub fn freezes_on_smi() -> Option<bool> {
    ["cpu", "cpu_core"].into_iter().find_map(|source| {
        match read_trimmed(&Path::new(SOURCES).join(source).join("freeze_on_smi"))?.as_str() {
            "0" => Some(false),
            "1" => Some(true),
            _ => None,
        }
    })
}

/// Who may count what. `None`: this kernel has no perf events.
pub fn perf_event_paranoid() -> Option<i32> {
    read_trimmed(Path::new("/proc/sys/kernel/perf_event_paranoid"))?.parse().ok()
}

/// May this process count whatever [`perf_event_paranoid`] says?
pub fn may_always_count() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    effective_capabilities(&status).is_some_and(|set| set & (1 << CAP_SYS_ADMIN | 1 << CAP_PERFMON) != 0)
}

fn effective_capabilities(status: &str) -> Option<u64> {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(set.trim(), 16).ok()
}

fn read_trimmed(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}

/// A list such as `0-7,16`.
fn parse_cpus(text: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        cpus.extend(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_processors_are_read() {
        assert_eq!(parse_cpus("0"), Some(vec![0]));
        assert_eq!(parse_cpus("0-3,8,10-11"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        for bad in ["", "0-", "a", "0,,1"] {
            assert_eq!(parse_cpus(bad), None, "{bad}");
        }
    }

    #[test]
    fn counters_are_found_where_the_kernel_shows_them() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(HostPmu::find_in(dir.path()), None);
        fs::create_dir(dir.path().join("cpu")).unwrap();
        let plain = HostPmu { perf_type: 4, core: CoreKind::Performance, cpus: None };
        assert_eq!(HostPmu::find_in(dir.path()), Some(plain));
        let hybrid = dir.path().join("cpu_core");
        fs::create_dir(&hybrid).unwrap();
        fs::write(hybrid.join("type"), "10\n").unwrap();
        fs::write(hybrid.join("cpus"), "0-1\n").unwrap();
        let fast = HostPmu { perf_type: 10, core: CoreKind::Performance, cpus: Some(vec![0, 1]) };
        assert_eq!(HostPmu::find_in(dir.path()), Some(fast));
    }

    #[test]
    fn capabilities_are_read() {
        let status = "Name:\tvmft\nCapPrm:\t0000000000000000\nCapEff:\t0000004000000000\n";
        assert_eq!(effective_capabilities(status), Some(1 << CAP_PERFMON));
        assert_eq!(effective_capabilities("Name:\tvmft\n"), None);
    }
}
