//! The command line of `ft-demo`, which is that of `run-ft.sh`.
//!
//! Owns: every option, its default and its unit (`usage.txt`). Must never: open anything but to say that it is not
//! there.

use std::fmt;
use std::net::Ipv4Addr;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};

/// What `--help` prints.
pub const USAGE: &str = include_str!("usage.txt");

/// Time between two heartbeats of the monitors, which the demo leaves at its default.
const HEARTBEAT_MS: u32 = 25;
/// What `vmft` takes as `--timeout-ms`, as far as that heartbeat allows it.
const TIMEOUT_MS: std::ops::RangeInclusive<u32> = 3 * HEARTBEAT_MS..=60_000;
/// A day: what boots for longer does not boot.
const BOOT_LIMIT_S: std::ops::RangeInclusive<u32> = 1..=86_400;

/// Where the two hosts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Network namespaces if this machine's KVM is fit, else emulated machines.
    Auto,
    /// Network namespaces of this machine.
    Netns,
    /// Emulated machines.
    Qemu,
}

/// Two machines reached by ssh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remote {
    /// Their names for ssh.
    pub hosts: [String; 2],
    /// Directory that is the same on both.
    pub shared: String,
    /// Tap on each.
    pub tap: String,
    /// Where the primary listens, if not at the first host's address.
    pub listen: Option<String>,
}

/// What shows that the guest is ready, and later that it survived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ready {
    /// A TCP port of the guest that accepts a connection.
    Port(NonZeroU16),
    /// A text in one line of the guest's console.
    Text(String),
}

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Ready::Port(port) => write!(f, "TCP port {port}"),
            Ready::Text(text) => write!(f, "'{text}' on the console"),
        }
    }
}

/// The initramfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Initrd {
    /// The default guest's.
    Ours,
    /// None.
    None,
    /// This one.
    File(PathBuf),
}

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The guest's kernel; `None` for Debian's.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs.
    pub initrd: Initrd,
    /// The disk image to copy; `None` for a fresh one.
    pub disk: Option<PathBuf>,
    /// Added to the kernel command line.
    pub cmdline: String,
    /// Guest memory.
    pub memory_mib: u32,
    /// Silence after which the other side counts as failed; `None` for the default of the hosts.
    pub timeout_ms: Option<u32>,
    /// When the guest is ready; `None`: when the demo's service answers.
    pub ready: Option<Ready>,
    /// How long the guest may take to be ready, and its backup to follow after that, in seconds.
    pub boot_limit_s: u32,
    /// Pace of the client; 0 for a closed loop.
    pub requests_per_s: u32,
    /// Where the hosts are, without [`Options::remote`].
    pub backend: Backend,
    /// Machines reached by ssh.
    pub remote: Option<Remote>,
    /// The guest's address and the length of its network's prefix.
    pub guest_ip: (Ipv4Addr, u8),
}

impl Options {
    /// Parses the arguments behind the program's name. `None`: help was asked for.
    ///
    /// # Errors
    /// A sentence that names the argument at fault.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Option<Options>, String> {
        let mut arguments = arguments.into_iter();
        let mut raw = Raw::default();
        let mut options = Options {
            kernel: None,
            initrd: Initrd::Ours,
            disk: None,
            cmdline: String::new(),
            memory_mib: 256,
            timeout_ms: None,
            ready: None,
            boot_limit_s: 180,
            requests_per_s: 0,
            backend: Backend::Auto,
            remote: None,
            guest_ip: (Ipv4Addr::new(10, 77, 0, 2), 24),
        };
        while let Some(argument) = arguments.next() {
            let name = argument.as_str();
            if !name.starts_with('-') {
                if options.kernel.replace(file(name)?).is_some() {
                    return Err(format!("There is more than one kernel: '{name}' is the second."));
                }
                continue;
            }
            if matches!(name, "--help" | "-h") {
                return Ok(None);
            }
            let mut value = || arguments.next().ok_or_else(|| format!("{name} needs a value."));
            match name {
                "--initrd" => options.initrd = initrd(&value()?)?,
                "--disk" => options.disk = Some(file(&value()?)?),
                "--cmdline" => options.cmdline = value()?,
                "--memory-mib" => options.memory_mib = number(name, &value()?)?,
                "--timeout-ms" => options.timeout_ms = Some(number_in(name, &value()?, TIMEOUT_MS)?),
                "--ready" => {
                    if options.ready.replace(ready(&value()?)?).is_some() {
                        return Err(
                            "--ready is given twice; one text or port shows that the guest is ready.".into(),
                        );
                    }
                }
                "--boot-limit-s" => options.boot_limit_s = number_in(name, &value()?, BOOT_LIMIT_S)?,
                "--requests-per-s" => options.requests_per_s = number(name, &value()?)?,
                "--backend" => raw.backend = Some(backend(&value()?)?),
                "--guest-ip" => options.guest_ip = guest_ip(&value()?)?,
                "--hosts" => raw.hosts = Some(hosts(&value()?)?),
                "--shared" => raw.shared = Some(value()?),
                "--tap" => raw.tap = Some(value()?),
                "--listen" => raw.listen = Some(value()?),
                _ => return Err(format!("There is no option {name}; --help lists them.")),
            }
        }
        options.backend = raw.backend.unwrap_or(Backend::Auto);
        options.remote = raw.remote()?;
        Ok(Some(options))
    }

    /// True if the guest is the default one and nothing else is to be looked for: then its service must answer.
    pub fn expects_service(&self) -> bool {
        self.kernel.is_none() && self.initrd == Initrd::Ours && self.ready.is_none()
    }
}

/// Options that make sense only together.
#[derive(Default)]
struct Raw {
    backend: Option<Backend>,
    hosts: Option<[String; 2]>,
    shared: Option<String>,
    tap: Option<String>,
    listen: Option<String>,
}

impl Raw {
    fn remote(self) -> Result<Option<Remote>, String> {
        let Some(hosts) = self.hosts else {
            let stray = [("--shared", &self.shared), ("--tap", &self.tap), ("--listen", &self.listen)];
            return match stray.into_iter().find(|(_, value)| value.is_some()) {
                Some((name, _)) => Err(format!("{name} needs --hosts.")),
                None => Ok(None),
            };
        };
        if self.backend.is_some() {
            return Err("--hosts and --backend exclude each other.".into());
        }
        let shared = self.shared.ok_or("--hosts needs --shared, a directory that is the same on both.")?;
        let tap = self.tap.unwrap_or_else(|| "tap0".into());
        Ok(Some(Remote { hosts, shared, tap, listen: self.listen }))
    }
}

fn file(value: &str) -> Result<PathBuf, String> {
    let path = Path::new(value);
    if !path.is_file() {
        return Err(format!("There is no file '{value}'."));
    }
    path.canonicalize().map_err(|error| format!("'{value}' cannot be used: {error}."))
}

fn initrd(value: &str) -> Result<Initrd, String> {
    if value == "none" { Ok(Initrd::None) } else { file(value).map(Initrd::File) }
}

fn number(name: &str, value: &str) -> Result<u32, String> {
    value.parse().map_err(|_| format!("{name} takes a whole number, not '{value}'."))
}

fn number_in(name: &str, value: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, String> {
    let number = number(name, value)?;
    if range.contains(&number) {
        return Ok(number);
    }
    Err(format!("{name} takes a number from {} to {}, not {number}.", range.start(), range.end()))
}

fn ready(value: &str) -> Result<Ready, String> {
    if value.trim().is_empty() {
        return Err("--ready takes a TCP port or a text, not an empty one.".into());
    }
    if !value.bytes().all(|byte| byte.is_ascii_digit()) {
        return match value.contains('\n') {
            true => Err("--ready takes a text within one line of the console, not several lines.".into()),
            false => Ok(Ready::Text(value.to_owned())),
        };
    }
    let port = value.parse().map(Ready::Port);
    port.map_err(|_| format!("--ready takes a TCP port from 1 to 65535 or a text, not '{value}'."))
}

fn backend(value: &str) -> Result<Backend, String> {
    match value {
        "auto" => Ok(Backend::Auto),
        "netns" => Ok(Backend::Netns),
        "qemu" => Ok(Backend::Qemu),
        _ => Err(format!("--backend is auto, netns or qemu, not '{value}'.")),
    }
}

fn hosts(value: &str) -> Result<[String; 2], String> {
    let names: Vec<String> = value.split(',').map(str::to_owned).collect();
    <[String; 2]>::try_from(names)
        // ssh would take a name with a dash in front for an option.
        .ok()
        .filter(|names| names.iter().all(|name| !name.is_empty() && !name.starts_with('-')))
        .ok_or_else(|| format!("--hosts takes two names with a comma between, not '{value}'."))
}

fn guest_ip(value: &str) -> Result<(Ipv4Addr, u8), String> {
    let parsed = value.split_once('/').and_then(|(address, len)| {
        let len = len.parse().ok().filter(|len| *len <= 32)?;
        Some((address.parse().ok()?, len))
    });
    parsed.ok_or_else(|| format!("--guest-ip takes an address such as 10.77.0.2/24, not '{value}'."))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Option<Options>, String> {
        Options::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn no_argument_means_the_default_guest() {
        let options = parse("").unwrap().unwrap();
        assert!(options.expects_service());
        assert_eq!((options.memory_mib, options.backend), (256, Backend::Auto));
        assert_eq!((options.timeout_ms, options.ready, options.boot_limit_s), (None, None, 180));
    }

    #[test]
    fn every_option_is_in_the_help_and_is_taken() {
        let line = "--initrd none --disk Cargo.toml --cmdline a=b --memory-mib 300 --requests-per-s 10 \
                    --backend qemu --guest-ip 10.77.0.9/16 --timeout-ms 2000 --ready 22 --boot-limit-s 300 \
                    Cargo.toml";
        let options = parse(line).unwrap().unwrap();
        let file = Path::new("Cargo.toml").canonicalize().unwrap();
        assert_eq!((options.kernel.as_ref(), options.disk.as_ref()), (Some(&file), Some(&file)));
        assert_eq!((options.initrd.clone(), options.cmdline.as_str()), (Initrd::None, "a=b"));
        assert_eq!((options.memory_mib, options.requests_per_s), (300, 10));
        assert_eq!(options.backend, Backend::Qemu);
        assert_eq!(options.guest_ip, (Ipv4Addr::new(10, 77, 0, 9), 16));
        assert_eq!((options.timeout_ms, options.boot_limit_s), (Some(2000), 300));
        assert_eq!(options.ready, NonZeroU16::new(22).map(Ready::Port));
        assert!(!options.expects_service());

        let options = parse("--hosts a,root@b --shared /s --tap t --listen 1.2.3.4:5").unwrap().unwrap();
        let expected = Remote {
            hosts: ["a".into(), "root@b".into()],
            shared: "/s".into(),
            tap: "t".into(),
            listen: Some("1.2.3.4:5".into()),
        };
        assert_eq!(options.remote, Some(expected));
        for name in line.split_whitespace().chain(["--hosts", "--shared", "--tap", "--listen", "--help"]) {
            assert!(!name.starts_with("--") || USAGE.contains(&format!("\n  {name} ")), "{name}");
        }
        assert_eq!(parse("--bogus --help").unwrap_err(), "There is no option --bogus; --help lists them.");
        assert_eq!(parse("--help --bogus"), Ok(None));
    }

    #[test]
    fn ready_is_a_port_or_a_text() {
        let ready =
            |value: &str| Options::parse(["--ready".to_owned(), value.to_owned()]).unwrap().unwrap().ready;
        assert_eq!(ready("65535"), NonZeroU16::new(65535).map(Ready::Port));
        for text in ["login:", "debian login: ", "22/tcp", "-22", "port 22"] {
            assert_eq!(ready(text), Some(Ready::Text(text.to_owned())), "{text}");
        }
        // The default guest is judged by what its user looks for, too.
        assert!(!parse("--ready 7777").unwrap().unwrap().expects_service());
    }

    #[test]
    fn empty_and_many_lines_are_no_text() {
        for (value, culprit) in [("", "empty"), (" ", "empty"), ("a\nb", "several lines")] {
            let error = Options::parse(["--ready".to_owned(), value.to_owned()]).unwrap_err();
            assert!(error.contains(culprit) && error.ends_with('.'), "{value:?}: {error}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (line, culprit) in [
            ("/no/such/kernel", "/no/such/kernel"),
            ("src", "src"),
            ("Cargo.toml Cargo.toml", "more than one kernel"),
            ("--disk", "--disk"),
            ("--memory-mib 1G", "1G"),
            ("--backend xen", "xen"),
            ("--timeout-ms", "--timeout-ms needs a value"),
            ("--timeout-ms 2s", "2s"),
            ("--timeout-ms -1", "-1"),
            ("--timeout-ms 0", "from 75 to 60000, not 0"),
            ("--timeout-ms 74", "from 75 to 60000, not 74"),
            ("--timeout-ms 60001", "from 75 to 60000, not 60001"),
            ("--timeout-ms 99999999999", "99999999999"),
            ("--ready", "--ready needs a value"),
            ("--ready 0", "from 1 to 65535 or a text, not '0'"),
            ("--ready 65536", "from 1 to 65535 or a text, not '65536'"),
            ("--ready 22 --ready login:", "twice"),
            ("--boot-limit-s", "--boot-limit-s needs a value"),
            ("--boot-limit-s 3m", "3m"),
            ("--boot-limit-s 0", "from 1 to 86400, not 0"),
            ("--boot-limit-s 86401", "from 1 to 86400, not 86401"),
            ("--hosts a", "'a'"),
            ("--hosts a,-oProxyCommand=x --shared /s", "-oProxyCommand=x"),
            ("--hosts a,b", "--shared"),
            ("--hosts a,b --shared /s --backend qemu", "--backend"),
            ("--tap tap1", "--hosts"),
            ("--guest-ip 10.0.0.1", "10.0.0.1"),
            ("--guest-ip 10.0.0.1/33", "10.0.0.1/33"),
        ] {
            let error = parse(line).unwrap_err();
            assert!(error.contains(culprit) && error.ends_with('.'), "{line}: {error}");
        }
    }
}
