//! `explain`: what the policies in a folder of manifests say of a flow.

use std::{fmt::Write as _, io::Write, path::Path, process::ExitCode};

use anyhow::{Context, ensure};

use super::status::Output;
use crate::{
    explain::{End, Explained, Place, Port, explain},
    model::{Index, Kind, Rejected},
    source::{Change, manifests::Folder},
};

/// Prints the answer; fails when the flow is denied, so that a script can ask.
pub fn run(manifests: &Path, from: &End, to: &End, port: Port, output: Output) -> anyhow::Result<ExitCode> {
    let mut folder = Folder::new(manifests.to_owned());
    let batch = folder.scan(true);
    ensure!(folder.is_readable(), "failed to read {}", manifests.display());
    let mut index = Index::new("");
    for change in batch.changes {
        if let Change::Apply { object, .. } = change {
            index.apply(object);
        }
    }
    let explained = explain(&index, from, to, port)?;
    let about_policies = |one: &&Rejected| {
        let kind = one.object.split(' ').next().and_then(Kind::parse);
        kind.is_none_or(Kind::is_policy)
    };
    let problems: Vec<String> = batch
        .rejected
        .iter()
        .filter(about_policies)
        .map(ToString::to_string)
        .collect();
    let text = match output {
        Output::Json => {
            let answer = serde_json::json!({"flows": explained, "problems": problems});
            serde_json::to_string_pretty(&answer)? + "\n"
        }
        Output::Table => render(&explained, &problems),
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("failed to print")?;
    let allowed = explained.iter().all(|flow| flow.allowed);
    Ok(if allowed {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn render(explained: &[Explained], problems: &[String]) -> String {
    let mut text = String::new();
    let verdict = |allowed| if allowed { "allowed" } else { "denied" };
    for flow in explained {
        let (from, to) = (describe(&flow.from), describe(&flow.to));
        let service = flow
            .service
            .as_ref()
            .map_or_else(String::new, |service| format!(" of Service {service}"));
        let _infallible = writeln!(
            text,
            "{from} -> {to}{service}, {}: {}",
            flow.port,
            verdict(flow.allowed)
        );
        if flow.steps.is_empty() {
            text.push_str("  neither end is a Pod of this cluster: no policy is about them\n");
        }
        for step in &flow.steps {
            let at = describe(&step.at);
            let _infallible = writeln!(text, "  {} of {at}: {}", step.direction, verdict(step.allowed));
            let _infallible = writeln!(text, "    {}", step.reason);
            if let Some(dry_run) = &step.dry_run {
                let _infallible = writeln!(text, "    without dry run {dry_run}");
            }
            if !step.selected_by.is_empty() {
                let _infallible = writeln!(text, "    selected by {}", step.selected_by.join(", "));
            }
        }
        text.push('\n');
    }
    for problem in problems {
        let _infallible = writeln!(text, "{problem}");
    }
    text
}

fn describe(place: &Place) -> String {
    match &place.pod {
        Some(pod) => format!("{pod} ({})", place.ip),
        None => place.ip.to_string(),
    }
}
