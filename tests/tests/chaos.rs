//! A third of a minute in which everything fails at once; `cargo xtask chaos` takes as long as wanted, with an API server too.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;

const SECONDS: &str = "20";

#[test]
fn everything_fails_at_once_and_nothing_is_lost() -> Result<()> {
    let Some(program) = agent::built() else {
        return Ok(());
    };
    let status = Command::new(env!("CARGO_BIN_EXE_dataplane-chaos"))
        .arg("--agent")
        .arg(program)
        .args(["--seconds", SECONDS])
        .status()
        .context("failed to start the run")?;
    ensure!(status.success(), "what did not hold is told above, with the seed");
    Ok(())
}
