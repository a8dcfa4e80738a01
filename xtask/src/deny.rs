//! What may be depended on: cargo-deny with `deny.toml`, over both lock files.

use anyhow::{Result, bail};

use crate::{paths, process, progress, setup};

const MANIFESTS: [&str; 2] = ["Cargo.toml", "dataplane-ebpf/Cargo.toml"];

/// Fails, naming each package that may not be there. Advisories are left out, in words, where their database cannot be had.
pub fn run() -> Result<()> {
    let program = setup::cargo_deny()?;
    let deny = |manifest: &str| {
        let mut command = process::cargo_tool(&program);
        command
            .args(["--locked", "--log-level", "error", "--manifest-path"])
            .arg(paths::root().join(manifest));
        command
    };
    let mut checks = vec!["licenses", "bans", "sources"];
    match process::run_captured(deny(MANIFESTS[0]).args(["fetch", "db"])) {
        Ok(()) => checks.push("advisories"),
        Err(error) => {
            let text = format!("{error:#}");
            let why = text.trim().lines().last().unwrap_or_default();
            progress::note(&format!(
                "skipped: advisories, whose database cannot be had: {why}"
            ));
        }
    }
    let mut failed = Vec::new();
    for manifest in MANIFESTS {
        let mut command = deny(manifest);
        command.arg("check").args(&checks);
        if let Err(error) = process::run(&mut command) {
            failed.push(format!("{manifest}: {error:#}"));
        }
    }
    if !failed.is_empty() {
        bail!("{}", failed.join("\n"));
    }
    Ok(())
}
