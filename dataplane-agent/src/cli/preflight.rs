//! `preflight`: what this machine has and lacks, before the agent starts.

use std::{io::Write, path::Path, process::ExitCode};

use anyhow::Context;

use super::status::{Output, table};
use crate::{
    config::Config,
    preflight::{self, Report},
};

/// Prints what was found; fails where the agent would not start.
pub fn run(config: &Config, cni: &Path, output: Output) -> anyhow::Result<ExitCode> {
    let report = preflight::look(config, cni);
    let text = match output {
        Output::Json => serde_json::to_string_pretty(&report)? + "\n",
        Output::Table => render(&report),
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("failed to print")?;
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
