//! `cargo xtask chaos`: builds, then hands over to the program that lets everything happen at once.

use anyhow::{Context, Result};

use crate::{build, paths, process, setup};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What happens follows from it; one is chosen and printed if absent
    #[arg(long)]
    seed: Option<u64>,

    /// How long things happen, in seconds
    #[arg(long, default_value_t = 900)]
    seconds: u64,

    /// Objects come from a real API server (see `cargo xtask kube`), which is killed too, in place of a folder
    #[arg(long)]
    api: bool,

    /// Changes of objects a second [default: 200; with an API server 50]
    #[arg(long)]
    changes: Option<u32>,

    /// Flags for the agents (`--socket-lb=all`), each with this before it
    #[arg(long = "flag", allow_hyphen_values = true)]
    flags: Vec<String>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::programs()?;
    build::run()?;
    let mut command = process::as_root(&paths::release("dataplane-chaos"))?;
    command.arg("--agent").arg(paths::release("dataplane-agent"));
    command.args(["--seconds", &args.seconds.to_string()]);
    if let Some(seed) = args.seed {
        command.args(["--seed", &seed.to_string()]);
    }
    if let Some(changes) = args.changes {
        command.args(["--changes", &changes.to_string()]);
    }
    if args.api {
        command.arg("--api");
    }
    for flag in &args.flags {
        command.arg(format!("--flag={flag}"));
    }
    process::finish_with(command.status().context("failed to start the run")?)
}
