//! Clusters with few and with many rules, policies and peers, compiled as the agent compiles them.

use std::net::Ipv4Addr;

use anyhow::{Result, bail};
use dataplane_agent::{
    compile::policy::{PolicyCompiler, Subjects, sets::SetId, tables::Tables},
    decode::{Decoded, decode},
    model::{Dirty, Index, Name, policy::Direction},
};
use serde_json::{Value, json};

/// Where the pod's rules lead, and an address that no rule is about.
pub const PEER: Ipv4Addr = Ipv4Addr::new(10, 3, 0, 2);
pub const NO_PEER: Ipv4Addr = Ipv4Addr::new(10, 2, 255, 9);
/// The port of the pod's last rule.
pub const PORT: u16 = 443;
/// Pods of the node that the other policies select.
const OTHERS: usize = 100;

/// What the peers of the rules are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peers {
    Pods,
    Cidrs,
}

/// How much there is of what a verdict must not depend on.
#[derive(Debug)]
pub struct Crowd {
    pub name: &'static str,
    /// Of the pod.
    pub rules: u16,
    /// In the cluster; all but one are about [`OTHERS`] pods of the same node.
    pub policies: usize,
    /// Of the pod's rules.
    pub peers: usize,
}

/// The first has one of each.
pub const CROWDS: [Crowd; 5] = [
    Crowd::new("alone", 1, 1, 1),
    Crowd::new("1,024 rules", 1024, 1, 1),
    Crowd::new("10,000 policies", 1, 10_000, 1),
    Crowd::new("10,000 peers", 1, 1, 10_000),
    Crowd::new("all of these", 1024, 10_000, 10_000),
];

/// What a node has of it.
#[derive(Debug)]
pub struct Compiled {
    pub tables: Tables,
    /// The pod's set for what it sends.
    pub egress: SetId,
    /// Pods that have a set.
    pub pods: usize,
}

/// A cluster in the making, as node `n1` sees it.
struct Cluster {
    index: Index,
    dirty: Dirty,
}

impl Cluster {
    fn new() -> Self {
        Self {
            index: Index::new("n1"),
            dirty: Dirty::default(),
        }
    }

    fn apply(&mut self, object: &Value) -> Result<()> {
        match decode(object) {
            Decoded::Object { object, problems, .. } if problems.is_empty() => {
                self.dirty.merge(self.index.apply(object));
                Ok(())
            }
            other => bail!("failed to read {object}: {other:?}"),
        }
    }

    fn pod(&mut self, name: &str, node: &str, ip: Ipv4Addr, labels: &Value) -> Result<()> {
        self.apply(&json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "x", "labels": labels},
            "spec": {"nodeName": node, "containers": [{"name": "c"}]},
            "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
        }))
    }

    /// A policy for what pods with this label send.
    fn policy(&mut self, name: &str, app: &str, egress: &[Value]) -> Result<()> {
        self.apply(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "x"},
            "spec": {"podSelector": {"matchLabels": {"app": app}}, "policyTypes": ["Egress"], "egress": egress},
        }))
    }

    fn compile(self) -> Result<Compiled> {
        let mut compiler = PolicyCompiler::new(Subjects::Node("n1".into()));
        compiler.update(&self.index, &self.dirty.policy);
        if let Some((name, pod)) = compiler.pods().iter().find(|(_, pod)| !pod.problems.is_empty()) {
            bail!("{name} has problems: {:?}", pod.problems);
        }
        Ok(Compiled {
            tables: Tables::of(&compiler),
            egress: compiler.set_of(&Name::new("x", "a"), Direction::Egress),
            pods: compiler.pods().len(),
        })
    }
}

fn rule(to: &Value, port: u16) -> Value {
    json!({"to": to, "ports": [{"port": port}]})
}

/// Address `number` of 10.`net`.0.0 and what follows it.
fn addr(net: u8, number: usize) -> Ipv4Addr {
    Ipv4Addr::from_bits(u32::from(Ipv4Addr::new(10, net, 0, 2)) + number as u32)
}

impl Crowd {
    /// Several things at once: what is promised is about each alone.
    pub fn is_mixed(&self) -> bool {
        [self.rules > 1, self.policies > 1, self.peers > 1]
            .into_iter()
            .filter(|many| *many)
            .count()
            > 1
    }

    const fn new(name: &'static str, rules: u16, policies: usize, peers: usize) -> Self {
        Self {
            name,
            rules,
            policies,
            peers,
        }
    }

    /// Pod `x/a`, which its last rule lets reach [`PEER`] at [`PORT`], and all the rest.
    pub fn compile(&self, peers: Peers) -> Result<Compiled> {
        let mut cluster = Cluster::new();
        let (first, all) = match peers {
            Peers::Pods => {
                let to = json!([{"podSelector": {"matchLabels": {"app": "b"}}}]);
                (to.clone(), to)
            }
            Peers::Cidrs => {
                // The networks behind the peer's: its own has neighbours in the trie.
                let block = |number: usize| {
                    let net = Ipv4Addr::from_bits(PEER.to_bits() & !0xff | (number as u32) << 8);
                    json!({"ipBlock": {"cidr": format!("{net}/24")}})
                };
                let blocks = (0..self.peers).map(block);
                (json!([block(0)]), blocks.collect())
            }
        };
        let rules = (1..self.rules).map(|number| rule(&first, 1000 + number));
        let rules: Vec<Value> = rules.chain([rule(&all, PORT)]).collect();
        cluster.policy("p", "a", &rules)?;
        cluster.pod("a", "n1", addr(1, 0), &json!({"app": "a"}))?;
        if peers == Peers::Pods {
            for number in 0..self.peers {
                let name = format!("b{number}");
                cluster.pod(&name, "n2", addr(3, number), &json!({"app": "b"}))?;
            }
        }
        for number in 1..self.policies {
            let (place, port) = (number % OTHERS, 1000 + (number / OTHERS) as u16);
            let app = format!("other-{place}");
            if number <= OTHERS {
                cluster.pod(&app, "n1", addr(200, number), &json!({"app": app}))?;
            }
            cluster.policy(&format!("other-{number}"), &app, &[rule(&first, port)])?;
        }
        cluster.compile()
    }
}

/// So many pods, each with a policy of its own of so many rules about so many peers. The peers are in as many groups as a
/// pod has rules, and each rule is about all groups but one, if `unlike`; else all rules are about all peers.
pub fn product(pods: usize, rules: usize, peers: usize, unlike: bool) -> Result<Compiled> {
    let mut cluster = Cluster::new();
    for number in 0..peers {
        let labels = json!({"app": "b", "group": format!("g{}", number % rules)});
        cluster.pod(&format!("b{number}"), "n2", addr(3, number), &labels)?;
    }
    let rules: Vec<Value> = (0..rules)
        .map(|number| {
            let to = if unlike {
                json!([{"podSelector": {
                    "matchLabels": {"app": "b"},
                    "matchExpressions": [{"key": "group", "operator": "NotIn", "values": [format!("g{number}")]}],
                }}])
            } else {
                json!([{"podSelector": {"matchLabels": {"app": "b"}}}])
            };
            rule(&to, 1000 + number as u16)
        })
        .collect();
    for number in 0..pods {
        let app = format!("a{number}");
        cluster.pod(&app, "n1", addr(200, number), &json!({"app": app}))?;
        cluster.policy(&app, &app, &rules)?;
    }
    cluster.compile()
}
