//! `cargo xtask bench control`: what large clusters cost the agent. Its own loop over its own tables in the kernel, in a
//! namespace made for it: time of the first sync and of single changes, memory of the process and of the maps.

mod fleet;
mod inside;
mod memory;

use std::{
    fs,
    io::{BufWriter, Write},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use dataplane_tests::{
    links::{Links, Route, everywhere},
    netns::NetNs,
    places::{self, Places},
};

use crate::{
    fleet::Fleet,
    inside::{Inside, Outcome},
};

const SMALL: Fleet = Fleet {
    services: 10_000,
    endpoints: 100_000,
};
const LARGE: Fleet = Fleet {
    services: 50_000,
    endpoints: 250_000,
};

/// What is promised of the large fleet.
const SYNC_AT_MOST_S: f64 = 2.0;
const CHANGE_AT_MOST_MS: f64 = 10.0;
const RESIDENT_AT_MOST: u64 = 60 << 20;
/// An object a line: the fastest folder. Files of so many lines.
const LINES_A_FILE: usize = 5000;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench control", about, version)]
struct Args {
    #[command(subcommand)]
    inside: Option<Part>,
    /// Changes of each kind
    #[arg(long, default_value_t = 50)]
    changes: usize,
    /// Only fleets with so many Services
    #[arg(long)]
    services: Option<usize>,
    /// Leave out reading from a folder of manifests
    #[arg(long)]
    no_folder: bool,
    /// What `cargo bench` says to every benchmark
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Subcommand)]
enum Part {
    #[command(hide = true)]
    Inside(Inside),
}

fn main() -> Result<()> {
    let args = Args::parse();
    match &args.inside {
        Some(Part::Inside(inside)) => inside::run(inside),
        None => compare(&args),
    }
}

fn compare(args: &Args) -> Result<()> {
    places::sweep();
    dataplane_tests::cli::remove_on_signal()?;
    let fleets = [SMALL, LARGE];
    for fleet in fleets
        .into_iter()
        .filter(|fleet| args.services.is_none_or(|only| only == fleet.services))
    {
        println!("{} services, {} endpoints", fleet.services, fleet.endpoints);
        let node = Node::build()?;
        let is_promised = fleet.services == LARGE.services;
        print(&node.measure(args, fleet, None)?, "decoded objects", is_promised);
        print_start(
            &node.measure(&no_changes(args), fleet, None)?,
            "restart over full tables",
        );
        drop(node);
        if !args.no_folder {
            let node = Node::build()?;
            let folder = node.places.work.join("manifests");
            write_manifests(&folder, fleet)?;
            print_start(
                &node.measure(&no_changes(args), fleet, Some(&folder))?,
                "a folder of JSON lines",
            );
        }
    }
    Ok(())
}

fn no_changes(args: &Args) -> Args {
    Args {
        inside: None,
        changes: 0,
        ..*args
    }
}

/// One agent's machine: an address and a default route, so that it has an uplink.
struct Node {
    places: Places,
    netns: NetNs,
    _router: NetNs,
}

impl Drop for Node {
    fn drop(&mut self) {
        let cleaned = self.netns.enter(|| {
            dataplane_agent::attach::cleanup::cleanup(&self.places.bpffs)?;
            Ok(())
        });
        if let Err(error) = cleaned {
            eprintln!("failed to clean up: {error:#}");
        }
        self.places.remove();
    }
}

impl Node {
    fn build() -> Result<Self> {
        let places = Places::create("control")?;
        let netns = NetNs::create(&places.netns("node"))?;
        let router = NetNs::create(&places.netns("router"))?;
        let mut links = Links::open(&netns)?;
        links.set_up("lo")?;
        links.add_veth("eth0", "node", router.fd(), None)?;
        links.set_up("eth0")?;
        Links::open(&router)?.set_up("node")?;
        links.add_address("eth0", ([192, 0, 2, 10].into(), 24))?;
        let via = Route {
            via: Some([192, 0, 2, 1].into()),
            ..Route::default()
        };
        links.add_route(everywhere([0, 0, 0, 0].into()), via)?;
        Ok(Self {
            places,
            netns,
            _router: router,
        })
    }

    /// Measures in a process of its own, so that memory is the agent's alone.
    fn measure(&self, args: &Args, fleet: Fleet, folder: Option<&Path>) -> Result<Outcome> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("inside").arg("--netns").arg(self.netns.path());
        command
            .arg("--bpffs")
            .arg(&self.places.bpffs)
            .arg("--work")
            .arg(&self.places.work);
        command.args(["--services", &fleet.services.to_string()]);
        command.args(["--endpoints", &fleet.endpoints.to_string()]);
        command.args(["--changes", &args.changes.to_string()]);
        if let Some(folder) = folder {
            command.arg("--folder").arg(folder);
        }
        let output = command
            .stderr(std::process::Stdio::inherit())
            .output()
            .context("failed to start the measurement")?;
        ensure!(
            output.status.success(),
            "the measurement failed: {}",
            output.status
        );
        serde_json::from_slice(&output.stdout).context("failed to read the measurement")
    }
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

fn print_start(outcome: &Outcome, what: &str) {
    println!("  {what}");
    let row = |name: &str, value: String| println!("    {name:<48} {value}");
    if outcome.restore_s > 0.01 {
        row("tables read", format!("{:8.2} s", outcome.restore_s));
    }
    row("decoded", format!("{:8.2} s", outcome.decode_s));
    let (sync_s, cpu_s) = (outcome.sync_s, outcome.sync_cpu_s);
    row(
        "compiled and written",
        format!("{sync_s:8.2} s ({cpu_s:.2} s on a CPU)"),
    );
    let own = outcome.full.own;
    row(
        "resident, maps left out (smaps)",
        format!("{:8.1} MiB", mebibytes(own)),
    );
}

fn print(outcome: &Outcome, what: &str, is_promised: bool) {
    println!("  {what}");
    let row = |name: &str, value: String, promise: Option<(bool, String)>| {
        let promise = promise
            .filter(|_| is_promised)
            .map(|(kept, at_most)| format!("at most {at_most}: {}", if kept { "kept" } else { "NOT KEPT" }));
        println!("    {name:<48} {value:>14}  {}", promise.unwrap_or_default());
    };
    let Outcome {
        restore_s: _,
        decode_s,
        sync_s,
        sync_cpu_s,
        usage,
        empty,
        full,
        changed,
        map_bytes,
        changes,
    } = outcome;
    row("decoded", format!("{decode_s:.2} s"), None);
    let kept = *sync_s <= SYNC_AT_MOST_S;
    let promise = Some((kept, format!("{SYNC_AT_MOST_S} s")));
    row("compiled and written", format!("{sync_s:.2} s"), promise);
    row("of it on a CPU", format!("{sync_cpu_s:.2} s"), None);
    for (kind, samples) in changes {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |percent: usize| {
            let place = sorted.len().saturating_sub(1) * percent / 100;
            sorted.get(place).copied().unwrap_or(0.0)
        };
        row(
            &format!("{kind}, median / 95 %"),
            format!("{:.2} / {:.2} ms", at(50), at(95)),
            Some((at(50) <= CHANGE_AT_MOST_MS, format!("{CHANGE_AT_MOST_MS} ms"))),
        );
    }
    for (name, resident) in [
        ("without maps, before the first object", empty),
        ("without maps, after the first sync", full),
        ("without maps, after the changes", changed),
    ] {
        let kept = resident.own <= RESIDENT_AT_MOST;
        let promise = (name != "without maps, before the first object")
            .then(|| (kept, format!("{} MiB", RESIDENT_AT_MOST >> 20)));
        row(
            &format!("{name} (heap; in use)"),
            format!(
                "{:.1} ({:.1}; {:.1}) MiB",
                mebibytes(resident.own),
                mebibytes(resident.anonymous),
                mebibytes(resident.allocated)
            ),
            promise,
        );
    }
    row(
        "maps of services and endpoints",
        format!("{:.1} MiB", mebibytes(*map_bytes)),
        None,
    );
    let (services, backends, maglev) = usage;
    println!(
        "    in use: {services} service entries, {backends} backends, {maglev} elements of Maglev tables"
    );
}

fn mebibytes(bytes: u64) -> f64 {
    f64::from((bytes >> 10) as u32) / 1024.0
}
