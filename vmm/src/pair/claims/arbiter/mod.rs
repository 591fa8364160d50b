//! Where claims are kept: something that both hosts can ask, and that gives each name a record once.
//!
//! Owns: what `--arbiter` may say, and what every arbiter promises. Must never: know what is in a record
//! (`claims/claim.rs` does), or take silence for an answer.
//!
//! ```text
//!   Claims ── create(guest, view, record) ──> New       the view had no record, and has this one for good
//!                                             Exists    it has one for good: another's, or ours from an attempt
//!                                                       of which the answer was lost
//!                                             Unknown   nothing is known; ask again
//! ```
//!
//! An arbiter has an id that both sides compare before they form a pair: two arbiters would give two winners. It
//! looks at the id again with every record, so that one that was replaced meanwhile (a directory that is not mounted
//! any more, an etcd that lost its data) decides nothing.
//!
//! Not covered: an arbiter that forgets records and keeps its id.

mod access;
pub mod dir;
pub mod etcd;

use std::fmt;
use std::io;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use ft_log::to_hex;

pub use access::{Access, AccessError, EtcdFiles};

use crate::host::random_bytes;
use crate::pair::claims::claim::{Lines, id_of};

/// The answer to [`Arbiter::create`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Created {
    /// The view had no record and now has this one. It outlives a crash of the arbiter.
    New,
    /// The view has a record, which outlives a crash of the arbiter.
    Exists(Vec<u8>),
    /// The record may or may not have been made, now or later. Ask again with the same one.
    Unknown {
        /// What went wrong.
        why: String,
    },
}

/// Keeps a record for each view of each guest, written once and never changed. All methods may be called from any
/// thread; how long they may take is each arbiter's to say.
pub trait Arbiter: fmt::Debug + fmt::Display + Send + Sync {
    /// Equal on two hosts that ask the same arbiter.
    fn id(&self) -> [u8; 16];

    /// Makes `record` the record of `view`, if it has none.
    fn create(&self, guest: &str, view: u64, record: &[u8]) -> Result<Created, ArbiterError>;

    /// The record of `view`, if it has one.
    fn read(&self, guest: &str, view: u64) -> Result<Option<Vec<u8>>, ArbiterError>;

    /// The highest view that has a record, and the record.
    fn latest(&self, guest: &str) -> Result<Option<(u64, Vec<u8>)>, ArbiterError>;

    /// Where the record of `view` is kept, as an operator would look for it.
    fn place(&self, guest: &str, view: u64) -> String;

    /// How an operator removes all records of `guest`: an imperative.
    fn removal(&self, guest: &str) -> String;
}

/// Why an arbiter cannot be used. None of these means that a view was lost.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterError {
    /// There is no such directory.
    #[error(
        "Claims directory '{path}' does not exist; create it on storage that both hosts see, and mount it here"
    )]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// It is something else.
    #[error("Claims directory '{path}' is not a directory")]
    NotADirectory {
        /// What is there.
        path: PathBuf,
    },
    /// Nothing can be created in it.
    #[error("Claims directory '{path}' cannot be written; both monitors need to create files in it")]
    NotWritable {
        /// The directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// It has no room for a claim.
    #[error("Claims directory '{path}' is full; free some space there, a claim needs less than 1 KiB")]
    Full {
        /// The directory.
        path: PathBuf,
    },
    /// The file system refused for certain: no claim was made.
    #[error("No claim was made, since '{path}' cannot be created (hard links must be possible there)")]
    NotMade {
        /// The claim.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Its id is not as this module writes it.
    #[error(
        "The arbiter's id, {place}, is damaged ({why}); find out whether monitors use it before it is removed by hand"
    )]
    DamagedId {
        /// Where it is.
        place: String,
        /// What is wrong with it.
        why: String,
    },
    /// This host has no random number for an id.
    #[error("No random number for the arbiter's id: {source}")]
    Random {
        /// What the host said.
        source: io::Error,
    },
    /// No endpoint of an etcd answers.
    #[error(
        "The arbiter {place} does not answer ({why}); start it, or correct --arbiter, or --etcd-ca if it wants TLS"
    )]
    Unreachable {
        /// Its endpoints.
        place: String,
        /// What came of each.
        why: String,
    },
    /// An etcd does not let this monitor in.
    #[error("No permission at the arbiter: {why}")]
    Refused {
        /// Who refuses, and what to do.
        why: String,
    },
    /// The options do not say how it is asked.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// What an etcd has stored, or answers, is not from here.
    #[error("The arbiter {place} cannot be used: {why}")]
    Foreign {
        /// Its endpoints.
        place: String,
        /// What is wrong.
        why: String,
    },
    /// A file that the host refuses to read.
    #[error("'{path}' cannot be used")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
}

const KINDS: &str = "dir:PATH or etcd:HOST:PORT[,HOST:PORT...]";

/// What `--arbiter` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ArbiterSpec {
    /// A directory that both hosts share.
    Directory(PathBuf),
    /// An etcd with these endpoints, each HOST:PORT.
    Etcd(Vec<String>),
}

impl ArbiterSpec {
    /// Checks that the arbiter can be used from this host, and finds or makes its id. `etcd` says how an etcd is asked.
    pub fn open(&self, etcd: &EtcdFiles) -> Result<Arc<dyn Arbiter>, ArbiterError> {
        match self {
            Self::Directory(path) => {
                access::refuse_for_directory(etcd)?;
                Ok(Arc::new(dir::Directory::open(path)?))
            }
            Self::Etcd(endpoints) => Ok(Arc::new(etcd::Etcd::open(endpoints, Access::read(etcd)?)?)),
        }
    }
}

impl FromStr for ArbiterSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) =
            text.split_once(':').ok_or_else(|| format!("'{text}' has no kind: use {KINDS}"))?;
        match kind {
            "dir" if rest.is_empty() => Err("the path behind 'dir:' is missing".into()),
            "dir" => Ok(Self::Directory(rest.into())),
            "etcd" => parse_endpoints(rest).map(Self::Etcd),
            other => Err(format!("'{other}' is no kind of arbiter: use {KINDS}")),
        }
    }
}

impl fmt::Display for ArbiterSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "dir:{}", path.display()),
            Self::Etcd(endpoints) => write!(f, "etcd:{}", endpoints.join(",")),
        }
    }
}

fn parse_endpoints(text: &str) -> Result<Vec<String>, String> {
    let endpoints: Vec<&str> = text.split(',').collect();
    if endpoints.len() > etcd::MAX_ENDPOINTS {
        return Err(format!(
            "{} endpoints are more than the {} that can be",
            endpoints.len(),
            etcd::MAX_ENDPOINTS
        ));
    }
    endpoints.into_iter().map(|endpoint| parse_endpoint(endpoint).map(|()| endpoint.to_owned())).collect()
}

/// HOST:PORT, where HOST is a name, an IPv4 address, or an IPv6 address in brackets.
fn parse_endpoint(text: &str) -> Result<(), String> {
    let example = "an endpoint is HOST:PORT, such as 192.0.2.9:2379 or [2001:db8::9]:2379";
    let (host, port) = text
        .rsplit_once(':')
        .ok_or_else(|| format!("'{text}' in the list behind 'etcd:' has no port: {example}"))?;
    let is_host = match host.strip_prefix('[') {
        Some(rest) => rest.strip_suffix(']').is_some_and(|inside| inside.parse::<Ipv6Addr>().is_ok()),
        None => {
            let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-');
            !host.is_empty() && host.len() <= 253 && host.bytes().all(allowed)
        }
    };
    if !is_host {
        return Err(format!("'{host}' in '{text}' is not a host: {example}"));
    }
    match port.parse::<u16>() {
        Ok(number) if number > 0 => Ok(()),
        _ => Err(format!("'{port}' in '{text}' is not a port: {example}")),
    }
}

/// An arbiter's id as it is kept there, under the `header` of that kind of arbiter.
fn encode_id(header: &str, id: &[u8; 16]) -> String {
    format!("{header}\nid {}\nend\n", to_hex(id))
}

/// The id that [`encode_id`] wrote.
fn decode_id(header: &str, contents: &[u8]) -> Result<[u8; 16], String> {
    let mut lines = Lines::start(contents, header)?;
    let id = id_of(lines.field("id")?)?;
    lines.end()?;
    Ok(id)
}

/// Sixteen random bytes: the id of an arbiter or of one life of a monitor.
pub fn random_id() -> io::Result<[u8; 16]> {
    let mut id = [0; 16];
    random_bytes(&mut id)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_parsed_and_shown_alike_or_refused_by_its_part() {
        for text in [
            "dir:/srv/vmft/claims",
            "dir:claims",
            "dir:/a:b",
            "etcd:192.0.2.1:2379",
            "etcd:a.example:2379,b-1:1,[::1]:65535",
        ] {
            assert_eq!(text.parse::<ArbiterSpec>().unwrap().to_string(), text);
        }
        for (text, part) in [
            ("", "'' has no kind"),
            ("/srv/vmft", "'/srv/vmft' has no kind"),
            ("dir:", "behind 'dir:' is missing"),
            ("zookeeper:a:1", "'zookeeper' is no kind"),
            ("etcd:", "'' in the list behind 'etcd:' has no port"),
            ("etcd:a:1,", "'' in the list behind 'etcd:' has no port"),
            ("etcd:a", "'a' in the list behind 'etcd:' has no port"),
            ("etcd:a:1,b:x", "'x' in 'b:x' is not a port"),
            ("etcd:a:0", "'0' in 'a:0' is not a port"),
            ("etcd:a:65536", "'65536' in 'a:65536' is not a port"),
            ("etcd::2379", "'' in ':2379' is not a host"),
            ("etcd:http://a:2379", "'http://a' in 'http://a:2379' is not a host"),
            ("etcd:::1:2379", "'::1' in '::1:2379' is not a host"),
            ("etcd:[::g]:2379", "'[::g]' in '[::g]:2379' is not a host"),
            ("etcd:root:pw@a:2379", "is not a host"),
            (&format!("etcd:{}", ["a:1"; 17].join(",")), "17 endpoints are more than the 16"),
        ] {
            let refusal = text.parse::<ArbiterSpec>().unwrap_err();
            assert!(refusal.contains(part), "{text}: {refusal}");
        }
    }
}
