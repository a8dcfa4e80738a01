//! `dataplane-bench-net`: new connections and request/response from a pod to a `ClusterIP` whose backend is on the same
//! node, through our agent without socket hooks, beside plain routing and beside the rules that kube-proxy writes, at
//! several numbers of services. All take turns within a round; ratios are taken within a round, medians over rounds.

mod fleet;
mod iptables;
mod load;
mod manifests;
mod nftables;
mod report;
mod variants;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use dataplane_tests::cli::remove_on_signal;
use dataplane_tests::places;
use dataplane_tests::process::Helper;

use crate::load::Measure;
use crate::report::{Samples, Section};
use crate::variants::{Kind, Variant, find};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench net", about, version)]
struct Args {
    /// The agent under test
    #[arg(long, env = "DATAPLANE_BENCH_AGENT")]
    agent: PathBuf,

    /// Numbers of services
    #[arg(long, value_delimiter = ',', default_value = "1,1000,10000")]
    services: Vec<u32>,

    /// Only these: plain, ours, policies, nftables, iptables-nft, iptables-legacy
    #[arg(long, value_delimiter = ',', value_parser = kind)]
    only: Vec<Kind>,

    /// Rounds at each number of services
    #[arg(long, default_value_t = 15)]
    rounds: u32,

    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 300)]
    millis: u64,

    /// The CPU that client and server share
    #[arg(long, default_value_t = 0)]
    cpu: usize,

    /// Where to keep every sample, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

fn kind(text: &str) -> Result<Kind, String> {
    let names = |kind: &Kind| {
        kind.name() == text
            || matches!(
                (kind, text),
                (Kind::Plain, "plain") | (Kind::Ours, "ours") | (Kind::Policies, "policies")
            )
    };
    Kind::ALL
        .into_iter()
        .find(names)
        .ok_or_else(|| format!("there is no variant {text}"))
}

fn main() -> Result<()> {
    let args = Args::parse();
    ensure!(!args.services.is_empty() && args.rounds > 0, "nothing to measure");
    ensure!(
        args.agent.is_file(),
        "there is no agent at {}",
        args.agent.display()
    );
    remove_on_signal()?;
    places::sweep();
    let helper = Helper::find()?;
    let mut sections = Vec::new();
    for &size in &args.services {
        let section = measure(&args, size, &helper)?;
        println!("{}\n", section.table());
        sections.push(section);
    }
    let promises = report::promises(&sections);
    println!("{}", report::promises_table(&promises));
    if let Some(path) = &args.json {
        let document = serde_json::json!({
            "benchmark": "net", "rounds": args.rounds, "millis": args.millis, "cpu": args.cpu,
            "sections": sections, "promises": promises,
        });
        std::fs::write(path, format!("{document:#}\n"))
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(())
}

/// All variants at one number of services: built once, then measured in turns.
fn measure(args: &Args, size: u32, helper: &Helper) -> Result<Section> {
    let mut variants = Vec::new();
    for kind in Kind::ALL {
        if !args.only.is_empty() && !args.only.contains(&kind) {
            continue;
        }
        if let Some(program) = kind.program().filter(|program| find(program).is_none()) {
            eprintln!(
                "skipped: {} (no {program} here; `cargo xtask setup` installs it)",
                kind.name()
            );
            continue;
        }
        eprintln!("{size} services: programming {} …", kind.name());
        variants.push(Variant::build(kind, size, &args.agent, helper, args.cpu)?);
    }
    if variants.is_empty() {
        bail!("no variant is left to measure");
    }
    let during = Duration::from_millis(args.millis);
    let mut samples: Vec<Samples> = variants.iter().map(Samples::of).collect();
    for variant in &variants {
        // Neighbours, caches, first flows; and the proof that the way works.
        variant
            .client
            .measure(variant.to, Measure::Connections, Duration::from_millis(50))
            .with_context(|| format!("{} does not lead to the server", variant.kind.name()))?;
    }
    eprintln!(
        "{size} services: {} rounds of {} variants …",
        args.rounds,
        variants.len()
    );
    for round in 0..args.rounds {
        for turn in 0..variants.len() {
            // Each round begins with another one, so that none is always first after a pause.
            let index = (turn + round as usize) % variants.len();
            let (variant, samples) = (&variants[index], &mut samples[index]);
            let rate = |measure| {
                variant
                    .client
                    .measure(variant.to, measure, during)
                    .with_context(|| format!("in {}", variant.kind.name()))
            };
            samples.connections_per_second.push(rate(Measure::Connections)?);
            samples.exchanges_per_second.push(rate(Measure::Exchanges)?);
        }
    }
    Ok(Section {
        services: size,
        variants: samples,
    })
}

impl Samples {
    fn of(variant: &Variant) -> Self {
        Self {
            name: variant.kind.name(),
            load_seconds: variant.load_seconds,
            connections_per_second: Vec::new(),
            exchanges_per_second: Vec::new(),
        }
    }
}
