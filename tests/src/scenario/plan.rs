//! How a probe is made, and which probes of a step may run side by side.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::file::{Outcome, Probe, Repeat, Scenario};
use crate::agent::patient;
use crate::shape::Shape;
use crate::worker::protocol;

/// Enough connections that a random choice meets every backend.
const PER_BACKEND: u32 = 20;
/// Enough connections to see that nobody answers.
const TO_FAIL: u32 = 3;
/// How often a backend is asked again until it changes, if the file does not say.
const REPEATS: u32 = 10;
/// An answer may need a second SYN.
const REACH_TIMEOUT: Duration = Duration::from_secs(3);
/// Silence for this long is a drop.
const FAIL_TIMEOUT: Duration = Duration::from_millis(1500);
/// After so many unanswered connections the verdict is clear.
const FAILURES: u32 = 2;
/// What a connection may take on a busy machine, on the average of many.
const EACH_MS: u64 = 20;

/// The worker's part of a probe.
pub fn request(
    shape: &Shape,
    probe: &Probe,
    to: super::file::To,
    first_backend: Option<String>,
) -> protocol::Probe {
    let reach = probe.expect.outcome == Outcome::Reach;
    let backends = u32::try_from(probe.expect.backends.len())
        .unwrap_or(u32::MAX)
        .max(1);
    let changing = until_change(probe);
    let usual = if changing {
        REPEATS
    } else {
        PER_BACKEND.saturating_mul(backends)
    };
    let asked = match probe.repeat_until_backend_changes {
        Some(Repeat::Times(times)) => Some(times),
        _ => probe.connections,
    };
    let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    protocol::Probe {
        proto: to.proto,
        to: to.addr(),
        from: source(shape, probe, to.addr()),
        connections: asked.unwrap_or(if reach { usual } else { TO_FAIL }),
        parallel: !reach && probe.from.source_port.is_none() && probe.interval_seconds.is_none(),
        interval_ms: millis(Duration::from_secs_f64(
            probe.interval_seconds.unwrap_or_default(),
        )),
        timeout_ms: millis(timeout(probe)),
        stop_after_failures: FAILURES,
        until_backend_changes: changing,
        first_backend,
    }
}

/// Where a probe's packets come from: the kernel chooses, unless the file names a port, or one of the client's addresses
/// that the kernel would not choose.
pub fn source(shape: &Shape, probe: &Probe, to: SocketAddr) -> SocketAddr {
    let mut source = protocol::any(to, probe.from.source_port.unwrap_or(0));
    let node = shape.nodes.iter().find(|node| node.name == probe.from.name);
    let named = probe.from.ip.filter(|ip| {
        ip.is_ipv4() == to.is_ipv4() && node.is_some_and(|node| node.extra_addresses.contains(ip))
    });
    if let Some(ip) = named {
        source.set_ip(ip);
    }
    source
}

/// Whether a probe goes on until another backend answers.
pub fn until_change(probe: &Probe) -> bool {
    matches!(
        probe.repeat_until_backend_changes,
        Some(Repeat::Asked(true) | Repeat::Times(_))
    )
}

/// How long one connection may take.
pub fn timeout(probe: &Probe) -> Duration {
    match probe.expect.outcome {
        Outcome::Reach | Outcome::Http => patient(REACH_TIMEOUT),
        Outcome::Reject => patient(FAIL_TIMEOUT),
        Outcome::Drop | Outcome::Fail | Outcome::Undefined => FAIL_TIMEOUT,
    }
}

/// An upper bound for all connections of a request.
pub fn bound(request: &protocol::Probe) -> Duration {
    let each = Duration::from_millis(request.interval_ms.saturating_add(EACH_MS));
    let interval = each.saturating_mul(request.connections);
    let waiting = Duration::from_millis(request.timeout_ms) * (request.stop_after_failures + 1);
    // Answered connections may each be slow up to their timeout, but a run that slow has failed anyway.
    interval + waiting * 2 + Duration::from_secs(30)
}

/// Splits a step's probes into groups that may run side by side. The order between groups is the file's.
pub fn groups<'a>(scenario: &Scenario, probes: &'a [Probe]) -> Vec<Vec<&'a Probe>> {
    let affinity = has_affinity(scenario);
    let mut groups: Vec<Vec<&Probe>> = Vec::new();
    let mut routes: HashMap<(&str, IpAddr), Option<&str>> = HashMap::new();
    let mut open = false;
    for probe in probes {
        let alone = affinity || stands_alone(probe);
        let via = probe.via_node.as_deref();
        let route = target(probe).map(|to| (probe.from.name.as_str(), to.ip()));
        let conflict = route.is_some_and(|route| routes.get(&route).is_some_and(|other| *other != via));
        if alone || conflict || !open {
            groups.push(Vec::new());
            routes.clear();
        }
        open = !alone;
        routes.extend(route.map(|route| (route, via)));
        if let Some(group) = groups.last_mut() {
            group.push(probe);
        }
    }
    groups
}

/// Where a probe's packets go.
pub fn target(probe: &Probe) -> Option<SocketAddr> {
    probe
        .to
        .map(super::file::To::addr)
        .or_else(|| parse_url(probe.http_get.as_deref()?).map(|(to, _)| to))
}

/// `http://ip:port/path`.
pub fn parse_url(url: &str) -> Option<(SocketAddr, String)> {
    let rest = url.strip_prefix("http://")?;
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let to = authority
        .parse()
        .or_else(|_| format!("{authority}:80").parse())
        .ok()?;
    Some((to, format!("/{path}")))
}

/// The outcome depends on what the same client did before, or on time.
fn stands_alone(probe: &Probe) -> bool {
    probe.flow.is_some()
        || probe.expect.sticky.is_some()
        || probe.must_equal_backend.is_some()
        || probe.repeat_until_backend_changes.is_some()
        || probe.interval_seconds.is_some()
        || probe.from.source_port.is_some()
        || probe.min_share.is_some()
}

fn has_affinity(scenario: &Scenario) -> bool {
    let changed = scenario
        .steps
        .iter()
        .flat_map(|step| &step.actions)
        .filter_map(|action| action.object.as_ref());
    scenario
        .objects
        .iter()
        .chain(changed)
        .any(|object| object["spec"]["sessionAffinity"] == "ClientIP")
}
