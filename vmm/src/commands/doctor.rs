//! `vmft doctor`: whether this host can run guests.
//!
//! Owns: how the report is printed. Must never: measure, or change the host.

use super::{CommandError, say};
use crate::config::DoctorArgs;
use crate::doctor::{self, Fitness, Options, Report};
use crate::launch::{Ending, LaunchError};

/// `vmft doctor`: a line for each thing that matters, then a verdict.
pub fn doctor(args: &DoctorArgs) -> Result<Ending, CommandError> {
    let report =
        doctor::examine(&Options { arbiter: args.arbiter.clone(), etcd: args.etcd.files(), peer: args.peer });
    if args.json {
        let text = serde_json::to_string_pretty(&report)
            .map_err(|error| LaunchError::host("write the report")(error.into()))?;
        say(text)?;
    } else {
        let checks: String = report.checks.iter().map(|check| format!("{check}\n")).collect();
        say(format_args!("{checks}verdict: {}", report.verdict))?;
    }
    match report.verdict {
        Fitness::Pmu | Fitness::Checkpoint => Ok(Ending::Orderly),
        Fitness::Unfit => Err(CommandError::Unfit(refusal(&report))),
    }
}

fn refusal(report: &Report) -> String {
    report.reason().map_or_else(
        || "this host is unfit".into(),
        |check| {
            let advice = check.advice.as_ref().map(|advice| format!("; {advice}")).unwrap_or_default();
            format!("this host is unfit: {}: {}{advice}", check.name, check.seen)
        },
    )
}
