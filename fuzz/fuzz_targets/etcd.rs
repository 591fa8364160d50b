//! Any bytes as an etcd's answer, and whole answers with any keys: no panic, and a whole answer says what is in it.
#![no_main]

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vmft::pair::claims::arbiter::etcd::{Answer, Branch, KeyValue};

type Found = Option<(Vec<u8>, Vec<u8>)>;

fuzz_target!(|input: (bool, Vec<Found>, &[u8])| {
    let (succeeded, found, bytes) = input;
    if let Ok(answer) = serde_json::from_slice::<Answer>(bytes) {
        let _ = answer.outcome();
    }
    let put = json!({ "header": {}, "succeeded": succeeded, "responses": [{ "response_put": {} }] });
    assert_eq!(outcome(&put), succeeded.then_some(Branch::Put), "won only by an answer that says so");
    let got = json!({
        "header": {}, "succeeded": succeeded, "responses": found.iter().map(range).collect::<Vec<_>>(),
    });
    let values: Vec<_> =
        found.into_iter().map(|found| found.map(|(key, value)| KeyValue { key, value })).collect();
    assert_eq!(outcome(&got), (!values.is_empty()).then_some(Branch::Got(values)));
});

fn range(found: &Found) -> Value {
    let text = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
    let kvs: Vec<_> =
        found.iter().map(|(key, value)| json!({ "key": text(key), "value": text(value) })).collect();
    json!({ "response_range": { "kvs": kvs } })
}

fn outcome(answer: &Value) -> Option<Branch> {
    let answer: Answer = serde_json::from_str(&answer.to_string()).expect("it has all fields");
    answer.outcome().ok()
}
