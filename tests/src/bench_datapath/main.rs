//! `dataplane-bench-datapath`: ns a packet by `BPF_PROG_TEST_RUN`. A trampoline restores the packet and walks the flows
//! before each run; in every round it is measured alone, then before a floor program that does only the unavoidable
//! lookups of the case, then before ours, and with `--baseline` before an older object's. Ratios are taken within a
//! round, medians over rounds. Last, a flood of first packets: what is left of the established flows.

mod baseline;
mod cases;
mod fill;
mod flood;
mod kernel;
mod layout;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dataplane_tests::test_run::{
    self, Device, make_device,
    stats::{Comparison, less, median},
};
use serde::Serialize;

use crate::baseline::Baseline;
use crate::cases::{CASES, Case};
use crate::kernel::Bench;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench datapath", about, version)]
struct Args {
    /// Rounds of each row
    #[arg(long, default_value_t = 15)]
    rounds: u32,

    /// Packets of each measurement
    #[arg(long, default_value_t = 2_000_000)]
    packets: u32,

    /// Slices of each round. The kernel answers in whole nanoseconds; the mean over slices is finer
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    slices: u32,

    /// Flows that the flow tables have room for
    #[arg(long, default_value_t = 4_194_304)]
    max_flows: u32,

    /// Only rows whose name contains this
    #[arg(long)]
    only: Option<String>,

    /// The folder with the objects, dataplane.o and bench.o
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ebpf"))]
    objects: PathBuf,

    /// An older dataplane.o to run beside the other one. The exit status is 1 if a row is more than 5 % slower than its,
    /// beyond noise
    #[arg(long)]
    baseline: Option<PathBuf>,

    /// The CPU to run on
    #[arg(long, default_value_t = 0)]
    cpu: usize,

    /// Where to keep every sample, as JSON
    #[arg(long)]
    json: Option<PathBuf>,
}

/// What was measured of a case at a number of flows: ns a packet, one element a round.
#[derive(Debug, Serialize)]
struct Row {
    case: &'static str,
    flows: u32,
    trampoline: Vec<f64>,
    floor: Vec<f64>,
    ours: Vec<f64>,
    floor_net: f64,
    ours_net: f64,
    ratio: f64,
    /// Of the older object; empty without one.
    old: Vec<f64>,
    comparison: Option<Comparison>,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.packets > 0, "nothing to measure");
    test_run::apart(args.cpu)?;

    let older = args.baseline.as_ref();
    let older = older.map(|older| Baseline::open(older, &args.objects.join("dataplane.o")));
    let older = older.transpose()?;
    let device = make_device()?;
    let mut rows = Vec::new();
    println!(
        "{:<44} {:>8} {:>10} {:>8} {:>8} {:>7}{}",
        "ns a packet, net of the trampoline",
        "flows",
        "trampoline",
        "floor",
        "ours",
        "ratio",
        if args.baseline.is_some() {
            baseline::HEADER
        } else {
            ""
        }
    );
    for case in CASES {
        if args.only.as_ref().is_some_and(|only| !case.name.contains(only)) {
            continue;
        }
        for &flows in case.flows {
            let (row, note) = measure(&args, older.as_ref(), case, flows, &device)
                .with_context(|| format!("failed to measure {} at {flows} flows", case.name))?;
            println!(
                "{:<44} {:>8} {:>10.1} {:>8.1} {:>8.1} {:>7.2}{note}",
                row.case,
                row.flows,
                median(&row.trampoline),
                row.floor_net,
                row.ours_net,
                row.ratio
            );
            rows.push(row);
        }
    }
    if let Some(path) = &args.json {
        write_json(path, &rows)?;
    }
    let mut good = true;
    let slower = rows
        .iter()
        .filter(|row| row.comparison.as_ref().is_some_and(|c| c.is_over));
    for row in slower {
        println!("slower than the baseline: {} at {} flows", row.case, row.flows);
        good = false;
    }
    if args
        .only
        .as_ref()
        .is_none_or(|only| "flood".contains(only.as_str()))
    {
        good &= flood::run(&args.objects, &device).context("failed to flood")?;
    }
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// The row, and what is to be printed behind it.
fn measure(
    args: &Args,
    older: Option<&Baseline>,
    case: &'static Case,
    flows: u32,
    device: &Device,
) -> Result<(Row, String)> {
    let mut bench = Bench::load(&args.objects, older, case, flows, args.max_flows, device)?;
    bench.check()?;
    let mut row = Row {
        case: case.name,
        flows,
        trampoline: Vec::new(),
        floor: Vec::new(),
        ours: Vec::new(),
        floor_net: 0.0,
        ours_net: 0.0,
        ratio: 0.0,
        old: Vec::new(),
        comparison: None,
    };
    // One round more: the first warms up.
    for round in 0..=args.rounds {
        let packets = (args.packets / args.slices).max(1);
        let mut sums = [0.0; 3];
        let mut old = None;
        for slice in 0..args.slices {
            sums[0] += bench.alone(packets)?;
            sums[1] += bench.floor(packets)?;
            // The two objects take turns in being first: what one leaves in the caches is not always the other's.
            if slice % 2 == 0 {
                sums[2] += bench.ours(packets)?;
            }
            if let Some(ns) = bench.old(packets)? {
                *old.get_or_insert(0.0) += ns;
            }
            if slice % 2 != 0 {
                sums[2] += bench.ours(packets)?;
            }
            bench.trampoline.walk.on(packets);
        }
        if round > 0 {
            let mean = |sum: f64| sum / f64::from(args.slices);
            let [trampoline, floor, ours] = sums.map(mean);
            row.trampoline.push(trampoline);
            row.floor.push(floor);
            row.ours.push(ours);
            row.old.extend(old.map(mean));
        }
    }
    let net = |of: &[f64]| less(of, &row.trampoline);
    let (floor, ours, old) = (net(&row.floor), net(&row.ours), net(&row.old));
    let ratios: Vec<f64> = ours.iter().zip(&floor).map(|(a, b)| a / b.max(1.0)).collect();
    row.floor_net = median(&floor);
    row.ours_net = median(&ours);
    row.ratio = median(&ratios);
    row.comparison = Comparison::of(&old, &ours, baseline::LIMIT);
    let note = match (&row.comparison, &bench.without_old) {
        (Some(comparison), _) => baseline::columns(comparison),
        (None, Some(reason)) => format!("  {reason}"),
        (None, None) => String::new(),
    };
    Ok((row, note))
}

fn write_json(path: &Path, rows: &[Row]) -> Result<()> {
    let text = serde_json::to_string_pretty(rows).context("failed to encode the samples")?;
    std::fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))
}
