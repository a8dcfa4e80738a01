//! How a flow leaves this node, in words.

use std::{collections::BTreeMap, io, net::IpAddr};

use super::{Way, ends::Found, tables::LOOPBACK};
use crate::{
    model::{Index, Name},
    netlink::{
        tables::device_name,
        way::{self, Neighbour, Routing},
    },
};

/// The ways to a target, and to the node that it is on, where packets go there by another one: in a tunnel, or through a router.
pub fn to(
    routing: &Routing,
    names: &BTreeMap<u32, String>,
    index: &Index,
    (addr, pod): Found<'_>,
) -> io::Result<Vec<Way>> {
    let in_words = |to: IpAddr, node: Option<&str>, found: Option<way::Way>| {
        let neighbour = found.and_then(|found| found.neighbour);
        Way {
            to,
            node: node.map(str::to_owned),
            device: found.map(|found| device_name(names, found.ifindex)),
            mtu: found.map(|found| found.mtu),
            forwarded_mtu: found
                .filter(|found| found.forwarded_mtu != found.mtu)
                .map(|found| found.forwarded_mtu),
            next_hop: found.map(|found| found.next_hop).filter(|hop| *hop != to),
            neighbour: neighbour.as_ref().map(ToString::to_string),
            is_silent: neighbour.is_some_and(Neighbour::is_silent),
        }
    };
    let mut ways = vec![in_words(addr, None, routing.way(addr)?)];
    if let Some((node, of_node)) = pod.and_then(|pod| node_of(index, pod.node.as_deref()?, addr))
        && of_node != addr
        && ways[0].next_hop != Some(of_node)
    {
        let found = routing.way(of_node)?;
        // Not of this node.
        if found.is_none_or(|way| way.ifindex != LOOPBACK) {
            ways.push(in_words(of_node, Some(node), found));
        }
    }
    Ok(ways)
}

/// A node's address, of the family of `like` if it has one.
fn node_of<'a>(index: &Index, node: &'a str, like: IpAddr) -> Option<(&'a str, IpAddr)> {
    let found = index.node_by_name(&Name::new("", node))?;
    let mut ips = found.internal_ips.iter();
    let same = ips.clone().find(|ip| ip.is_ipv4() == like.is_ipv4());
    same.or_else(|| ips.next()).map(|ip| (node, *ip))
}
