//! A host that is a network namespace on this machine: for machines with a good /dev/kvm of their own.
//!
//! It has the interfaces of a QEMU host (br0 with eth0, eth1, eth2), as veth pairs to the test's bridges, and runs
//! the same agent. It shares the machine's files and clock. States are those of `qemu`.

use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;

use super::protocol::AGENT_PORT;
use super::tool::{self, Background};
use super::{HostError, Images, Link, Net, leftovers};

/// A namespace and the agent in it.
#[derive(Debug)]
pub(super) struct NetnsMachine {
    namespace: String,
    agent: Background,
    dead: bool,
}

impl NetnsMachine {
    /// Makes host `index`; `dir` takes its console log.
    pub(super) fn start(net: &Net, index: u8, dir: &Path) -> Result<NetnsMachine, HostError> {
        let agent = Images::ensure()?.agent();
        let namespace = format!("{}-h{index}", net.namespace());
        tool::run(&format!("ip netns add {namespace}"))?;
        if let Err(error) = join_networks(net, &namespace, index) {
            leftovers::remove_namespace(&namespace)?;
            return Err(error);
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace]);
        command.arg(&agent).arg(format!("{}:{AGENT_PORT}", Link::Ctl.host_address(index)));
        let agent = Background::start(&mut command, dir.join("console.log"))?;
        Ok(NetnsMachine { namespace, agent, dead: false })
    }

    /// What the agent has printed.
    pub(super) fn console(&self) -> String {
        self.agent.log()
    }

    /// True until the host is killed.
    pub(super) fn is_running(&mut self) -> bool {
        self.agent.is_running()
    }

    /// Kills all processes of the host and takes its links away.
    pub(super) fn kill(&mut self) {
        if !self.dead {
            self.dead = true;
            if let Err(error) = leftovers::remove_namespace(&self.namespace) {
                eprintln!("{error}");
            }
            self.agent.kill();
        }
    }

    /// Stops all processes of the host or lets them go on.
    pub(super) fn freeze(&mut self, stop: bool) {
        let signal = if stop { Signal::SIGSTOP } else { Signal::SIGCONT };
        if let Err(error) = leftovers::signal_namespace(&self.namespace, signal) {
            eprintln!("{error}");
        }
    }
}

impl Drop for NetnsMachine {
    fn drop(&mut self) {
        self.kill();
    }
}

fn join_networks(net: &Net, namespace: &str, index: u8) -> Result<(), HostError> {
    let inside = |arguments: &str| tool::run(&format!("ip -n {namespace} {arguments}"));
    inside("link set lo up")?;
    inside("link add br0 type bridge mcast_snooping 0")?;
    inside("link set br0 up")?;
    inside("tuntap add mode tap name tap0")?;
    inside("link set tap0 master br0 up")?;
    for (number, link) in Link::ALL.into_iter().enumerate() {
        let outside = link.interface(index);
        net.ip(&format!("link add {outside} type veth peer name eth{number} netns {namespace}"))?;
        net.ip(&format!("link set {outside} master {} up", link.bridge()))?;
        inside(&format!("link set eth{number} up"))?;
        let interface = match link {
            Link::Guest => {
                inside(&format!("link set eth{number} master br0"))?;
                "br0".to_owned()
            }
            Link::Log | Link::Ctl => format!("eth{number}"),
        };
        inside(&format!("addr add {}/24 dev {interface}", link.host_address(index)))?;
    }
    Ok(())
}
