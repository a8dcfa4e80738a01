//! Bytes of the policy tables, beside those of a table with an entry for each pod, peer and port.

use std::path::Path;

use anyhow::Result;
use dataplane_common::policy::{PeerRulesKey, PodPolicy, PolicyRule, PolicySet, PortRulesKey, RuleBits};
use dataplane_tests::test_run::{load, tables::memlock};
use serde::Serialize;

use crate::{
    crowd,
    datapath::{self, entries, exact},
};

const PODS: usize = 100;
const RULES: usize = 100;
const PEERS: usize = 10_000;
/// Bytes of an entry by pod, peer and port: its key, and a small value.
const ENTRY: usize = 16 + 8;

/// The maps of the policies themselves; flows and events have sizes of their own.
const MAPS: [&str; 10] = [
    "POD_POLICY",
    "PEERS_V4",
    "PEERS_V6",
    "CIDRS_V4",
    "CIDRS_V6",
    "POLICY_SETS",
    "PEER_RULES",
    "PORT_RULES",
    "RULE_BITS",
    "RULES",
];

/// What the tables take.
#[derive(Debug, Serialize)]
pub struct Memory {
    what: &'static str,
    /// Map, entries, bytes of these.
    used: Vec<(&'static str, usize, usize)>,
    /// Bytes, as the kernel accounts for the maps.
    allocated: u64,
    /// Bytes by pod, peer and port.
    product: usize,
    pub is_met: bool,
}

/// With rules that are all about other peers, and with rules that are all about the same ones.
pub fn measure(objects: &Path) -> Result<Vec<Memory>> {
    [
        ("each rule about other peers", true),
        ("all rules about the same peers", false),
    ]
    .into_iter()
    .map(|(what, unlike)| {
        let compiled = crowd::product(PODS, RULES, PEERS, unlike)?;
        let object = load(&objects.join("dataplane.o"), &entries(1024))?;
        datapath::write(&exact(&object), &compiled.tables)?;
        let tables = &compiled.tables;
        let word = size_of::<u32>();
        let used: Vec<(&'static str, usize, usize)> = [
            ("POD_POLICY", compiled.pods, word + size_of::<PodPolicy>()),
            ("PEERS_V4", tables.peers.len(), word + word),
            ("CIDRS_V4", tables.cidrs.len(), 2 * word + word),
            ("POLICY_SETS", tables.sets.len(), size_of::<PolicySet>()),
            (
                "PEER_RULES",
                tables.peer_rules.len(),
                size_of::<PeerRulesKey>() + word,
            ),
            (
                "PORT_RULES",
                tables.port_rules.len(),
                word + size_of::<PortRulesKey>() + word,
            ),
            ("RULE_BITS", tables.bits.len(), size_of::<RuleBits>()),
            ("RULES", tables.rules.len(), size_of::<PolicyRule>()),
        ]
        .map(|(name, entries, bytes)| (name, entries, entries * bytes))
        .into();
        let allocated = MAPS
            .iter()
            .map(|name| memlock(&object, name))
            .sum::<Result<u64>>()?;
        let product = PODS * RULES * PEERS * ENTRY;
        Ok(Memory {
            what,
            used,
            allocated,
            product,
            is_met: allocated < product as u64,
        })
    })
    .collect()
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mib = |bytes: u64| f64::from((bytes >> 10) as u32) / 1024.0;
        let used: usize = self.used.iter().map(|(_, _, bytes)| bytes).sum();
        write!(
            f,
            "memory: {PODS} pods x {RULES} rules x {PEERS} peers, {}: {:.2} MiB of entries (",
            self.what,
            mib(used as u64)
        )?;
        for (number, (name, entries, _)) in self
            .used
            .iter()
            .filter(|(_, entries, _)| *entries > 0)
            .enumerate()
        {
            let comma = if number == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {entries}")?;
        }
        write!(
            f,
            "), {:.1} MiB allocated; {} entries of {ENTRY} bytes by pod, peer and port: {:.0} MiB   less: {}",
            mib(self.allocated),
            PODS * RULES * PEERS,
            mib(self.product as u64),
            if self.is_met { "met" } else { "MISSED" }
        )
    }
}
