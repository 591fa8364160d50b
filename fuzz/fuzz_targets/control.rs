//! Any bytes as a request and as a reply on the control socket, also in the place of a part of a whole reply: no panic, and
//! what is understood is understood again as it is written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmft::control::protocol::{CONTROL_VERSION, Request, read_reply, read_request, write_reply};

const STATUS: &[u8] = include_bytes!("../../vmm/src/control/golden/status.json");

fuzz_target!(|input: (u16, u8, &[u8])| {
    let (from, len, bytes) = input;
    if let Ok(command) = read_request(bytes) {
        let request = Request { vmft: CONTROL_VERSION, command };
        let line = serde_json::to_vec(&request).expect("it has nothing that cannot be written");
        assert_eq!(read_request(&line), Ok(command));
    }
    let from = usize::from(from) % STATUS.len();
    let to = (from + usize::from(len)).min(STATUS.len());
    let changed = [&STATUS[..from], bytes, &STATUS[to..]].concat();
    for line in [bytes, &changed] {
        if let Ok(answer) = read_reply(line) {
            assert_eq!(read_reply(&write_reply(answer.clone())), Ok(answer));
        }
    }
});
