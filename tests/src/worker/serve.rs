//! The worker process: reads calls until its input ends, each call on a thread of its own.

use std::io::{Write, stdin, stdout};
use std::sync::Arc;
use std::thread;

use anyhow::Result;

use super::flow::{Flows, Route};
use super::herd::Herds;
use super::protocol::{Answer, Call, Request, Response};
use super::stream::Streams;
use super::{arrivals, probe, responder, sweep, transfer};

/// Serves until the driver closes the input or dies.
pub fn serve(name: &str) -> Result<()> {
    let name: Arc<str> = Arc::from(name);
    let flows = Arc::new((Flows::default(), Streams::default()));
    let herds = Arc::new(Herds::default());
    for line in stdin().lines() {
        let Call { id, request } = serde_json::from_str(&line?)?;
        let (name, flows, herds) = (Arc::clone(&name), Arc::clone(&flows), Arc::clone(&herds));
        thread::spawn(move || {
            let response = handle(&name, &flows.0, &flows.1, &herds, request)
                .unwrap_or_else(|error| Response::Failed(format!("{error:#}")));
            if let Ok(mut line) = serde_json::to_string(&Answer { id, response }) {
                line.push('\n');
                // A driver that is gone has closed the input too.
                let _ = stdout().lock().write_all(line.as_bytes());
            }
        });
    }
    Ok(())
}

fn handle(
    name: &Arc<str>,
    flows: &Flows,
    streams: &Streams,
    herds: &Herds,
    request: Request,
) -> Result<Response> {
    match request {
        Request::Listen { proto, port } => responder::listen(name, proto, port).map(|()| Response::Done),
        Request::Probe(probe) => Ok(Response::Attempts(probe::run(&probe))),
        Request::HttpGet { to, path, timeout_ms } => probe::http_get(to, &path, timeout_ms),
        Request::FlowStart {
            name,
            proto,
            from,
            to,
            timeout_ms,
        } => flows.start(name, Route { proto, from, to }, timeout_ms),
        Request::FlowExchange { name, timeout_ms } => flows.exchange(&name, timeout_ms),
        Request::FlowHistory { name, from } => flows.history(&name, from),
        Request::TransferListen { port } => transfer::listen(name, port).map(|()| Response::Done),
        Request::Transfer(transfer) => transfer::run(&transfer),
        Request::StreamStart { name, to, per_second } => streams.start(name, to, per_second),
        Request::StreamReport { name, stop } => streams.report(&name, stop),
        Request::HerdOpen {
            name,
            to,
            connections,
            timeout_ms,
        } => Ok(herds.open(&name, to, connections, timeout_ms)),
        Request::Sweep(sweep) => Ok(Response::Swept(sweep::run(&sweep))),
        Request::Arrivals => Ok(Response::Arrivals(arrivals::take())),
        Request::HerdExchange { name, timeout_ms } => Ok(herds.exchange(&name, timeout_ms)),
    }
}
