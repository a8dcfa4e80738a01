//! `cargo xtask bench policy`: what policies cost a packet, by `BPF_PROG_TEST_RUN` behind the trampoline of `bench datapath`,
//! and whether that depends on how many rules, policies and peers there are. Contestants take turns within rounds, net of
//! the trampoline; ratios are taken within a round, medians over rounds. The agent's compiler makes the tables; the host
//! build counts what a verdict looks up in them, and the kernel build is timed over them.

mod crowd;
mod datapath;
mod memory;
mod rounds;
mod watched;

use std::{
    net::{IpAddr, SocketAddrV4},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use dataplane_agent::compile::policy::tables::judge;
use dataplane_common::reason::Reason;
use dataplane_tests::test_run::{
    ACK, CLIENT, Device, FRAME, NEXT, PORT, SERVICE, SHOT, SYN, TCP, Trampoline, Walk, apart,
    counting::Counting,
    frame, load, make_device, program,
    stats::{less, median},
    tables::{counted, decided},
};
use serde::Serialize;

use crate::{
    crowd::{CROWDS, Compiled, Peers},
    datapath::{Datapath, OFF, ON, allow, entries, exact},
    memory::Memory,
    rounds::{Arm, Row, rounds},
};

/// Flows that the tables have room for while new ones are judged: fewer than the walk has, so that each is new.
const ROOM: u32 = 131_072;
const NEW_FLOWS: u32 = 1 << 22;
/// Established flows, and the room for them.
const FLOWS: [u32; 2] = [1, 1 << 16];
const ROOM_ESTABLISHED: u32 = 1 << 18;

/// What is promised: a verdict in a crowd ÷ alone, a translated flow with policies ÷ without, and what policies add to any
/// other flow ÷ a flow hit.
const PODS_AT_MOST: f64 = 1.1;
const CIDRS_AT_MOST: f64 = 1.5;
const TRANSLATED_AT_MOST: f64 = 1.15;
const HITS_AT_MOST: f64 = 1.0;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench policy", about, version)]
struct Args {
    /// Rounds of each row
    #[arg(long, default_value_t = 15)]
    rounds: u32,

    /// Packets of each measurement
    #[arg(long, default_value_t = 500_000)]
    packets: u32,

    /// Slices of each round. The kernel answers in whole nanoseconds; the mean over slices is finer
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    slices: u32,

    /// Only groups of rows whose name contains this
    #[arg(long)]
    only: Option<String>,

    /// The folder with the objects, dataplane.o and bench.o
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/ebpf"))]
    objects: PathBuf,

    /// The CPU to run on
    #[arg(long, default_value_t = 0)]
    cpu: usize,

    /// Where to keep every sample, as JSON
    #[arg(long)]
    json: Option<PathBuf>,

    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

impl Args {
    fn packets_of_slice(&self) -> u32 {
        (self.packets / self.slices).max(1)
    }

    /// Packets that an arm sees in all rounds.
    fn packets_of_arm(&self) -> u64 {
        u64::from(self.packets_of_slice()) * u64::from(self.slices) * (u64::from(self.rounds) + 1)
    }

    fn wants(&self, group: &str) -> bool {
        self.only
            .as_ref()
            .is_none_or(|only| group.contains(only.as_str()))
    }
}

/// Lookups of a verdict, by crowd.
#[derive(Debug, Serialize)]
struct Lookups {
    what: String,
    by_crowd: Vec<(&'static str, u32)>,
}

impl Lookups {
    fn are_the_same(&self) -> bool {
        self.by_crowd
            .iter()
            .all(|(_, lookups)| *lookups == self.by_crowd[0].1)
    }
}

#[derive(Debug, Default, Serialize)]
struct Results {
    lookups: Vec<Lookups>,
    rows: Vec<Row>,
    memory: Vec<Memory>,
}

impl Results {
    /// Prints it, too.
    fn add(&mut self, row: Option<Row>) {
        if let Some(row) = row {
            println!("{row}");
            self.rows.push(row);
        }
    }

    fn are_good(&self) -> bool {
        self.lookups.iter().all(Lookups::are_the_same)
            && !self.rows.iter().any(|row| row.comparison.is_over)
            && self.memory.iter().all(|memory| memory.is_met)
    }
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    ensure!(args.rounds > 0 && args.packets > 0, "nothing to measure");
    apart(args.cpu)?;
    let device = make_device()?;
    let mut results = Results::default();
    for (peers, name) in [(Peers::Pods, "pods"), (Peers::Cidrs, "CIDRs")] {
        let groups = ["denied", "allowed"].map(|outcome| format!("verdict: {name}, {outcome}"));
        if groups.iter().any(|group| args.wants(group)) {
            verdicts(&args, &device, peers, &groups, &mut results)
                .with_context(|| format!("failed to measure verdicts about {name}"))?;
        }
    }
    established(&args, &device, &mut results).context("failed to measure established flows")?;
    watched::watched(&args, &device, &mut results).context("failed to measure drops that are watched")?;
    if args.wants("memory") {
        for memory in memory::measure(&args.objects).context("failed to measure the memory")? {
            println!("{memory}");
            results.memory.push(memory);
        }
    }
    if let Some(path) = &args.json {
        let text = serde_json::to_string_pretty(&results).context("failed to encode the samples")?;
        std::fs::write(path, text).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(if results.are_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// New flows of a pod to an address that its rules don't let it reach, and to one that they do, in every crowd. A verdict is
/// what they take beyond the same packets without policies.
fn verdicts(
    args: &Args,
    device: &Device,
    peers: Peers,
    groups: &[String; 2],
    results: &mut Results,
) -> Result<()> {
    let crowds: Vec<Compiled> = CROWDS
        .iter()
        .map(|crowd| crowd.compile(peers))
        .collect::<Result<_>>()?;
    let nodes: Vec<Datapath> = crowds
        .iter()
        .map(|compiled| Datapath::load(&args.objects, compiled, ON, ROOM, device))
        .collect::<Result<_>>()?;
    let without = Datapath::load(&args.objects, &crowds[0], OFF, ROOM, device)?;
    let aim = match peers {
        Peers::Pods => PODS_AT_MOST,
        Peers::Cidrs => CIDRS_AT_MOST,
    };
    for (group, is_allowed) in groups.iter().zip([false, true]) {
        if !args.wants(group) {
            continue;
        }
        let to = if is_allowed { crowd::PEER } else { crowd::NO_PEER };
        let lookups = count(group, &crowds, to.into(), is_allowed)?;
        print(&lookups);
        results.lookups.push(lookups);

        let walk = Walk::new(frame(SocketAddrV4::new(to, crowd::PORT), SYN), NEW_FLOWS);
        let bench = load(&args.objects.join("bench.o"), &entries(1024))?;
        let mut trampoline = Trampoline::new(bench, false, walk, device)?;
        let mut arms = vec![Arm::Nothing, Arm::Ours(&without)];
        arms.extend(nodes.iter().map(Arm::Ours));
        for arm in &arms[2..] {
            let (answer, _) = arm.run(&mut trampoline, 1, None)?;
            ensure!(
                answer == if is_allowed { NEXT } else { SHOT },
                "from_pod returned {answer} for a flow that is to be {}",
                if is_allowed { "allowed" } else { "denied" }
            );
        }
        trampoline.walk.on(1);
        let judged = |node: &Datapath, compiled: &Compiled| {
            if is_allowed {
                let rules = 0..compiled.tables.rules.len() as u32;
                rules.map(|rule| decided(&node.object, rule)).sum()
            } else {
                counted(&node.object, "COUNTERS", Reason::PolicyDenied as u32)
            }
        };
        let count = || -> Result<Vec<u64>> {
            let pairs = nodes.iter().zip(&crowds);
            pairs.map(|(node, compiled)| judged(node, compiled)).collect()
        };
        let before = count()?;
        let net = rounds(args, &mut trampoline, &arms)?;
        for (before, after) in before.iter().zip(count()?) {
            let packets = args.packets_of_arm();
            ensure!(
                after - before == packets,
                "{} of {packets} packets were judged",
                after - before
            );
        }
        let without = &net[0];
        let alone = less(&net[1], without);
        println!(
            "{}   the packet without policies: {:.1}",
            Row::header(group, "alone", "crowd"),
            median(without)
        );
        for (crowd, ours) in CROWDS.iter().zip(&net[1..]).skip(1) {
            let ours = less(ours, without);
            let what = format!("  {}", crowd.name);
            let aim = if crowd.is_mixed() { f64::INFINITY } else { aim };
            results.add(Row::of(what, NEW_FLOWS, alone.clone(), ours, aim, String::new()));
        }
    }
    Ok(())
}

/// What the host build looks up for a verdict in each crowd; also that it is the right one.
fn count(group: &str, crowds: &[Compiled], to: IpAddr, is_allowed: bool) -> Result<Lookups> {
    let mut by_crowd = Vec::new();
    for (crowd, compiled) in CROWDS.iter().zip(crowds) {
        let counting = Counting::new(&compiled.tables);
        let judgement = judge(&counting, compiled.egress, to, TCP, crowd::PORT);
        ensure!(
            judgement.is_allowed() == is_allowed && !judgement.is_broken(),
            "{}: the host build says {judgement:?}",
            crowd.name
        );
        by_crowd.push((crowd.name, counting.lookups()));
    }
    Ok(Lookups {
        what: group.to_owned(),
        by_crowd,
    })
}

fn print(lookups: &Lookups) {
    let by_crowd = lookups.by_crowd.iter();
    let by_crowd: Vec<String> = by_crowd
        .map(|(name, lookups)| format!("{name} {lookups}"))
        .collect();
    let judged = if lookups.are_the_same() { "met" } else { "MISSED" };
    println!(
        "{}, lookups: {}   the same: {judged}",
        lookups.what,
        by_crowd.join(", ")
    );
}

/// Packets of flows that have been judged, with policies and without.
fn established(args: &Args, device: &Device, results: &mut Results) -> Result<()> {
    let groups = ["established: translated", "established: not translated"];
    if !groups.iter().any(|group| args.wants(group)) {
        return Ok(());
    }
    let compiled = CROWDS[0].compile(Peers::Pods)?;
    for (group, is_translated) in groups.into_iter().zip([true, false]) {
        if !args.wants(group) {
            continue;
        }
        if is_translated {
            println!("{}", Row::header(group, "without", "with"));
        } else {
            println!("{}", Row::header(group, "flow hit", "added"));
        }
        for flows in FLOWS {
            let load_with =
                |revision| Datapath::load(&args.objects, &compiled, revision, ROOM_ESTABLISHED, device);
            let [without, with] = [load_with(OFF)?, load_with(ON)?];
            let mut bench = load(&args.objects.join("bench.o"), &entries(ROOM_ESTABLISHED))?;
            let headers = program(&mut bench, "floor_headers_tc")?;
            let hit = program(&mut bench, "floor_policy_flow_tc")?;
            let to = if is_translated {
                for node in [&without, &with] {
                    let filling = exact(&node.object);
                    filling.port()?;
                    filling.service(0, false, device)?;
                    filling.flows(false, CLIENT, flows, ON)?;
                }
                SocketAddrV4::new(SERVICE, PORT)
            } else {
                let to = (crowd::PEER, crowd::PORT);
                for object in [&with.object, &bench] {
                    allow(object, flows, to, device)?;
                }
                SocketAddrV4::new(to.0, to.1)
            };
            let walk = Walk::new(frame(to, ACK), flows);
            let mut trampoline = Trampoline::new(bench, false, walk, device)?;
            let mut arms = vec![Arm::Nothing, Arm::Ours(&without), Arm::Ours(&with)];
            if !is_translated {
                arms.extend([Arm::Floor(&headers), Arm::Floor(&hit)]);
            }
            check(&mut trampoline, &arms)?;
            let net = rounds(args, &mut trampoline, &arms)?;
            let judged = decided(&with.object, 0)?;
            ensure!(judged == 0, "{judged} packets of established flows were judged");
            results.add(established_row(flows, &net));
        }
    }
    Ok(())
}

/// Of what the packets take without policies and with them, and of the floor programs if the flows are not translated.
fn established_row(flows: u32, net: &[Vec<f64>]) -> Option<Row> {
    let what = String::new();
    match net {
        [without, with] => {
            let (without, with) = (without.clone(), with.clone());
            Row::of(what, flows, without, with, TRANSLATED_AT_MOST, String::new())
        }
        [without, with, headers, hit] => {
            let note = format!(
                "   without {:.1}, with {:.1}; of the hit the lookup alone {:.1}",
                median(without),
                median(with),
                median(&less(hit, headers))
            );
            Row::of(what, flows, hit.clone(), less(with, without), HITS_AT_MOST, note)
        }
        _ => None,
    }
}

/// All of them pass the same packet on, and the datapath makes the same of it, with policies and without.
fn check(trampoline: &mut Trampoline, arms: &[Arm<'_>]) -> Result<()> {
    let mut first: Option<[u8; FRAME]> = None;
    for arm in &arms[1..] {
        let mut out = [0; FRAME];
        let (answer, _) = arm.run(trampoline, 1, Some(&mut out))?;
        ensure!(answer == NEXT, "a program returned {answer}");
        ensure!(
            *first.get_or_insert(out) == out,
            "different packets were made: {first:x?}, {out:x?}"
        );
    }
    Ok(())
}
