//! `cargo xtask demo`: builds, then hands over to the demo program.

use anyhow::{Context, Result};

use crate::{build, paths, process, setup};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Keep the two nodes up and print what to try
    #[arg(long)]
    hold: bool,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::programs()?;
    build::run()?;
    let mut command = process::as_root(&paths::release("dataplane-demo"))?;
    command.arg("--agent").arg(paths::release("dataplane-agent"));
    command
        .arg("--manifests")
        .arg(paths::root().join("deploy/examples"));
    if args.hold {
        command.arg("--hold");
    }
    process::finish_with(command.status().context("failed to start the demo")?)
}
