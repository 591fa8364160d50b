//! A real etcd of one member, in a test's network, where the hosts reach it over the log link.
//!
//! Owns: the process and its data. States: starting -> answering -> stopped and continued at will -> killed on drop.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::tool::{self, Background};
use super::{HostError, Link, Net};

const CLIENT_PORT: u16 = 2379;
/// Longest that it may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running etcd.
#[derive(Debug)]
pub struct Etcd {
    process: Background,
    namespace: String,
}

impl Etcd {
    /// Starts one that remembers nothing, and waits until it listens. One at a time in a network.
    pub fn start(net: &Net, name: &str) -> Result<Etcd, HostError> {
        let data = net.run_dir().join(format!("etcd-{name}"));
        let client = format!("http://{}", Etcd::endpoint());
        let mut command = Command::new("ip");
        command.args(["netns", "exec", net.namespace(), "etcd", "--data-dir"]).arg(&data);
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        let log = net.run_dir().join(format!("etcd-{name}.log"));
        let mut process = Background::start(&mut command, log)?;
        let deadline = Instant::now() + START_TIMEOUT;
        let address = SocketAddr::from((Link::Log.own_address(), CLIENT_PORT));
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
        Ok(Etcd { process, namespace: net.namespace().to_owned() })
    }

    /// Where the hosts reach it.
    pub fn endpoint() -> String {
        format!("{}:{CLIENT_PORT}", Link::Log.own_address())
    }

    /// Freezes it: connections are taken by the kernel, and nothing answers.
    pub fn stop(&mut self) {
        self.process.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn cont(&mut self) {
        self.process.signal(Signal::SIGCONT);
    }

    /// The keys that begin with `prefix`, in order.
    pub fn keys(&self, prefix: &str) -> Result<Vec<String>, HostError> {
        let text = tool::run(&format!(
            "ip netns exec {} env ETCDCTL_API=3 etcdctl --endpoints={} get --prefix --keys-only {prefix}",
            self.namespace,
            Etcd::endpoint()
        ))?;
        Ok(text.lines().filter(|line| !line.is_empty()).map(String::from).collect())
    }
}
