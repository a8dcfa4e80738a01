//! What this machine has and lacks for the agent, row by row, without changing anything: [`kernel`] what the kernel does,
//! [`machine`] mounts, kernel parameters and CNI, [`devices`] what each device gets, [`others`] who else is at work here, [`source`]
//! where objects come from.

mod devices;
mod kernel;
mod machine;
mod others;
mod source;

use std::path::Path;

use serde::Serialize;

use crate::{
    config::Config,
    netlink::{socket::RequestSocket, tables::Tables},
};

/// What a row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// The agent starts; somebody should know.
    Note,
    /// The agent does not start.
    Problem,
}

impl Verdict {
    pub const fn as_str(self) -> &'static str {
        match self {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "problem",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    pub area: &'static str,
    pub subject: String,
    pub verdict: Verdict,
    /// What was found.
    pub found: String,
    /// What it means, and the way out where one is needed.
    pub meaning: String,
}

/// All rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// No row is a problem.
    pub can_start: bool,
    pub rows: Vec<Row>,
}

/// The rows of one area.
#[derive(Debug)]
struct Rows<'a> {
    area: &'static str,
    rows: &'a mut Vec<Row>,
}

impl<'a> Rows<'a> {
    fn of(area: &'static str, rows: &'a mut Vec<Row>) -> Self {
        Self { area, rows }
    }

    fn add(
        &mut self,
        verdict: Verdict,
        subject: impl Into<String>,
        found: impl Into<String>,
        meaning: impl Into<String>,
    ) {
        self.rows.push(Row {
            area: self.area,
            subject: subject.into(),
            verdict,
            found: found.into(),
            meaning: meaning.into(),
        });
    }

    fn ok(&mut self, subject: impl Into<String>, found: impl Into<String>) {
        self.add(Verdict::Ok, subject, found, "");
    }

    fn note(&mut self, subject: impl Into<String>, found: impl Into<String>, meaning: impl Into<String>) {
        self.add(Verdict::Note, subject, found, meaning);
    }

    fn problem(&mut self, subject: impl Into<String>, error: impl Into<anyhow::Error>) {
        let error: anyhow::Error = error.into();
        self.add(Verdict::Problem, subject, "missing", format!("{error:#}"));
    }
}

/// Looks at the machine, as an agent with this configuration would find it. Must be called in the network namespace of the
/// host.
pub fn look(config: &Config, cni: &Path) -> Report {
    let mut rows = Vec::new();
    let may_load = kernel::look(&mut Rows::of("kernel", &mut rows), config);
    machine::mounts(&mut Rows::of("mounts", &mut rows), config);
    let tables = RequestSocket::open().and_then(|mut socket| Tables::dump(&mut socket));
    match &tables {
        Ok(tables) => {
            devices::look(&mut Rows::of("devices", &mut rows), config, tables);
            machine::parameters(&mut Rows::of("sysctls", &mut rows), config, tables);
            others::look(&mut Rows::of("others", &mut rows), config, tables, may_load);
        }
        Err(error) => {
            let error = anyhow::anyhow!("failed to list devices: {error}");
            Rows::of("devices", &mut rows).problem("netlink", error);
        }
    }
    machine::cni(&mut Rows::of("cni", &mut rows), cni);
    source::look(&mut Rows::of("source", &mut rows), config);
    Report {
        can_start: rows.iter().all(|row| row.verdict != Verdict::Problem),
        rows,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_keeps_the_agent_from_starting_and_a_note_does_not() {
        let mut rows = Vec::new();
        let mut area = Rows::of("kernel", &mut rows);
        area.ok("a", "1");
        area.note("b", "0", "slower");
        assert!(area.rows.iter().all(|row| row.verdict != Verdict::Problem));
        area.problem("c", anyhow::anyhow!("no").context("failed to try"));
        assert_eq!(area.rows[2].meaning, "failed to try: no");
        assert_eq!(area.rows[2].verdict, Verdict::Problem);
    }
}
