//! `status`: what is attached, by the kernel's own queries, and how full the tables are.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context;
use jiff::Timestamp;

use super::{
    ask::{self, Answer},
    output::{Output, table},
};
use crate::{
    attach::inspect::{self, Status, Versions},
    bpf::kernel,
    source::{
        Report,
        kube::{self, state::KindState},
        manifests,
    },
};

/// Prints the status of the datapath under `bpffs`.
pub fn run(bpffs: &Path, output: Output) -> anyhow::Result<()> {
    kernel::check_capabilities()?;
    let mut status = inspect::inspect(bpffs).context("failed to query what is attached")?;
    if let Some(socket) = status.socket.as_ref().filter(|_| status.agent_running) {
        let answer = ask::reach(socket, "/conditions");
        status.versions.agent = answer.as_ref().ok().and_then(Answer::version).map(str::to_owned);
        match answer.and_then(|answer| answer.value()) {
            Ok(conditions) => status.conditions = conditions,
            Err(error) => status.warnings.push(format!("{error:#}")),
        }
        match ask::value(socket, "/source") {
            Ok(report) => status.source = report,
            Err(error) => status.warnings.push(format!("{error:#}")),
        }
    }
    output.print(&status, render)
}

/// Who works here, and what is wrong: what is read first.
fn head(status: &Status) -> String {
    let running = if status.agent_running { "" } else { "not " };
    let installed = if status.installed { "" } else { "not " };
    let Versions {
        command,
        agent,
        kernel,
    } = &status.versions;
    let other = agent.as_ref().filter(|agent| agent != command);
    let version = match other {
        Some(agent) => format!("version {agent}, this command {command}"),
        None => format!("version {command}"),
    };
    let mut lines = vec![
        format!(
            "agent {running}running, datapath {installed}installed under {}, tc by {}",
            status.bpffs, status.tc
        ),
        format!("{version}, Linux {kernel}"),
    ];
    let problems = problems(status).into_iter();
    lines.extend(problems.map(|problem| format!("problem: {problem}")));
    lines.join("\n") + "\n"
}

fn render(status: &Status) -> String {
    let mut text = head(status);
    let rows = status.conditions.iter().map(|one| {
        let holds = if one.status { "yes" } else { "no" };
        vec![
            one.kind.as_str().to_owned(),
            holds.to_owned(),
            shortened(&one.message),
        ]
    });
    text += &table(&["CONDITION", "HOLDS", "NOT SERVED"], rows);

    let now = Timestamp::now();
    match &status.source {
        Some(Report::Api(source)) => text += &of_server(source, now),
        Some(Report::Folder(source)) => text += &of_folder(source, now),
        None => {}
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

    text
}

fn of_server(source: &kube::state::Report, now: Timestamp) -> String {
    let head = format!(
        "\nAPI server {}: {} requests, {} bytes received\n",
        source.server, source.requests, source.received_bytes
    );
    let columns = [
        "KIND",
        "STATE",
        "OBJECTS",
        "LISTS",
        "LAST EVENT",
        "ERRORS",
        "FAILING",
    ];
    let kinds = source.kinds.iter();
    head + &table(&columns, kinds.map(|(kind, state)| kind_row(kind, state, now)))
}

fn of_folder(source: &manifests::Report, now: Timestamp) -> String {
    let row = vec![
        source.path.display().to_string(),
        source.files.to_string(),
        source.objects.to_string(),
        source.refused.to_string(),
        since(source.last_look, now),
        since(source.last_change, now),
    ];
    table(
        &[
            "FOLDER",
            "FILES",
            "OBJECTS",
            "REFUSED",
            "LAST LOOK",
            "LAST CHANGE",
        ],
        std::iter::once(row),
    )
}

/// What is wrong, before everything else.
fn problems(status: &Status) -> Vec<String> {
    let mut problems = Vec::new();
    if status.installed && !status.agent_running {
        problems
            .push("no agent runs: packets go on by what the tables hold, which nobody changes".to_owned());
    }
    let unmet = status.conditions.iter().filter(|one| !one.status);
    problems.extend(unmet.map(|one| format!("{}: {}", one.kind.as_str(), one.message)));
    if let Some(Report::Api(source)) = &status.source {
        // Kinds that fail for the same reason are one problem.
        let mut failing: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (kind, state) in &source.kinds {
            if let Some(why) = &state.failing {
                failing.entry(why).or_default().push(kind);
            }
        }
        let of = |(why, kinds): (&str, Vec<&str>)| {
            format!(
                "API server {}: {} not followed: {why}",
                source.server,
                kinds.join(", ")
            )
        };
        problems.extend(failing.into_iter().map(of));
    }
    problems.extend(status.warnings.iter().cloned());
    problems
}

fn kind_row(kind: &str, state: &KindState, now: Timestamp) -> Vec<String> {
    vec![
        kind.to_owned(),
        state.phase.as_str().to_owned(),
        state.objects.to_string(),
        state.lists.to_string(),
        since(state.last_event, now),
        state.errors.to_string(),
        state.failing.clone().unwrap_or_default(),
    ]
}

/// The begin of what the head has said in full.
fn shortened(message: &str) -> String {
    const CHARACTERS: usize = 100;
    match message.char_indices().nth(CHARACTERS) {
        Some((end, _)) => format!("{} …", &message[..end]),
        None => message.to_owned(),
    }
}

/// For people; JSON has the time itself.
fn since(time: Option<Timestamp>, now: Timestamp) -> String {
    let Some(time) = time else {
        return String::new();
    };
    match (now.as_second() - time.as_second()).max(0) {
        seconds @ ..=119 => format!("{seconds} s ago"),
        seconds @ 120..=7199 => format!("{} min ago", seconds / 60),
        seconds => format!("{} h ago", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_age_of_what_is_known_of_a_kind_is_shown() {
        let now = Timestamp::now();
        for (seconds, expected) in [
            // A clock that was set back.
            (-5, "0 s ago"),
            (0, "0 s ago"),
            (119, "119 s ago"),
            (150, "2 min ago"),
            (8000, "2 h ago"),
        ] {
            let state = KindState {
                last_event: Some(now - jiff::SignedDuration::from_secs(seconds)),
                failing: Some("the API server is gone".to_owned()),
                ..KindState::default()
            };
            let row = kind_row("Service", &state, now);
            assert!(row.iter().any(|cell| cell == expected), "{row:?}");
            assert!(row.iter().any(|cell| cell == "the API server is gone"), "{row:?}");
        }
        let row = kind_row("Service", &KindState::default(), now);
        assert!(!row.iter().any(|cell| cell.contains("ago")), "nothing has come");
    }

    #[test]
    fn the_age_of_what_is_known_of_a_folder_is_shown() {
        let now = Timestamp::now();
        let report = manifests::Report {
            path: "/manifests".into(),
            files: 2,
            objects: 40,
            refused: 1,
            last_look: Some(now - jiff::SignedDuration::from_secs(3)),
            last_change: Some(now - jiff::SignedDuration::from_secs(300)),
        };
        let text = of_folder(&report, now);
        for expected in ["/manifests", "40", "3 s ago", "5 min ago"] {
            assert!(text.contains(expected), "{text}");
        }
    }
}
