//! `etcd:HOST:PORT[,HOST:PORT...]`: records as keys of an etcd, version 3.4 or newer, through its JSON gateway.
//!
//! Owns: the keys below `/vmft/`. Must never: use a lease as a lock, change or remove a key, read without the
//! cluster's agreement, or take an error for a refusal.
//!
//! ```text
//! /vmft/id                                 vmft-etcd 1, a line with 32 hex digits, end: made on first use
//! /vmft/claims/<guest>/view-<20 digits>    a record
//!
//! one transaction: if    /vmft/id is what it was at start, and the view's key was never created
//!                  then  put the record                     -> New
//!                  else  get both: another id               -> Unknown
//!                                  the record               -> Exists
//! no answer from any endpoint                               -> Unknown; the same transaction again reads it back
//! ```
//!
//! Every call is a transaction, so every answer is what a majority of the cluster agreed on. A call to one endpoint
//! takes [`CALL_TIMEOUT`] at most; each endpoint is tried, beginning with the one that answered last.
//!
//! A user has to prove who it is first, and gets a token that the etcd forgets after minutes without a call; then it proves
//! it again.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::access::{Access, User};
use super::{Arbiter, ArbiterError, Created, decode_id, encode_id, random_id};
use crate::with_causes;

const HEADER: &str = "vmft-etcd 1";
const ID_KEY: &str = "/vmft/id";
/// Never created.
const PROBE_KEY: &str = "/vmft/probe";
/// Longest that one endpoint may take for one answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
/// So much is shown of an answer that no etcd gives.
const SHOWN_CHARS: usize = 160;
/// More than any answer has.
const MAX_ANSWER_BYTES: u64 = 64 << 10;
/// Clusters have up to seven members.
pub(super) const MAX_ENDPOINTS: usize = 16;

/// An etcd, with the id that it had when it was opened.
#[derive(Debug)]
pub(super) struct Etcd {
    cluster: Cluster,
    id: [u8; 16],
}

/// The endpoints of an etcd.
#[derive(Debug)]
pub struct Cluster {
    endpoints: Vec<String>,
    agent: ureq::Agent,
    access: Access,
    /// By which the etcd knows the user.
    token: Mutex<Option<String>>,
    /// The endpoint that answered last.
    first: AtomicUsize,
}

/// What came of one endpoint.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It wants to know who asks, or does not let that user do it.
    #[error("the etcd at {endpoint} refuses ({why}); {advice}")]
    NoPermission {
        /// HOST:PORT.
        endpoint: String,
        /// Its words.
        why: String,
        /// What to do.
        advice: String,
    },
    /// It cannot be reached, or what it says is not an answer.
    #[error("{endpoint}: {why}")]
    NoAnswer {
        /// HOST:PORT.
        endpoint: String,
        /// How it failed.
        why: String,
    },
}

impl Etcd {
    /// Asks for the id, and makes it on first use.
    pub(super) fn open(endpoints: &[String], access: Access) -> Result<Self, ArbiterError> {
        let cluster = Cluster::new(endpoints, access);
        let made = random_id().map_err(|source| ArbiterError::Random { source })?;
        let transaction = json!({
            "compare": [never_created(ID_KEY)],
            "success": [put(ID_KEY, encode_id(HEADER, &made).as_bytes())],
            "failure": [get(ID_KEY)],
        });
        let answer = cluster.transact(&transaction)?;
        let damaged = |why| ArbiterError::DamagedId { place: format!("key '{ID_KEY}' of {cluster}"), why };
        let id = match answer.outcome() {
            Ok(Branch::Put) => made,
            Ok(Branch::Got(mut values)) => match values.pop().flatten() {
                Some(stored) => decode_id(HEADER, &stored.value).map_err(damaged)?,
                None => return Err(damaged("it is neither there nor not there".into())),
            },
            Err(why) => return Err(damaged(why)),
        };
        Ok(Self { cluster, id })
    }

    /// A transaction that does `then` if the id is what it was and `key`, if any, was never created. Else it reads
    /// the id and `otherwise`.
    fn guarded(&self, key: Option<&str>, then: Value, otherwise: Option<Value>) -> Value {
        let mut compare = vec![json!({
            "key": base64(ID_KEY.as_bytes()), "target": "VALUE", "result": "EQUAL",
            "value": base64(encode_id(HEADER, &self.id).as_bytes()),
        })];
        compare.extend(key.map(never_created));
        let mut failure = vec![get(ID_KEY)];
        failure.extend(otherwise);
        json!({ "compare": compare, "success": [then], "failure": failure })
    }

    /// What the answer to an attempt to make the record at `key` means. An error: nothing, and why.
    fn decide(&self, key: &str, answer: Answer) -> Result<Created, String> {
        let values = match answer.outcome()? {
            Branch::Put => return Ok(Created::New),
            Branch::Got(values) => values,
        };
        let [id, stored] = <[_; 2]>::try_from(values)
            .map_err(|values| format!("it got {} keys where there were two", values.len()))?;
        self.check_id(id.as_ref())?;
        match stored {
            Some(stored) if stored.key == key.as_bytes() => Ok(Created::Exists(stored.value)),
            _ => Err(format!("{} contradicts itself on '{key}'", self.cluster)),
        }
    }

    /// What a `range` of one key finds, in an etcd that is still the one that it was.
    fn look(&self, range: Value) -> Result<Option<KeyValue>, ArbiterError> {
        let transaction = json!({ "compare": [], "success": [get(ID_KEY), range], "failure": [] });
        let answer = self.cluster.transact(&transaction)?;
        let Branch::Got(mut values) = answer.outcome().map_err(|why| self.foreign(why))? else {
            return Err(self.foreign("it put where it was to get".into()));
        };
        let found = values.pop().flatten();
        self.check_id(values.pop().flatten().as_ref()).map_err(|why| self.foreign(why))?;
        Ok(found)
    }

    fn foreign(&self, why: String) -> ArbiterError {
        ArbiterError::Foreign { place: self.cluster.to_string(), why }
    }

    /// Whether the id that was read is the one that it was. Else: what is wrong.
    fn check_id(&self, stored: Option<&KeyValue>) -> Result<(), String> {
        let why = match stored.map(|stored| decode_id(HEADER, &stored.value)) {
            Some(Ok(id)) if id == self.id => return Ok(()),
            Some(Ok(_)) => "is another's".to_owned(),
            Some(Err(why)) => format!("is damaged: {why}"),
            None => "is gone".to_owned(),
        };
        Err(format!(
            "{} is not known to be the etcd that it was: its key '{ID_KEY}' {why}; restore its data, or correct --arbiter",
            self.cluster
        ))
    }
}

impl fmt::Display for Etcd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cluster.fmt(f)
    }
}

impl Arbiter for Etcd {
    fn id(&self) -> [u8; 16] {
        self.id
    }

    fn create(&self, guest: &str, view: u64, record: &[u8]) -> Result<Created, ArbiterError> {
        let key = key_of(guest, view);
        let transaction = self.guarded(Some(&key), put(&key, record), Some(get(&key)));
        let answer = match self.cluster.transact(&transaction) {
            Ok(answer) => answer,
            Err(error) => return Ok(Created::Unknown { why: with_causes(&error) }),
        };
        Ok(self.decide(&key, answer).unwrap_or_else(|why| Created::Unknown { why }))
    }

    fn read(&self, guest: &str, view: u64) -> Result<Option<Vec<u8>>, ArbiterError> {
        let stored = self.look(get(&key_of(guest, view)))?;
        Ok(stored.map(|stored| stored.value))
    }

    fn latest(&self, guest: &str) -> Result<Option<(u64, Vec<u8>)>, ArbiterError> {
        let prefix = format!("/vmft/claims/{guest}/view-");
        // The byte behind '-'.
        let end = format!("/vmft/claims/{guest}/view.");
        let last = json!({ "request_range": {
            "key": base64(prefix.as_bytes()), "range_end": base64(end.as_bytes()),
            "sort_order": "DESCEND", "sort_target": "KEY", "limit": "1",
        }});
        let Some(last) = self.look(last)? else { return Ok(None) };
        let key = String::from_utf8_lossy(&last.key);
        match key.strip_prefix(&prefix).and_then(|digits| digits.parse().ok()) {
            Some(view) if key_of(guest, view) == key => Ok(Some((view, last.value))),
            _ => Err(self.foreign(format!("'{key}' is not the key of a claim"))),
        }
    }

    fn place(&self, guest: &str, view: u64) -> String {
        format!("'{}' of {}", key_of(guest, view), self.cluster)
    }

    fn removal(&self, guest: &str) -> String {
        let endpoints = self.cluster.endpoints.join(",");
        let options = self.cluster.access.control_options();
        format!("run `etcdctl --endpoints={endpoints} {options}del --prefix /vmft/claims/{guest}/`")
    }
}

impl Cluster {
    /// An etcd with these endpoints, each HOST:PORT.
    pub fn new(endpoints: &[String], access: Access) -> Self {
        let config = ureq::Agent::config_builder()
            .tls_config(access.tls.clone().unwrap_or_default())
            .timeout_global(Some(CALL_TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            // The way to the arbiter is the one that was named, whatever the environment says.
            .proxy(None)
            // A connection of which the other end is gone would cost an attempt.
            .max_idle_connections(0)
            .build();
        let (agent, token, first) = (config.into(), Mutex::default(), AtomicUsize::new(0));
        Self { endpoints: endpoints.to_vec(), agent, access, token, first }
    }

    /// The endpoints, each HOST:PORT.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// The version of the server at `endpoint`.
    pub fn version(&self, endpoint: &str) -> Result<String, CallError> {
        let answer = self.agent.get(self.address(endpoint, "version")).call();
        let text = self.text_of(endpoint, answer)?;
        #[derive(Deserialize)]
        struct Version {
            etcdserver: String,
        }
        let version: Version = parse(endpoint, &text)?;
        Ok(version.etcdserver)
    }

    /// How long `endpoint` takes for a transaction that asks for all rights and changes nothing.
    pub fn round_trip(&self, endpoint: &str) -> Result<Duration, CallError> {
        let contradiction = json!({ "key": base64(PROBE_KEY.as_bytes()), "target": "CREATE",
            "result": "NOT_EQUAL", "create_revision": "0" });
        let transaction = json!({
            "compare": [never_created(PROBE_KEY), contradiction],
            "success": [put(PROBE_KEY, b"never put")],
            "failure": [get(PROBE_KEY)],
        });
        let started = Instant::now();
        self.post(endpoint, &transaction)?;
        Ok(started.elapsed())
    }

    /// The first answer of any endpoint.
    fn transact(&self, transaction: &Value) -> Result<Answer, ArbiterError> {
        let first = self.first.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for offset in 0..self.endpoints.len() {
            let index = (first + offset) % self.endpoints.len();
            match self.post(&self.endpoints[index], transaction) {
                Ok(answer) => {
                    self.first.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => failures.push(error),
            }
        }
        if let Some(refusal) = failures.iter().find(|error| matches!(error, CallError::NoPermission { .. })) {
            return Err(ArbiterError::Refused { why: refusal.to_string() });
        }
        let failures: Vec<String> = failures.iter().map(ToString::to_string).collect();
        Err(ArbiterError::Unreachable { place: self.to_string(), why: failures.join("; ") })
    }

    fn post(&self, endpoint: &str, transaction: &Value) -> Result<Answer, CallError> {
        let ask = |token: Option<&str>| self.call(endpoint, "v3/kv/txn", transaction, token);
        let Some(user) = &self.access.user else { return ask(None) };
        let known = self.lock_token().clone();
        match known.map(|token| ask(Some(&token))) {
            // There is no token yet, or the etcd may have forgotten it.
            None | Some(Err(CallError::NoPermission { .. })) => ask(Some(&self.log_in(endpoint, user)?)),
            Some(other) => other,
        }
    }

    /// Has the etcd tell a token for the user.
    fn log_in(&self, endpoint: &str, user: &User) -> Result<String, CallError> {
        #[derive(Deserialize)]
        struct LoggedIn {
            token: String,
        }
        let LoggedIn { token } = self.call(endpoint, "v3/auth/authenticate", &user.to_json(), None)?;
        *self.lock_token() = Some(token.clone());
        Ok(token)
    }

    fn lock_token(&self) -> MutexGuard<'_, Option<String>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address(&self, endpoint: &str, path: &str) -> String {
        let scheme = if self.access.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{endpoint}/{path}")
    }

    fn call<T: for<'de> Deserialize<'de>>(
        &self,
        endpoint: &str,
        path: &str,
        body: &Value,
        token: Option<&str>,
    ) -> Result<T, CallError> {
        let mut request = self.agent.post(self.address(endpoint, path)).content_type("application/json");
        if let Some(token) = token {
            request = request.header("Authorization", token);
        }
        parse(endpoint, &self.text_of(endpoint, request.send(body.to_string()))?)
    }

    /// The body of a good answer.
    fn text_of(&self, endpoint: &str, answer: Response) -> Result<String, CallError> {
        let no_answer = |why: String| CallError::NoAnswer { endpoint: endpoint.to_owned(), why };
        let failed = |error: ureq::Error| match error {
            ureq::Error::Timeout(_) => no_answer(format!("no answer within {} ms", CALL_TIMEOUT.as_millis())),
            other => no_answer(with_causes(&other)),
        };
        let mut answer = answer.map_err(failed)?;
        let status = answer.status();
        let text =
            answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string().map_err(failed)?;
        if status.is_success() {
            return Ok(text);
        }
        #[derive(Deserialize)]
        struct Failure {
            error: String,
            #[serde(default)]
            code: u64,
        }
        let failure = serde_json::from_str::<Failure>(&text).ok();
        let why = failure.as_ref().map_or_else(
            || {
                format!(
                    "HTTP status {status}: {}",
                    text.chars().take(SHOWN_CHARS).collect::<String>().trim().escape_debug()
                )
            },
            |failure| failure.error.clone(),
        );
        // gRPC's PERMISSION_DENIED and UNAUTHENTICATED. A user that is not named or not known is an invalid argument to
        // etcd, and one that it needs no user for a failed precondition.
        let denied = failure.is_some_and(|failure| matches!(failure.code, 7 | 16))
            || matches!(status.as_u16(), 401 | 403)
            || ["user name is empty", "authentication"].iter().any(|words| why.contains(words));
        if denied {
            let advice = self.access.advice();
            Err(CallError::NoPermission { endpoint: endpoint.to_owned(), why, advice })
        } else {
            Err(no_answer(why))
        }
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd:{}", self.endpoints.join(","))
    }
}

type Response = Result<ureq::http::Response<ureq::Body>, ureq::Error>;

fn parse<T: for<'de> Deserialize<'de>>(endpoint: &str, text: &str) -> Result<T, CallError> {
    serde_json::from_str(text).map_err(|error| CallError::NoAnswer {
        endpoint: endpoint.to_owned(),
        why: format!("what answers is not an etcd 3.4 or newer: {error}"),
    })
}

/// The answer to a transaction.
#[derive(Debug, Deserialize)]
pub struct Answer {
    #[expect(dead_code, reason = "every etcd sends it, and what sends none is no etcd")]
    header: Value,
    #[serde(default)]
    succeeded: bool,
    #[serde(default)]
    responses: Vec<ResponseOp>,
}

#[derive(Debug, Deserialize)]
struct ResponseOp {
    response_put: Option<Map<String, Value>>,
    response_range: Option<Range>,
}

#[derive(Debug, Deserialize)]
struct Range {
    #[serde(default)]
    kvs: Vec<EncodedKeyValue>,
}

#[derive(Debug, Deserialize)]
struct EncodedKeyValue {
    key: String,
    #[serde(default)]
    value: String,
}

/// A key that an etcd has, and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValue {
    /// The key.
    pub key: Vec<u8>,
    /// Its value.
    pub value: Vec<u8>,
}

/// What a transaction did: one put, or gets of at most one key each.
#[derive(Debug, PartialEq, Eq)]
pub enum Branch {
    /// The one put.
    Put,
    /// What each get found.
    Got(Vec<Option<KeyValue>>),
}

impl Answer {
    /// What the transaction did. An error: an answer that says no such thing, and why.
    pub fn outcome(self) -> Result<Branch, String> {
        if let [ResponseOp { response_put: Some(_), response_range: None }] = &self.responses[..] {
            return if self.succeeded { Ok(Branch::Put) } else { Err("it put without agreement".into()) };
        }
        let mut values = Vec::new();
        for response in self.responses {
            let Some(range) = response.response_range else {
                return Err("it did not get what it was to".into());
            };
            let decode = |text: &str| BASE64_STANDARD.decode(text).map_err(|error| error.to_string());
            let first = range.kvs.first();
            values.push(
                first
                    .map(|kv| Ok::<_, String>(KeyValue { key: decode(&kv.key)?, value: decode(&kv.value)? }))
                    .transpose()?,
            );
        }
        if values.is_empty() { Err("its answer is empty".into()) } else { Ok(Branch::Got(values)) }
    }
}

/// Fixed width, so that the last key is the highest view.
fn key_of(guest: &str, view: u64) -> String {
    format!("/vmft/claims/{guest}/view-{view:020}")
}

fn base64(bytes: &[u8]) -> String {
    BASE64_STANDARD.encode(bytes)
}

fn never_created(key: &str) -> Value {
    json!({ "key": base64(key.as_bytes()), "target": "CREATE", "result": "EQUAL", "create_revision": "0" })
}

fn put(key: &str, value: &[u8]) -> Value {
    json!({ "request_put": { "key": base64(key.as_bytes()), "value": base64(value) } })
}

fn get(key: &str) -> Value {
    json!({ "request_range": { "key": base64(key.as_bytes()) } })
}

#[cfg(test)]
#[path = "etcd_tests.rs"]
mod tests;
