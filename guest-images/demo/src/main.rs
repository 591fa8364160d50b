//! The demo service that runs in the guest: a key-value store over TCP that keeps each acknowledged write on disk.
//!
//! Usage: `vmft-demo ADDRESS:PORT LOG_FILE [READY_FILE]`. It prints `vmft-demo: ready` and creates READY_FILE when it
//! listens. The line protocol is in `request`, the log file in `store`.
//!
//! One thread per connection, at most [`MAX_CONNECTIONS`]; requests of a connection are answered in order, writes of
//! all connections are done one after the other. It must answer bad input with an `ERR` line and go on, and must
//! never acknowledge a write that is not on the disk.

mod request;
mod store;

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use request::{Command, MAX_LINE, Request};
use store::Store;

const MAX_CONNECTIONS: usize = 64;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (address, log, ready) = match arguments.as_slice() {
        [address, log] => (address, log, None),
        [address, log, ready] => (address, log, Some(ready)),
        _ => {
            eprintln!("usage: vmft-demo ADDRESS:PORT LOG_FILE [READY_FILE]");
            return ExitCode::from(2);
        }
    };
    match start(address, Path::new(log), ready.map(Path::new)) {
        Ok((listener, store)) => serve(&listener, &Arc::new(Mutex::new(store))),
        Err(reason) => {
            eprintln!("vmft-demo: {reason}");
            ExitCode::FAILURE
        }
    }
}

fn start(address: &str, log: &Path, ready: Option<&Path>) -> Result<(TcpListener, Store), String> {
    let store = Store::open(log).map_err(|error| error.to_string())?;
    let listener =
        TcpListener::bind(address).map_err(|error| format!("Cannot listen on {address}: {error}"))?;
    if let Some(ready) = ready {
        File::create(ready).map_err(|error| format!("Cannot create {}: {error}", ready.display()))?;
    }
    println!("vmft-demo: ready");
    Ok((listener, store))
}

fn serve(listener: &TcpListener, store: &Arc<Mutex<Store>>) -> ! {
    let connections = Arc::new(AtomicUsize::new(0));
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                eprintln!("vmft-demo: cannot accept a connection: {error}");
                continue;
            }
        };
        if connections.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
            // The client may have gone already; it is refused either way.
            let _ = writeln!(stream, "ERR 0 too many connections");
            continue;
        }
        connections.fetch_add(1, Ordering::Relaxed);
        let (store, connections) = (Arc::clone(store), Arc::clone(&connections));
        thread::spawn(move || {
            // An error means that the client is gone; its acknowledged writes are on disk.
            let _ = answer(stream, &store);
            connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

fn answer(stream: TcpStream, store: &Mutex<Store>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut replies = BufWriter::new(stream.try_clone()?);
    let mut requests = BufReader::new(stream);
    let mut line = Vec::new();
    while read_line(&mut requests, &mut line)? {
        match Request::parse(&line) {
            Ok(request) => execute(&request, store, &mut replies)?,
            Err(error) => writeln!(replies, "ERR {} {error}", error.number())?,
        }
        replies.flush()?;
    }
    Ok(())
}

/// Reads a line without its end; of a line that is too long only the first `MAX_LINE + 1` bytes. False at the end.
fn read_line(requests: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    requests.by_ref().take(MAX_LINE as u64 + 1).read_until(b'\n', line)?;
    match line.last() {
        None => return Ok(false),
        Some(b'\n') => {
            line.pop();
        }
        Some(_) if line.len() > MAX_LINE => {
            requests.skip_until(b'\n')?;
        }
        // The connection ended inside a line: that was no request.
        Some(_) => return Ok(false),
    }
    Ok(true)
}

fn execute(request: &Request<'_>, store: &Mutex<Store>, replies: &mut impl Write) -> io::Result<()> {
    let n = request.number;
    let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
    match request.command {
        Command::Put { key, value } => match store.put(key, value) {
            Ok(writes) => writeln!(replies, "OK {n} {writes}"),
            Err(error) => writeln!(replies, "ERR {n} {error}"),
        },
        Command::Get { key } => match store.get(key) {
            Some(value) => writeln!(replies, "VAL {n} {value}"),
            None => writeln!(replies, "NIL {n}"),
        },
        Command::Ping => writeln!(replies, "PONG {n}"),
        Command::Count => writeln!(replies, "COUNT {n} {} {}", store.writes(), store.len()),
        Command::Dump => {
            // A copy, so that a client that reads slowly does not hold up the others.
            let pairs = store.pairs();
            drop(store);
            for (key, value) in &pairs {
                writeln!(replies, "KEY {n} {key} {value}")?;
            }
            writeln!(replies, "END {n} {}", pairs.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service() -> (TcpStream, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let (listener, store) = start("127.0.0.1:0", &dir.path().join("log"), None).unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || serve(&listener, &Arc::new(Mutex::new(store))));
        (TcpStream::connect(address).unwrap(), dir)
    }

    fn ask(stream: &TcpStream, requests: &str, replies: usize) -> Vec<String> {
        (&*stream).write_all(requests.as_bytes()).unwrap();
        BufReader::new(stream).lines().take(replies).map(Result::unwrap).collect()
    }

    #[test]
    fn requests_are_answered_in_order() {
        let (stream, _dir) = service();
        let requests = "PUT 1 b two words\nPUT 2 a x\nGET 3 b\nGET 4 none\nPING 5\nCOUNT 6\nDUMP 7\n";
        assert_eq!(
            ask(&stream, requests, 9),
            [
                "OK 1 1",
                "OK 2 2",
                "VAL 3 two words",
                "NIL 4",
                "PONG 5",
                "COUNT 6 2 2",
                "KEY 7 a x",
                "KEY 7 b two words",
                "END 7 2",
            ]
        );
    }

    #[test]
    fn bad_input_gets_an_error_and_the_connection_goes_on() {
        let (stream, _dir) = service();
        let long = "x".repeat(3 * MAX_LINE);
        let requests = format!("\nPUT\nPUT x k v\nFLY 3\nPUT 4 key\nPUT 5 k {long}\nPING 6\n");
        let replies = ask(&stream, &requests, 7);
        assert!(replies[..6].iter().all(|reply| reply.starts_with("ERR ")), "{replies:?}");
        assert!(replies[3].starts_with("ERR 3 "), "{replies:?}");
        assert_eq!(replies[6], "PONG 6");
    }

    #[test]
    fn bytes_that_are_not_text_get_an_error() {
        let (stream, _dir) = service();
        (&stream).write_all(b"PUT 1 k \xff\xfe\n").unwrap();
        assert_eq!(ask(&stream, "PING 2\n", 2)[1], "PONG 2");
    }

    #[test]
    fn connections_beyond_the_limit_are_refused() {
        let (first, _dir) = service();
        let address = first.peer_addr().unwrap();
        let held: Vec<TcpStream> =
            (1..MAX_CONNECTIONS).map(|_| TcpStream::connect(address).unwrap()).collect();
        let refused = TcpStream::connect(address).unwrap();
        assert_eq!(ask(&refused, "", 1), ["ERR 0 too many connections"]);
        assert_eq!(ask(&first, "PING 1\n", 1), ["PONG 1"]);
        drop(held);
    }
}
