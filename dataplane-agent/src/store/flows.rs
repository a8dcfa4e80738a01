//! `FLOWS_V4`, `FLOWS_V6`, `HALF_OPEN_V4` and `HALF_OPEN_V6`, read: a connection from its two entries, whichever are there.
//! And `POLICY_FLOWS_V4` and `POLICY_FLOWS_V6`: what policies have allowed, of which no Service is known.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use dataplane_common::{
    flow::{Flow4, Flow6, FlowKey4, FlowKey6, FlowMeta, flow_flags, flow_state},
    policy::{PolicyFlow, PolicyFlowKey4, PolicyFlowKey6, policy_flow_flags},
};
use serde::{Deserialize, Serialize};

use crate::bpf::{
    map_names as names,
    pins::Pins,
    sys::{self, MapFd},
};

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum FlowState {
    /// Both ends have shown that they take part.
    Established,
    /// One end has said that it ends it, and nothing after that.
    Closing,
    /// Only one end has spoken, or the client has not gone on after the answer.
    HalfOpen,
    /// Left to netfilter, which translates it as it did before there was anything of ours.
    Left,
    /// Policies have allowed it, at a Pod that they select, and nothing here translates it.
    Allowed,
}

impl FlowState {
    pub const fn as_str(self) -> &'static str {
        match self {
            FlowState::Established => "established",
            FlowState::Closing => "closing",
            FlowState::HalfOpen => "half-open",
            FlowState::Left => "left",
            FlowState::Allowed => "allowed",
        }
    }
}

/// A translated flow, or one that policies have allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flow {
    pub proto: u8,
    pub client: SocketAddr,
    /// What the client asked for.
    pub asked: SocketAddr,
    pub backend: SocketAddr,
    /// What the backend sees of the client, where that is not the client's own address.
    pub seen_as: Option<SocketAddr>,
    pub state: FlowState,
    /// Since its last packet in either direction, to the nearest second or two.
    pub idle: Duration,
}

/// Either family's entry, read.
struct Entry {
    proto: u8,
    /// Source and destination, before translation and behind it.
    before: [SocketAddr; 2],
    behind: [SocketAddr; 2],
    meta: FlowMeta,
    is_half_open: bool,
}

/// Every flow of the pinned tables. This node's own connections that no service translates are none.
pub fn read(pins: &Pins) -> io::Result<Vec<Flow>> {
    let mut flows = Flows::default();
    for (v4, v6, is_half_open) in [
        (names::FLOWS_V4, names::FLOWS_V6, false),
        (names::HALF_OPEN_V4, names::HALF_OPEN_V6, true),
    ] {
        let v4: MapFd<FlowKey4, Flow4> = MapFd::new(pins.open_map(v4)?)?;
        v4.for_each(|key, flow| {
            let addr =
                |addr: u32, port_be| SocketAddr::new(IpAddr::from(addr.to_ne_bytes()), u16::from_be(port_be));
            flows.add(&Entry {
                proto: key.proto,
                before: [addr(key.src_be, key.sport_be), addr(key.dst_be, key.dport_be)],
                behind: [addr(flow.src_be, flow.sport_be), addr(flow.dst_be, flow.dport_be)],
                meta: flow.meta,
                is_half_open,
            });
        })?;
        let v6: MapFd<FlowKey6, Flow6> = MapFd::new(pins.open_map(v6)?)?;
        v6.for_each(|key, flow| {
            let addr = |addr: [u32; 4], port_be| {
                SocketAddr::new(
                    IpAddr::from(bytemuck::cast::<_, [u8; 16]>(addr)),
                    u16::from_be(port_be),
                )
            };
            flows.add(&Entry {
                proto: key.proto,
                before: [addr(key.src_be, key.sport_be), addr(key.dst_be, key.dport_be)],
                behind: [addr(flow.src_be, flow.sport_be), addr(flow.dst_be, flow.dport_be)],
                meta: flow.meta,
                is_half_open,
            });
        })?;
    }
    Ok(flows.finish(sys::ticks()))
}

/// [`read`], and those that policies have allowed at Pods of this node and no Service translates here.
pub fn read_all(pins: &Pins) -> io::Result<Vec<Flow>> {
    let mut flows = read(pins)?;
    let mut allowed = Flows::default();
    let v4: MapFd<PolicyFlowKey4, PolicyFlow> = MapFd::new(pins.open_map(names::POLICY_FLOWS_V4)?)?;
    v4.for_each(|key, flow| {
        let addr = |addr: u32| IpAddr::from(addr.to_ne_bytes());
        let ends = [(key.pod_be, key.pod_port_be), (key.peer_be, key.peer_port_be)];
        allowed.add_allowed(key.proto, ends.map(|(of, port)| (addr(of), port)), flow);
    })?;
    let v6: MapFd<PolicyFlowKey6, PolicyFlow> = MapFd::new(pins.open_map(names::POLICY_FLOWS_V6)?)?;
    v6.for_each(|key, flow| {
        let addr = |addr: [u32; 4]| IpAddr::from(bytemuck::cast::<_, [u8; 16]>(addr));
        let ends = [(key.pod_be, key.pod_port_be), (key.peer_be, key.peer_port_be)];
        allowed.add_allowed(key.proto, ends.map(|(of, port)| (addr(of), port)), flow);
    })?;
    add_others(&mut flows, allowed.finish(sys::ticks()));
    Ok(flows)
}

/// Adds flows that are not there yet, as their endpoints see them.
fn add_others(flows: &mut Vec<Flow>, others: Vec<Flow>) {
    let seen = |flow: &Flow| (flow.proto, flow.seen_as.unwrap_or(flow.client), flow.backend);
    let known: HashSet<_> = flows.iter().map(seen).collect();
    flows.extend(others.into_iter().filter(|flow| !known.contains(&seen(flow))));
    flows.sort_by_key(|flow| flow.idle);
}

/// Flows by client, what it asked for and protocol, with the ticks of their last packet.
#[derive(Default)]
struct Flows(BTreeMap<(SocketAddr, SocketAddr, u8), (Flow, u32)>);

impl Flows {
    fn add(&mut self, entry: &Entry) {
        let Entry {
            proto,
            before,
            behind,
            ref meta,
            is_half_open,
        } = *entry;
        if meta.flags & flow_flags::DIRECT != 0 {
            return;
        }
        let is_left = meta.flags & flow_flags::LEFT != 0;
        // Its packets pass as they are: what the client asked for, netfilter alone knows.
        let [client, asked, seen, backend] = match (meta.flags & flow_flags::REPLY != 0, is_left) {
            (false, false) => [before[0], before[1], behind[0], behind[1]],
            (true, false) => [behind[1], behind[0], before[1], before[0]],
            (false, true) => [before[0], before[1], before[0], before[1]],
            (true, true) => [before[1], before[0], before[1], before[0]],
        };
        let state = match meta.state {
            _ if is_left => FlowState::Left,
            _ if is_half_open => FlowState::HalfOpen,
            flow_state::CLOSING => FlowState::Closing,
            _ => FlowState::Established,
        };
        let flow = Flow {
            proto,
            client,
            asked,
            backend,
            seen_as: (seen != client).then_some(seen),
            state,
            idle: Duration::ZERO,
        };
        let (known, seen) = self
            .0
            .entry((client, asked, proto))
            .or_insert((flow, meta.seen_ticks));
        // One that is established may have an older entry among the half-open ones.
        known.state = known.state.min(state);
        *seen = (*seen).max(meta.seen_ticks);
    }

    /// `ends`: the Pod and its peer, with their ports in network byte order.
    fn add_allowed(&mut self, proto: u8, ends: [(IpAddr, u16); 2], flow: &PolicyFlow) {
        let [pod, peer] = ends.map(|(addr, port_be)| SocketAddr::new(addr, u16::from_be(port_be)));
        let (client, to) = if flow.flags & policy_flow_flags::FROM_POD == 0 {
            (peer, pod)
        } else {
            (pod, peer)
        };
        let new = Flow {
            proto,
            client,
            asked: to,
            backend: to,
            seen_as: None,
            state: FlowState::Allowed,
            idle: Duration::ZERO,
        };
        // Both of its Pods may be here.
        let (_, seen) = self
            .0
            .entry((client, to, proto))
            .or_insert((new, flow.seen_ticks));
        *seen = (*seen).max(flow.seen_ticks);
    }

    fn finish(self, now: u32) -> Vec<Flow> {
        let mut flows: Vec<Flow> = self
            .0
            .into_values()
            .map(|(flow, seen)| Flow {
                idle: sys::since_ticks(now, seen),
                ..flow
            })
            .collect();
        flows.sort_by_key(|flow| flow.idle);
        flows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn entry(flags: u8, before: [&str; 2], behind: [&str; 2], seen_ticks: u32, is_half_open: bool) -> Entry {
        Entry {
            proto: 6,
            before: before.map(addr),
            behind: behind.map(addr),
            meta: FlowMeta {
                flags,
                seen_ticks,
                ..FlowMeta::default()
            },
            is_half_open,
        }
    }

    #[test]
    fn both_entries_of_a_flow_are_one_flow() {
        let (client, asked, seen, backend) =
            ("10.0.0.1:1", "10.96.0.1:80", "192.0.2.1:61000", "10.0.1.2:8080");
        let forward = entry(0, [client, asked], [seen, backend], 10, false);
        let reply = entry(flow_flags::REPLY, [backend, seen], [asked, client], 12, true);
        for entries in [vec![&forward, &reply], vec![&reply, &forward], vec![&reply]] {
            let mut flows = Flows::default();
            for entry in &entries {
                flows.add(entry);
            }
            let found = flows.finish(15);
            let expected = Flow {
                proto: 6,
                client: addr(client),
                asked: addr(asked),
                backend: addr(backend),
                seen_as: Some(addr(seen)),
                state: if entries.len() == 2 {
                    FlowState::Established
                } else {
                    FlowState::HalfOpen
                },
                idle: Duration::from_nanos(3 << 30),
            };
            assert_eq!(found, [expected]);
        }
    }

    #[test]
    fn the_nodes_own_connections_are_no_flows_and_those_of_netfilter_are_as_they_are() {
        let mut flows = Flows::default();
        let pair = ["10.0.0.1:1", "10.0.1.2:8080"];
        flows.add(&entry(flow_flags::DIRECT, pair, pair, 1, false));
        assert!(flows.0.is_empty());
        flows.add(&entry(flow_flags::LEFT, pair, pair, 1, false));
        let found = flows.finish(0);
        assert_eq!(
            (found[0].state, found[0].backend),
            (FlowState::Left, addr(pair[1]))
        );
        assert_eq!(found[0].idle, Duration::ZERO, "a clock that was set back");
    }

    #[test]
    fn what_policies_have_allowed_is_a_flow_where_no_service_has_it() {
        let [pod, peer, node] = ["10.0.0.1:1", "10.0.1.2:8080", "192.0.2.1:61000"].map(addr);
        let of = |flags, seen_ticks| PolicyFlow {
            flags,
            seen_ticks,
            ..PolicyFlow::default()
        };
        let ends = |pod: SocketAddr, peer: SocketAddr| [pod, peer].map(|end| (end.ip(), end.port().to_be()));
        let mut allowed = Flows::default();
        // As either of its Pods sees it, and one that has come through a Service.
        allowed.add_allowed(6, ends(pod, peer), &of(policy_flow_flags::FROM_POD, 8));
        allowed.add_allowed(6, ends(peer, pod), &of(0, 9));
        allowed.add_allowed(6, ends(peer, node), &of(0, 9));
        let mut flows = Flows::default();
        flows.add(&entry(
            0,
            ["10.0.0.7:5", "10.96.0.1:80"],
            ["192.0.2.1:61000", "10.0.1.2:8080"],
            7,
            false,
        ));
        let mut flows = flows.finish(10);
        add_others(&mut flows, allowed.finish(10));
        let shown: Vec<_> = flows
            .iter()
            .map(|flow| (flow.client, flow.asked, flow.state))
            .collect();
        assert_eq!(
            shown,
            [
                (pod, peer, FlowState::Allowed),
                (addr("10.0.0.7:5"), addr("10.96.0.1:80"), FlowState::Established)
            ]
        );
        assert_eq!(flows[0].idle, Duration::from_nanos(1 << 30));
    }
}
