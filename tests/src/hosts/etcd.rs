//! A real etcd of three members, in a test's network, where the hosts reach it over the log link, by TLS and as a user.
//!
//! Owns: the processes, their data, and the certificates. States of a member: starting -> answering -> frozen and let go
//! at will -> killed, at the latest on drop.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::certificates::{self, CA, CLIENT, SERVER};
use super::tool::{self, Background};
use super::{HostError, Link, Net};

/// What members listen on: for clients, and for each other.
const PORTS: [(u16, u16); 3] = [(2379, 2380), (2381, 2382), (2383, 2384)];
/// The user that the monitors are.
const USER: &str = "monitor:password";
const ROOT: &str = "root:secret";
/// What [`Etcd::admit`] makes of the files, each with the option that names it.
const ADMISSION: [(&str, &str); 4] = [
    ("--etcd-ca", CA),
    ("--etcd-cert", CLIENT[0]),
    ("--etcd-cert-key", CLIENT[1]),
    ("--etcd-user", "etcd-user"),
];
/// Longest that it may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running etcd.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Option<Background>>,
    namespace: String,
    keys: PathBuf,
}

impl Etcd {
    /// Starts one that remembers nothing, and waits until all of it listens, which it does once it has a leader. One at a
    /// time in a network.
    pub fn start(net: &Net, name: &str) -> Result<Etcd, HostError> {
        let keys = net.run_dir().join(format!("etcd-keys-{name}"));
        make_keys(&keys)?;
        let start = |number| start_member(net, name, number, &keys).map(Some);
        let members = (0..PORTS.len()).map(start).collect::<Result<Vec<_>, _>>()?;
        let mut etcd = Etcd { members, namespace: net.namespace().to_owned(), keys };
        let deadline = Instant::now() + START_TIMEOUT;
        for (process, (port, _)) in etcd.members.iter_mut().flatten().zip(PORTS) {
            let address = SocketAddr::from((Link::Log.own_address(), port));
            while net.enter(|| TcpStream::connect_timeout(&address, START_TIMEOUT))?.is_err() {
                process.check()?;
                if Instant::now() > deadline {
                    return Err(HostError::ToolFailed {
                        program: "etcd".into(),
                        status: format!("not listening within {START_TIMEOUT:?}"),
                        stderr: process.log(),
                    });
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        etcd.make_users()?;
        Ok(etcd)
    }

    /// Who may do what, and that nobody else may do anything.
    fn make_users(&self) -> Result<(), HostError> {
        for words in [
            format!("user add {ROOT}").as_str(),
            "user grant-role root root",
            "role add monitor",
            "role grant-permission --prefix monitor readwrite /vmft/",
            format!("user add {USER}").as_str(),
            "user grant-role monitor monitor",
            "auth enable",
        ] {
            self.control("", words)?;
        }
        Ok(())
    }

    /// Puts what monitors need to be let in into `directory`.
    pub fn admit(&self, directory: &Path) -> Result<(), HostError> {
        for (_, name) in ADMISSION {
            let to = directory.join(name);
            fs::copy(self.keys.join(name), &to).map_err(HostError::file(&to))?;
        }
        Ok(())
    }

    /// The options by which a monitor is let in, if what it needs is in `directory`.
    pub fn options(directory: &str) -> Vec<String> {
        ADMISSION
            .iter()
            .flat_map(|(option, name)| [(*option).to_owned(), format!("{directory}/{name}")])
            .collect()
    }

    fn control(&self, options: &str, words: &str) -> Result<String, HostError> {
        let file = |name: &str| self.keys.join(name).display().to_string();
        let (ca, certificate, key) = (file(CA), file(CLIENT[0]), file(CLIENT[1]));
        tool::run(&format!(
            "ip netns exec {} env ETCDCTL_API=3 etcdctl --endpoints={} --cacert={ca} --cert={certificate} --key={key} \
             {options} {words}",
            self.namespace,
            Etcd::endpoints()
        ))
    }

    /// Where the hosts reach its members: `HOST:PORT,HOST:PORT,HOST:PORT`.
    pub fn endpoints() -> String {
        PORTS.map(|(port, _)| format!("{}:{port}", Link::Log.own_address())).join(",")
    }

    /// Kills member `number`, from 0, in the order of [`Etcd::endpoints`].
    pub fn kill(&mut self, number: usize) {
        self.members[number] = None;
    }

    /// Freezes what lives of these members, or lets them go on. Of frozen ones the kernel takes connections, and nothing answers.
    pub fn freeze(&mut self, numbers: Range<usize>, frozen: bool) {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        self.members[numbers].iter_mut().flatten().for_each(|member| member.signal(signal));
    }

    /// The keys that begin with `prefix`, in order.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>, HostError> {
        let text = self.control(&format!("--user={ROOT}"), &format!("get --prefix --keys-only {prefix}"))?;
        Ok(text.lines().filter(|line| !line.is_empty()).map(String::from).collect())
    }
}

/// Makes what members and those who ask them show each other.
fn make_keys(directory: &Path) -> Result<(), HostError> {
    fs::create_dir(directory)
        .and_then(|()| certificates::make(directory, &Link::Log.own_address().to_string()))
        .and_then(|()| certificates::write_secret(&directory.join("etcd-user"), &format!("{USER}\n")))
        .map_err(HostError::file(directory))
}

fn start_member(net: &Net, name: &str, number: usize, keys: &Path) -> Result<Background, HostError> {
    let (client, peer) = PORTS[number];
    let client = format!("https://{}:{client}", Link::Log.own_address());
    let peer_of = |peer| format!("http://127.0.0.1:{peer}");
    let member = |number: usize| format!("{name}-{number}");
    let cluster: Vec<String> = PORTS
        .iter()
        .enumerate()
        .map(|(at, (_, port))| format!("{}={}", member(at), peer_of(*port)))
        .collect();
    let data = net.run_dir().join(format!("etcd-{}", member(number)));
    let mut command = Command::new("ip");
    command
        .args(["netns", "exec", net.namespace(), "etcd", "--name", &member(number), "--data-dir"])
        .arg(&data);
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer_of(peer), "--initial-advertise-peer-urls", &peer_of(peer)]);
    command.args(["--initial-cluster-state", "new", "--initial-cluster", &cluster.join(",")]);
    for (option, name) in [("--cert-file", SERVER[0]), ("--key-file", SERVER[1]), ("--trusted-ca-file", CA)] {
        command.arg(option).arg(keys.join(name));
    }
    command.arg("--client-cert-auth");
    Background::start(&mut command, data.with_extension("log"))
}
