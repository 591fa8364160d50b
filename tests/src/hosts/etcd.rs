//! A real etcd of three members, in a test's network, where the hosts reach it over the log link.
//!
//! Owns: the processes and their data. States of a member: starting -> answering -> frozen and let go at will -> killed,
//! at the latest on drop.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::tool::{self, Background};
use super::{HostError, Link, Net};

/// What members listen on: for clients, and for each other.
const PORTS: [(u16, u16); 3] = [(2379, 2380), (2381, 2382), (2383, 2384)];
/// Longest that it may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running etcd.
#[derive(Debug)]
pub struct Etcd {
    members: Vec<Option<Background>>,
    namespace: String,
}

impl Etcd {
    /// Starts one that remembers nothing, and waits until all of it listens, which it does once it has a leader. One at a
    /// time in a network.
    pub fn start(net: &Net, name: &str) -> Result<Etcd, HostError> {
        let start = |number| start_member(net, name, number).map(Some);
        let members = (0..PORTS.len()).map(start).collect::<Result<Vec<_>, _>>()?;
        let mut etcd = Etcd { members, namespace: net.namespace().to_owned() };
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
        Ok(etcd)
    }

    /// Where the hosts reach its members: `HOST:PORT,HOST:PORT,HOST:PORT`.
    pub fn endpoints() -> String {
        PORTS.map(|(port, _)| format!("{}:{port}", Link::Log.own_address())).join(",")
    }

    /// Freezes what lives of it: connections are taken by the kernel, and nothing answers.
    pub fn stop(&mut self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn cont(&mut self) {
        self.signal(Signal::SIGCONT);
    }

    fn signal(&mut self, signal: Signal) {
        self.members.iter_mut().flatten().for_each(|member| member.signal(signal));
    }

    /// Kills member `number`, from 0, in the order of [`Etcd::endpoints`].
    pub fn kill(&mut self, number: usize) {
        self.members[number] = None;
    }

    /// Freezes member `number`, or lets it go on.
    pub fn freeze(&mut self, number: usize, frozen: bool) {
        if let Some(member) = &mut self.members[number] {
            member.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT });
        }
    }

    /// The keys that begin with `prefix`, in order.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>, HostError> {
        let text = tool::run(&format!(
            "ip netns exec {} env ETCDCTL_API=3 etcdctl --endpoints={} get --prefix --keys-only {prefix}",
            self.namespace,
            Etcd::endpoints()
        ))?;
        Ok(text.lines().filter(|line| !line.is_empty()).map(String::from).collect())
    }
}

fn start_member(net: &Net, name: &str, number: usize) -> Result<Background, HostError> {
    let (client, peer) = PORTS[number];
    let client = format!("http://{}:{client}", Link::Log.own_address());
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
    Background::start(&mut command, data.with_extension("log"))
}
