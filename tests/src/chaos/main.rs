//! `dataplane-chaos`: three nodes, and everything that happens to a cluster at once: agents, the API server and etcd are
//! killed, cables are pulled, objects change many times a second, while connections run and others are forbidden.
//!
//! What must hold: no connection to a healthy endpoint breaks or fails, no forbidden packet passes; at the end the tables
//! are what a start from nothing makes of the same objects, and nothing has leaked. What happens follows from the seed
//! alone, its moments too, as far as the machine keeps them.

mod census;
mod churn;
mod faults;
mod forbidden;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use dataplane_tests::api::{self, served::Served};
use dataplane_tests::cli::remove_on_signal;
use dataplane_tests::places::{self, Owned, Places};
use dataplane_tests::traffic::Lap;

use crate::census::Growth;
use crate::churn::Churning;
use crate::faults::Faults;
use crate::forbidden::Forbidden;
use crate::stage::Stage;

/// What packets may still use is taken away a moment later.
const RECLAIM: Duration = Duration::from_secs(30);
/// How often the state of traffic is looked at.
const LOOK: Duration = Duration::from_secs(1);

#[derive(Debug, Parser)]
#[command(name = "cargo xtask chaos", about, version)]
struct Args {
    /// The agent
    #[arg(long, env = "DATAPLANE_CHAOS_AGENT")]
    agent: PathBuf,

    /// What happens follows from it; one is chosen and printed if absent
    #[arg(long)]
    seed: Option<u64>,

    /// How long things happen, in seconds
    #[arg(long, default_value_t = 900)]
    seconds: u64,

    /// Objects come from a real API server, which is killed too, in place of a folder
    #[arg(long)]
    api: bool,

    /// Changes of objects a second [default: 200; with an API server 50]
    #[arg(long)]
    changes: Option<u32>,

    /// Keep the agents' logs in this folder
    #[arg(long)]
    logs: Option<PathBuf>,

    /// Flags for the agents (`--socket-lb=all`), each with this before it
    #[arg(long = "flag", allow_hyphen_values = true)]
    flags: Vec<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match remove_on_signal().and_then(|()| run(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The whole run. False if something did not hold.
fn run(args: &Args) -> Result<bool> {
    places::sweep();
    let seed = args.seed.unwrap_or_else(|| fastrand::u64(..1_000_000));
    // Removed when the run has ended, in whatever way.
    let (place, served);
    if args.api {
        let Some(binaries) = api::binaries() else {
            // What is missing was said.
            return Ok(true);
        };
        place = Owned(Places::create("chaos-api")?);
        served = Some(Served::start(&binaries, &place.0.work)?);
    } else {
        served = None;
    }
    let rate = args.changes.unwrap_or(if args.api { 50 } else { 200 });
    println!(
        "chaos: seed {seed}, {} s, {rate} changes/s {}",
        args.seconds,
        if args.api {
            "through the API server"
        } else {
            "of a folder"
        }
    );
    let doubts = play(args, seed, rate, served)?;
    for doubt in &doubts {
        println!("did not hold: {doubt}");
    }
    if doubts.is_empty() {
        println!("All of it held.");
    } else {
        println!(
            "again: --seed {seed} --seconds {}{}",
            args.seconds,
            if args.api { " --api" } else { "" }
        );
    }
    Ok(doubts.is_empty())
}

fn play(args: &Args, seed: u64, rate: u32, served: Option<Served>) -> Result<Vec<String>> {
    let mut stage = Stage::set(&args.agent, args.flags.clone(), served)?;
    let before = stage.census()?;
    let traffic = stage.traffic()?;
    let forbidden = Forbidden::start(&stage)?;
    let churning = Churning::start(&stage, seed, rate);
    let mut faults = Faults::new(seed, args.api);
    let mut doubts = Vec::new();

    let began = Instant::now();
    let end = Duration::from_secs(args.seconds);
    let mut growth = Growth::new(end);
    let mut total = Lap::default();
    while began.elapsed() < end && doubts.len() < 10 {
        faults.next(&mut stage, began, end)?;
        growth.look(&stage, began.elapsed())?;
        sleep(LOOK);
        doubts.extend(broken(&mut total, traffic.take(), began.elapsed()));
        doubts.extend(forbidden.passed());
        doubts.extend(stage.agents.ended());
    }
    let (changes, refused) = churning.finish()?;
    stage.settle()?;
    sleep(LOOK);
    doubts.extend(broken(&mut total, traffic.take(), began.elapsed()));
    println!(
        "{changes} changes in {:.0} s ({:.0}/s), {refused} of them again because the server was away; {}",
        began.elapsed().as_secs_f64(),
        f64::from(changes) / began.elapsed().as_secs_f64(),
        faults.told()
    );
    println!(
        "connections: {} kept, {} begun meanwhile, the longest wait for an answer {} ms; {}",
        total.kept_total(),
        total.fresh_total(),
        total.longest.as_millis(),
        forbidden.told()
    );
    doubts.extend(forbidden.passed());
    doubts.extend(growth.judged(&stage)?);
    doubts.extend(census::equal_to_a_start_from_nothing(&mut stage)?);
    drop(traffic);
    drop(forbidden);
    stage.without_churn()?;
    let end = Instant::now() + RECLAIM;
    let mut grown = before.grown_to(&stage.census()?);
    while !grown.is_empty() && Instant::now() < end {
        sleep(LOOK);
        grown = before.grown_to(&stage.census()?);
    }
    doubts.extend(grown);
    if let Some(folder) = &args.logs {
        std::fs::create_dir_all(folder)?;
        for (node, log) in stage.agents.logs() {
            std::fs::copy(log, folder.join(format!("{node}.log")))?;
        }
    }
    Ok(doubts)
}

/// Adds what has happened since the last look to the total; what broke or failed in it.
fn broken(total: &mut Lap, lap: Lap, at: Duration) -> Vec<String> {
    let at = at.as_secs();
    let mut doubts: Vec<String> = lap
        .broken
        .iter()
        .skip(total.broken.len())
        .map(|how| format!("after {at} s a connection broke: {how}"))
        .collect();
    doubts.extend(
        lap.failed
            .iter()
            .map(|how| format!("after {at} s a new connection failed: {how}")),
    );
    total.kept = lap.kept;
    total.broken = lap.broken;
    total.longest = total.longest.max(lap.longest);
    for (name, count) in lap.fresh {
        *total.fresh.entry(name).or_default() += count;
    }
    doubts
}
