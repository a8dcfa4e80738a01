//! What the tables say of a flow, with the names that only the loop knows.

use dataplane_common::config;

use super::Agent;
use crate::{
    bpf::{pins::Pins, world::World},
    explain::{
        Answered, Explained,
        known::Named,
        tables::{Failed, Here, Query},
    },
    netlink::tables::device_names,
    store::traffic::TrafficTables,
};

/// Where the tables are, and the constants that the datapath was loaded with.
#[derive(Debug)]
pub struct Tables {
    pub pins: Pins,
    pub constants: config::Config,
}

impl Agent {
    pub(super) fn explain(&self, query: &Query) -> Answered {
        match tokio::task::block_in_place(|| self.try_explain(query)) {
            Ok(flows) => Answered { flows, error: None },
            Err(error) => Answered {
                flows: Vec::new(),
                error: Some(format!("{:#}", anyhow::Error::from(error))),
            },
        }
    }

    fn try_explain(&self, query: &Query) -> Result<Vec<Explained>, Failed> {
        let tables = self.tables.as_ref().ok_or(Failed::NoTables)?;
        let bound = self.host.as_ref().map(|host| self.bound_pods(host));
        let bound = bound.into_iter().flatten();
        let known = Named {
            node: &self.node_name,
            index: &self.index,
            compiler: &self.policies,
            interfaces: bound.map(|(ifindex, pod)| (pod.name, ifindex)).collect(),
            syncer: &self.policy_syncer,
            services: &self.compiler,
            problems: self.problems(),
            failed: &self.failed,
        };
        let here = Here {
            world: World::open(&tables.pins, tables.constants)?,
            index: &self.index,
            known: &known,
            traffic: TrafficTables::open(&tables.pins)?,
            devices: device_names()?,
        };
        here.explain(query)
    }
}
