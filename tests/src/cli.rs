//! The command line of `dataplane-scenarios`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::agent::AgentOptions;
use crate::api::served::Served;
use crate::places::{Owned, Places};
use crate::process::{self, Helper, Rights};
use crate::scenario::report::RunReport;
use crate::scenario::run::RunOptions;
use crate::scenario::select::Filter;
use crate::scenario::suite;
use crate::shape::Network;
use crate::{api, places, worker};

/// Runs scenario files against a test cluster in network namespaces, with real packets.
#[derive(Debug, Parser)]
#[command(name = "dataplane-scenarios", version, args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    inside: Option<Inside>,
    #[command(flatten)]
    run: Run,
}

#[derive(Debug, clap::Args)]
struct Run {
    /// Folders of scenario files, or single files
    #[arg(required = true)]
    dir: Vec<PathBuf>,
    /// Comma list of ids, tags or globs; `!` leaves out what it matches
    #[arg(long)]
    filter: Option<String>,
    /// Socket hooks for no process, or for all
    #[arg(long, value_enum, default_value_t)]
    socket_lb: SocketLb,
    /// Where packets from outside are handled first
    #[arg(long, value_enum, default_value_t)]
    datapath: Datapath,
    /// How pods are connected
    #[arg(long, value_enum, default_value_t)]
    network: Network,
    /// Where agents read objects from
    #[arg(long, value_enum, default_value_t)]
    source: Source,
    /// What agents may do: all that root may, or what the container of deploy/manifests may
    #[arg(long = "as", value_enum, default_value_t, value_name = "WHO")]
    who: Who,
    /// What the container may beside that, as `securityContext.extraCapabilities` of the chart says
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    extra_capabilities: Vec<String>,
    /// The agent's program; the one built beside this program if absent
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Clusters side by side; one for each CPU if absent
    #[arg(long)]
    jobs: Option<usize>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
    /// Keep the agents' logs in this folder
    #[arg(long)]
    logs: Option<PathBuf>,
    /// Ask the agents, too, what they would do with each cell of the tables of policy scenarios
    #[arg(long)]
    explain: bool,
    /// Keep each cluster up until Enter (one at a time)
    #[arg(long)]
    hold: bool,
}

/// What children of this program are started as.
#[derive(Debug, Subcommand)]
enum Inside {
    #[command(hide = true)]
    Worker {
        #[arg(long)]
        netns: PathBuf,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[arg(long)]
        name: String,
    },
    #[command(hide = true)]
    Enter {
        #[arg(long)]
        netns: PathBuf,
        #[arg(long)]
        cgroup: Option<PathBuf>,
        #[command(flatten)]
        rights: Rights,
        #[arg(last = true)]
        command: Vec<String>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum SocketLb {
    #[default]
    Off,
    All,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Datapath {
    #[default]
    Xdp,
    Tc,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Source {
    #[default]
    Folder,
    Api,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Who {
    #[default]
    Root,
    /// Its capabilities alone, in a read-only file system
    Container,
}

impl Who {
    fn helper(self, extra_capabilities: &[String]) -> Result<Helper> {
        let helper = Helper::find()?;
        match self {
            Who::Root => {
                ensure!(
                    extra_capabilities.is_empty(),
                    "root has all: --extra-capabilities goes with --as container"
                );
                Ok(helper)
            }
            Who::Container => helper.confined(extra_capabilities),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Output {
    #[default]
    Text,
    Json,
}

/// The configuration a run had, as its JSON document names it.
#[derive(Debug, Serialize)]
struct Config {
    socket_lb: SocketLb,
    datapath: Datapath,
    network: Network,
    source: Source,
    #[serde(rename = "as")]
    who: Who,
    agent: PathBuf,
    jobs: usize,
    filter: Option<String>,
}

/// Runs the program; errors of usage or of the machine are the caller's to print.
pub fn main() -> Result<ExitCode> {
    let Args { inside, run } = Args::parse();
    match inside {
        None => run.run(),
        Some(Inside::Worker { netns, cgroup, name }) => {
            process::settle(&netns, cgroup.as_deref())?;
            worker::serve(&name)?;
            Ok(ExitCode::SUCCESS)
        }
        Some(Inside::Enter {
            netns,
            cgroup,
            rights,
            command,
        }) => {
            process::settle(&netns, cgroup.as_deref())?;
            process::become_program(&command, &rights)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

impl Run {
    fn run(self) -> Result<ExitCode> {
        let Self {
            dir,
            filter,
            socket_lb,
            datapath,
            network,
            source,
            who,
            extra_capabilities,
            agent,
            jobs,
            output,
            logs,
            hold,
            explain,
        } = self;
        ensure!(
            nix::unistd::geteuid().is_root(),
            "network namespaces and BPF need root"
        );
        let selection = filter
            .as_deref()
            .map(Filter::parse)
            .transpose()?
            .unwrap_or_default();
        let entries = suite::read(&dir, &selection)?;
        let agent = match agent {
            Some(agent) => agent,
            None => std::env::current_exe()?.with_file_name("dataplane-agent"),
        };
        let agent = agent
            .canonicalize()
            .with_context(|| format!("there is no agent at {}", agent.display()))?;
        let binaries = (source == Source::Api).then(api::binaries);
        if binaries == Some(None) {
            // What is missing was said.
            return Ok(ExitCode::SUCCESS);
        }
        let binaries = binaries.flatten();
        let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
        // A server holds one cluster's objects.
        let jobs = if hold || binaries.is_some() {
            1
        } else {
            jobs.unwrap_or(processors).clamp(1, 64)
        };
        if let Some(dir) = &logs {
            std::fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        }
        remove_on_signal()?;
        places::sweep();

        let flags = [
            "--socket-lb".to_owned(),
            word(&socket_lb),
            "--datapath".to_owned(),
            word(&datapath),
        ]
        .to_vec();
        let server = binaries.as_deref().map(start_server).transpose()?;
        let options = RunOptions {
            network,
            agent: AgentOptions {
                program: agent.clone(),
                flags,
            },
            helper: who.helper(&extra_capabilities)?,
            served: server.as_ref().map(|(served, _)| served.clone()),
            logs,
            hold,
            explain,
        };
        let text = output == Output::Text;
        let done = |report: &crate::scenario::report::ScenarioReport| {
            if text {
                suite::print(report);
            }
        };
        let reports = suite::run_all(entries, jobs, &options, &done);
        drop(options);
        drop(server);
        let config = Config {
            socket_lb,
            datapath,
            network,
            source,
            who,
            agent,
            jobs,
            filter,
        };
        let report = RunReport::new(config, reports);
        if text {
            println!("{}", report.summary());
        } else {
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(if report.failed > 0 {
            ExitCode::FAILURE
        } else {
            ExitCode::SUCCESS
        })
    }
}

/// A server, and where it keeps its things.
fn start_server(binaries: &Path) -> Result<(Arc<Served>, Owned)> {
    let places = Owned(Places::create("api")?);
    Ok((Arc::new(Served::start(binaries, &places.0.work)?), places))
}

/// The word a value has on the command line.
fn word(value: &impl ValueEnum) -> String {
    value
        .to_possible_value()
        .map_or_else(String::new, |value| value.get_name().to_owned())
}

/// On a signal everything this process has made is removed, and the process ends.
pub fn remove_on_signal() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("failed to listen for signals")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            places::close();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
