//! `preflight`: what this machine has and lacks, before the agent starts.

use std::{path::Path, process::ExitCode};

use super::output::{Output, table};
use crate::{
    config::Config,
    preflight::{self, Report},
};

/// Prints what was found; fails where the agent would not start.
pub fn run(config: &Config, cni: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let report = preflight::look(config, cni);
    output.print(&report, render)?;
    Ok(if report.can_start {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn render(report: &Report) -> String {
    let rows = report.rows.iter().map(|row| {
        vec![
            row.area.to_owned(),
            row.subject.clone(),
            row.verdict.as_str().to_owned(),
            row.found.clone(),
            row.meaning.clone(),
        ]
    });
    let mut text = table(&["AREA", "WHAT", "IS", "FOUND", "MEANING"], rows);
    text += if report.can_start {
        "\nthe agent can start\n"
    } else {
        "\nthe agent would not start\n"
    };
    text
}
