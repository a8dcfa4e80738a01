//! Connections through an upgrade of the datapath and a rollback, with agents that are killed on the way. Real packets in a
//! cluster of two nodes; needs root and the agent that `cargo xtask build` makes.
//!
//! The other versions are objects in `tests/assets`: their programs serve real connections from tables of their own layouts,
//! which are made of the present agent's tables by the way that a rollback takes; nobody of their agents runs. One is the last
//! release, the other has other layouts of flows, clients, backends, services and frontends. What begins an upgrade from these
//! is the agent as it is delivered.
//!
//! Shown: no established connection is lost, in either direction, and new ones are served before and after. A connection that
//! begins in the very milliseconds in which the programs of a node change between tables of two layouts may have to be begun again;
//! how many did is counted.

#[expect(
    dead_code,
    reason = "the stage of the tests of taking over, which ask it for more"
)]
#[path = "../takeover/stage.rs"]
mod stage;

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, sleep};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser as _;
use dataplane_agent::args::{Cli, Command};
use dataplane_agent::attach::start::{load_and_leave, prepare};
use dataplane_agent::bpf::loader::Release;
use dataplane_agent::bpf::pins::{Pins, SCHEMA_VERSION};
use dataplane_agent::config::Config;
use dataplane_tests::{agent, assets};

use crate::stage::{CLIENTS, Stage, Takers, alive};

const NODES: [&str; 2] = ["node1", "node2"];
/// Of each client.
const CONNECTIONS: u32 = 20;
/// Milliseconds after which starts are killed: before and while programs are loaded, and about where links change.
const KILLED_AFTER: [u64; 4] = [30, 300, 700, 900];

#[test]
fn to_other_layouts_and_back() -> Result<()> {
    let Some(program) = agent::built() else {
        return Ok(());
    };
    let stage = Stage::set("ul", None, program)?;
    let mut agents = stage.agents();
    let mut herds = Herds::default();
    agents.start(&stage)?;
    herds.open(&stage, "first")?;

    let other = assets::object(assets::OTHER_LAYOUT)?;
    agents.running_mut()?.kill_all();
    herds.through(&stage, "back", || {
        leave(&stage, &agents, other, SCHEMA_VERSION - 1)
    })?;
    herds.open(&stage, "other")?;

    herds.through(&stage, "forward", || {
        for after in KILLED_AFTER {
            agents.running_mut()?.start_all()?;
            sleep(Duration::from_millis(after));
            agents.running_mut()?.kill_all();
        }
        agents.restart()
    })?;
    for node in NODES {
        let folders = folders(&agents, node)?;
        let own = Pins::new(agents.running()?.bpffs(node)?);
        ensure!(folders == [own.folder()], "{node} has {folders:?}");
    }
    herds.open(&stage, "last")?;
    herds.all_alive(&stage)
}

#[test]
fn from_the_last_release() -> Result<()> {
    let Some(program) = agent::built() else {
        return Ok(());
    };
    let stage = Stage::set("ur", None, program)?;
    let mut agents = stage.agents();
    let mut herds = Herds::default();
    agents.start(&stage)?;
    let (name, schema) = assets::RELEASED;
    let released = assets::object(name)?;
    agents.running_mut()?.kill_all();
    leave(&stage, &agents, released, schema)?;
    herds.open(&stage, "released")?;
    herds.through(&stage, "upgrade", || agents.restart())?;
    herds.open(&stage, "present")?;
    herds.all_alive(&stage)
}

/// Gives every node the programs of a version, and its tables what is there.
fn leave(stage: &Stage, agents: &Takers, object: &'static [u8], schema: u32) -> Result<()> {
    for node in NODES {
        let config = config(stage, agents, node)?;
        let release = Release {
            object,
            ..Release::CURRENT
        };
        let netns = stage.cluster.node_netns(node)?;
        netns
            .enter(|| load_and_leave(prepare(&config)?, &config, release, schema))
            .with_context(|| format!("layout {schema} on {node}"))?;
        let folders = folders(agents, node)?;
        ensure!(
            folders == [format!("dataplane-v{schema}")],
            "{node} has {folders:?}"
        );
    }
    Ok(())
}

fn folders(agents: &Takers, node: &str) -> Result<Vec<String>> {
    let all = Pins::all(agents.running()?.bpffs(node)?)?;
    Ok(all.iter().map(|pins| pins.folder().to_owned()).collect())
}

/// As that of the agents.
fn config(stage: &Stage, agents: &Takers, node: &str) -> Result<Config> {
    let bpffs = agents.running()?.bpffs(node)?.display().to_string();
    let cgroup = stage.cluster.node_cgroup(node)?.display().to_string();
    let run = [
        "dataplane-agent",
        "run",
        "--node-name",
        node,
        "--manifests",
        "/none",
    ];
    let places = ["--bpffs", &bpffs, "--cgroup", &cgroup];
    match Cli::try_parse_from(run.iter().chain(&places))?.command {
        Command::Run(run) => run.resolve(),
        _ => bail!("another command"),
    }
}

/// The connections that must not break.
#[derive(Default)]
struct Herds(Vec<String>);

impl Herds {
    /// New connections of every client.
    fn open(&mut self, stage: &Stage, herd: &str) -> Result<()> {
        for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
            let report = stage.open(client, &format!("{herd}-{number}"), to, CONNECTIONS)?;
            ensure!(
                report.broken.is_empty(),
                "{herd}: {client} to {to}: {:?}",
                report.broken.first()
            );
        }
        self.0.push(herd.to_owned());
        Ok(())
    }

    fn all_alive(&self, stage: &Stage) -> Result<()> {
        for herd in &self.0 {
            for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
                let report = stage.exchange(client, &format!("{herd}-{number}"))?;
                ensure!(
                    report.broken.is_empty() && alive(&report) == CONNECTIONS,
                    "{herd}: {client} to {to} has {} of {CONNECTIONS}: {:?}",
                    alive(&report),
                    report.broken.first()
                );
            }
        }
        Ok(())
    }

    /// All of them have to live while something is done, and new ones begin.
    fn through(&self, stage: &Stage, name: &str, change: impl FnOnce() -> Result<()>) -> Result<()> {
        let stop = AtomicBool::new(false);
        let (mut begun, mut again) = (0, 0);
        thread::scope(|scope| -> Result<()> {
            let traffic = scope.spawn(|| -> Result<()> {
                while !stop.load(Ordering::SeqCst) {
                    for (number, (client, to)) in CLIENTS.into_iter().enumerate() {
                        let report = stage.open(client, &format!("{name}-{number}-{begun}"), to, 1)?;
                        begun += 1;
                        again += report.broken.len();
                    }
                    self.all_alive(stage).context(format!("while going {name}"))?;
                }
                Ok(())
            });
            let changed = change();
            stop.store(true, Ordering::SeqCst);
            traffic
                .join()
                .map_err(|_| anyhow::anyhow!("the traffic panicked"))??;
            changed
        })?;
        println!("{name}: {begun} connections began meanwhile, {again} of them in vain");
        ensure!(
            again * 20 <= begun,
            "{again} of {begun} connections began in vain"
        );
        self.all_alive(stage)
    }
}
