//! `cargo xtask bench control`: what large clusters cost the agent. Its own loop over its own tables in the kernel, in a
//! namespace made for it: time of the first sync and of single changes, memory of the process and of the maps. Services with
//! their endpoints first, then policies with the pods that they are about.

mod crowd;
mod driven;
mod edits;
mod fleet;
mod memory;
mod node;
mod policies;
mod report;
mod services;

use std::{
    fs,
    io::{BufWriter, Write},
    path::Path,
};

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use dataplane_tests::places;

use crate::{crowd::Crowd, fleet::Fleet, node::Node};

const SMALL: Fleet = Fleet {
    services: 10_000,
    endpoints: 100_000,
};
const LARGE: Fleet = Fleet {
    services: 50_000,
    endpoints: 250_000,
};
const CROWD: Crowd = Crowd {
    pods: 50_000,
    policies: 10_000,
    cidrs: 5000,
};

/// An object a line: the fastest folder. Files of so many lines.
const LINES_A_FILE: usize = 5000;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench control", about, version)]
struct Args {
    #[command(subcommand)]
    inside: Option<Part>,
    /// Leave out all else
    #[arg(long, value_enum)]
    only: Option<Subject>,
    /// Changes of each kind; of policies and pods four times as many
    #[arg(long, default_value_t = 50)]
    changes: usize,
    /// Only fleets with so many Services
    #[arg(long)]
    services: Option<usize>,
    /// Leave out reading Services from a folder of manifests
    #[arg(long)]
    no_folder: bool,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Subject {
    Services,
    Policies,
}

/// What runs in a process of its own, and prints what it has measured as JSON.
#[derive(Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Services(services::Inside),
    #[command(hide = true)]
    Policies(policies::Inside),
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.inside {
        Some(Part::Services(inside)) => inside.place.run(services::measure(inside)),
        Some(Part::Policies(inside)) => inside.place.run(policies::measure(inside)),
        None => compare(&args),
    }
}

fn compare(args: &Args) -> Result<()> {
    places::sweep();
    dataplane_tests::cli::remove_on_signal()?;
    if args.only != Some(Subject::Policies) {
        let fleets = [SMALL, LARGE].into_iter();
        for fleet in fleets.filter(|fleet| args.services.is_none_or(|only| only == fleet.services)) {
            services_of(args, fleet)?;
        }
    }
    if args.only != Some(Subject::Services) {
        policies_of(args, CROWD)?;
    }
    Ok(())
}

fn services_of(args: &Args, fleet: Fleet) -> Result<()> {
    println!("{} services, {} endpoints", fleet.services, fleet.endpoints);
    let settings = |changes: usize| {
        vec![
            ("services", fleet.services.to_string()),
            ("endpoints", fleet.endpoints.to_string()),
            ("changes", changes.to_string()),
        ]
    };
    let node = Node::build()?;
    let is_promised = fleet.services == LARGE.services;
    let outcome = node.measure("services", &settings(args.changes))?;
    report::print_services(&outcome, "decoded objects", is_promised);
    let outcome = node.measure("services", &settings(0))?;
    report::print_start(&outcome, "restart over full tables");
    drop(node);
    if !args.no_folder {
        let node = Node::build()?;
        let folder = node.places.work.join("manifests");
        write_manifests(&folder, fleet)?;
        let mut settings = settings(0);
        settings.push(("folder", folder.display().to_string()));
        report::print_start(&node.measure("services", &settings)?, "a folder of JSON lines");
    }
    Ok(())
}

fn policies_of(args: &Args, crowd: Crowd) -> Result<()> {
    let Crowd {
        pods,
        policies,
        cidrs,
    } = crowd;
    println!("{policies} policies, {pods} pods, {cidrs} CIDRs, from a folder");
    let node = Node::build()?;
    let settings = [
        ("pods", pods.to_string()),
        ("policies", policies.to_string()),
        ("cidrs", cidrs.to_string()),
        ("changes", (4 * args.changes).to_string()),
        ("folder", node.places.work.join("manifests").display().to_string()),
    ];
    report::print_policies(&node.measure("policies", &settings)?);
    Ok(())
}

fn write_manifests(folder: &Path, fleet: Fleet) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut objects = std::iter::once(fleet::node()).chain(fleet.objects()).peekable();
    for number in 0.. {
        if objects.peek().is_none() {
            break;
        }
        let path = folder.join(format!("objects-{number:03}.json"));
        let mut file = BufWriter::new(fs::File::create(&path)?);
        for object in objects.by_ref().take(LINES_A_FILE) {
            writeln!(file, "{object}")?;
        }
        file.flush()?;
    }
    Ok(())
}
