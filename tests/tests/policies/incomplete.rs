//! Tables of which one is not pinned, and processes without rights: each command says what is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::built;

use crate::policies;
use crate::stage::{SERVICE, Stage};

const NODE: &str = "node1";

/// A table, and commands that cannot do without it.
const NEEDED: [(&str, &[&[&str]]); 5] = [
    (
        "BACKENDS",
        &[&["services"], &["endpoints"], &["policies"], EXPLAIN],
    ),
    ("FLOWS_V4", &[&["flows"]]),
    ("BACKEND_TRAFFIC", &[&["endpoints"]]),
    ("VERDICTS", &[&["verdicts"]]),
    ("MONITOR", &[&["monitor", "--count", "1", "--seconds", "1"]]),
];
const EXPLAIN: &[&str] = &[
    "explain",
    "--from",
    "10.244.1.11",
    "--to",
    "10.244.1.21",
    "--port",
    "80/TCP",
];

#[test]
fn a_table_or_a_right_that_is_missing_is_named() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let mut stage = Stage::set("incomplete", &agent, &[], &policies())?;
    stage.agents.kill_all();
    let complete = stage.agents.status(NODE)?.to_string();
    ensure!(!complete.contains("is left out"), "{complete}");
    let bpffs = stage.agents.bpffs(NODE)?.to_path_buf();
    let maps = fs::read_dir(&bpffs)?
        .flatten()
        .map(|version| version.path().join("maps"))
        .find(|maps| maps.is_dir())
        .context("nothing is pinned")?;
    for (table, commands) in NEEDED {
        let (pin, away) = (maps.join(table), maps.join("AWAY"));
        fs::rename(&pin, &away).with_context(|| format!("no table {table}"))?;
        for command in commands {
            let output = stage
                .agents
                .asking(NODE, &with_tables(command, &bpffs.display().to_string()))?;
            let error = String::from_utf8_lossy(&output.stderr).into_owned();
            ensure!(
                !output.status.success() && error.contains(&format!("failed to open {}", pin.display())),
                "{command:?} without {table}: {error}"
            );
        }
        fs::rename(&away, &pin)?;
    }
    let (pin, away) = (maps.join("FLOWS_V4"), maps.join("AWAY"));
    fs::rename(&pin, &away)?;
    for command in [&["services", "-o", "wide"][..], &["endpoints"]] {
        let output = stage
            .agents
            .asking(NODE, &with_tables(command, &bpffs.display().to_string()))?;
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        let said = format!(
            "no flows: failed to read their tables: failed to open {}",
            pin.display()
        );
        ensure!(
            output.status.success() && error.contains(&said),
            "{command:?} without flows: {error}"
        );
    }
    fs::rename(&away, &pin)?;
    // What is there is shown, and what is not is named.
    let (pin, away) = (maps.join("BACKENDS"), maps.join("AWAY"));
    fs::rename(&pin, &away)?;
    let status = stage.agents.status(NODE)?;
    ensure!(
        status["warnings"]
            .to_string()
            .contains("table BACKENDS is left out"),
        "{status:#}"
    );
    let output = stage
        .agents
        .run(NODE, &["maps", "--bpffs", &bpffs.display().to_string()])?;
    let [shown, error] =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    ensure!(
        output.status.success() && shown.contains("FLOWS_V4") && error.contains("table BACKENDS is left out"),
        "{shown}{error}"
    );

    // The next agent makes it anew.
    fs::remove_file(&away)?;
    stage.agents.start_all()?;
    stage.settle()?;
    ensure!(stage.connects("front", SERVICE.parse()?)?, "after a start");
    let status = stage.agents.status(NODE)?;
    ensure!(!status.to_string().contains("is left out"), "{status:#}");

    for command in NEEDED.iter().flat_map(|(_, commands)| *commands) {
        without_rights(&agent, command, &bpffs.display().to_string())?;
    }
    Ok(())
}

/// Root without any capability.
fn without_rights(agent: &Path, command: &[&str], bpffs: &str) -> Result<()> {
    let output = Command::new("setpriv")
        .args(["--inh-caps=-all", "--bounding-set=-all"])
        .arg(agent)
        .args(with_tables(command, bpffs))
        .args(["--socket", "/nonexistent"])
        .output()
        .context("failed to run setpriv")?;
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(
        !output.status.success() && error.contains("missing capability CAP_NET_ADMIN: run as root"),
        "{command:?}: {error}"
    );
    Ok(())
}

fn with_tables<'a>(command: &[&'a str], bpffs: &'a str) -> Vec<&'a str> {
    [command, &["--bpffs", bpffs]].concat()
}
