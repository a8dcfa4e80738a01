//! `cargo xtask bench …`: builds in release, then hands over to the benchmark.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::{build, ebpf, paths, process, progress, setup};

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
    #[command(disable_help_flag = true)]
    /// First sync, single changes and memory of the agent: 50,000 services, 250,000 endpoints; 10,000 policies, 50,000 pods
    Control(PassedOn),
    #[command(disable_help_flag = true)]
    /// What policies cost a packet, and whether it depends on how many rules, policies and peers there are
    Policy(PassedOn),
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
        What::Control(PassedOn { args }) => return of_agent("control", args),
        What::Policy(PassedOn { args }) => return of_agent("policy", args),
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

/// A benchmark of the agent's own, which cargo builds with the agent.
fn of_agent(name: &str, args: &[String]) -> Result<()> {
    setup::programs()?;
    ebpf::run(&ebpf::Args::default())?;
    let mut command = process::cargo("build");
    command.args(["--release", "--package", "dataplane-agent", "--bench", name]);
    let program = progress::step("building the agent's benchmark", || {
        process::run(process::quiet_unless_watched(&mut command))?;
        // Its name has a hash, which cargo tells.
        let messages = process::stdout_of(command.arg("--message-format=json"))?;
        built_program(&messages).context("cargo does not say where the benchmark is")
    })?;
    let status = process::as_root(&program)?
        .args(args)
        .status()
        .with_context(|| format!("failed to start {}", program.display()))?;
    process::finish_with(status)
}

/// The benchmark that cargo's messages, a JSON object a line, say was built; beside it cargo builds the agent.
fn built_program(messages: &str) -> Option<PathBuf> {
    messages.lines().find_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let kind = message.pointer("/target/kind/0")?;
        let program = message.get("executable")?.as_str()?;
        (kind == "bench").then(|| program.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_a_program_is() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"]},"executable":null}
{"reason":"compiler-artifact","target":{"kind":["bin"]},"executable":"/t/release/dataplane-agent"}
{"reason":"compiler-artifact","target":{"kind":["bench"]},"executable":"/t/release/deps/control-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(built_program(messages), Some("/t/release/deps/control-1".into()));
    }
}
