//! Connections that netfilter translates and that run on a node where the datapath starts, kube-proxy's most of all: how
//! the tables of flows say that they are left to it.
//!
//! Netfilter goes on with what it has begun, also when the rules are gone by which it did. So each such connection gets
//! entries that let its packets pass as they are: those that the client sends, those that the client gets behind
//! netfilter, and those that the endpoint sends, by which no new flow takes its ports. Like any other entry they end with the
//! endpoint, with silence, and with a FIN.
//!
//! Whatever else netfilter knows that is answered to a port of the range for translation has that port too (it masquerades from
//! any): what this node's own processes have begun, for services or not, and before anything is served all that is there. It
//! gets the entry that it would have if the datapath had seen it begin (`flow_flags::DIRECT`).

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use dataplane_common::{
    addr::{Family, Tuple, V4, V6, proto},
    flow::{Flow4, Flow6, FlowKey4, FlowKey6, FlowMeta, Side, flow_flags, flow_state},
    policy::REVISION_NONE,
};

use crate::{
    netlink::conntrack::{Connection, Ends, Phase},
    sync::encode,
};

/// The service that a connection is for, and its endpoint where the tables know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    pub service: u32,
    pub service_generation: u16,
    /// Id and generation.
    pub backend: Option<(u32, u32)>,
}

/// What a connection that netfilter knows is to the datapath.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Its packets would be taken for those of a service.
    Service(Owner),
    /// A process of this node has begun it, for a service: netfilter translates before any hook.
    Own,
    Other,
}

/// Entries of `FLOWS_V4` and `FLOWS_V6`.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    pub v4: HashMap<FlowKey4, Flow4>,
    pub v6: HashMap<FlowKey6, Flow6>,
    /// Connections of this node's own processes for services, which need none.
    pub own: usize,
    /// Netfilter translates an exchange by UDP, of whomever.
    pub datagrams: bool,
}

/// The entries of connections that netfilter knows. `role` tells what those are whose destination it translates, `is_ours`
/// whether what is answered to an address and port might be taken for an answer to the datapath.
pub fn entries(
    connections: &[Connection],
    now_ticks: u32,
    mut role: impl FnMut(&Connection) -> Role,
    is_ours: impl Fn(SocketAddr) -> bool,
) -> Entries {
    let mut all = Entries::default();
    for connection in connections {
        let is_under_way = connection.is_translated() && connection.phase != Phase::Over;
        all.datagrams |= is_under_way && connection.proto == proto::UDP;
        let role = if is_under_way {
            role(connection)
        } else {
            Role::Other
        };
        all.own += usize::from(role == Role::Own);
        let is_ipv4 = connection.original.src.is_ipv4();
        match role {
            Role::Service(owner) if is_ipv4 => {
                all.v4.extend(of_service::<V4>(connection, &owner, now_ticks));
            }
            Role::Service(owner) => all.v6.extend(of_service::<V6>(connection, &owner, now_ticks)),
            Role::Own | Role::Other if !is_ours(connection.reply.dst) => {}
            Role::Own | Role::Other if is_ipv4 => all.v4.extend([of_port::<V4>(connection, now_ticks)]),
            Role::Own | Role::Other => all.v6.extend([of_port::<V6>(connection, now_ticks)]),
        }
    }
    all
}

impl Entries {
    /// Whether netfilter has to go on translating.
    pub fn need_netfilter(&self) -> bool {
        self.own > 0 || self.count() > 0
    }

    /// Connections to services.
    pub fn count(&self) -> usize {
        let v4 = self.v4.values().filter(|flow| is_counted(&flow.meta));
        let v6 = self.v6.values().filter(|flow| is_counted(&flow.meta));
        v4.count() + v6.count()
    }
}

/// Whether an entry is left to netfilter, and the one by which connections are counted: what their client gets.
pub fn is_counted(meta: &FlowMeta) -> bool {
    const CLIENT_GETS: u8 = flow_flags::LEFT | flow_flags::SELF_EGRESS;
    meta.flags & CLIENT_GETS == CLIENT_GETS
}

fn of_service<F: Family>(
    connection: &Connection,
    owner: &Owner,
    now_ticks: u32,
) -> [(F::FlowKey, F::Flow); 3] {
    let Connection {
        proto,
        original,
        reply,
        phase,
    } = *connection;
    let meta = FlowMeta {
        backend: owner.backend.map_or(u32::MAX, |(id, _)| id),
        backend_generation: owner.backend.map_or(0, |(_, generation)| generation),
        service: owner.service,
        service_generation: owner.service_generation,
        seen_ticks: now_ticks,
        state: if phase == Phase::Closing {
            flow_state::CLOSING
        } else {
            flow_state::OPEN
        },
        judged: REVISION_NONE,
        ..FlowMeta::default()
    };
    // An entry for replies does not end with its endpoint: nobody would say when this one is gone.
    let first = if owner.backend.is_some() {
        0
    } else {
        flow_flags::REPLY
    };
    let entry = |ends: Ends, side: Side, flags: u8| {
        let tuple = tuple::<F>(ends);
        let flags = flow_flags::LEFT | flags;
        (
            F::flow_key(&tuple, proto, side),
            F::flow(&tuple, FlowMeta { flags, ..meta }),
        )
    };
    let reply_flags = flow_flags::REPLY;
    [
        entry(original, Side::Ingress, first),
        entry(
            original.reversed(),
            Side::Egress,
            reply_flags | flow_flags::SELF_EGRESS,
        ),
        entry(reply, Side::Ingress, reply_flags),
    ]
}

/// By which no new flow takes the port that a connection is answered to.
fn of_port<F: Family>(connection: &Connection, now_ticks: u32) -> (F::FlowKey, F::Flow) {
    let meta = FlowMeta {
        backend: u32::MAX,
        service: u32::MAX,
        flags: flow_flags::REPLY | flow_flags::DIRECT | flow_flags::OTHER_EGRESS,
        seen_ticks: now_ticks,
        state: if connection.phase == Phase::Open {
            flow_state::OPEN
        } else {
            flow_state::CLOSING
        },
        judged: REVISION_NONE,
        ..FlowMeta::default()
    };
    let tuple = tuple::<F>(connection.reply);
    (
        F::flow_key(&tuple, connection.proto, Side::Ingress),
        F::flow(&tuple, meta),
    )
}

fn tuple<F: Family>(ends: Ends) -> Tuple<F::Addr> {
    let addr = |end: SocketAddr| F::from_any(encode::any_addr(end.ip()));
    Tuple {
        src: addr(ends.src),
        dst: addr(ends.dst),
        sport_be: ends.src.port().to_be(),
        dport_be: ends.dst.port().to_be(),
    }
}

/// Which backends there are.
#[derive(Debug, Default)]
pub struct Endpoints {
    /// Ids by address and protocol.
    pub all: HashMap<(SocketAddr, u8), Vec<u32>>,
    /// Those that a service chooses from.
    pub chosen: HashMap<u32, HashSet<u32>>,
}

impl Endpoints {
    /// The id under which a service has an endpoint.
    pub fn of(&self, service: u32, at: SocketAddr, proto: u8) -> Option<u32> {
        let ids = self.all.get(&(at, proto))?;
        let chosen = self.chosen.get(&service);
        let is_chosen = |id: &&u32| chosen.is_some_and(|chosen| chosen.contains(id));
        ids.iter().find(is_chosen).or_else(|| ids.first()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ends(src: &str, dst: &str) -> Ends {
        Ends {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
        }
    }

    fn connection() -> Connection {
        Connection {
            proto: proto::TCP,
            original: ends("10.244.1.10:4000", "10.96.0.1:80"),
            reply: ends("10.244.2.21:8080", "10.244.1.10:4000"),
            phase: Phase::Open,
        }
    }

    fn is_ours(at: SocketAddr) -> bool {
        at == "192.0.2.1:61000".parse().unwrap() || at == "[2001:db8::1]:61000".parse().unwrap()
    }

    const OWNER: Owner = Owner {
        service: 3,
        service_generation: 5,
        backend: Some((7, 9)),
    };

    #[test]
    fn a_connection_has_three_entries_that_change_nothing() {
        let mut other = connection();
        other.original.dst = "10.96.0.2:80".parse().unwrap();
        let mut over = connection();
        over.phase = Phase::Over;
        let role = |one: &Connection| {
            if one.original.dst == connection().original.dst {
                Role::Service(OWNER)
            } else {
                Role::Other
            }
        };
        let all = entries(&[connection(), other, over], 100, role, is_ours);
        assert_eq!((all.v4.len(), all.v6.len(), all.count()), (3, 0, 1));
        assert!(all.need_netfilter() && !all.datagrams);
        for (key, flow) in &all.v4 {
            let same = (key.src_be, key.dst_be, key.sport_be, key.dport_be);
            assert_eq!((flow.src_be, flow.dst_be, flow.sport_be, flow.dport_be), same);
            assert_eq!(flow.meta.exit, 0, "on to the kernel's stack");
            assert_eq!((flow.meta.backend, flow.meta.backend_generation), (7, 9));
        }
        let flags = |ends: Ends, side| {
            let key = V4::flow_key(&tuple::<V4>(ends), proto::TCP, side);
            all.v4[&key].meta.flags
        };
        let Connection { original, reply, .. } = connection();
        assert_eq!(
            flags(original, Side::Ingress),
            flow_flags::LEFT,
            "it ends with its endpoint"
        );
        let gets = flags(original.reversed(), Side::Egress);
        assert_eq!(
            gets,
            flow_flags::LEFT | flow_flags::REPLY | flow_flags::SELF_EGRESS
        );
        assert_eq!(flags(reply, Side::Ingress), flow_flags::LEFT | flow_flags::REPLY);
    }

    #[test]
    fn a_port_of_the_range_is_taken_by_whatever_is_answered_there() {
        let answered_to = |from: &str, to: &str| Connection {
            reply: ends(from, to),
            ..connection()
        };
        let by_node = answered_to("10.244.2.21:8080", "192.0.2.1:61000");
        let elsewhere = answered_to("10.244.2.21:8080", "192.0.2.1:60999");
        let mut v6 = answered_to("[fd00::21]:8080", "[2001:db8::1]:61000");
        v6.original = ends("[2001:db8::1]:40000", "[fd00:10:96::1]:80");
        let mut over = answered_to("198.51.100.1:443", "192.0.2.1:61000");
        over.phase = Phase::Over;
        let role = |one: &Connection| {
            if one.original == v6.original {
                Role::Other
            } else {
                Role::Own
            }
        };
        let all = entries(&[by_node, elsewhere, v6, over], 100, role, is_ours);
        assert_eq!((all.v4.len(), all.v6.len(), all.count(), all.own), (2, 1, 0, 2));
        assert!(all.need_netfilter());
        let entry =
            |one: &Connection| all.v4[&V4::flow_key(&tuple::<V4>(one.reply), one.proto, Side::Ingress)];
        let flow = entry(&by_node);
        let flags = flow_flags::REPLY | flow_flags::DIRECT | flow_flags::OTHER_EGRESS;
        assert_eq!((flow.meta.flags, flow.meta.exit), (flags, 0));
        assert_eq!(flow.meta.state, flow_state::OPEN);
        assert_eq!(
            (flow.sport_be, flow.dport_be),
            (8080_u16.to_be(), 61000_u16.to_be())
        );
        assert_eq!(entry(&over).meta.state, flow_state::CLOSING);

        let others = entries(&[v6], 100, |_| Role::Other, is_ours);
        assert_eq!(others.v6.len(), 1);
        assert!(!others.need_netfilter(), "nobody takes its rules away");
    }

    #[test]
    fn exchanges_by_udp_are_seen_while_both_ends_take_part() {
        let exchange = Connection {
            proto: proto::UDP,
            ..connection()
        };
        let asked_once = Connection {
            phase: Phase::Over,
            ..exchange
        };
        let direct = Connection {
            original: exchange.reply.reversed(),
            ..exchange
        };
        for (one, seen) in [(exchange, true), (asked_once, false), (direct, false)] {
            assert_eq!(entries(&[one], 100, |_| Role::Other, is_ours).datagrams, seen);
        }
    }

    #[test]
    fn an_endpoint_is_that_of_the_service() {
        let at: SocketAddr = "[fd00::1]:8080".parse().unwrap();
        let endpoints = Endpoints {
            all: [((at, proto::TCP), vec![4, 6])].into(),
            chosen: [(1, [6].into()), (2, [9].into())].into(),
        };
        assert_eq!(endpoints.of(1, at, proto::TCP), Some(6));
        assert_eq!(
            endpoints.of(2, at, proto::TCP),
            Some(4),
            "it may have left the service"
        );
        assert_eq!(endpoints.of(1, at, proto::UDP), None);
    }
}
