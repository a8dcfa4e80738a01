//! `cargo xtask build`: everything that runs, in release.

use anyhow::Result;

use crate::{ebpf, process, progress};

/// The kernel side, then the agent that embeds it and the programs of the tests.
pub fn run() -> Result<()> {
    ebpf::run(&ebpf::Args::default())?;
    let mut command = process::cargo("build");
    command.args([
        "--release",
        "--package",
        "dataplane-agent",
        "--package",
        "dataplane-tests",
    ]);
    progress::step("building the agent and the test programs", || {
        process::run(process::quiet_unless_watched(&mut command))
    })
}
