//! `cargo xtask bench …`: builds in release, then hands over to the benchmark.

use anyhow::{Context, Result};

use crate::{build, paths, process, setup};

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    #[command(disable_help_flag = true)]
    /// ns a packet of each program by `BPF_PROG_TEST_RUN`, as ratios to floor programs
    Datapath(PassedOn),
    #[command(disable_help_flag = true)]
    /// Connections/s and request/response, pod to `ClusterIP`, beside plain routing and kube-proxy's rules
    Net(PassedOn),
}

#[derive(Debug, clap::Args)]
struct PassedOn {
    /// The benchmark's own options; `--help` lists them
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    let (program, args, needs_agent) = match &args.what {
        What::Datapath(PassedOn { args }) => ("dataplane-bench-datapath", args, false),
        What::Net(PassedOn { args }) => ("dataplane-bench-net", args, true),
    };
    setup::programs()?;
    build::run()?;
    let mut command = process::as_root(&paths::release(program))?;
    if needs_agent
        && !args
            .iter()
            .any(|arg| arg == "--agent" || arg.starts_with("--agent="))
    {
        command.arg("--agent").arg(paths::release("dataplane-agent"));
    }
    let status = command
        .args(args)
        .status()
        .with_context(|| format!("failed to start {program}"))?;
    process::finish_with(status)
}
