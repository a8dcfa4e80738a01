//! `status`: what is attached, by the kernel's own queries, and how full the tables are.

use std::{io::Write, path::Path, time::Duration};

use anyhow::Context;
use comfy_table::{Table, presets};
use serde::de::DeserializeOwned;

use super::ask::ask;
use crate::{
    attach::inspect::{self, Status},
    bpf::kernel,
    source::kube::state::KindState,
};

/// How long the agent may be silent.
const WITHIN: Duration = Duration::from_secs(10);

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    Table,
    Json,
}

/// Prints the status of the datapath under `bpffs`.
pub fn run(bpffs: &Path, output: Output) -> anyhow::Result<()> {
    kernel::check_capabilities()?;
    let mut status = inspect::inspect(bpffs).context("failed to query what is attached")?;
    if let Some(socket) = status.socket.as_ref().filter(|_| status.agent_running) {
        match told(socket, "/conditions") {
            Ok(conditions) => status.conditions = conditions,
            Err(error) => status.warnings.push(format!("{error:#}")),
        }
        match told(socket, "/source") {
            Ok(report) => status.source = report,
            Err(error) => status.warnings.push(format!("{error:#}")),
        }
    }
    let text = match output {
        Output::Json => serde_json::to_string_pretty(&status)? + "\n",
        Output::Table => render(&status),
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("failed to print")
}

fn told<T: DeserializeOwned>(socket: &Path, path: &str) -> anyhow::Result<T> {
    ask(socket, path, WITHIN)
        .with_context(|| format!("failed to ask the agent at {}", socket.display()))?
        .value()
}

fn render(status: &Status) -> String {
    let agent = if status.agent_running {
        "running"
    } else {
        "not running"
    };
    let datapath = if status.installed {
        "installed"
    } else {
        "not installed"
    };
    let mut text = format!(
        "agent {agent}, datapath {datapath} under {}, tc by {}\n",
        status.bpffs, status.tc
    );

    let rows = status.conditions.iter().map(|one| {
        let holds = if one.status { "yes" } else { "no" };
        vec![
            one.kind.as_str().to_owned(),
            holds.to_owned(),
            one.message.clone(),
        ]
    });
    text += &table(&["CONDITION", "HOLDS", "NOT SERVED"], rows);

    if let Some(source) = &status.source {
        let head = format!(
            "\nAPI server {}: {} requests, {} bytes received\n",
            source.server, source.requests, source.received_bytes
        );
        text += &head;
        text += &table(
            &[
                "KIND",
                "STATE",
                "OBJECTS",
                "LISTS",
                "LAST EVENT",
                "ERRORS",
                "FAILING",
            ],
            source.kinds.iter().map(|(kind, state)| kind_row(kind, state)),
        );
    }

    let rows = status.attachments.iter().map(|one| {
        let owner = if one.ours { "us" } else { "other" };
        vec![
            one.target.clone(),
            one.hook.clone(),
            one.position.to_string(),
            one.program.clone(),
            one.program_id.to_string(),
            one.mode.clone(),
            owner.to_owned(),
        ]
    });
    text += &table(&["DEVICE", "HOOK", "#", "PROGRAM", "ID", "MODE", "OF"], rows);

    let rows = status
        .xdp_fallbacks
        .iter()
        .map(|one| vec![one.device.clone(), one.reason.clone()]);
    text += &table(&["WITHOUT XDP", "REASON"], rows);

    let rows = status.tables.iter().map(|one| {
        vec![
            one.name.to_owned(),
            one.entries.to_string(),
            one.limit.to_string(),
        ]
    });
    text += &table(&["TABLE", "ENTRIES", "LIMIT"], rows);

    let rows = status.flows.iter().map(|one| {
        vec![
            one.event.to_owned(),
            one.count.to_string(),
            one.meaning.to_owned(),
        ]
    });
    text += &table(&["FLOWS", "COUNT", "MEANING"], rows);

    let rows = status.counters.iter().map(|one| {
        vec![
            one.reason.to_owned(),
            one.count.to_string(),
            one.meaning.to_owned(),
        ]
    });
    text += &table(&["REASON", "COUNT", "MEANING"], rows);

    for warning in &status.warnings {
        text += "\nwarning: ";
        text += warning;
        text += "\n";
    }
    text
}

fn kind_row(kind: &str, state: &KindState) -> Vec<String> {
    let last_event = state.last_event.map_or_else(String::new, |time| time.to_string());
    vec![
        kind.to_owned(),
        state.phase.as_str().to_owned(),
        state.objects.to_string(),
        state.lists.to_string(),
        last_event,
        state.errors.to_string(),
        state.failing.clone().unwrap_or_default(),
    ]
}

/// Nothing when there are no rows, else an empty line first.
pub fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    if table.row_count() == 0 {
        return String::new();
    }
    let mut text = String::from("\n");
    for line in table.lines() {
        text += line.trim_end();
        text += "\n";
    }
    text
}
