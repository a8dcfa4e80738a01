//! `cargo xtask …`: set-up, builds, demo, tests, scenarios and benchmarks, each one command that does what it needs first.

mod bench;
mod build;
mod chaos;
mod chart;
mod demo;
mod deny;
mod e2e;
mod ebpf;
mod guest;
mod image;
mod kernels;
mod kube;
mod lint;
mod needs;
mod packages;
mod paths;
mod process;
mod progress;
mod scenarios;
mod screenshots;
mod setup;
mod test;
mod toolchain;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    about = "Development commands of the dataplane",
    version
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find or install what building, testing and measuring need; instant when nothing is missing
    Setup(setup::Args),
    /// Build the kernel side to target/ebpf/dataplane.o
    BuildEbpf(ebpf::Args),
    /// Build the kernel side, the agent and the test programs (release)
    Build,
    /// A static agent in an image FROM scratch, as an OCI archive in target/image; no daemon, no registry
    Image(image::Args),
    /// Write what is generated from the Helm chart: its README, plain manifests, renders
    Chart(chart::Args),
    /// Upstream's network tests in a real cluster of three nodes, with the chart in place of kube-proxy; half an hour
    E2e(e2e::Args),
    /// Two nodes and a client in network namespaces, real traffic, one screen
    Demo(demo::Args),
    /// Agents, API server, etcd and cables fail while objects change and connections run; a quarter of an hour
    Chaos(chaos::Args),
    /// All unit, property and end-to-end tests of the workspace
    Test(test::Args),
    /// Formatting and lints of the user side and the kernel side
    Lint,
    /// Draw the pictures of the documentation anew; that of the page of `ui` needs a chromium
    Screenshots,
    /// Run scenario files against a test cluster with real packets
    Scenarios(scenarios::Args),
    /// Build a real Kubernetes API server for tests, unless `KUBEBUILDER_ASSETS` names one
    Kube,
    /// Measure the datapath, or connections through it beside its peers
    Bench(bench::Args),
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Setup(args) => setup::run(&args),
        Command::BuildEbpf(args) => ebpf::run(&args),
        Command::Build => build::run(),
        Command::Image(args) => image::run(&args),
        Command::Chart(args) => chart::run(&args),
        Command::E2e(args) => e2e::run(&args),
        Command::Demo(args) => demo::run(&args),
        Command::Chaos(args) => chaos::run(&args),
        Command::Test(args) => test::run(&args),
        Command::Lint => lint::run(),
        Command::Screenshots => screenshots::run(),
        Command::Scenarios(args) => scenarios::run(&args),
        Command::Kube => kube::run(),
        Command::Bench(args) => bench::run(&args),
    }
}
