//! What a campaign found, as a table and as reasons why it failed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::history::Verdict;
use super::schedule::{Fault, Kind};

/// Within this time of a fault the guest should be protected again; of the mending, where nobody can claim until then.
const AIM: Duration = Duration::from_secs(10);

/// What came of one fault.
#[derive(Debug, Clone, Copy)]
pub struct Survived {
    /// The fault.
    pub fault: Fault,
    /// Whose host; `None` if nobody's in particular.
    pub host: Option<u8>,
    /// The longest time that a client was without a reply, of all clients.
    pub blackout: Duration,
    /// From the fault until the guest was protected again; `None` if it was so all the time.
    pub protected_after: Option<Duration>,
}

impl Survived {
    /// Was the guest protected again later than it should have been?
    fn is_late(&self) -> bool {
        let unclaimable = match self.fault.kind {
            Kind::FillClaimsAndKill => self.fault.lasts,
            _ => Duration::ZERO,
        };
        self.protected_after.is_some_and(|after| after > unclaimable + AIM)
    }
}

/// See the module's description.
#[derive(Debug, Clone)]
pub struct Report {
    /// The campaign's seed.
    pub seed: u64,
    /// How many faults were asked for.
    pub wanted: usize,
    /// Those that were injected and survived.
    pub survived: Vec<Survived>,
    /// From the first request to the last reply.
    pub took: Duration,
    /// Requests that were answered.
    pub answered: usize,
    /// What clients saw that they must not: broken connections, wrong or missing replies.
    pub client_errors: Vec<String>,
    /// Requests of the counting client that were not answered.
    pub lost: usize,
    /// Requests of it that were answered more than once.
    pub repeated: usize,
    /// Replies to it that came after the reply to a later request.
    pub out_of_order: usize,
    /// Acknowledged writes that are not stored in the end, as sentences.
    pub missing: Vec<String>,
    /// What the checker says of the clients with keys in common.
    pub linearizable: Verdict,
    /// Frames and disk writes that were seen.
    pub seen: (usize, usize),
    /// Those of hosts that had been frozen, which are allowed.
    pub late: (usize, usize),
    /// Two hosts at a time, and what could not be seen, as sentences.
    pub two_at_a_time: Vec<String>,
    /// What backups said whose guests were not their primaries' any more.
    pub useless: Vec<String>,
    /// Why the campaign could not go on.
    pub stopped: Option<String>,
}

impl Report {
    /// Why this campaign failed; empty if it did not.
    pub fn failures(&self) -> Vec<String> {
        let mut failures: Vec<String> = self.stopped.iter().cloned().collect();
        if self.survived.len() < self.wanted {
            failures.push(format!("{} of {} faults were survived", self.survived.len(), self.wanted));
        }
        failures.extend(self.client_errors.iter().cloned());
        failures.extend(self.missing.iter().map(|missing| format!("acknowledged and lost: {missing}")));
        for (what, count) in
            [("lost", self.lost), ("repeated", self.repeated), ("out of order", self.out_of_order)]
        {
            if count > 0 {
                failures.push(format!("{count} requests {what}"));
            }
        }
        if self.linearizable != Verdict::Linearizable {
            failures.push(format!("linearizable: {}", self.linearizable));
        }
        failures.extend(self.two_at_a_time.iter().cloned());
        failures.extend(self.useless.iter().cloned());
        failures
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| Fault | Count | Blackout p50 / p99 / max, s | Protected again p50 / p99 / max, s | Later than 10 s |"
        )?;
        writeln!(f, "| --- | --- | --- | --- | --- |")?;
        let mut by_kind: BTreeMap<Kind, Vec<&Survived>> = BTreeMap::new();
        for survived in &self.survived {
            by_kind.entry(survived.fault.kind).or_default().push(survived);
        }
        for (kind, survived) in &by_kind {
            row(f, &kind.to_string(), survived)?;
        }
        row(f, "all", &self.survived.iter().collect::<Vec<_>>())?;
        let unprotected: Duration =
            self.survived.iter().filter_map(|survived| survived.protected_after).sum();
        let (took, answered) = (self.took.as_secs_f64(), self.answered);
        writeln!(f, "\n| What | Figure |\n| --- | --- |")?;
        writeln!(f, "| seed | {} |", self.seed)?;
        writeln!(f, "| faults survived | {} of {} |", self.survived.len(), self.wanted)?;
        writeln!(f, "| requests answered | {answered} in {took:.1} s |")?;
        writeln!(f, "| time unprotected | {:.1} s |", unprotected.as_secs_f64())?;
        writeln!(f, "| client errors | {} |", self.client_errors.len())?;
        writeln!(
            f,
            "| requests lost / repeated / out of order | {} / {} / {} |",
            self.lost, self.repeated, self.out_of_order
        )?;
        writeln!(f, "| acknowledged writes lost | {} |", self.missing.len())?;
        writeln!(f, "| linearizable | {} |", self.linearizable)?;
        let ((frames, writes), (late_frames, late_writes)) = (self.seen, self.late);
        writeln!(f, "| frames of the guest seen | {frames}, {late_frames} late |")?;
        writeln!(f, "| writes to its disk seen | {writes}, {late_writes} late |")?;
        writeln!(f, "| two hosts at a time | {} |", self.two_at_a_time.len())?;
        writeln!(f, "| guests that diverged | {} |", self.useless.len())?;
        let failures = self.failures();
        writeln!(f, "| result | {} |", if failures.is_empty() { "passed" } else { "FAILED" })?;
        failures.iter().try_for_each(|failure| writeln!(f, "FAILED: {failure}"))
    }
}

fn row(f: &mut fmt::Formatter<'_>, what: &str, survived: &[&Survived]) -> fmt::Result {
    let blackouts = spread(survived.iter().map(|survived| survived.blackout).collect());
    let times: Vec<Duration> = survived.iter().filter_map(|survived| survived.protected_after).collect();
    let late = survived.iter().filter(|survived| survived.is_late()).count();
    let kept = survived.len() - times.len();
    let protected = match kept {
        0 => spread(times),
        _ => format!("{}; kept {kept} times", spread(times)),
    };
    writeln!(f, "| {what} | {} | {blackouts} | {protected} | {late} |", survived.len())
}

/// Nearest ranks.
fn spread(mut times: Vec<Duration>) -> String {
    if times.is_empty() {
        return "-".to_owned();
    }
    times.sort_unstable();
    let rank = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1].as_secs_f64();
    format!("{:.2} / {:.2} / {:.2}", rank(50), rank(99), rank(100))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::schedule::schedule;

    fn report() -> Report {
        let survived = schedule(1, 3).into_iter().zip(1..).map(|(fault, s)| Survived {
            fault,
            host: Some(1),
            blackout: Duration::from_secs(s),
            protected_after: (s > 1).then(|| Duration::from_secs(5 * s)),
        });
        Report {
            seed: 1,
            wanted: 3,
            survived: survived.collect(),
            took: Duration::from_secs(60),
            answered: 1_000,
            client_errors: Vec::new(),
            lost: 0,
            repeated: 0,
            out_of_order: 0,
            missing: Vec::new(),
            linearizable: Verdict::Linearizable,
            seen: (900, 800),
            late: (1, 0),
            two_at_a_time: Vec::new(),
            useless: Vec::new(),
            stopped: None,
        }
    }

    #[test]
    fn figures_are_in_the_table() {
        let text = report().to_string();
        let all = "| all | 3 | 2.00 / 3.00 / 3.00 | 10.00 / 15.00 / 15.00; kept 1 times | 1 |";
        for line in [all, "| time unprotected | 25.0 s |", "| linearizable | yes |", "| result | passed |"] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn time_in_which_nobody_can_claim_makes_no_late_protection() {
        let lasts = Duration::from_secs(3);
        let survived = |kind, after_s| {
            let fault = Fault { kind, role: None, after: Duration::ZERO, lasts };
            let protected_after = Some(Duration::from_secs(after_s));
            Survived { fault, host: None, blackout: Duration::ZERO, protected_after }
        };
        assert!(!survived(Kind::FillClaimsAndKill, 13).is_late());
        assert!(survived(Kind::FillClaimsAndKill, 14).is_late());
        assert!(survived(Kind::CutLog, 13).is_late(), "one of the hosts can claim");
    }

    #[test]
    fn each_broken_property_fails_the_campaign() {
        assert_eq!(report().failures(), [""; 0]);
        let break_it: [fn(&mut Report); 10] = [
            |report| report.wanted = 4,
            |report| report.client_errors.push("broken".into()),
            |report| report.lost = 1,
            |report| report.repeated = 1,
            |report| report.out_of_order = 1,
            |report| report.missing.push("k".into()),
            |report| report.linearizable = Verdict::Undecided { key: 1 },
            |report| report.two_at_a_time.push("frames".into()),
            |report| report.useless.push("diverged".into()),
            |report| report.stopped = Some("deadline".into()),
        ];
        for break_it in break_it {
            let mut report = report();
            break_it(&mut report);
            assert_eq!(report.failures().len(), 1);
            assert!(report.to_string().contains("FAILED"));
        }
    }
}
