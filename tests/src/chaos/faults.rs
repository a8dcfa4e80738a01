//! What happens to agents, servers and cables, one thing every few seconds.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use dataplane_tests::api::relay::Relay;
use fastrand::Rng;

use crate::stage::{self, NODES, Stage};

/// The longest time between two faults, in milliseconds.
const PAUSE: u64 = 9_000;
/// The longest time that what was killed stays away.
const AWAY: u64 = 3_000;
/// The longest time that a cable is out: TCP tries again soon enough not to give up.
const OUT: u64 = 1_500;
/// The node whose agent is let live in the second half, so that its growth can be told.
pub const SPARED: u8 = NODES[2];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    AgentKilled(u8),
    AllAgentsKilled,
    CableOut(u8),
    StrayDevice(u8),
    ServerKilled,
    ServerAndStoreKilled,
    WatchesCut,
}

/// The faults of a run.
pub struct Faults {
    rng: Rng,
    has_server: bool,
    next: Duration,
    told: BTreeMap<&'static str, u32>,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::AgentKilled(_) => "an agent killed",
            Self::AllAgentsKilled => "all agents killed",
            Self::CableOut(_) => "a cable out",
            Self::StrayDevice(_) => "a stray device",
            Self::ServerKilled => "the API server killed",
            Self::ServerAndStoreKilled => "API server and etcd killed",
            Self::WatchesCut => "watches cut",
        }
    }
}

impl Faults {
    pub fn new(seed: u64, has_server: bool) -> Self {
        Self {
            // What objects do follows from the seed too, by a generator of their own.
            rng: Rng::with_seed(seed ^ 0x00c0_ffee),
            has_server,
            next: Duration::from_secs(2),
            told: BTreeMap::new(),
        }
    }

    /// Lets the next fault happen if its time has come, and mends it.
    pub fn next(&mut self, stage: &mut Stage, began: Instant, end: Duration) -> Result<()> {
        if began.elapsed() < self.next {
            return Ok(());
        }
        let is_late = self.next > end / 2;
        let mut fault = self.choose();
        if is_late && matches!(fault, Fault::AgentKilled(SPARED) | Fault::AllAgentsKilled) {
            fault = Fault::AgentKilled(NODES[0]);
        }
        let away = Duration::from_millis(self.rng.u64(..AWAY));
        let out = Duration::from_millis(100 + self.rng.u64(..OUT - 100));
        println!(
            "{:>6.1} s  {fault:?}, {:.1} s",
            began.elapsed().as_secs_f64(),
            if matches!(fault, Fault::CableOut(_)) {
                out
            } else {
                away
            }
            .as_secs_f64()
        );
        *self.told.entry(fault.name()).or_default() += 1;
        self.next += Duration::from_millis(1_000 + self.rng.u64(..PAUSE));
        let wait = std::thread::sleep;
        match fault {
            Fault::AgentKilled(node) => {
                stage.agents.kill(&stage::node(node))?;
                wait(away);
                stage.agents.start_all()?;
            }
            Fault::AllAgentsKilled => {
                stage.agents.kill_all();
                wait(away);
                stage.agents.start_all()?;
            }
            Fault::CableOut(node) => {
                stage.cluster.set_plugged(&stage::node(node), false)?;
                wait(out);
                stage.cluster.set_plugged(&stage::node(node), true)?;
            }
            Fault::StrayDevice(node) => {
                let netns = stage.cluster.node_netns(&stage::node(node))?.fd();
                let links = stage.cluster.node_links(&stage::node(node))?;
                links.add_veth("stray0", "stray1", netns, None)?;
                links.set_up("stray0")?;
                wait(out);
                links.delete("stray0")?;
            }
            Fault::ServerKilled | Fault::ServerAndStoreKilled => {
                if let Some(served) = &stage.served {
                    if fault == Fault::ServerKilled {
                        served.server.kill_apiserver();
                    } else {
                        served.server.kill_both();
                    }
                    wait(away);
                    served.server.run()?;
                }
            }
            Fault::WatchesCut => stage.agents.relays().for_each(Relay::cut),
        }
        Ok(())
    }

    fn choose(&mut self) -> Fault {
        let node = NODES[self.rng.usize(..NODES.len())];
        let of = if self.has_server { 100 } else { 65 };
        match self.rng.u8(..of) {
            0..30 => Fault::AgentKilled(node),
            30..35 => Fault::AllAgentsKilled,
            35..55 => Fault::CableOut(node),
            55..65 => Fault::StrayDevice(node),
            65..80 => Fault::ServerKilled,
            80..90 => Fault::ServerAndStoreKilled,
            _ => Fault::WatchesCut,
        }
    }

    /// How often each has happened, in words.
    pub fn told(&self) -> String {
        let told: Vec<String> = self
            .told
            .iter()
            .map(|(name, times)| format!("{name} {times} times"))
            .collect();
        told.join(", ")
    }
}
