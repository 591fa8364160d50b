//! Hosts reached by ssh.
//!
//! Owns: the ssh clients, and the processes on the other machines that they belong to. Must never: ask for a
//! password, or leave a process or file behind on the other machine.
//!
//! A program's number is the first line that its shell prints; the program then takes the shell's place.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::DemoError;
use super::host::{Host, Monitor};
use crate::hosts::Ending;
use crate::lock;

/// Between two looks at whether a killed process is gone, in seconds.
const GONE_INTERVAL_S: &str = "0.02";
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A machine that `ssh NAME` reaches.
#[derive(Debug, Clone)]
pub(super) struct SshHost {
    name: String,
}

impl SshHost {
    pub(super) fn new(name: &str) -> SshHost {
        SshHost { name: name.to_owned() }
    }

    /// The machine's address on the connection from here.
    pub(super) fn address(&self) -> Result<IpAddr, DemoError> {
        let script = "set -- $SSH_CONNECTION; echo $3";
        let said = self.command(script).output();
        let said = self.checked(script, said)?;
        said.trim().parse().map_err(|_| self.failed(script, "success", &format!("'{said}' is no address")))
    }

    /// Copies a file of this machine.
    pub(super) fn copy(&self, file: &Path, path: &str, mode: &str) -> Result<(), DemoError> {
        let input = File::open(file).map_err(DemoError::file(file))?;
        let script = format!("cat >{0} && chmod {mode} {0}", quoted(path));
        let said = self.command(&script).stdin(input).output();
        self.checked(&script, said).map(drop)
    }

    /// A client that runs a shell command there.
    fn command(&self, script: &str) -> Command {
        let mut command = Command::new("ssh");
        let timeout = format!("ConnectTimeout={}", CONNECT_TIMEOUT.as_secs());
        command.args(["-o", "BatchMode=yes", "-o", &timeout, "--", &self.name, script]);
        command.stdin(Stdio::null());
        command
    }

    fn checked(&self, script: &str, output: std::io::Result<Output>) -> Result<String, DemoError> {
        let output =
            output.map_err(|error| self.failed(script, "cannot be sent by ssh", &error.to_string()))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            return Err(self.failed(script, &output.status.to_string(), said.trim()));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn failed(&self, script: &str, ending: &str, said: &str) -> DemoError {
        let (command, host) = (script.to_owned(), self.name.clone());
        DemoError::Command { command, host, ending: ending.to_owned(), said: said.to_owned() }
    }
}

impl Host for SshHost {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn start(&self, argv: &[&str]) -> Result<Arc<dyn Monitor>, DemoError> {
        let words: Vec<String> = argv.iter().map(|word| quoted(word)).collect();
        let script = format!("echo $$; exec {}", words.join(" "));
        let mut command = self.command(&script);
        let mut client = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| self.failed(&script, "cannot be sent by ssh", &error.to_string()))?;
        let printed = Arc::new(Mutex::new(Printed::default()));
        let mut first = String::new();
        let mut stdout = client.stdout.take().map(BufReader::new);
        let read = stdout.as_mut().map(|stdout| stdout.read_line(&mut first));
        let pid: Option<u32> = first.trim().parse().ok();
        if let Some(stderr) = client.stderr.take() {
            collect(stderr, Arc::clone(&printed), false);
        }
        let (Some(pid), Some(Ok(_)), Some(stdout)) = (pid, read, stdout) else {
            let ended = client.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
            return Err(self.failed(&script, &ended, &lock(&printed).lines.join("; ")));
        };
        collect(stdout, Arc::clone(&printed), true);
        Ok(Arc::new(SshProcess { host: self.clone(), pid, client: Mutex::new(client), printed }))
    }

    fn shell(&self, script: &str) -> Result<String, DemoError> {
        let output = self.command(script).output();
        self.checked(script, output)
    }
}

/// A program on the other machine and the client that it belongs to.
struct SshProcess {
    host: SshHost,
    pid: u32,
    client: Mutex<Child>,
    printed: Arc<Mutex<Printed>>,
}

/// What came out of a program.
#[derive(Default)]
struct Printed {
    /// The lines of both its streams.
    lines: Vec<String>,
    /// The start of a line of standard output that has no end yet.
    unfinished: Vec<u8>,
}

impl Monitor for SshProcess {
    fn lines_from(&self, seen: usize) -> Vec<String> {
        lock(&self.printed).lines.iter().skip(seen).cloned().collect()
    }

    fn unfinished_line(&self) -> String {
        String::from_utf8_lossy(&lock(&self.printed).unfinished).into_owned()
    }

    fn ending(&self) -> Option<Ending> {
        match lock(&self.client).try_wait() {
            Ok(None) => None,
            // 255 is for a signal there as well as for a lost connection.
            Ok(Some(status)) => Some(match status.code() {
                Some(code) if code != 255 => Ending::Exited(code),
                _ => Ending::Lost("ssh does not say how".into()),
            }),
            Err(error) => Some(Ending::Lost(error.to_string())),
        }
    }

    fn kill(&self) -> Result<(), DemoError> {
        let pid = self.pid;
        let script =
            format!("kill -9 {pid} && while kill -0 {pid} 2>/dev/null; do sleep {GONE_INTERVAL_S}; done");
        self.host.shell(&script).map(drop)
    }
}

impl Drop for SshProcess {
    fn drop(&mut self) {
        if Monitor::ending(self).is_none()
            && let Err(error) = self.kill()
        {
            eprintln!("{error}");
        }
        let mut client = lock(&self.client);
        // Errors mean that it has ended before.
        let _ = client.kill();
        let _ = client.wait();
    }
}

/// A new directory on the other machine; it goes away with this.
pub(super) struct SshDir {
    host: SshHost,
    path: String,
}

impl SshDir {
    /// Fails if the directory exists.
    pub(super) fn create(host: &SshHost, path: String) -> Result<SshDir, DemoError> {
        host.shell(&format!("mkdir {}", quoted(&path)))?;
        Ok(SshDir { host: host.clone(), path })
    }
}

impl Drop for SshDir {
    fn drop(&mut self) {
        if let Err(error) = self.host.shell(&format!("rm -r {}", quoted(&self.path))) {
            eprintln!("{error}");
        }
    }
}

/// Collects the lines of a stream; `prompts`: what comes before a line's end, too.
fn collect(stream: impl Read + Send + 'static, printed: Arc<Mutex<Printed>>, prompts: bool) {
    thread::spawn(move || {
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        loop {
            let (taken, ended) = match stream.fill_buf() {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Ok([]) | Err(_) => break,
                Ok(bytes) => {
                    let end = bytes.iter().position(|&byte| byte == b'\n');
                    line.extend_from_slice(&bytes[..end.unwrap_or(bytes.len())]);
                    (end.map_or(bytes.len(), |end| end + 1), end.is_some())
                }
            };
            stream.consume(taken);
            let mut printed = lock(&printed);
            if ended {
                printed.lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
            if prompts {
                printed.unfinished.clone_from(&line);
            }
        }
        if !line.is_empty() {
            lock(&printed).lines.push(String::from_utf8_lossy(&line).trim_end().to_owned());
        }
    });
}

/// As one word of a shell command.
pub(super) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn quoted_words_reach_a_program_as_they_were() {
        for word in ["", "plain", "two words", "it's", "$HOME `id` \"x\" \\", "-n\nline"] {
            let script = format!("printf %s {}", quoted(word));
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }

    #[test]
    fn prompt_is_there_before_its_line_ends() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let printed = Arc::new(Mutex::new(Printed::default()));
        collect(ours, Arc::clone(&printed), true);
        let until = |wanted: &dyn Fn(&Printed) -> bool| {
            while !wanted(&lock(&printed)) {
                thread::yield_now();
            }
        };
        theirs.write_all(b"one\r\nlogin: ").unwrap();
        until(&|printed| printed.lines == ["one"] && printed.unfinished == b"login: ");
        theirs.write_all(b"root\nlast").unwrap();
        drop(theirs);
        until(&|printed| printed.lines == ["one", "login: root", "last"]);
    }
}
