//! Interfaces that may be a pod's and that nobody knows: when they get their programs, and that a restart changes nothing.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use dataplane_agent::host::{Claim, Unknown};
use dataplane_tests::netns::NetNs;

use super::{
    needs::ready,
    node::{Agent, Node, ip},
};

const BOTH: [usize; 2] = [1, 1];
const NONE: [usize; 2] = [0, 0];

impl Node {
    /// A namespace with a veth to the node, as CNI plugins begin.
    fn add_interface(&mut self, name: &str) -> Result<(NetNs, u32)> {
        let netns = NetNs::create(&self.places.netns(name))?;
        self.links.add_veth(name, "eth0", netns.fd(), None)?;
        self.links.set_up(name)?;
        let ifindex = self.links.index(name)?;
        Ok((netns, ifindex))
    }

    fn await_hooks(&self, ifindex: u32, expected: [usize; 2]) -> Result<Duration> {
        let started = Instant::now();
        loop {
            let hooks = self.hooks(ifindex)?;
            if hooks == expected {
                return Ok(started.elapsed());
            }
            ensure!(
                started.elapsed() < Duration::from_secs(3),
                "{ifindex} has {hooks:?} and should have {expected:?}"
            );
        }
    }
}

fn say(agent: &Agent, unknown: Unknown) {
    agent.wanted.send_modify(|wanted| wanted.unknown = unknown);
}

/// After the next looks at the machine.
fn look(agent: &Agent) -> Result<()> {
    for _ in 0..2 {
        agent.wanted.send_modify(|wanted| wanted.revision += 1);
        let revision = agent.wanted.borrow().revision;
        agent.wait("a look", |state| state.wanted_revision == revision)?;
    }
    Ok(())
}

#[test]
fn new_interfaces_get_their_programs_while_a_pod_is_expected() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("unknown")?;
    let config = node.config();
    let agent = node.start(&config)?;
    say(&agent, Unknown::Leave);
    look(&agent)?;
    let (_stranger, stranger) = node.add_interface("stranger")?;
    look(&agent)?;
    assert_eq!(node.hooks(stranger)?, NONE);

    say(&agent, Unknown::Close);
    look(&agent)?;
    // It may be the pod's, whose Pod was known late.
    node.await_hooks(stranger, BOTH)?;
    let mut slowest = Duration::ZERO;
    let mut namespaces = Vec::new();
    for number in 0..5 {
        let (netns, ifindex) = node.add_interface(&format!("new{number}"))?;
        slowest = slowest.max(node.await_hooks(ifindex, BOTH)?);
        namespaces.push((netns, ifindex));
    }
    println!("programs were there {slowest:?} after the interface at the latest");
    look(&agent)?;
    for (_, ifindex) in &namespaces {
        assert_eq!(node.hooks(*ifindex)?, BOTH);
    }
    let eth0 = node.links.index("eth0")?;
    assert_eq!(node.hooks(eth0)?, BOTH, "the uplink has its own");
    assert!(agent.wait("a state", |_| true)?.bound_pods.is_empty());

    say(&agent, Unknown::Leave);
    look(&agent)?;
    for (_, ifindex) in &namespaces {
        node.await_hooks(*ifindex, NONE)?;
    }
    agent.stop(&node)?;
    node.clean_up()
}

#[test]
fn a_restart_closes_no_interface_and_opens_none() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("unkagain")?;
    let config = node.config();
    let agent = node.start(&config)?;
    say(&agent, Unknown::Leave);
    let (_open, open) = node.add_interface("open")?;
    look(&agent)?;
    agent.stop(&node)?;

    // It has been left alone, so it still is, whatever is expected now.
    let agent = node.start(&config)?;
    look(&agent)?;
    assert_eq!(node.hooks(open)?, NONE);
    say(&agent, Unknown::Close);
    let (_closed, closed) = node.add_interface("closed")?;
    look(&agent)?;
    node.await_hooks(closed, BOTH)?;
    assert_eq!(node.hooks(open)?, NONE);
    agent.stop(&node)?;

    // What has come while no agent ran may be a pod's.
    let (_later, later) = node.add_interface("later")?;
    let agent = node.start(&config)?;
    look(&agent)?;
    assert_eq!(
        [open, closed, later].map(|one| node.hooks(one).unwrap()),
        [NONE, BOTH, NONE]
    );
    say(&agent, Unknown::Close);
    look(&agent)?;
    assert_eq!(
        [open, closed, later].map(|one| node.hooks(one).unwrap()),
        [NONE, BOTH, BOTH]
    );
    agent.stop(&node)?;
    node.clean_up()
}

#[test]
fn what_a_cni_plugin_tells_is_believed_also_after_a_restart() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("claim")?;
    let config = node.config();
    let agent = node.start(&config)?;
    node.add_pod()?;
    agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
    let veth = node.links.index("veth1")?;
    let namespace = node.namespace_of(veth)?;
    // Another Pod than the one whose address is found there.
    let claim = Claim {
        ifindex: veth,
        namespace,
        addrs: vec![ip("10.0.1.5")],
        uid: String::new(),
    };
    agent.wanted.send_modify(|wanted| {
        wanted.revision += 1;
        wanted.claims.insert("default/b".to_owned(), claim);
    });
    let is_told = |state: &dataplane_agent::host::HostState| {
        state.bound_pods.get(&veth).is_some_and(|pod| pod == "default/b") && state.pod_interfaces.is_empty()
    };
    agent.wait("what was told", is_told)?;
    agent.stop(&node)?;

    let record = dataplane_agent::attach::state::State::read(&config.bpffs).record;
    assert_eq!(record.claims.keys().collect::<Vec<_>>(), ["default/b"]);
    let agent = node.start(&config)?;
    agent.wanted.send_modify(|wanted| {
        wanted.revision += 1;
        wanted.claims = record.claims;
        wanted.pods.clear();
    });
    agent.wait("what was told before", is_told)?;
    assert_eq!(node.hooks(veth)?, BOTH);
    agent.stop(&node)?;
    node.clean_up()
}
