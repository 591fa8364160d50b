//! What an operator's client and a monitor say to each other: one JSON object on a line, each way.
//!
//! Owns: requests, replies and their version; docs/control.md shows them. Must never: do I/O.
//!
//! ```text
//! client   {"vmft":1,"command":"status"}
//! monitor  {"vmft":1,"status":{...}}           or  {"vmft":1,"done":"..."}
//!          {"vmft":1,"refused":{"reason":"..","text":"..","primary":{..}}}
//! ```

use serde::{Deserialize, Serialize};

/// The version of the protocol. Both sides must have the same; a reply to another version says so.
pub const CONTROL_VERSION: u32 = 1;
/// Longest request, with its line feed.
pub const MAX_REQUEST_BYTES: usize = 4 << 10;
/// Longest reply, with its line feed.
pub const MAX_REPLY_BYTES: usize = 64 << 10;

/// What a monitor can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// How do things stand?
    Status,
    /// Let the backup take over, and become its backup.
    Switch,
    /// Let the guest stand.
    Pause,
    /// Let it go on.
    Resume,
    /// Press its power button.
    Shutdown,
    /// End it, and both monitors.
    PowerOff,
    /// Let the backup go.
    DropBackup,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// [`CONTROL_VERSION`].
    pub vmft: u32,
    /// What is asked.
    pub command: Command,
}

/// A reply.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// [`CONTROL_VERSION`].
    pub vmft: u32,
    /// What the monitor says.
    #[serde(flatten)]
    pub answer: Answer,
}

/// What a monitor answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// How things stand.
    Status(Box<Status>),
    /// It is done, or will be as soon as it can.
    Done(String),
    /// No, and why.
    Refused(Refusal),
}

/// Why a monitor does not do what it is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub text: String,
    /// Who is the primary, if this monitor is not and knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<Peer>,
}

/// The kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The request speaks another version.
    Version,
    /// The request is not one.
    BadRequest,
    /// This monitor is not the primary.
    NotPrimary,
    /// There is no backup that could be meant.
    NoBackup,
    /// Not while the guest is paused.
    Paused,
    /// Not at this moment.
    Busy,
}

/// What a monitor is for its guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Nothing yet, or nothing any more.
    #[default]
    None,
    /// It runs the guest.
    Primary,
    /// It follows, or is about to.
    Backup,
    /// It waits for a primary without a backup.
    Standby,
}

impl Role {
    /// The name in JSON, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Primary => "primary",
            Self::Backup => "backup",
            Self::Standby => "standby",
        }
    }
}

/// The other monitor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its host's name, once it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// A primary: its `--listen`. A backup: where its connection comes from.
    pub address: String,
    /// Where a backup would take a backup of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<String>,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.host {
            Some(host) => write!(f, "{host} ({})", self.address),
            None => f.write_str(&self.address),
        }
    }
}

/// How things stand with one monitor.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The guest's name.
    pub name: String,
    /// This monitor's host.
    pub host: String,
    /// This monitor's process.
    pub pid: u32,
    /// This monitor's version and the digest of its program.
    pub version: String,
    /// For how long this process has run, in seconds.
    pub uptime_s: u64,
    /// What this monitor is.
    pub role: Role,
    /// The view; 0 before the first.
    pub view: u64,
    /// Would the guest survive the loss of its host?
    pub protected: bool,
    /// When role or protection changed last: seconds since 1970, by this host's clock.
    pub since_unix_s: u64,
    /// The same, in seconds before now.
    pub since_s: u64,
    /// Why they changed.
    pub cause: String,
    /// The other monitor, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Peer>,
    /// The guest on its way to a backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Transfer>,
    /// Figures, once there is a guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figures: Option<Figures>,
}

/// A guest on its way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Which way.
    pub direction: Direction,
    /// The other host.
    pub host: String,
    /// How much of the memory has been sent, or received, once.
    pub percent: u32,
    /// How often what was written meanwhile has been sent. Known where it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rounds: Option<u32>,
    /// Pages sent again in them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages_again: Option<u64>,
}

/// Which way a guest goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// To a backup.
    #[default]
    Sending,
    /// From the primary.
    Receiving,
}

/// Numbers of a guest that runs or follows here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// The guest's position.
    pub anchors: u64,
    /// The log since the backup was given the guest.
    pub log: LogFigures,
    /// A primary's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary: Option<PrimaryFigures>,
}

/// Numbers of the log: sent on a primary, received on a backup.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LogFigures {
    /// Bytes; on a backup without framing.
    pub bytes: u64,
    /// Bytes a second, over the last seconds.
    pub bytes_per_s: u64,
    /// Batches.
    pub batches: u64,
    /// Bytes that are not executed yet: known on a backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queued_bytes: Option<u64>,
}

/// Numbers that a primary has. Those of log, lag and checkpoints begin anew with each backup.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PrimaryFigures {
    /// Does the guest stand because it was paused?
    pub paused: bool,
    /// Age of the oldest batch that the backup is not known to have executed.
    pub lag_ms: u64,
    /// From a batch's sending to the news that it is executed: median.
    pub lag_p50_us: u64,
    /// The same: 99th percentile.
    pub lag_p99_us: u64,
    /// For how long the guest was held up because of the lag.
    pub paced_ms: u64,
    /// Outputs let out since this monitor runs the guest.
    pub outputs: u64,
    /// Outputs that wait.
    pub outputs_held: u64,
    /// Sum of the times for which outputs have waited.
    pub output_delay_sum_us: u64,
    /// Longest of them.
    pub output_delay_max_us: u64,
    /// Outputs that were acknowledged and had to wait for the lease.
    pub lease_refusals: u64,
    /// Checkpoints.
    pub checkpoints: u64,
    /// Pages in them.
    pub checkpoint_pages: u64,
    /// For how long the guest stood still for one: median.
    pub checkpoint_pause_p50_us: u64,
    /// The same: 99th percentile.
    pub checkpoint_pause_p99_us: u64,
    /// For how long an event may wait for the guest's next exit at present.
    pub defer_ms: u64,
    /// Longest time for which no heartbeat of the backup's was answered.
    pub silence_max_ms: u64,
}

/// What can be read of every version's messages.
#[derive(Deserialize)]
struct Version {
    vmft: u32,
}

/// Reads a request, which is a line without its end.
pub fn read_request(line: &[u8]) -> Result<Command, Refusal> {
    let bad = |error: serde_json::Error| Refusal {
        reason: Reason::BadRequest,
        text: format!(
            "this is no request: {error}; one looks like {{\"vmft\":{CONTROL_VERSION},\"command\":\"status\"}}"
        ),
        primary: None,
    };
    // The version alone first: another version's request may look different.
    let Version { vmft } = serde_json::from_slice(line).map_err(bad)?;
    if vmft != CONTROL_VERSION {
        return Err(Refusal {
            reason: Reason::Version,
            text: format!("the request speaks version {vmft}, this monitor speaks {CONTROL_VERSION}"),
            primary: None,
        });
    }
    serde_json::from_slice(line).map(|request: Request| request.command).map_err(bad)
}

/// Reads a reply, which is a line. An error says what is wrong with it.
pub fn read_reply(line: &[u8]) -> Result<Answer, String> {
    let bad = |error: serde_json::Error| error.to_string();
    // The version alone first, as above.
    let Version { vmft } = serde_json::from_slice(line).map_err(bad)?;
    if vmft != CONTROL_VERSION {
        return Err(format!("it speaks version {vmft}, this program speaks {CONTROL_VERSION}"));
    }
    serde_json::from_slice(line).map(|reply: Reply| reply.answer).map_err(bad)
}

/// A reply as a line.
pub fn write_reply(answer: Answer) -> Vec<u8> {
    let reply = Reply { vmft: CONTROL_VERSION, answer };
    // Nothing in it can fail to be written: no maps with keys that are no text, no writer that fails.
    let mut line = serde_json::to_vec(&reply).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        Status {
            name: "web".into(),
            host: "alpha".into(),
            pid: 17,
            version: "0.1.0+0123456789abcdef".into(),
            uptime_s: 90,
            role: Role::Primary,
            view: 3,
            protected: true,
            since_unix_s: 1_700_000_000,
            since_s: 60,
            cause: "beta has loaded the guest".into(),
            peer: Some(Peer {
                host: Some("beta".into()),
                address: "192.0.2.2:51234".into(),
                listen: Some("192.0.2.2:7700".into()),
            }),
            transfer: None,
            figures: Some(Figures {
                anchors: 1_000,
                log: LogFigures { bytes: 4_096, bytes_per_s: 512, batches: 8, queued_bytes: None },
                primary: Some(PrimaryFigures { lag_ms: 2, outputs: 5, ..PrimaryFigures::default() }),
            }),
        }
    }

    #[test]
    fn messages_are_written_as_documented() {
        let request = Request { vmft: CONTROL_VERSION, command: Command::Status };
        assert_eq!(serde_json::to_string(&request).unwrap(), r#"{"vmft":1,"command":"status"}"#);
        let reply = String::from_utf8(write_reply(Answer::Status(Box::new(status())))).unwrap();
        assert_eq!(reply, include_str!("golden/status.json"));
        let refusal = Refusal {
            reason: Reason::Version,
            text: "the request speaks version 2, this monitor speaks 1".into(),
            primary: None,
        };
        let not_primary = Refusal {
            reason: Reason::NotPrimary,
            text: "this monitor is a backup; the primary is alpha (192.0.2.1:7700)".into(),
            primary: Some(Peer {
                host: Some("alpha".into()),
                address: "192.0.2.1:7700".into(),
                listen: None,
            }),
        };
        let replies = [
            Answer::Refused(refusal),
            Answer::Refused(not_primary),
            Answer::Done("the guest goes on".into()),
        ];
        let replies = String::from_utf8(replies.map(write_reply).concat()).unwrap();
        assert_eq!(replies, include_str!("golden/short.json"));
        let commands = [
            (Command::Switch, "switch"),
            (Command::Pause, "pause"),
            (Command::Resume, "resume"),
            (Command::Shutdown, "shutdown"),
            (Command::PowerOff, "power-off"),
            (Command::DropBackup, "drop-backup"),
        ];
        for (command, name) in commands {
            assert_eq!(serde_json::to_string(&command).unwrap(), format!("\"{name}\""));
        }
    }

    #[test]
    fn replies_are_read_back() {
        let receiving =
            Transfer { direction: Direction::Receiving, host: "alpha".into(), ..Transfer::default() };
        let status = Status { transfer: Some(receiving), figures: None, peer: None, ..status() };
        let answer = Answer::Status(Box::new(status));
        assert_eq!(read_reply(&write_reply(answer.clone())), Ok(answer));
        // Another version is told by its name, whatever else it says.
        let other = read_reply(b"{\"vmft\":2,\"said\":[]}\n");
        assert_eq!(other, Err("it speaks version 2, this program speaks 1".to_owned()));
    }

    #[test]
    fn what_is_no_request_is_refused_by_reason() {
        assert_eq!(read_request(br#"{"vmft":1,"command":"status"}"#), Ok(Command::Status));
        let reason = |line: &[u8]| read_request(line).map_err(|refusal| refusal.reason);
        assert_eq!(reason(br#"{"vmft":2,"order":["status"]}"#), Err(Reason::Version));
        for bad in [
            &b""[..],
            b"status",
            b"{}",
            b"\xff\xfe",
            br#"{"vmft":-1,"command":"status"}"#,
            br#"{"vmft":1}"#,
            br#"{"vmft":1,"command":"explode"}"#,
            br#"{"vmft":1,"command":"status","more":1}"#,
        ] {
            assert_eq!(reason(bad), Err(Reason::BadRequest), "{}", String::from_utf8_lossy(bad));
        }
    }
}
