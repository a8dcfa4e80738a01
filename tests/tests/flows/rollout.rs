//! Ten thousand connections of mixed age through the replacement of every backend, one after the other, as a Deployment
//! does it, with the agents killed on the way: a connection ends with its backend and not before, and no new one is
//! refused.

use anyhow::{Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::worker::protocol::HerdReport;

use crate::stage::{CLIENTS, Mode, Stage, State, alive};

const CONNECTIONS: u32 = 10_000;
/// Old backend and the one that takes its place, with their nodes.
const REPLACEMENTS: [(&str, &str); 4] = [
    ("old1", "new1"),
    ("old2", "new2"),
    ("old3", "new3"),
    ("old4", "new4"),
];
const BACKENDS: [(&str, u8); 8] = [
    ("old1", 1),
    ("old2", 2),
    ("old3", 1),
    ("old4", 2),
    ("new1", 2),
    ("new2", 1),
    ("new3", 2),
    ("new4", 1),
];
/// Connections are opened before the first replacement and at each of its steps.
const BATCHES: u32 = 1 + 3 * REPLACEMENTS.len() as u32;

#[test]
fn by_packets_and_xdp() -> Result<()> {
    replace_all("rx", "off", "xdp")
}

#[test]
fn by_socket_hooks_and_tc() -> Result<()> {
    replace_all("rt", "all", "tc")
}

struct Rollout {
    stage: Stage,
    opened: u32,
    /// Connections that are to be alive, by client.
    held: [u32; 3],
}

fn replace_all(name: &str, socket_lb: &'static str, datapath: &'static str) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode {
        socket_lb,
        datapath,
        more: &[],
    };
    let ready = REPLACEMENTS.map(|(old, _)| old);
    let mut rollout = Rollout {
        stage: Stage::set(name, mode, &BACKENDS, &ready, agent)?,
        opened: 0,
        held: [0; 3],
    };
    rollout.more()?;
    for (number, (old, new)) in REPLACEMENTS.into_iter().enumerate() {
        rollout
            .stage
            .put(&[(new, Some(State::Ready)), (old, Some(State::Terminating))])?;
        if number == 1 {
            // What has just been written is for the agents that come next to find.
            rollout.stage.agents.kill_all();
            rollout.more()?;
            rollout.stage.agents.start_all()?;
        } else {
            rollout.stage.settle()?;
            rollout.more()?;
        }
        rollout.stage.settle()?;
        rollout.all_answer()?;
        rollout.stage.put(&[(old, None)])?;
        rollout.more()?;
        rollout.stage.settle()?;
        rollout.all_answer()?;
        rollout.stage.end(old)?;
        rollout.lose(old)?;
        rollout.more()?;
    }
    rollout.all_answer()?;
    println!("{} connections were opened", rollout.opened);
    ensure!(rollout.opened >= CONNECTIONS, "{} connections", rollout.opened);
    Ok(())
}

impl Rollout {
    /// Every client opens its part of a batch.
    fn more(&mut self) -> Result<()> {
        let each = CONNECTIONS.div_ceil(BATCHES * CLIENTS.len() as u32);
        for ((client, to), held) in CLIENTS.into_iter().zip(&mut self.held) {
            let report = self.stage.open(client, "all", to, each)?;
            ensure!(
                report.broken.is_empty(),
                "{} new connections of {client} failed, the first: {:?}",
                report.broken.len(),
                report.broken.first()
            );
            *held += each;
            self.opened += each;
        }
        Ok(())
    }

    /// Every connection answers.
    fn all_answer(&mut self) -> Result<()> {
        for (report, (client, expected)) in self.reports()? {
            ensure!(
                report.broken.is_empty() && alive(&report) == expected,
                "{} of {expected} connections of {client} broke, the first: {:?}",
                report.broken.len(),
                report.broken.first()
            );
        }
        Ok(())
    }

    /// The connections to one backend have ended, and all others answer.
    fn lose(&mut self, ended: &str) -> Result<()> {
        for (number, (report, (client, expected))) in self.reports()?.into_iter().enumerate() {
            let lost = report.broken.len() as u32;
            let other = report.broken.iter().find(|(backend, _)| backend != ended);
            ensure!(other.is_none(), "with {ended}, {client} lost {other:?}");
            ensure!(lost > 0, "no connection of {client} was with {ended}");
            ensure!(
                !report.alive.contains_key(ended),
                "{ended} still answers {client}"
            );
            ensure!(alive(&report) + lost == expected, "{client}: {:?}", report.alive);
            self.held[number] = expected - lost;
        }
        Ok(())
    }

    fn reports(&self) -> Result<Vec<(HerdReport, (&'static str, u32))>> {
        let clients = CLIENTS.into_iter().zip(self.held);
        clients
            .map(|((client, _), held)| Ok((self.stage.exchange(client, "all")?, (client, held))))
            .collect()
    }
}
