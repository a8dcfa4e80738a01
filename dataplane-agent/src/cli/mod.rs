//! The commands.

pub mod alone;
pub mod ask;
pub mod bugreport;
pub mod check;
pub mod cleanup;
pub mod endpoints;
pub mod explain;
pub mod flows;
pub mod log;
pub mod manual;
pub mod maps;
pub mod monitor;
pub mod names;
pub mod output;
pub mod policies;
pub mod preflight;
pub mod services;
pub mod status;
pub mod top;
pub mod ui;
pub mod verdicts;
pub mod wait;

use std::{path::Path, process::ExitCode};

use crate::{
    agent,
    args::{Cli, Command},
    bpf::{kernel, pins::Pins},
    explain::tables::Query,
    logging,
};

/// Runs a command; errors go to stderr, with their causes.
pub fn main(cli: Cli) -> ExitCode {
    logging::start();
    run(cli.command).unwrap_or_else(|error| {
        if error.is::<output::Closed>() {
            return ExitCode::SUCCESS;
        }
        output::note(format_args!("error: {error:#}"));
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
            tables,
            output,
        } => {
            let query = Query {
                from,
                to,
                port,
                source_port,
            };
            return explain::run(manifests.as_deref(), tables.places(), &query, output);
        }
        Command::Wait { socket, timeout } => wait::run(&socket, timeout)?,
        Command::Services {
            service,
            tables,
            problems,
            output,
        } => {
            let asked = services::Asked {
                service: service.as_ref(),
                places: tables.places(),
                problems,
            };
            services::run(&asked, output)?;
        }
        Command::Endpoints {
            service,
            tables,
            output,
        } => endpoints::run(service.as_ref(), tables.places(), output)?,
        Command::Policies { pod, tables, output } => match pod {
            Some(pod) => policies::run_for(&pod, tables.places(), output)?,
            None => policies::run(tables.places(), output)?,
        },
        Command::Verdicts {
            tables,
            follow,
            output,
        } => verdicts::run(tables.places(), follow, output)?,
        Command::Bugreport { to, tables } => bugreport::run(tables.places(), to)?,
        Command::Log {
            levels,
            reset,
            socket,
        } => log::run(levels.as_deref(), reset, &socket)?,
        Command::Completions { shell } => manual::completions(shell)?,
        Command::Man { folder } => manual::write_pages(&folder)?,
        Command::Top {
            tables,
            interval,
            once,
        } => top::run(tables.places(), interval, once)?,
        Command::Ui {
            listen,
            allow_host,
            socket,
            bpffs,
        } => ui::run(listen, &allow_host, ui::Places { socket, bpffs })?,
        Command::Status { bpffs, output } => status::run(&bpffs, output)?,
        Command::Flows {
            filter,
            tables,
            output,
        } => flows::run(tables.places(), &filter, output)?,
        Command::Monitor {
            filter,
            tables,
            output,
        } => monitor::run(tables.places(), &filter, output)?,
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
        pins.try_exists()?,
        "no tables of this version are pinned under {}: is an agent installed, with another --bpffs?",
        bpffs.display()
    );
    Ok(pins)
}
