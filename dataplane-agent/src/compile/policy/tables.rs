//! The rows of the policy tables, as the datapath finds them. In memory they are what `explain` judges by.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use dataplane_common::{
    addr::{Family, V4, V6},
    policy::{
        self as layout, PeerRulesKey, PeerTables, PolicyRule, PolicySet, PolicyTables, PortRulesKey,
        RuleBits, port_prefix, set_flags,
    },
};
use ipnet::IpNet;

use super::{
    PolicyCompiler,
    atoms::addr_bits,
    classes::{ClassId, Place},
    ports::PortPrefix,
    sets::SetId,
};
use crate::model::ObjectRef;

/// Every row. Ids of sets and classes are the compiler's own.
#[derive(Clone, Debug, Default)]
pub struct Tables {
    pub peers: HashMap<IpAddr, ClassId>,
    pub cidrs: HashMap<IpNet, ClassId>,
    pub sets: HashMap<SetId, PolicySet>,
    pub peer_rules: HashMap<PeerRulesKey, u32>,
    /// With the length of the prefix.
    pub port_rules: HashMap<(u32, PortRulesKey), u32>,
    /// By id; the first is the empty set.
    pub bits: Vec<RuleBits>,
    pub rules: Vec<PolicyRule>,
    /// By the number in [`PolicyRule::policy`].
    pub policies: Vec<ObjectRef>,
}

/// Gives numbers to things that are the same.
struct Numbers<T>(BTreeMap<T, u32>, Vec<T>);

impl<T: Ord + Clone> Numbers<T> {
    fn of(&mut self, thing: &T) -> u32 {
        let next = self.1.len() as u32;
        *self.0.entry(thing.clone()).or_insert_with(|| {
            self.1.push(thing.clone());
            next
        })
    }
}

impl Tables {
    pub fn of(compiler: &PolicyCompiler) -> Self {
        let mut tables = Self::default();
        let mut bits = Numbers(BTreeMap::new(), Vec::new());
        let mut policies = Numbers(BTreeMap::new(), Vec::new());
        bits.of(&RuleBits::default());
        for (place, class) in compiler.classes().places() {
            match place {
                Place::Addr(addr) => tables.peers.insert(addr, class),
                Place::Range(range) => tables.cidrs.insert(range, class),
            };
        }
        for (id, set) in compiler.sets().iter() {
            let header = PolicySet {
                rules: tables.rules.len() as u32,
                any_peer: bits.of(&set.any_peer),
                admin_rules: set.admin_rules,
                words: set.key.rules.len().div_ceil(64) as u8,
                flags: if set.key.deny_by_default {
                    0
                } else {
                    set_flags::ALLOW_BY_DEFAULT
                },
            };
            tables.sets.insert(id, header);
            tables.rules.extend(set.key.rules.iter().map(|rule| PolicyRule {
                policy: policies.of(&rule.policy),
                place: rule.place,
                action: rule.action as u8,
                pad: [0; 3],
            }));
            for class in compiler.classes_of(id) {
                let Some(by_class) = compiler.peer_rules(id, class) else {
                    continue;
                };
                tables
                    .peer_rules
                    .insert(PeerRulesKey { set: id, class }, bits.of(&by_class));
            }
            for (prefix, by_port) in &set.by_port {
                tables
                    .port_rules
                    .insert((prefix.length, port_key(id, *prefix)), bits.of(by_port));
            }
        }
        tables.bits = bits.1;
        tables.policies = policies.1;
        tables
    }
}

/// The key of a prefix, without its length.
pub fn port_key(set: SetId, prefix: PortPrefix) -> PortRulesKey {
    PortRulesKey {
        set,
        proto_be: u16::from(prefix.proto).to_be(),
        port_be: prefix.port.to_be(),
    }
}

/// The value of the longest prefix with one that covers a key, as the kernel's table finds it. `get`: that of a prefix, by its
/// length and key.
pub fn longest_port<T>(key: PortRulesKey, get: impl Fn(&(u32, PortRulesKey)) -> Option<T>) -> Option<T> {
    let (proto, port) = (u16::from_be(key.proto_be) as u8, u16::from_be(key.port_be));
    let mut lengths = PortPrefix::covering(port_prefix::PORT);
    lengths.find_map(|length| get(&(length, port_key(key.set, PortPrefix::of(length, proto, port)))))
}

impl<F: Family> PeerTables<F> for Tables {
    fn peer(&self, addr: &F::Addr) -> Option<u32> {
        self.peers.get(&ip::<F>(addr)).copied()
    }

    fn cidr(&self, addr: &F::Addr) -> Option<u32> {
        let addr = ip::<F>(addr);
        let mut lengths = (0..=addr_bits(addr)).rev();
        lengths.find_map(|length| self.cidrs.get(&IpNet::new(addr, length).ok()?.trunc()).copied())
    }
}

impl PolicyTables for Tables {
    fn set(&self, id: u32) -> Option<&PolicySet> {
        self.sets.get(&id)
    }

    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32> {
        self.peer_rules.get(&key).copied()
    }

    fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
        longest_port(key, |prefix| self.port_rules.get(prefix).copied())
    }

    fn bits(&self, id: u32) -> Option<&RuleBits> {
        self.bits.get(id as usize)
    }

    fn rule(&self, index: u32) -> Option<&PolicyRule> {
        self.rules.get(index as usize)
    }
}

/// An address as the standard library has it.
pub fn ip<F: Family>(addr: &F::Addr) -> IpAddr {
    let words = F::to_any(*addr);
    if F::VERSION == 4 {
        IpAddr::from(words[0].to_ne_bytes())
    } else {
        IpAddr::from(bytemuck::cast::<[u32; 4], [u8; 16]>(words))
    }
}

/// Judges what goes between a pod with a set and an address. `port` is the destination's, 0 for protocols without.
pub fn judge<T>(tables: &T, set: SetId, peer: IpAddr, proto: u8, port: u16) -> layout::Judgement
where
    T: PeerTables<V4> + PeerTables<V6> + PolicyTables,
{
    let class = match peer {
        IpAddr::V4(addr) => layout::class::<V4, T>(tables, &u32::from_ne_bytes(addr.octets())),
        IpAddr::V6(addr) => layout::class::<V6, T>(tables, &bytemuck::cast(addr.octets())),
    };
    layout::judge(tables, set, class, proto, port.to_be())
}
