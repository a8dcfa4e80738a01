//! The commands.

pub mod ask;
pub mod check;
pub mod cleanup;
pub mod explain;
pub mod flows;
pub mod manual;
pub mod maps;
pub mod output;
pub mod policies;
pub mod preflight;
pub mod services;
pub mod status;
pub mod verdicts;
pub mod wait;

use std::{
    io::{IsTerminal, Write},
    path::Path,
    process::ExitCode,
};

use tracing_subscriber::EnvFilter;

use crate::{
    agent,
    args::{Cli, Command},
    bpf::{kernel, pins::Pins},
    explain::tables::Query,
};

/// Runs a command; errors go to stderr, with their causes.
pub fn main(cli: Cli) -> ExitCode {
    log_to_stderr();
    run(cli.command).unwrap_or_else(|error| {
        // Nothing is left to report to when stderr is closed.
        let _closed = writeln!(std::io::stderr(), "error: {error:#}");
        ExitCode::FAILURE
    })
}

fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Run(run) => agent::run(run.resolve()?)?,
        Command::Preflight {
            run,
            cni_conf_dir,
            output,
        } => return preflight::run(&run.resolve_machine()?, &cni_conf_dir, output),
        Command::Check { folder } => return check::run(&folder),
        Command::Explain {
            from,
            to,
            port,
            source_port,
            manifests,
            socket,
            output,
        } => {
            let query = Query {
                from,
                to,
                port,
                source_port,
            };
            return explain::run(manifests.as_deref(), &socket, &query, output);
        }
        Command::Wait { socket, timeout } => wait::run(&socket, timeout)?,
        Command::Services {
            service,
            socket,
            bpffs,
            problems,
            output,
        } => {
            let service = service.as_deref();
            services::run(
                &services::Asked {
                    service,
                    socket: &socket,
                    bpffs: &bpffs,
                    problems,
                },
                output,
            )?;
        }
        Command::Policies { socket, output } => policies::run(&socket, output)?,
        Command::Verdicts {
            socket,
            follow,
            output,
        } => verdicts::run(&socket, follow, output)?,
        Command::Completions { shell } => manual::completions(shell)?,
        Command::Man { folder } => manual::write_pages(&folder)?,
        Command::Status { bpffs, output } => status::run(&bpffs, output)?,
        Command::Flows {
            filter,
            bpffs,
            socket,
            output,
        } => flows::run(&bpffs, &socket, &filter, output)?,
        Command::Maps { bpffs, output } => maps::run(&bpffs, output)?,
        Command::Cleanup {
            kube_proxy_rules: true,
            ..
        } => cleanup::kube_proxy_rules()?,
        Command::Cleanup { bpffs, .. } => cleanup::run(&bpffs)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The pinned tables, for commands that read them without an agent.
fn pinned(bpffs: &Path) -> anyhow::Result<Pins> {
    kernel::check_capabilities()?;
    let pins = Pins::new(bpffs);
    anyhow::ensure!(
        pins.exists(),
        "no tables of this version are pinned under {}: is an agent installed, with another --bpffs?",
        bpffs.display()
    );
    Ok(pins)
}

/// Levels by `DATAPLANE_LOG`, as `tracing` writes them; colours only on a terminal and without `NO_COLOR`.
fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("DATAPLANE_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let colours = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .init();
}
