//! The arbiter against a real etcd, which each test starts on loopback.

use std::io::{self, Write};
use std::net::{Shutdown, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::pair::claims::arbiter::EtcdFiles;

#[path = "../../../../../tests/src/hosts/certificates.rs"]
mod certificates;

use certificates::{CA, CLIENT, SERVER};

/// Longest that a server may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(30);

struct Server {
    process: Child,
    endpoint: String,
    args: EtcdFiles,
    _data: TempDir,
}

impl Server {
    /// `None` where this machine has no etcd.
    fn start() -> Option<Self> {
        Self::start_with(&[], EtcdFiles::default())
    }

    fn start_with(options: &[&str], args: EtcdFiles) -> Option<Self> {
        let data = TempDir::new().unwrap();
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let (endpoint, peer) = (free(), format!("http://{}", free()));
        let client = format!("http{}://{endpoint}", if args.ca.is_some() { "s" } else { "" });
        let started = Command::new("etcd")
            .arg("--data-dir")
            .arg(data.path())
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "error"])
            .args(options)
            .env("ETCD_UNSUPPORTED_ARCH", "")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(process) = started else {
            println!("SKIPPED a real etcd: there is none here (Debian's package etcd-server)");
            return None;
        };
        let server = Self { process, endpoint, args, _data: data };
        let cluster = Cluster::new(std::slice::from_ref(&server.endpoint), access(&server.args));
        let deadline = Instant::now() + START_TIMEOUT;
        while let Err(error) = cluster.round_trip(&server.endpoint) {
            assert!(Instant::now() < deadline, "etcd does not start: {error}");
            thread::sleep(Duration::from_millis(20));
        }
        Some(server)
    }

    fn open(&self) -> Etcd {
        self.try_open(&self.args).unwrap()
    }

    fn try_open(&self, args: &EtcdFiles) -> Result<Etcd, ArbiterError> {
        Etcd::open(std::slice::from_ref(&self.endpoint), access(args))
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.process.id() as i32), signal).unwrap();
    }

    fn control(&self, arguments: &[&str]) {
        let mut etcdctl = Command::new("etcdctl");
        etcdctl.env("ETCDCTL_API", "3").arg(format!("--endpoints={}", self.endpoint));
        etcdctl.args(access(&self.args).control_options().split_whitespace()).args(arguments);
        let output = etcdctl.output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn access(args: &EtcdFiles) -> Access {
    Access::read(args).unwrap()
}

fn create(etcd: &Etcd, view: u64, record: &str) -> Created {
    etcd.create("web-1", view, record.as_bytes()).unwrap()
}

fn unknown(created: Created) -> String {
    match created {
        Created::Unknown { why } => why,
        other => panic!("decided: {other:?}"),
    }
}

#[test]
fn a_view_gets_one_record_for_good() {
    let Some(server) = Server::start() else { return };
    let etcd = server.open();
    assert_eq!(etcd.latest("web-1").unwrap(), None);
    assert_eq!(create(&etcd, 9, "a"), Created::New);
    assert_eq!(create(&etcd, 10, "b"), Created::New);
    assert_eq!(create(&etcd, 9, "c"), Created::Exists(b"a".to_vec()));
    assert_eq!(etcd.read("web-1", 9).unwrap(), Some(b"a".to_vec()));
    assert_eq!(etcd.read("web-1", 8).unwrap(), None);
    assert_eq!(etcd.create("web-10", 99, b"d").unwrap(), Created::New);
    assert_eq!(etcd.latest("web-1").unwrap(), Some((10, b"b".to_vec())));
    assert_eq!(create(&etcd, u64::MAX, "e"), Created::New);
    assert_eq!(server.open().latest("web-1").unwrap(), Some((u64::MAX, b"e".to_vec())));
    assert_eq!(server.open().id(), etcd.id(), "all see one id");
    let removal = etcd.removal("web-1");
    let words: Vec<&str> =
        removal.trim_matches(|c: char| c != '`').trim_matches('`').split(' ').skip(2).collect();
    server.control(&words);
    assert_eq!(etcd.latest("web-1").unwrap(), None, "{removal}");
    assert_eq!(etcd.latest("web-10").unwrap(), Some((99, b"d".to_vec())));
}

#[test]
fn of_many_threads_exactly_one_wins_each_view() {
    let Some(server) = Server::start() else { return };
    let barrier = Barrier::new(6);
    let etcds: Vec<Etcd> = (0..6).map(|_| server.open()).collect();
    for view in 1..=50 {
        let outcomes: Vec<Created> = thread::scope(|scope| {
            let claim = |(number, etcd)| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    create(etcd, view, &format!("record of {number}"))
                })
            };
            let threads: Vec<_> = etcds.iter().enumerate().map(claim).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let (_, winner) = etcds[0].latest("web-1").unwrap().unwrap();
        for (number, outcome) in outcomes.into_iter().enumerate() {
            let expected = if winner == format!("record of {number}").into_bytes() {
                Created::New
            } else {
                Created::Exists(winner.clone())
            };
            assert_eq!(outcome, expected, "view {view}, claimant {number}");
        }
    }
}

#[test]
fn an_etcd_that_hangs_decides_nothing_and_what_it_did_is_read_back() {
    let Some(server) = Server::start() else { return };
    let (ours, theirs) = (server.open(), server.open());
    server.signal(Signal::SIGSTOP);
    let started = Instant::now();
    let why = unknown(create(&ours, 1, "ours"));
    assert!(why.contains("no answer within 1000 ms") && why.contains(&server.endpoint), "{why}");
    unknown(create(&theirs, 1, "theirs"));
    assert!(started.elapsed() < 3 * CALL_TIMEOUT, "{:?}", started.elapsed());
    server.signal(Signal::SIGCONT);
    // Both transactions may wait in its sockets; each side asks again until it is told.
    let settle = |etcd: &Etcd, record: &str| {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            match create(etcd, 1, record) {
                Created::Unknown { why } => assert!(Instant::now() < deadline, "{why}"),
                Created::New => break record.as_bytes().to_vec(),
                Created::Exists(record) => break record,
            }
        }
    };
    assert_eq!(settle(&ours, "ours"), settle(&theirs, "theirs"), "both were told the same winner");
}

#[test]
fn every_endpoint_is_tried() {
    let Some(server) = Server::start() else { return };
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (_, port) = server.endpoint.split_once(':').unwrap();
    let endpoints = [silent.local_addr().unwrap().to_string(), closed.clone(), format!("localhost:{port}")];
    let etcd = Etcd::open(&endpoints, Access::default()).unwrap();
    let started = Instant::now();
    assert_eq!(create(&etcd, 1, "a"), Created::New);
    assert!(started.elapsed() < CALL_TIMEOUT, "the one that answered last is asked first");
    drop(server);
    let why = unknown(create(&etcd, 2, "b"));
    assert!(endpoints.iter().all(|endpoint| why.contains(endpoint)), "{why}");
    let Err(error) = Etcd::open(&[closed], Access::default()) else { panic!("nobody is there") };
    assert!(
        error.to_string().contains("Connection refused") && error.to_string().contains("--arbiter"),
        "{error}"
    );
}

#[test]
fn an_etcd_that_is_not_the_one_it_was_decides_nothing() {
    let Some(server) = Server::start() else { return };
    let etcd = server.open();
    // As one that was set up anew, another one, and a damaged one.
    server.control(&["del", ID_KEY]);
    assert!(unknown(create(&etcd, 1, "a")).contains("is gone"));
    server.control(&["put", ID_KEY, &encode_id(HEADER, &[1; 16])]);
    assert!(unknown(create(&etcd, 1, "a")).contains("is another's"));
    assert!(matches!(etcd.latest("web-1"), Err(ArbiterError::Foreign { .. })));
    assert!(matches!(etcd.read("web-1", 1), Err(ArbiterError::Foreign { .. })));
    server.control(&["put", ID_KEY, "vmft-etcd"]);
    assert!(unknown(create(&etcd, 1, "a")).contains("is damaged"));
    let refused = server.try_open(&server.args);
    assert!(matches!(refused, Err(ArbiterError::DamagedId { .. })), "{refused:?}");
    server.control(&["put", ID_KEY, &encode_id(HEADER, &etcd.id())]);
    assert_eq!(create(&etcd, 1, "a"), Created::New);
    server.control(&["put", "/vmft/claims/web-1/view-zzz", "a"]);
    let error = etcd.latest("web-1").unwrap_err();
    assert!(error.to_string().contains("view-zzz' is not the key of a claim"), "{error}");
}

#[test]
fn a_full_etcd_lets_claims_wait() {
    let Some(server) = Server::start_with(&["--quota-backend-bytes", "200000"], EtcdFiles::default()) else {
        return;
    };
    let etcd = server.open();
    let filling = "x".repeat(100_000);
    // The last one is refused. How many fit depends on when the etcd looks at the size of its file, which it does every 100 ms.
    let fill = |number: usize| etcd.create("other", number as u64, filling.as_bytes()).unwrap();
    let refused = (0..1_000).map(fill).find(|created| *created != Created::New);
    assert!(unknown(refused.unwrap()).contains("database space exceeded"));
    assert!(unknown(create(&etcd, 1, "a")).contains("database space exceeded"));
}

#[test]
fn an_etcd_that_wants_a_user_is_refused_by_name() {
    let Some(server) = Server::start() else { return };
    let etcd = server.open();
    server.control(&["user", "add", "root:secret"]);
    server.control(&["user", "grant-role", "root", "root"]);
    server.control(&["auth", "enable"]);
    let refused = server.try_open(&server.args);
    let Err(ArbiterError::Refused { why }) = refused else { panic!("{refused:?}") };
    assert!(why.contains(&server.endpoint) && why.contains("--etcd-user"), "{why}");
    assert!(unknown(create(&etcd, 1, "a")).contains("--etcd-user"));
}

/// Certificates of a CA's own and of what it has signed.
struct Certificates {
    directory: TempDir,
    args: EtcdFiles,
}

impl Certificates {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        certificates::make(directory.path(), "127.0.0.1").unwrap();
        let file = |name: &str| Some(directory.path().join(name));
        let [ca, cert, cert_key] = [CA, CLIENT[0], CLIENT[1]].map(file);
        Self { directory, args: EtcdFiles { ca, cert, cert_key, user: None } }
    }

    /// An etcd that asks for certificates of this CA.
    fn server(&self) -> Option<Server> {
        let file =
            |option: &str, name: &str| format!("{option}={}", self.directory.path().join(name).display());
        let files = [
            file("--cert-file", SERVER[0]),
            file("--key-file", SERVER[1]),
            file("--trusted-ca-file", CA),
            "--client-cert-auth".to_owned(),
        ];
        Server::start_with(&files.each_ref().map(String::as_str), self.args.clone())
    }

    fn user(&self, line: &str) -> EtcdFiles {
        let path = self.directory.path().join(line);
        certificates::write_secret(&path, &format!("{line}\n")).unwrap();
        EtcdFiles { user: Some(path), ..self.args.clone() }
    }
}

#[test]
fn an_etcd_with_tls_and_users_is_asked_by_tls_as_a_user() {
    let certificates = Certificates::new();
    let Some(server) = certificates.server() else { return };
    for words in [
        "user add root:secret",
        "user grant-role root root",
        "role add vmft",
        "role grant-permission --prefix vmft readwrite /vmft/",
        "user add monitor:password",
        "user grant-role monitor vmft",
        "user add nobody:password",
        "auth enable",
    ] {
        server.control(&words.split(' ').collect::<Vec<_>>());
    }
    let monitor = certificates.user("monitor:password");
    let etcd = server.try_open(&monitor).unwrap();
    assert_eq!(create(&etcd, 1, "a"), Created::New);
    // An etcd that has restarted knows none of its tokens.
    *etcd.cluster.lock_token() = Some("forgotten.7".into());
    assert_eq!(create(&etcd, 1, "b"), Created::Exists(b"a".to_vec()));
    assert_eq!(etcd.latest("web-1").unwrap(), Some((1, b"a".to_vec())));
    assert!(etcd.removal("web-1").contains(" --user=monitor del "), "{}", etcd.removal("web-1"));

    let refused = |args: &EtcdFiles| server.try_open(args).unwrap_err().to_string();
    for (line, part) in [
        ("monitor:wrong", "correct --etcd-user"),
        ("nobody:password", "let 'nobody' read and write all keys below /vmft/"),
    ] {
        let why = refused(&certificates.user(line));
        assert!(why.contains("No permission") && why.contains(part) && !why.contains("wrong"), "{why}");
    }
    assert!(refused(&certificates.args).contains("name a user"), "{}", refused(&certificates.args));
    let bare = EtcdFiles { cert: None, cert_key: None, ..monitor.clone() };
    assert!(refused(&bare).contains("does not answer"), "{}", refused(&bare));
    let other = Certificates::new();
    let foreign = EtcdFiles { ca: other.args.ca.clone(), ..monitor };
    assert!(refused(&foreign).contains("invalid peer certificate"), "{}", refused(&foreign));
    assert!(refused(&EtcdFiles::default()).contains("--etcd-ca if it wants TLS"));
}

/// Answers each of `answers` to one connection, whatever is asked.
fn impostor(answers: Vec<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            // Whoever asks may have enough before all is written; it is read to its end, so that closing resets nothing.
            let _ = stream.write_all(&answer);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = io::copy(&mut stream, &mut io::sink());
        }
    });
    endpoint
}

#[test]
fn what_is_not_an_etcd_is_told_from_one() {
    let http = |status: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
    };
    let huge = "x".repeat(MAX_ANSWER_BYTES as usize + 1);
    let put = r#"{"header":{},"responses":[{"response_put":{}}]}"#;
    let bad_base64 = r#"{"header":{},"responses":[{"response_range":{"kvs":[{"key":"!","value":"!"}]}}]}"#;
    let answers = vec![
        b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(),
        Vec::new(),
        http("200 OK", "{}"),
        http("200 OK", "<html>"),
        http("200 OK", r#"{"succeeded":true}"#),
        http("200 OK", r#"{"header":{},"succeeded":true}"#),
        http("200 OK", put),
        http("200 OK", bad_base64),
        http("200 OK", &huge),
        http("302 Found", ""),
        http("503 Service Unavailable", r#"{"error":"etcdserver: no leader","code":14}"#),
    ];
    let count = answers.len();
    let endpoint = impostor(answers);
    let etcd = Etcd { cluster: Cluster::new(&[endpoint], Access::default()), id: [1; 16] };
    for number in 0..count {
        let why = unknown(create(&etcd, 1, "a"));
        assert!(!why.is_empty(), "answer {number}");
    }
    for (status, body) in [("401 Unauthorized", "{}"), ("403 Forbidden", r#"{"error":"denied","code":7}"#)] {
        let refused = Etcd::open(&[impostor(vec![http(status, body)])], Access::default());
        assert!(matches!(refused, Err(ArbiterError::Refused { .. })), "{refused:?}");
    }
}

#[test]
fn keys_and_id_are_stored_as_documented() {
    assert_eq!(key_of("web-1", 3), "/vmft/claims/web-1/view-00000000000000000003");
    let golden = "vmft-etcd 1\nid 000102030405060708090a0b0c0d0e0f\nend\n";
    let id = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];
    assert_eq!(encode_id(HEADER, &id), golden);
    assert_eq!(decode_id(HEADER, golden.as_bytes()), Ok(id));
}

const ID: [u8; 16] = [7; 16];

/// Answers as an etcd gives them to an attempt at view 1, with what is stored there.
fn answer(succeeded: bool, id: &[u8], stored: Option<&str>) -> String {
    let range = |key: &str, value: Option<&[u8]>| {
        let kvs: Vec<Value> = value
            .map(
                |value| json!({ "key": base64(key.as_bytes()), "value": base64(value), "mod_revision": "3" }),
            )
            .into_iter()
            .collect();
        json!({ "response_range": { "header": { "revision": "9" }, "kvs": kvs } })
    };
    let record = stored.map(str::as_bytes);
    let responses = if succeeded {
        json!([{ "response_put": { "header": { "revision": "9" } } }])
    } else {
        json!([range(ID_KEY, Some(id)), range(&key_of("web-1", 1), record)])
    };
    json!({ "header": { "revision": "9" }, "succeeded": succeeded, "responses": responses }).to_string()
}

fn decide(text: &str) -> Option<Created> {
    let etcd = Etcd { cluster: Cluster::new(&["127.0.0.1:1".into()], Access::default()), id: ID };
    etcd.decide(&key_of("web-1", 1), parse("127.0.0.1:1", text).ok()?).ok()
}

#[test]
fn whole_answers_decide() {
    let id = encode_id(HEADER, &ID);
    assert_eq!(decide(&answer(true, b"", None)), Some(Created::New));
    assert_eq!(decide(&answer(false, id.as_bytes(), Some("a"))), Some(Created::Exists(b"a".to_vec())));
    assert_eq!(decide(&answer(false, id.as_bytes(), None)), None);
    assert_eq!(decide(&answer(false, encode_id(HEADER, &[8; 16]).as_bytes(), Some("a"))), None);
    assert_eq!(decide(&answer(false, b"", Some("a"))), None);
}

proptest! {
    /// Whatever is put in place of a part of a good answer: a view is won only by an answer that says that it put, and
    /// lost only by one that has the right id and the record's own key.
    #[test]
    fn a_damaged_answer_never_decides_what_it_does_not_say(
        succeeded: bool,
        from in 0..400usize,
        len in 0..40usize,
        insert in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..20),
            prop::sample::select(vec!["true", "false", "null", "[]", "{}", "\"\"", ",", "\"response_put\":{}"])
                .prop_map(|text| text.as_bytes().to_vec()),
        ],
    ) {
        let mut bytes = answer(succeeded, encode_id(HEADER, &ID).as_bytes(), Some("a")).into_bytes();
        let from = from.min(bytes.len());
        let to = (from + len).min(bytes.len());
        bytes.splice(from..to, insert);
        let text = String::from_utf8_lossy(&bytes);
        match decide(&text) {
            Some(Created::New) => {
                let value: Value = serde_json::from_str(&text).unwrap();
                prop_assert_eq!(&value["succeeded"], &Value::Bool(true));
                prop_assert!(value["responses"][0]["response_put"].is_object());
                prop_assert_eq!(value["responses"].as_array().map(Vec::len), Some(1));
            }
            Some(Created::Exists(_)) => {
                prop_assert!(text.contains(&base64(encode_id(HEADER, &ID).as_bytes())));
                prop_assert!(text.contains(&base64(key_of("web-1", 1).as_bytes())));
            }
            Some(Created::Unknown { .. }) | None => {}
        }
    }

    #[test]
    fn no_bytes_make_an_answer_that_decides(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        prop_assert_eq!(decide(&String::from_utf8_lossy(&bytes)), None);
    }
}
