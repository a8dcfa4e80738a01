//! `cargo xtask demo`: builds, then hands over to the demo program.

use anyhow::{Context, Result};

use crate::{build, kube, paths, process, setup};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Keep the two nodes up and print what to try
    #[arg(long)]
    hold: bool,

    /// Serve what a real Kubernetes API server says, in place of a folder; builds it (`cargo xtask kube`) where there is none
    #[arg(long)]
    api: bool,

    /// How often the agents are killed while connections run
    #[arg(long)]
    kills: Option<u32>,

    /// Connections kept on each of three ways meanwhile
    #[arg(long)]
    connections: Option<u32>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    setup::programs()?;
    if args.api {
        kube::provide()?;
    }
    build::run()?;
    let mut command = process::as_root(&paths::release("dataplane-demo"))?;
    command.arg("--agent").arg(paths::release("dataplane-agent"));
    command
        .arg("--manifests")
        .arg(paths::root().join("deploy/examples"));
    if args.api {
        command.arg("--api");
    }
    if args.hold {
        command.arg("--hold");
    }
    for (flag, value) in [("--kills", args.kills), ("--connections", args.connections)] {
        if let Some(value) = value {
            command.arg(flag).arg(value.to_string());
        }
    }
    process::finish_with(command.status().context("failed to start the demo")?)
}
