//! The datapath with a node's policies, in the kernel.

use std::{net::Ipv4Addr, path::Path};

use anyhow::{Context, Result};
use aya::{Ebpf, programs::ProgramFd};
use dataplane_agent::compile::policy::tables::Tables;
use dataplane_common::policy::{PodPolicy, PolicyFlow, PolicyFlowKey4, VARIABLES, policy_flow_flags};
use dataplane_tests::test_run::{
    CLIENT, Device, TCP, load, program,
    tables::{Filling, now_ticks, source},
    word,
};
use ipnet::IpNet;

use crate::crowd::Compiled;

/// Revisions of policies that are in force, and of none.
pub const ON: u32 = 1;
pub const OFF: u32 = 0;

/// The object with the pod's program.
#[derive(Debug)]
pub struct Datapath {
    pub object: Ebpf,
    pub from_pod: ProgramFd,
}

impl Datapath {
    /// With its policies in force or not. `flows`: what the flow tables have room for.
    pub fn load(
        objects: &Path,
        compiled: &Compiled,
        revision: u32,
        flows: u32,
        device: &Device,
    ) -> Result<Self> {
        let mut object = load(&objects.join("dataplane.o"), &entries(flows))?;
        let from_pod = program(&mut object, "from_pod")?;
        let filling = exact(&object);
        write(&filling, &compiled.tables)?;
        let pod = PodPolicy {
            egress: compiled.egress,
            audit_egress: compiled.egress,
            ..PodPolicy::default()
        };
        filling.write("POD_POLICY", &device.ifindex, &pod)?;
        filling.write(VARIABLES, &0u32, &revision)?;
        Ok(Self { object, from_pod })
    }
}

/// Rows are this build's.
pub fn exact(object: &Ebpf) -> Filling<'_> {
    Filling { object, older: false }
}

/// Sizes of the tables of flows; what is about IPv6 or fragments has none to speak of.
pub fn entries(flows: u32) -> [(&'static str, u32); 8] {
    [
        ("FLOWS_V4", flows),
        ("POLICY_FLOWS_V4", flows),
        ("HALF_OPEN_V4", 1024),
        ("FLOWS_V6", 1024),
        ("POLICY_FLOWS_V6", 1024),
        ("HALF_OPEN_V6", 1024),
        ("DATAGRAMS_V4", 1024),
        ("DATAGRAMS_V6", 1024),
    ]
}

/// Every row. The compiler's ids serve as those of the kernel.
pub fn write(filling: &Filling<'_>, tables: &Tables) -> Result<()> {
    for (id, bits) in (0u32..).zip(&tables.bits) {
        filling.write("RULE_BITS", &id, bits)?;
    }
    for (index, rule) in (0u32..).zip(&tables.rules) {
        filling.write("RULES", &index, rule)?;
    }
    for ((length, key), bits) in &tables.port_rules {
        let [set, port] = bytemuck::cast::<_, [u32; 2]>(*key);
        filling.write("PORT_RULES", &[*length, set, port], bits)?;
    }
    for (id, set) in &tables.sets {
        filling.write("POLICY_SETS", id, set)?;
    }
    for (key, bits) in &tables.peer_rules {
        filling.write("PEER_RULES", key, bits)?;
    }
    for (addr, class) in &tables.peers {
        let std::net::IpAddr::V4(addr) = addr else {
            continue;
        };
        filling.write("PEERS_V4", &word(*addr), class)?;
    }
    for (range, class) in &tables.cidrs {
        let IpNet::V4(range) = range else { continue };
        let key = [u32::from(range.prefix_len()), word(range.network())];
        filling.write("CIDRS_V4", &key, class)?;
    }
    Ok(())
}

/// The walk's flows to `to`, allowed at the pod.
pub fn allow(object: &Ebpf, flows: u32, to: (Ipv4Addr, u16), device: &Device) -> Result<()> {
    let value = PolicyFlow {
        ifindex: device.ifindex,
        revision: ON,
        seen_ticks: now_ticks()?,
        flags: policy_flow_flags::FROM_POD,
    };
    for flow in 0..flows {
        let (client, port) = source(CLIENT, flow);
        let key = PolicyFlowKey4 {
            pod_be: client,
            peer_be: word(to.0),
            pod_port_be: port.to_be(),
            peer_port_be: to.1.to_be(),
            proto: TCP,
            unused: [0; 3],
        };
        exact(object)
            .write("POLICY_FLOWS_V4", &key, &value)
            .context("failed to enter flows")?;
    }
    Ok(())
}
