//! What the maps should look like, and whether the pinned ones do.

use std::{io, os::fd::AsFd};

use super::{
    map_names,
    pins::{Pins, SCHEMA_VERSION},
    sys,
};
use crate::{
    config::Sizes,
    store::{Limits, policy::PolicyLimits},
};

/// Names and entries of the maps whose size is set at load time; the others keep the object's.
pub fn sizes_by_name(sizes: &Sizes) -> [(&'static str, u32); 40] {
    let Sizes {
        limits,
        affinity,
        flows,
        policy_flows,
        half_open,
        datagrams,
        held,
        sockets,
        own_addresses,
        devices,
    } = *sizes;
    let Limits {
        frontends,
        services,
        backends,
        maglev,
        source_ranges,
        policy,
    } = limits;
    let PolicyLimits {
        pods,
        peers,
        ranges,
        sets,
        peer_rules,
        port_rules,
        bits,
        rules,
    } = policy;
    [
        (map_names::FRONTENDS_V4, frontends),
        (map_names::FRONTENDS_V6, frontends),
        (map_names::SERVICES, services),
        (map_names::BACKENDS, backends),
        (map_names::SERVICE_TRAFFIC, services),
        (map_names::BACKEND_TRAFFIC, backends),
        (map_names::VERDICTS_TOLD, pods),
        (map_names::MAGLEV, maglev),
        (map_names::RANGES_V4, source_ranges),
        (map_names::RANGES_V6, source_ranges),
        (map_names::AFFINITY_V4, affinity),
        (map_names::AFFINITY_V6, affinity),
        (map_names::FLOWS_V4, flows),
        (map_names::FLOWS_V6, flows),
        (map_names::HALF_OPEN_V4, half_open),
        (map_names::HALF_OPEN_V6, half_open),
        (map_names::DATAGRAMS_V4, datagrams),
        (map_names::DATAGRAMS_V6, datagrams),
        (map_names::HELD, held),
        (map_names::SOCK_CHOSEN, sockets),
        (map_names::SOCK_REVERSE_V4, sockets),
        (map_names::SOCK_REVERSE_V6, sockets),
        (map_names::OWN_ADDRS_V4, own_addresses),
        (map_names::OWN_ADDRS_V6, own_addresses),
        (map_names::DEVICES, devices),
        (map_names::SOURCE_CHECKED, pods),
        (map_names::POD_POLICY, pods),
        (map_names::PEERS_V4, peers),
        (map_names::PEERS_V6, peers),
        (map_names::CIDRS_V4, ranges),
        (map_names::CIDRS_V6, ranges),
        (map_names::POLICY_SETS, sets),
        (map_names::PEER_RULES, peer_rules),
        (map_names::PORT_RULES, port_rules),
        (map_names::RULE_BITS, bits),
        (map_names::RULES, rules),
        (map_names::RULE_HITS, rules),
        (map_names::SET_HITS, sets),
        (map_names::POLICY_FLOWS_V4, policy_flows),
        (map_names::POLICY_FLOWS_V6, policy_flows),
    ]
}

/// The properties of a map that must be equal for a pinned one to be used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub map_type: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub flags: u32,
}

impl Shape {
    pub fn of(info: &sys::MapInfo) -> Self {
        Self {
            map_type: info.map_type,
            key_size: info.key_size,
            value_size: info.value_size,
            max_entries: info.max_entries,
            flags: info.map_flags,
        }
    }

    /// The same with another number of entries.
    pub fn is_resized(&self, other: &Shape) -> bool {
        let resized = Shape {
            max_entries: other.max_entries,
            ..*self
        };
        self.max_entries != other.max_entries && resized == *other
    }

    /// The first property in which two shapes differ: its name, here, there.
    fn difference(&self, other: &Shape) -> Option<(&'static str, u32, u32)> {
        let Self {
            map_type,
            key_size,
            value_size,
            max_entries,
            flags,
        } = *self;
        [
            ("type", map_type, other.map_type),
            ("key size", key_size, other.key_size),
            ("value size", value_size, other.value_size),
            ("entries", max_entries, other.max_entries),
            ("flags", flags, other.flags),
        ]
        .into_iter()
        .find(|&(_, here, there)| here != there)
    }
}

/// A pinned map that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error(
        "pinned table {name} has {property} {found}, this agent wants {wanted}, although both are of table layout {SCHEMA_VERSION}: run `dataplane-agent cleanup` first (connections through Services are interrupted)"
    )]
    Differs {
        name: String,
        property: &'static str,
        found: u32,
        wanted: u32,
    },
    /// A change that its developer has not given a number.
    #[error(
        "pinned table {0} has another layout, although both are of table layout {SCHEMA_VERSION}: run `dataplane-agent cleanup` first (connections through Services are interrupted)"
    )]
    OtherLayout(String),
    #[error("failed to open pinned table {name}")]
    Open {
        name: String,
        #[source]
        source: io::Error,
    },
}

/// The shape of a pinned map, if there is one.
pub fn pinned_shape(pins: &Pins, name: &str) -> io::Result<Option<Shape>> {
    let Some(map) = pins.find_map(name)? else {
        return Ok(None);
    };
    Ok(Some(Shape::of(&sys::map_info(map.as_fd())?)))
}

/// Compares the pinned map, if there is one, with what is wanted.
pub fn check_pinned(pins: &Pins, name: &str, wanted: &Shape) -> Result<(), MapError> {
    let found = pinned_shape(pins, name).map_err(|source| MapError::Open {
        name: name.to_owned(),
        source,
    })?;
    match found.and_then(|found| wanted.difference(&found)) {
        None => Ok(()),
        Some((property, wanted, found)) => Err(MapError::Differs {
            name: name.to_owned(),
            property,
            found,
            wanted,
        }),
    }
}
