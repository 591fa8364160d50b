//! Asks for views on behalf of one monitor, and goes on asking.
//!
//! Owns: one attempt after the other at a claim, and that an arbiter that hangs is named. Must never: take no answer for one.
//! Threads: `claim`, one for each attempt: it may hang in the kernel.

use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::claim::{ClaimError, Claims, Member, Outcome, Owner};
use crate::host::{LogEvent, spawn};
use crate::pair::protocol::Answer;
use crate::with_causes;

/// Pause before an unanswered claim is made again.
const CLAIM_AGAIN: Duration = Duration::from_millis(50);
/// How long a claim may hang before it is said.
const CLAIM_SAID_AFTER: Duration = Duration::from_secs(2);

/// Asks for views on behalf of one monitor.
pub struct Claimant {
    claims: Claims,
    owner: Owner,
    lost: Option<String>,
    said: bool,
}

impl Claimant {
    /// Asks `claims` for `owner`.
    pub fn new(claims: Claims, owner: Owner) -> Self {
        Self { claims, owner, lost: None, said: false }
    }

    /// Claims `view`, with `backup` or without one. After an answer that tells nothing it takes a while, so that it may be
    /// called again at once.
    pub fn ask(&mut self, view: u64, backup: Option<&Member>) -> Answer {
        let Self { claims, owner, said, .. } = self;
        let mut say = |why: &str| {
            if !std::mem::replace(said, true) {
                tracing::warn!(
                    event = %LogEvent::ClaimUndecided,
                    view,
                    "the claim is undecided, asking again until there is an answer: {why}"
                );
            }
        };
        let why = match claim_on_a_thread(claims, (view, owner, backup), &mut say) {
            Ok(Ok(Outcome::Won)) => return Answer::Won,
            Ok(Ok(Outcome::Otherwise)) => return Answer::Otherwise,
            Ok(Ok(Outcome::Lost { holder, breach })) => {
                if let Some(breach) = breach {
                    tracing::error!("{breach}");
                }
                let lost = format!("{} (process {}) has claimed the view", holder.host, holder.pid);
                self.lost = Some(lost);
                return Answer::Lost;
            }
            Ok(Err(refused @ ClaimError::NotMember { .. })) => {
                self.lost = Some(refused.to_string());
                return Answer::Lost;
            }
            Ok(Ok(Outcome::Unknown { why })) | Err(why) => why,
            Ok(Err(error)) => with_causes(&error),
        };
        say(&why);
        std::thread::sleep(CLAIM_AGAIN);
        Answer::Unknown
    }

    /// Why the claim was lost, in words.
    pub fn why_lost(&self) -> String {
        self.lost.clone().unwrap_or_else(|| "another monitor has claimed the view".to_owned())
    }
}

/// One attempt; an error on the outside: none was made. It may hang in the kernel, as on a file server that does not answer; that is said meanwhile.
fn claim_on_a_thread(
    claims: &Claims,
    (view, owner, backup): (u64, &Owner, Option<&Member>),
    say: &mut impl FnMut(&str),
) -> Result<Result<Outcome, ClaimError>, String> {
    let (answer, answered) = bounded(1);
    let (asked, owner, backup) = (claims.clone(), owner.clone(), backup.cloned());
    spawn("claim", move || {
        // This function waits for exactly this.
        let _ = answer.send(asked.claim(view, &owner, backup.as_ref()));
    })
    .map_err(|error| format!("no thread for it: {error}"))?;
    loop {
        match answered.recv_timeout(CLAIM_SAID_AFTER) {
            Ok(outcome) => return Ok(outcome),
            Err(RecvTimeoutError::Timeout) => {
                say(&format!("{} has not answered for {} s", claims.arbiter(), CLAIM_SAID_AFTER.as_secs()));
            }
            Err(RecvTimeoutError::Disconnected) => return Err("its thread has ended".into()),
        }
    }
}
