//! `cargo xtask chaos`: builds, then hands over to the program that lets everything happen at once.

use anyhow::{Context, Result};

use crate::{build, kube, paths, process, setup};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The run's own options: --seed N, --seconds N, --api, --changes N, --logs DIR, --flag=FLAG of the agents
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    passed_on: Vec<String>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::programs()?;
    if args.passed_on.iter().any(|arg| arg == "--api") {
        kube::provide()?;
    }
    build::run()?;
    let mut command = process::as_root(&paths::release("dataplane-chaos"))?;
    command.arg("--agent").arg(paths::release("dataplane-agent"));
    command.args(&args.passed_on);
    process::finish_with(command.status().context("failed to start the run")?)
}
