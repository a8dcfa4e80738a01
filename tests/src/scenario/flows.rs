//! Flow probes: a connection or a stream of datagrams that lives through the steps.

use std::collections::HashMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use super::file::{FlowAction, Outcome, Probe};
use super::judge::Observation;
use super::plan;
use crate::cluster::Cluster;
use crate::worker::Worker;
use crate::worker::protocol::{Attempt, Datagram, Proto, Request, Response};

/// How long a flow may take to arrive where it is expected, if the file does not say.
const WITHIN: Duration = Duration::from_secs(10);
/// So many datagrams in a row decide.
const IN_A_ROW: usize = 2;
/// A datagram without answer for this long was dropped.
const SILENCE: Duration = Duration::from_millis(1500);
const POLL: Duration = Duration::from_millis(100);
const CALL: Duration = Duration::from_secs(30);

/// The flows of a scenario, by name.
#[derive(Debug, Default)]
pub struct Flows(HashMap<String, (String, Proto)>);

impl Flows {
    /// Starts or continues a flow and watches it until it is clear what became of it.
    pub fn probe(&mut self, cluster: &Cluster, name: &str, probe: &Probe) -> Result<Observation> {
        let within = probe.within_seconds.map_or(WITHIN, Duration::from_secs_f64);
        let deadline = Instant::now() + within;
        let attempts = match probe.action.context("a flow needs an action")? {
            FlowAction::Start => {
                let to = probe.to.context("a flow needs a destination")?;
                let client = &probe.from.name;
                self.0.insert(name.to_owned(), (client.clone(), to.proto));
                let timeout = if probe.expect.outcome == Outcome::Reach {
                    within.min(WITHIN)
                } else {
                    SILENCE
                };
                let request = Request::FlowStart {
                    name: name.to_owned(),
                    proto: to.proto,
                    from: plan::source(cluster.shape(), probe, to.addr()),
                    to: to.addr(),
                    timeout_ms: millis(timeout),
                };
                match cluster.worker(client)?.call(request, CALL)? {
                    Response::Attempts(attempts) => attempts,
                    _ => watch(cluster.worker(client)?, name, 0, probe, deadline)?,
                }
            }
            FlowAction::Continue => {
                let (client, proto) = self
                    .0
                    .get(name)
                    .with_context(|| format!("flow {name} was never started"))?;
                let worker = cluster.worker(client)?;
                if *proto == Proto::Udp {
                    let (next, _) = history(worker, name, 0)?;
                    watch(worker, name, next, probe, deadline)?
                } else {
                    let timeout = if probe.expect.outcome == Outcome::Reach {
                        within
                    } else {
                        SILENCE
                    };
                    let request = Request::FlowExchange {
                        name: name.to_owned(),
                        timeout_ms: millis(timeout),
                    };
                    match worker.call(request, timeout + CALL)? {
                        Response::Attempts(attempts) => attempts,
                        other => bail!("unexpected answer {other:?}"),
                    }
                }
            }
        };
        Ok(Observation::Attempts(attempts))
    }
}

/// Watches datagrams from number `from` on until the last of them in a row are what was expected, or time is up.
/// Returns those last ones.
fn watch(worker: &Worker, name: &str, from: u64, probe: &Probe, deadline: Instant) -> Result<Vec<Attempt>> {
    let mut sent_at: Vec<Instant> = Vec::new();
    loop {
        let (_, datagrams) = history(worker, name, from)?;
        let now = Instant::now();
        sent_at.resize(datagrams.len().max(sent_at.len()), now);
        let decided: Vec<Attempt> = datagrams
            .into_iter()
            .zip(&sent_at)
            .map_while(|(datagram, sent)| match datagram.attempt {
                None if now.duration_since(*sent) < SILENCE => None,
                attempt => Some(attempt.unwrap_or(Attempt::Silent)),
            })
            .collect();
        let last = &decided[decided.len().saturating_sub(IN_A_ROW)..];
        if (last.len() == IN_A_ROW && last.iter().all(|attempt| is_expected(probe, attempt)))
            || now >= deadline
        {
            return Ok(if last.is_empty() {
                vec![Attempt::Silent]
            } else {
                last.to_vec()
            });
        }
        sleep(POLL);
    }
}

fn is_expected(probe: &Probe, attempt: &Attempt) -> bool {
    match (probe.expect.outcome, attempt) {
        (Outcome::Reach, Attempt::Answered { by, .. }) => {
            let backends = &probe.expect.backends;
            probe.expected_pods().contains(&by.name)
                && (backends.is_empty() || backends.contains(&by.backend()))
        }
        (Outcome::Reach, _) => false,
        (Outcome::Undefined, _) => true,
        (_, attempt) => attempt.backend().is_none(),
    }
}

fn history(worker: &Worker, name: &str, from: u64) -> Result<(u64, Vec<Datagram>)> {
    match worker.call(
        Request::FlowHistory {
            name: name.to_owned(),
            from,
        },
        CALL,
    )? {
        Response::History { next, datagrams } => Ok((next, datagrams)),
        other => bail!("unexpected answer {other:?}"),
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
