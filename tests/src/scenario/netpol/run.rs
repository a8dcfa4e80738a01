//! One case, in a cluster that may have served others: its steps, and every judged cell of every table.

use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::bed::{Arrivals, Bed, Tries};
use super::drops::Counted;
use super::file::{Action, Case, Cell, Step};
use super::layout::{Layout, Needs, member};
use super::objects::{Change, Objects};
use crate::api::client::Refused;
use crate::scenario::judge::Status;
use crate::scenario::report::{Cells, ProbeReport, ScenarioReport};
use crate::scenario::run::{RunOptions, hold, keep_logs};
use crate::worker::protocol::{Attempt, Proto, Swept, Target};
use crate::worker::sctp;

/// Runs a case in `bed` if that serves it, else in a new one called `name` that is left in its place. A cluster in which
/// more has failed than cells serves no other case. Whatever goes wrong is in the report.
pub fn run(case: &Case, bed: &mut Option<Bed>, name: &str, options: &RunOptions) -> ScenarioReport {
    let start = Instant::now();
    let mut report = ScenarioReport::without_probes(&case.id, &case.name, Status::Passed, String::new());
    report.reason = None;
    let mut run = Run {
        case,
        cells: Cells::default(),
        failed: Vec::new(),
        problems: Vec::new(),
    };
    let judged = case
        .steps
        .iter()
        .filter_map(|step| step.expected.cells().ok())
        .flatten();
    if judged.count() == 0 {
        report.status = Status::Skipped;
        report.reason = Some("every cell is undefined".to_owned());
        return report;
    }
    let result = run.drive(bed, name, options);
    let refused = Refused::or_problem(result, &mut run.problems);
    let broken = !run.problems.is_empty() || refused.is_some();
    if !run.failed.is_empty() {
        let earlier = match bed.as_ref().map_or(0, |bed| bed.cases.saturating_sub(1)) {
            0 => String::new(),
            cases => format!(" (the cluster had served {cases} cases)"),
        };
        let count = format!(
            "{} of {} cells failed{earlier}",
            run.failed.len(),
            run.cells.probed
        );
        run.problems.insert(0, count);
    }
    run.problems.dedup();
    if broken {
        *bed = None;
    }
    if !run.problems.is_empty() {
        report.status = Status::Failed;
        report.reason = Some(run.problems.join("; "));
    } else if refused.is_some() {
        report.status = Status::Skipped;
        report.reason = refused;
    }
    report.probes = run.failed;
    report.cells = Some(run.cells);
    report.seconds = start.elapsed().as_secs_f64();
    report
}

struct Run<'a> {
    case: &'a Case,
    cells: Cells,
    failed: Vec<ProbeReport>,
    problems: Vec<String>,
}

impl Run<'_> {
    fn drive(&mut self, slot: &mut Option<Bed>, name: &str, options: &RunOptions) -> Result<()> {
        let layout = Layout::of(self.case)?;
        let needs = Needs::of(self.case, &layout, options.network)?;
        let (mut objects, before) = Objects::begin(self.case, &layout)?;
        if !slot.as_ref().is_some_and(|bed| bed.serves(&needs)) {
            // The old one goes first: it has the name.
            *slot = None;
            *slot = Some(Bed::build(name, needs.clone(), &before, options)?);
        }
        let bed = slot.as_mut().context("there is no cluster")?;
        bed.begin(&needs, &before)?;
        let mut steps = || -> Result<()> {
            for (number, step) in self.case.steps.iter().enumerate() {
                let place = || format!("step {}", number + 1);
                for action in &step.actions {
                    act(action, bed, &mut objects, &layout).with_context(place)?;
                }
                self.problems.extend(bed.agents().settle());
                self.probe(bed, number, step, &objects).with_context(place)?;
            }
            self.problems.extend(bed.agents().ended());
            Ok(())
        };
        let result = steps();
        keep_logs(options, &self.case.id, bed.agents())?;
        if options.hold {
            hold(bed.id())?;
        }
        result
    }

    /// Probes all cells of a step's tables that are judged.
    fn probe(&mut self, bed: &mut Bed, number: usize, step: &Step, objects: &Objects) -> Result<()> {
        let cells = step.expected.cells()?;
        let has_sctp = sctp::is_in_kernel();
        let mut tries = Tries::new();
        for (index, cell) in cells.iter().enumerate() {
            self.cells.probed += 1;
            self.cells.crafted += usize::from(cell.proto == Proto::Sctp && !has_sctp);
            let target = Target {
                proto: cell.proto,
                to: (objects.address(self.case, cell.to)?, cell.port).into(),
                answers: cell.connects,
            };
            tries.entry(member(cell.from)).or_default().push((index, target));
        }
        if bed.explains() {
            self.explain(bed, number, &cells, objects)?;
        }
        let before = Counted::before(bed.agents())?;
        let (swept, arrivals) = bed.sweep(&tries)?;
        self.cells.drops.add(before.drops(bed.agents())?);
        for (index, swept) in &swept {
            let cell = &cells[*index];
            if let Some(seen) = fault(cell, swept, &arrivals) {
                self.failed.push(report(cell, number, seen));
            }
        }
        ensure!(
            swept.len() == tries.values().map(Vec::len).sum::<usize>(),
            "a sweep left targets out"
        );
        Ok(())
    }
}

impl Run<'_> {
    /// Asks the agents at both ends of each cell, those of SCTP too, what they would do.
    fn explain(&mut self, bed: &Bed, number: usize, cells: &[Cell], objects: &Objects) -> Result<()> {
        for cell in cells {
            let from = (member(cell.from), objects.address(self.case, cell.from)?);
            let to = (member(cell.to), objects.address(self.case, cell.to)?);
            let Some(said) = bed.explain(&from, &to, (cell.proto, cell.port))? else {
                continue;
            };
            self.cells.explained += 1;
            if said.allowed != cell.connects {
                self.failed.push(report(
                    cell,
                    number,
                    format!("explain: {}", said.reasons.join("; ")),
                ));
            }
        }
        Ok(())
    }
}

fn report(cell: &Cell, step: usize, seen: String) -> ProbeReport {
    let proto = format!("{:?}", cell.proto).to_uppercase();
    ProbeReport {
        id: format!("{proto}/{}", cell.port),
        step: step + 1,
        status: Status::Failed,
        expected: if cell.connects {
            "connects"
        } else {
            "does not connect"
        }
        .to_owned(),
        seen,
        route: format!("{} -> {}", cell.from, cell.to),
        note: None,
    }
}

fn act(action: &Action, bed: &mut Bed, objects: &mut Objects, layout: &Layout) -> Result<()> {
    // A pod's address and device are there before its object says so, and go after it.
    if let Action::CreatePod { pod } = action {
        bed.create_pod(pod, layout)?;
    }
    match objects.act(action)? {
        Change::Apply(object) => bed.folder().apply(&object)?,
        Change::Delete(object) => bed.folder().delete(&object)?,
    }
    if let Action::DeletePod { pod } = action {
        bed.delete_pod(&pod.id())?;
    }
    Ok(())
}

/// What is wrong about what was seen, if anything is.
fn fault(cell: &Cell, swept: &Swept, arrivals: &Arrivals) -> Option<String> {
    let target = member(cell.to);
    if cell.connects {
        return match &swept.attempt {
            Attempt::Answered { by, .. } if by.name == target => None,
            other => Some(format!("{} after {} tries", seen(other), swept.tries)),
        };
    }
    if swept.reached {
        return Some(seen(&swept.attempt));
    }
    let arrived = |source| {
        arrivals
            .get(&target)
            .is_some_and(|seen| seen.contains(&(cell.proto, cell.port, source)))
    };
    let arrived = swept.sources.iter().any(|source| arrived(*source));
    arrived.then(|| format!("{}, but its packet arrived", seen(&swept.attempt)))
}

fn seen(attempt: &Attempt) -> String {
    match attempt {
        Attempt::Answered { by, ms } => format!("{} answered in {ms} ms", by.name),
        Attempt::Refused { how, .. } => format!("refused ({how})"),
        Attempt::Silent => "silence".to_owned(),
        Attempt::Broken { how } => how.clone(),
        Attempt::Unsupported => "the kernel cannot do it".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::worker::protocol::Identity;

    fn swept(attempt: Attempt, reached: bool) -> Swept {
        Swept {
            attempt,
            reached,
            tries: 1,
            sources: vec![source()],
        }
    }

    fn source() -> SocketAddr {
        "10.244.1.11:33000".parse().unwrap()
    }

    fn answered(name: &str) -> Attempt {
        let by = Identity {
            name: name.to_owned(),
            at: "10.244.2.12:80".parse().unwrap(),
            client: source(),
        };
        Attempt::Answered { by, ms: 1 }
    }

    fn cell(connects: bool) -> Cell<'static> {
        Cell {
            from: "x/a",
            to: "y/b",
            proto: Proto::Udp,
            port: 80,
            connects,
        }
    }

    #[test]
    fn a_cell_that_connects_needs_the_answer_of_its_pod() {
        let fault = |attempt| fault(&cell(true), &swept(attempt, true), &Arrivals::new());
        assert_eq!(fault(answered("y_b")), None);
        assert!(fault(answered("y_a")).is_some());
        assert!(fault(Attempt::Silent).is_some());
        assert!(
            fault(Attempt::Refused {
                how: "reset".to_owned(),
                ms: 1
            })
            .is_some()
        );
    }

    #[test]
    fn a_cell_that_does_not_connect_bears_no_answer_and_no_arrival() {
        let none = Arrivals::new();
        assert_eq!(fault(&cell(false), &swept(Attempt::Silent, false), &none), None);
        let refused = Attempt::Refused {
            how: "reset".to_owned(),
            ms: 1,
        };
        assert_eq!(fault(&cell(false), &swept(refused, false), &none), None);
        assert!(fault(&cell(false), &swept(answered("y_b"), true), &none).is_some());
        let arrived = Arrivals::from([("y_b".to_owned(), [(Proto::Udp, 80, source())].into())]);
        assert!(fault(&cell(false), &swept(Attempt::Silent, false), &arrived).is_some());
        let elsewhere = Arrivals::from([("y_b".to_owned(), [(Proto::Udp, 81, source())].into())]);
        assert_eq!(
            fault(&cell(false), &swept(Attempt::Silent, false), &elsewhere),
            None
        );
    }
}
