//! What a start needs, and that one that fails says why and leaves nothing behind.

use std::{collections::HashSet, fs, path::Path};

use anyhow::{Context, Result};
use caps::{CapSet, Capability};
use dataplane_agent::{
    attach::{
        cleanup, inspect, start,
        state::{Record, State},
    },
    bpf::{Program, links::Cgroup, sys},
    config::{Config, Sizes},
    netlink::devconf::{self, Parameter},
};
use tokio::sync::watch;

use super::{
    needs::ready,
    node::{Agent, Node, SIZES},
};

/// All that an agent needs.
const ENOUGH: [Capability; 3] = [
    Capability::CAP_BPF,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
];

/// Gives up all other capabilities of the calling thread.
fn keep_only(kept: &HashSet<Capability>) -> Result<()> {
    caps::set(None, CapSet::Effective, kept)?;
    Ok(caps::set(None, CapSet::Permitted, kept)?)
}

#[test]
fn three_capabilities_are_enough() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("caps")?;
    node.add_pod()?;
    let config = node.config();
    let (wanted, seen) = watch::channel(Node::wanted());
    let kernel = node.netns.enter(|| {
        keep_only(&ENOUGH.into())?;
        start::start(start::prepare(&config)?, &config, seen)
    })?;
    let agent = Agent { kernel, wanted };
    agent.wait("the uplink and the pod", |state| {
        !state.devices.is_empty() && !state.pod_interfaces.is_empty()
    })?;
    let status = node.netns.enter(|| {
        keep_only(&ENOUGH.into())?;
        Ok(inspect::inspect(&config.bpffs)?)
    })?;
    assert!(!status.attachments.is_empty());
    for attachment in &status.attachments {
        assert!(attachment.ours && attachment.program != "?", "{attachment:?}");
    }
    agent.stop(&node)?;
    node.netns.enter(|| {
        keep_only(&ENOUGH.into())?;
        Ok(cleanup::cleanup(&config.bpffs)?)
    })?;
    assert!(!node.pins().exists());
    Ok(())
}

#[test]
fn parameters_of_the_loopback_device_are_set_where_proc_is_read_only() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("devconf")?;
    for (parameter, name) in [
        (Parameter::AcceptLocal, "accept_local"),
        (Parameter::RouteLocalnet, "route_localnet"),
    ] {
        let path = format!("/proc/sys/net/ipv4/conf/lo/{name}");
        for value in [1, 0] {
            let read = node.netns.enter(|| {
                keep_only(&[Capability::CAP_NET_ADMIN].into())?;
                devconf::set(1, parameter, value)?;
                Ok(fs::read_to_string(&path)?)
            })?;
            assert_eq!(read.trim(), value.to_string(), "{name}");
        }
    }
    Ok(())
}

#[test]
fn each_missing_capability_is_named() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("lacks")?;
    let config = node.config();
    let all: HashSet<Capability> = caps::read(None, CapSet::Permitted)?;
    for (missing, named) in [
        (vec![Capability::CAP_NET_ADMIN], "CAP_NET_ADMIN"),
        (vec![Capability::CAP_BPF, Capability::CAP_SYS_ADMIN], "CAP_BPF"),
        (
            vec![Capability::CAP_PERFMON, Capability::CAP_SYS_ADMIN],
            "CAP_PERFMON",
        ),
    ] {
        let kept = all.iter().copied().filter(|one| !missing.contains(one)).collect();
        let refused = node.netns.enter(|| {
            keep_only(&kept)?;
            Ok(start::prepare(&config).map(drop))
        })?;
        let error = refused.err().context(named)?.to_string();
        assert!(
            error.starts_with(&format!("missing capability {named}: run as root, or grant")),
            "{error}"
        );
    }
    Ok(())
}

#[test]
fn a_first_start_that_fails_leaves_nothing() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("fails")?;
    let config = Config {
        bpffs: node.places.bpffs.join("deep/down"),
        // More than the kernel has memory for, and found out only after other maps were made.
        sizes: Sizes {
            half_open: u32::MAX,
            ..SIZES
        },
        ..node.config()
    };
    let error = node.start(&config).err().context("started")?;
    let text = format!("{error:#}");
    assert!(text.contains("HALF_OPEN_V"), "{text}");
    assert_eq!(fs::read_dir(&node.places.bpffs)?.count(), 0);
    assert_eq!(State::read(&config.bpffs).record, Record::default());
    Ok(())
}

#[test]
fn a_start_with_another_cgroup_moves_the_hooks() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("moves")?;
    let inner = node.places.cgroup.join("inner");
    fs::create_dir(&inner)?;
    let hooks = |path: &Path| {
        let cgroup = Cgroup::open(path)?;
        anyhow::Ok(sys::prog_query(cgroup.target(), Program::Connect4.hook().attach_type())?.len())
    };
    let counts = || anyhow::Ok([hooks(&node.places.cgroup)?, hooks(&inner)?]);
    let outside = node.config();
    let inside = Config {
        cgroup: Some(inner.clone()),
        ..outside.clone()
    };
    for (config, expected) in [(&outside, [1, 0]), (&inside, [0, 1])] {
        let agent = node.start(config)?;
        agent.wait("the uplink", |state| !state.devices.is_empty())?;
        assert_eq!(counts()?, expected);
        agent.stop(&node)?;
    }
    node.clean_up()?;
    assert_eq!(counts()?, [0, 0]);
    Ok(fs::remove_dir(&inner)?)
}
