//! What holds for all values and all bytes that come from outside without a frame of `ft-log`'s: claims and owners'
//! records, the control socket, an etcd's answers. What is written is read back, and no bytes make a decoder panic.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use vmft::control::protocol::{
    Answer, CONTROL_VERSION, Command, Peer, Reason, Refusal, Request, Role, Status, Transfer, read_reply,
    read_request, write_reply,
};
use vmft::pair::claims::arbiter::etcd;
use vmft::pair::claims::claim::{ClaimRole, Member, Owner, Record, read_record, write_record};

/// Bytes with a part that is replaced: what a bad disk, an editor or another program leaves.
fn damaged(whole: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let words = prop::sample::select(vec![
        "\n",
        " ",
        "+",
        "0",
        "-1",
        "none",
        "\u{1b}[2J",
        "true",
        "null",
        "{}",
        "\"\"",
    ]);
    let piece = prop_oneof![vec(any::<u8>(), 0..20), words.prop_map(|word| word.as_bytes().to_vec())];
    (0..=whole.len(), 0..20usize, piece).prop_map(move |(from, len, piece)| {
        let to = (from + len).min(whole.len());
        [&whole[..from], &piece, &whole[to..]].concat()
    })
}

fn any_record() -> impl Strategy<Value = Record> {
    let role = prop_oneof![Just(ClaimRole::Primary), Just(ClaimRole::Backup), Just(ClaimRole::Ended)];
    let host = || "[a-z0-9. äß-]{1,40}";
    let owner = (host(), any::<u32>(), any::<[u8; 16]>(), role).prop_map(|(host, pid, uuid, role)| Owner {
        host,
        pid,
        uuid,
        role,
    });
    let member = (host(), any::<[u8; 16]>()).prop_map(|(host, uuid)| Member { host, uuid });
    ("[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", any::<u64>(), owner, prop::option::of(member))
        .prop_map(|(guest, view, owner, backup)| Record { guest, view, owner, backup })
}

fn any_answer() -> impl Strategy<Value = Answer> {
    let peer =
        (prop::option::of(".*"), ".*").prop_map(|(host, address)| Peer { host, address, listen: None });
    let peer = || prop::option::of(peer.clone());
    let transfer = (any::<u32>(), prop::option::of(any::<u64>()))
        .prop_map(|(percent, pages_again)| Transfer { percent, pages_again, ..Transfer::default() });
    let status = (any::<u64>(), ".*", peer(), prop::option::of(transfer), any::<bool>()).prop_map(
        |(view, cause, peer, transfer, protected)| {
            Answer::Status(Box::new(Status {
                view,
                cause,
                peer,
                transfer,
                protected,
                role: Role::Backup,
                ..Status::default()
            }))
        },
    );
    let refused = (".*", peer())
        .prop_map(|(text, primary)| Answer::Refused(Refusal { reason: Reason::NotPrimary, text, primary }));
    prop_oneof![status, refused, ".*".prop_map(Answer::Done)]
}

fn check_claim(bytes: &[u8]) {
    if let Ok(record) = read_record(bytes) {
        assert_eq!(write_record(&record).as_bytes(), bytes, "one form for each claim");
    }
}

fn check_reply(line: &[u8]) {
    if let Ok(answer) = read_reply(line) {
        assert_eq!(read_reply(&write_reply(answer.clone())), Ok(answer));
    }
}

fn check_request(line: &[u8]) {
    if let Ok(command) = read_request(line) {
        let request = Request { vmft: CONTROL_VERSION, command };
        assert_eq!(read_request(&serde_json::to_vec(&request).unwrap()), Ok(command));
    }
}

proptest! {
    #[test]
    fn claims_are_read_back(record in any_record()) {
        prop_assert_eq!(read_record(write_record(&record).as_bytes()), Ok(record));
    }

    #[test]
    fn a_damaged_claim_is_another_claim_or_none(
        bytes in any_record().prop_flat_map(|record| damaged(write_record(&record).into_bytes())),
    ) {
        check_claim(&bytes);
    }

    #[test]
    fn replies_are_read_back(answer in any_answer()) {
        prop_assert_eq!(read_reply(&write_reply(answer.clone())), Ok(answer));
    }

    #[test]
    fn a_damaged_reply_is_another_reply_or_none(
        line in any_answer().prop_flat_map(|answer| damaged(write_reply(answer))),
    ) {
        check_reply(&line);
    }

    #[test]
    fn a_damaged_request_is_another_request_or_none(
        line in prop::sample::select(vec![
            Command::Status, Command::Switch, Command::Pause, Command::Resume, Command::Shutdown,
            Command::PowerOff, Command::DropBackup,
        ]).prop_flat_map(|command| {
            damaged(serde_json::to_vec(&Request { vmft: CONTROL_VERSION, command }).unwrap())
        }),
    ) {
        check_request(&line);
    }

    #[test]
    fn no_bytes_make_a_decoder_panic(bytes in vec(any::<u8>(), 0..400)) {
        check_claim(&bytes);
        check_request(&bytes);
        check_reply(&bytes);
        if let Ok(answer) = serde_json::from_slice::<etcd::Answer>(&bytes) {
            let _ = answer.outcome();
        }
    }

    /// What etcd's answers decide is tested beside their decoder.
    #[test]
    fn an_answer_of_an_etcd_says_what_is_in_it(
        succeeded: bool,
        found in vec(prop::option::of((vec(any::<u8>(), 0..40), vec(any::<u8>(), 0..40))), 0..4),
    ) {
        let text = |bytes: &[u8]| BASE64_STANDARD.encode(bytes);
        let range = |found: &Option<(Vec<u8>, Vec<u8>)>| -> Value {
            let kvs: Vec<_> =
                found.iter().map(|(key, value)| json!({ "key": text(key), "value": text(value) })).collect();
            json!({ "response_range": { "kvs": kvs } })
        };
        let answer = json!({
            "header": {}, "succeeded": succeeded, "responses": found.iter().map(range).collect::<Vec<_>>(),
        });
        let answer: etcd::Answer = serde_json::from_str(&answer.to_string()).unwrap();
        let values: Vec<_> = found
            .into_iter()
            .map(|found| found.map(|(key, value)| etcd::KeyValue { key, value }))
            .collect();
        prop_assert_eq!(answer.outcome().ok(), (!values.is_empty()).then_some(etcd::Branch::Got(values)));
    }
}
