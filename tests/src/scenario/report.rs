//! What a run says: a line a scenario, the probes that failed, a last line of counts; or one JSON document.

use std::fmt::Write as _;

use serde::Serialize;

use super::judge::Status;
use super::netpol::drops::Drops;

/// So many failures of a scenario are written out; the JSON document has them all.
const TOLD: usize = 20;

/// One probe.
#[derive(Debug, Clone, Serialize)]
pub struct ProbeReport {
    pub id: String,
    pub step: usize,
    pub status: Status,
    pub expected: String,
    pub seen: String,
    /// From where to where.
    pub route: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

/// One scenario.
#[derive(Debug, Clone, Serialize)]
pub struct ScenarioReport {
    pub id: String,
    pub name: String,
    pub status: Status,
    pub reason: Option<String>,
    pub seconds: f64,
    /// Of a table, those that failed.
    pub probes: Vec<ProbeReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cells: Option<Cells>,
}

/// How much of a policy scenario's tables was probed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Cells {
    pub probed: usize,
    /// Of these, SCTP by crafted packets: the kernel has none of its own.
    pub crafted: usize,
    /// Cells about which the agents were asked.
    pub explained: usize,
    pub drops: Drops,
}

/// The whole run.
#[derive(Debug, Serialize)]
pub struct RunReport<C> {
    pub config: C,
    pub passed: usize,
    pub failed: usize,
    pub skipped: usize,
    pub scenarios: Vec<ScenarioReport>,
}

impl ScenarioReport {
    /// A scenario that was not run, or could not be.
    pub fn without_probes(id: &str, name: &str, status: Status, reason: String) -> Self {
        Self {
            id: id.to_owned(),
            name: name.to_owned(),
            status,
            reason: Some(reason),
            seconds: 0.0,
            probes: Vec::new(),
            cells: None,
        }
    }

    /// The line of the scenario and what there is to say about its probes.
    pub fn text(&self) -> String {
        let word = match self.status {
            Status::Passed => "pass",
            Status::Failed => "FAIL",
            Status::Skipped | Status::Undefined => "skip",
        };
        let mut text = format!("{word}  {} {}  {:.1}s", self.id, self.name, self.seconds);
        if let Some(reason) = &self.reason {
            let _ = write!(text, "  {reason}");
        }
        if let Some(Cells {
            probed,
            crafted,
            explained,
            drops: Drops { denied, others },
        }) = &self.cells
        {
            let _ = write!(text, "  {probed} cells, {denied} drops by policies");
            for (reason, count) in others {
                let _ = write!(text, ", {count} {reason}");
            }
            if *explained > 0 {
                let _ = write!(text, ", {explained} explained");
            }
            if *crafted > 0 {
                let _ = write!(
                    text,
                    ", {crafted} of SCTP by crafted packets: the kernel lacks it"
                );
            }
        }
        let mut untold = 0;
        let mut told = 0;
        for probe in &self.probes {
            if probe.status == Status::Failed {
                told += 1;
                if told > TOLD {
                    untold += 1;
                    continue;
                }
            }
            let ProbeReport {
                id,
                step,
                status,
                expected,
                seen,
                route,
                note,
            } = probe;
            let note = note.as_deref().unwrap_or_default();
            let _ = match status {
                Status::Failed => write!(
                    text,
                    "\n      {id} (step {step}) {route}\n        expected {expected}\n        seen     {seen}  {note}"
                ),
                Status::Passed if !note.is_empty() => {
                    write!(
                        text,
                        "\n      {id} (step {step}) {route}: expected {expected}, seen {seen}: {note}"
                    )
                }
                _ => Ok(()),
            };
        }
        if untold > 0 {
            let _ = write!(text, "\n      and {untold} more");
        }
        text
    }
}

impl<C> RunReport<C> {
    /// Counts scenarios; they are put in the order of their ids.
    pub fn new(config: C, mut scenarios: Vec<ScenarioReport>) -> Self {
        scenarios.sort_by(|one, other| one.id.cmp(&other.id));
        let count = |status| {
            scenarios
                .iter()
                .filter(|scenario| scenario.status == status)
                .count()
        };
        Self {
            config,
            passed: count(Status::Passed),
            failed: count(Status::Failed),
            skipped: count(Status::Skipped) + count(Status::Undefined),
            scenarios,
        }
    }

    /// The last line.
    pub fn summary(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}
