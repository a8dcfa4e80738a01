//! Policies at random: the two builds must agree about every verdict, whatever the tables say, also where a row is missing.

use std::collections::HashMap;

use anyhow::{Result, bail, ensure};
use dataplane_common::addr::{AnyAddr, Family, V4, V6, proto};
use dataplane_common::memory::{FamilyTables, Memory, MemoryCidr};
use dataplane_common::policy::{
    Counted, PeerRulesKey, PodPolicy, PolicyFlow, PolicyFlowKey4, PolicyFlowKey6, PolicyRule, PolicySet,
    PortRulesKey, RuleBits, VARIABLES, VerdictEvent, port_prefix, set_flags,
};
use dataplane_common::source::{Source4, Source6, source_place};
use dataplane_common::unbound::{PodRange, range_index};

use crate::kernel::Kernel;
use crate::packets::Random;
use crate::setting::{Setting, any};

/// Sets, the first of which is none.
const SETS: usize = 6;
const CLASSES: u32 = 6;
const RULES_OF_SET: usize = 130;
const BITS: usize = 40;

impl Setting {
    /// Makes tables at random.
    pub fn add_policies(&mut self, random: &mut Random) {
        let (addresses4, addresses6) = (self.addresses4.clone(), self.addresses6.clone());
        let ports = self.ports.clone();
        let memory = &mut self.memory;
        let class = |random: &mut Random| 1 + random.below(CLASSES as usize) as u32;
        for addr in addresses4 {
            if random.percent(70) {
                memory.v4.peers.insert(any(addr)[0], class(random));
            }
        }
        for addr in addresses6 {
            if random.percent(70) {
                memory.v6.peers.insert(any(addr), class(random));
            }
        }
        for (version, network, length) in [
            (4, any([10, 0, 0, 0].into()), 8),
            (4, any([10, 244, 1, 0].into()), 24),
            (6, [0x00fd_u32.to_le(), 0, 0, 0], 16),
        ] {
            memory.policies.cidrs.push(MemoryCidr {
                version,
                network,
                length,
                class: class(random),
            });
        }
        let tables = &mut memory.policies;
        tables.bits.push(RuleBits::default());
        for _ in 1..BITS {
            let mut bits = RuleBits::default();
            for _ in 0..=random.below(60) {
                // Also rules that no set has.
                bits.insert(random.below(RULES_OF_SET + 10) as u32);
            }
            tables.bits.push(bits);
        }
        // Also elements that are not there.
        let bits =
            |random: &mut Random| random.below(BITS) as u32 + if random.percent(1) { 1 << 20 } else { 0 };
        tables.sets.push(PolicySet::default());
        for set in 1..SETS as u32 {
            tables.sets.push(PolicySet {
                rules: tables.rules.len() as u32,
                any_peer: bits(random),
                admin_rules: random.below(RULES_OF_SET) as u16,
                words: RULES_OF_SET.div_ceil(64) as u8,
                flags: random.pick(&[0, set_flags::ALLOW_BY_DEFAULT]),
            });
            for place in 0..RULES_OF_SET as u32 {
                tables.rules.push(PolicyRule {
                    policy: set,
                    place,
                    action: random.below(4) as u8,
                    pad: [0; 3],
                });
            }
            for class in 0..=CLASSES {
                if random.percent(70) {
                    tables
                        .peer_rules
                        .insert(PeerRulesKey { set, class }, bits(random));
                }
            }
            let mut add = |length, l4: u8, port: u16, bits| {
                let key = PortRulesKey {
                    set,
                    proto_be: u16::from(l4).to_be(),
                    port_be: port.to_be(),
                };
                tables.port_rules.insert((length, key), bits);
            };
            if random.percent(80) {
                add(port_prefix::ANY, 0, 0, bits(random));
            }
            for l4 in [proto::TCP, proto::UDP, proto::SCTP, proto::ICMP, proto::ICMPV6] {
                if random.percent(60) {
                    add(port_prefix::PROTOCOL, l4, 0, bits(random));
                }
                for &port in &ports {
                    if random.percent(30) {
                        add(port_prefix::PORT, l4, port, bits(random));
                    }
                }
            }
        }
        // What the kernel's arrays hold where nothing was written.
        tables.sets.push(PolicySet::default());
        tables.rules.extend([PolicyRule::default(); 16]);
    }
}

/// Writes the tables that packets do not change.
pub fn fill(kernel: &mut Kernel, memory: &Memory) -> Result<()> {
    let tables = &memory.policies;
    kernel.set_array::<_, 12>("POLICY_SETS", &tables.sets)?;
    kernel.set_array::<_, 128>("RULE_BITS", &tables.bits)?;
    kernel.set_array::<_, 12>("RULES", &tables.rules)?;
    kernel.insert::<_, _, 8, 4>("PEER_RULES", tables.peer_rules.iter())?;
    for ((length, key), value) in &tables.port_rules {
        kernel.insert_prefix::<_, 8>("PORT_RULES", *length, key, *value)?;
    }
    kernel.insert::<_, _, 4, 4>("PEERS_V4", memory.v4.peers.iter())?;
    kernel.insert::<_, _, 16, 4>("PEERS_V6", memory.v6.peers.iter())?;
    for cidr in &tables.cidrs {
        let length = cidr.length.into();
        if cidr.version == 4 {
            kernel.insert_prefix::<_, 4>("CIDRS_V4", length, &cidr.network[0], cidr.class)?;
        } else {
            kernel.insert_prefix::<AnyAddr, 16>("CIDRS_V6", length, &cidr.network, cidr.class)?;
        }
    }
    Ok(())
}

/// Policies of a pod change, come into being or end.
pub fn change(setting: &mut Setting, kernel: &mut Kernel, random: &mut Random) -> Result<()> {
    let indexes = [setting.indexes.pod0, setting.indexes.pod1];
    let tables = &mut setting.memory.policies;
    if random.percent(40) {
        let set = |random: &mut Random| {
            if random.percent(30) {
                0
            } else {
                random.below(SETS + 1) as u32
            }
        };
        let ifindex = random.pick(&indexes);
        if random.percent(85) {
            let (ingress, egress) = (set(random), set(random));
            let mut audit = |same| if random.percent(30) { set(random) } else { same };
            let pod = PodPolicy {
                ingress,
                egress,
                audit_ingress: audit(ingress),
                audit_egress: audit(egress),
            };
            tables.pods.insert(ifindex, pod);
            kernel.insert::<_, _, 4, 16>("POD_POLICY", HashMap::from([(ifindex, pod)]).iter())?;
        } else if tables.pods.remove(&ifindex).is_some() {
            kernel.remove::<_, 4, 16>("POD_POLICY", &ifindex)?;
        }
    }
    if random.percent(20) {
        change_addresses(setting, kernel, random)?;
    }
    let tables = &mut setting.memory.policies;
    if random.percent(30) {
        tables.revision = if random.percent(20) {
            0
        } else {
            tables.revision + 1
        };
        kernel.set_element::<_, 4>(VARIABLES, 0, &tables.revision)?;
    }
    Ok(())
}

/// This node's range of pod addresses becomes another or none, and an address gets or loses its interface.
fn change_addresses(setting: &mut Setting, kernel: &mut Kernel, random: &mut Random) -> Result<()> {
    let memory = &mut setting.memory;
    for version in [4, 6] {
        let index = range_index(version);
        // Words of an address as it is written, so that the build's byte order does not matter.
        let range = |network: [u8; 16], free: [u8; 16]| PodRange {
            network_be: bytemuck::cast(network),
            free_be: bytemuck::cast(free),
        };
        let mut network = [0; 16];
        let mut free = [0; 16];
        let (net, from) = if version == 4 {
            (&[10, 244, 0][..], 3..4)
        } else {
            (&[0xfd, 0, 2, 0x44, 0, 0][..], 8..16)
        };
        network[..net.len()].copy_from_slice(net);
        free[from].fill(0xff);
        let of_pods = range(network, free);
        let chosen = random.pick(&[PodRange::default(), of_pods, of_pods, of_pods]);
        memory.policies.ranges[index as usize] = chosen;
        kernel.set_element::<_, 32>("POD_RANGES", index, &chosen)?;
    }
    let ifindex = random.pick(&[1, setting.indexes.pod0, setting.indexes.pod1]);
    let addr4 = any(random.pick(&setting.addresses4))[0];
    if memory.v4.bound.remove(&addr4).is_some() {
        kernel.remove::<_, 4, 4>("BOUND_V4", &addr4)?;
    } else {
        memory.v4.bound.insert(addr4, ifindex);
        kernel.insert::<_, _, 4, 4>("BOUND_V4", HashMap::from([(addr4, ifindex)]).iter())?;
    }
    let addr6 = any(random.pick(&setting.addresses6));
    if memory.v6.bound.remove(&addr6).is_some() {
        kernel.remove::<_, 16, 4>("BOUND_V6", &addr6)?;
    } else {
        memory.v6.bound.insert(addr6, ifindex);
        kernel.insert::<_, _, 16, 4>("BOUND_V6", HashMap::from([(addr6, ifindex)]).iter())?;
    }
    change_sources(setting, kernel, random)
}

/// A pod's interface is checked or not, and another address is looked at first.
fn change_sources(setting: &mut Setting, kernel: &mut Kernel, random: &mut Random) -> Result<()> {
    let memory = &mut setting.memory;
    let ifindex = random.pick(&[setting.indexes.pod0, setting.indexes.pod1]);
    if memory.policies.source_checked.remove(&ifindex) {
        kernel.remove::<_, 4, 4>("SOURCE_CHECKED", &ifindex)?;
    } else {
        memory.policies.source_checked.insert(ifindex);
        kernel.insert::<_, _, 4, 4>("SOURCE_CHECKED", HashMap::from([(ifindex, 1u32)]).iter())?;
    }
    let addr_be = any(random.pick(&setting.addresses4))[0];
    memory.v4.sources.insert(ifindex, addr_be);
    kernel.set_element::<_, 8>("SOURCES_V4", source_place(ifindex), &Source4 { addr_be, ifindex })?;
    let addr_be = any(random.pick(&setting.addresses6));
    memory.v6.sources.insert(ifindex, addr_be);
    let own = Source6 {
        addr_be,
        ifindex,
        unused: 0,
    };
    kernel.set_element::<_, 24>("SOURCES_V6", source_place(ifindex), &own)?;
    Ok(())
}

/// Both builds remember the same flows as allowed, rules have decided as often, and the same was told of verdicts; forgets
/// all of that.
pub fn compare(setting: &mut Setting, kernel: &mut Kernel) -> Result<usize> {
    let memory = &mut setting.memory;
    let count = compare_flows::<V4, PolicyFlowKey4, 16>(kernel, "POLICY_FLOWS_V4", &mut memory.v4)?
        + compare_flows::<V6, PolicyFlowKey6, 40>(kernel, "POLICY_FLOWS_V6", &mut memory.v6)?;
    for (counted, hits) in memory.policies.hits.get_mut().drain() {
        let of_kernel = match counted {
            Counted::Rule(index) => kernel.take_hits("RULE_HITS", index)?,
            Counted::Set(set) => kernel.take_hits("SET_HITS", set)?,
        };
        ensure!(
            of_kernel == hits,
            "{counted:?}: host {hits:?}, kernel {of_kernel:?}"
        );
    }
    let mut of_kernel = kernel.take_records::<VerdictEvent>("VERDICTS")?.into_iter();
    for own in memory.policies.told.get_mut().drain(..) {
        let other = of_kernel.next().map(|event| VerdictEvent { at_ns: 0, ..event });
        ensure!(other == Some(own), "told: host {own:?}, kernel {other:?}");
    }
    if let Some(event) = of_kernel.next() {
        bail!("only the kernel build has told {event:?}");
    }
    Ok(count)
}

fn compare_flows<F, A, const K: usize>(
    kernel: &mut Kernel,
    name: &str,
    tables: &mut FamilyTables<F>,
) -> Result<usize>
where
    F: Family<PolicyFlowKey = A>,
    A: bytemuck::Pod + Eq + std::hash::Hash + std::fmt::Debug,
{
    // When it was used is left out: the host build's clock stands still.
    let known = |flow: PolicyFlow| (flow.ifindex, flow.revision, flow.flags);
    let mut of_kernel = kernel.drain::<A, PolicyFlow, K, 16>(name)?;
    let own = tables.policy_flows.get_mut();
    let count = own.len();
    for (key, flow) in own.drain() {
        let other = of_kernel.remove(&key);
        ensure!(
            other.map(known) == Some(known(flow)),
            "{name} {key:?}: host {flow:?}, kernel {other:?}"
        );
    }
    ensure!(
        of_kernel.is_empty(),
        "only the kernel build has in {name} {of_kernel:?}"
    );
    Ok(count)
}
