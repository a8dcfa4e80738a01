//! Connections that netfilter translates and that run on a node where the datapath starts, kube-proxy's most of all: how
//! the tables of flows say that they are left to it.
//!
//! Netfilter goes on with what it has begun, also when the rules are gone by which it did. So each such connection gets
//! entries that let its packets pass as they are: those that the client sends, those that the client gets behind
//! netfilter, and those that the endpoint sends, by which no new flow takes its ports. Like any other entry they end with the
//! endpoint, with silence, and with a FIN.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
};

use dataplane_common::{
    addr::{Family, Tuple, V4, V6},
    flow::{Flow4, Flow6, FlowKey4, FlowKey6, FlowMeta, Side, flow_flags, flow_state},
    policy::REVISION_NONE,
};

use crate::{
    netlink::conntrack::{Ends, Translated},
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

/// Entries of `FLOWS_V4` and `FLOWS_V6`.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    pub v4: HashMap<FlowKey4, Flow4>,
    pub v6: HashMap<FlowKey6, Flow6>,
}

/// The entries of those connections whose packets the datapath would take for its own: `owner` tells whose they are.
pub fn entries(
    connections: &[Translated],
    now_ticks: u32,
    mut owner: impl FnMut(&Translated) -> Option<Owner>,
) -> Entries {
    let mut all = Entries::default();
    for connection in connections {
        if let Some(owner) = owner(connection) {
            if connection.original.src.is_ipv4() {
                all.v4.extend(of_connection::<V4>(connection, &owner, now_ticks));
            } else {
                all.v6.extend(of_connection::<V6>(connection, &owner, now_ticks));
            }
        }
    }
    all
}

impl Entries {
    /// Connections.
    pub fn len(&self) -> usize {
        let v4 = self.v4.values().filter(|flow| is_counted(&flow.meta));
        let v6 = self.v6.values().filter(|flow| is_counted(&flow.meta));
        v4.count() + v6.count()
    }

    pub fn is_empty(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

/// Whether an entry is left to netfilter, and the one by which connections are counted: what their client gets.
pub fn is_counted(meta: &FlowMeta) -> bool {
    const CLIENT_GETS: u8 = flow_flags::LEFT | flow_flags::SELF_EGRESS;
    meta.flags & CLIENT_GETS == CLIENT_GETS
}

fn of_connection<F: Family>(
    connection: &Translated,
    owner: &Owner,
    now_ticks: u32,
) -> [(F::FlowKey, F::Flow); 3] {
    let Translated {
        proto,
        original,
        reply,
        closing,
    } = *connection;
    let meta = FlowMeta {
        backend: owner.backend.map_or(u32::MAX, |(id, _)| id),
        backend_generation: owner.backend.map_or(0, |(_, generation)| generation),
        service: owner.service,
        service_generation: owner.service_generation,
        seen_ticks: now_ticks,
        state: if closing {
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
    use dataplane_common::addr::proto;

    use super::*;

    fn ends(src: &str, dst: &str) -> Ends {
        Ends {
            src: src.parse().unwrap(),
            dst: dst.parse().unwrap(),
        }
    }

    fn connection() -> Translated {
        Translated {
            proto: proto::TCP,
            original: ends("10.244.1.10:4000", "10.96.0.1:80"),
            reply: ends("10.244.2.21:8080", "10.244.1.10:4000"),
            closing: false,
        }
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
        let of_service = |one: &Translated| (one == &connection()).then_some(OWNER);
        let all = entries(&[connection(), other], 100, of_service);
        assert_eq!((all.v4.len(), all.v6.len(), all.len()), (3, 0, 1));
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
        let Translated { original, reply, .. } = connection();
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
