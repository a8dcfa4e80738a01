//! What the policies of a cluster say of a flow, and why: from objects alone, for whose two ends the tables are compiled and
//! asked as the datapath asks them; or from the tables of this node as they are, through which a packet is led ([`tables`]),
//! with names ([`known`]) or without ([`unnamed`]).

mod asked;
mod ends;
pub mod known;
pub mod packet;
mod reasons;
#[cfg(test)]
mod samples;
pub mod tables;
mod unchosen;
pub mod unnamed;
mod unowned;
mod unserved;
mod verdict;
mod ways;

use std::{
    borrow::Cow,
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::{addr::proto, policy::SET_NONE};
use serde::{Deserialize, Serialize};

pub use ends::{End, Error, Port};
pub use verdict::Verdict;

use ends::{Found, Target};
use reasons::Selection;
use unowned::Met;

use crate::{
    compile::policy::{
        PolicyCompiler, Subjects,
        sets::SetId,
        tables::{Tables, judge},
    },
    model::{Index, Name, Pod, PolicyDirty, policy::Direction},
};

/// What an agent answers when it is asked what its tables say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    pub flows: Vec<Explained>,
    /// Why there is no answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The answer for one pair of addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    pub from: Place,
    pub to: Place,
    /// Of the target.
    pub port: String,
    /// The Service whose endpoint the target is, if one is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    /// Where the first packet is sent, if that is an address of the Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<SocketAddr>,
    /// What else there is to know, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// How many of the Service's new flows the target gets, if the tables were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub share: Option<Share>,
    /// A source port from which this target is chosen, if the tables were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// What the first packet becomes for the target, where it is translated here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub becomes: Option<Becomes>,
    /// How it leaves this node, if the tables were asked: to the target, and to the node that the target is on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ways: Vec<Way>,
    /// What has come of the connections that this node has led to the target, if it was chosen by a Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub so_far: Option<SoFar>,
    /// No step denies it; whether another may elsewhere, `verdict` says.
    pub allowed: bool,
    #[serde(default)]
    pub verdict: Verdict,
    pub steps: Vec<Step>,
    /// What is decided elsewhere.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<Elsewhere>,
}

/// A part of the slots of a Service's Maglev table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    pub slots: u32,
    pub of: u32,
}

/// A packet's addresses and ports behind the translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Becomes {
    pub from: SocketAddr,
    pub to: SocketAddr,
}

/// How packets leave this node, by its own routing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    pub to: IpAddr,
    /// The node whose address this is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Absent: there is no route.
    pub device: Option<String>,
    /// Bytes of the largest packet that goes there without being cut, as far as this node knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// That of packets of clients outside, which the datapath forwards, where it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forwarded_mtu: Option<u32>,
    /// A router; absent where the address is on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_hop: Option<IpAddr>,
    /// What is known of the next hop, as `ip neighbour` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub neighbour: Option<String>,
    /// The next hop was asked for its link-layer address and does not answer.
    #[serde(default)]
    pub is_silent: bool,
}

/// Connections that this node has led to an endpoint, since it knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SoFar {
    pub connections: u64,
    /// Those whose first answer was a refusal.
    pub refused: u64,
}

/// An end of a flow, as it was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub ip: IpAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
}

/// What is decided at one end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Step {
    /// `egress` of the source or `ingress` of the target; `service`: there is no target.
    pub direction: Cow<'static, str>,
    pub at: Place,
    pub allowed: bool,
    /// The rule that decided; absent when none did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Decision>,
    pub reason: String,
    /// What would be decided if no policy were a dry run, where that is something else.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<String>,
    /// The policies that have a say about the pod in this direction, first those of higher precedence.
    pub selected_by: Vec<String>,
}

/// What is not decided by this node's tables.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elsewhere {
    /// `egress` of the source or `ingress` of the target.
    pub direction: Cow<'static, str>,
    /// The node that decides, if it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    pub reason: String,
}

/// A rule of a policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// `kind namespace/name`.
    pub policy: String,
    pub tier: String,
    /// Where the rule stands, such as `spec.ingress[0]`.
    pub field: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub action: Cow<'static, str>,
}

/// Judges a flow by all policies of the index: for Pods with two addresses in both families, and for a Service with each
/// of its endpoints.
pub fn explain(index: &Index, from: &End, to: &End, port: Port) -> Result<Vec<Explained>, Error> {
    let asked = to;
    let from = ends::sources(index, from)?;
    let client = from.iter().find_map(|(_, pod)| *pod);
    let to = ends::targets(index, asked, port, client)?;
    let found = from.iter().chain(to.iter().map(|target| &target.found));
    let pods = found.filter_map(|(_, pod)| Some(pod.as_ref()?.name.clone()));
    let mut compiler = PolicyCompiler::new(Subjects::These(pods.collect()));
    compiler.update(index, &everything(index));
    let judge = Judge {
        index,
        tables: Tables::of(&compiler),
        compiler: &compiler,
    };
    let pairs = from.iter().flat_map(|from| to.iter().map(move |to| (*from, to)));
    let pairs = pairs.filter(|((from, _), to)| from.is_ipv4() == to.found.0.is_ipv4());
    let mut explained: Vec<Explained> = pairs.map(|(from, to)| judge.flow(from, to)).collect();
    for flow in &mut explained {
        let is_asked = *asked == End::Addr(flow.to.ip);
        flow.note_unowned(index, is_asked, None, |_| false);
    }
    if explained.is_empty() {
        return Err(Error::Families);
    }
    Ok(explained)
}

/// Why nothing is served for a Service, where nothing is meant to be, or there is no such Service.
pub fn why_unserved(index: &Index, service: &Name) -> Option<String> {
    ends::service(index, service).err().map(|error| error.to_string())
}

fn everything(index: &Index) -> PolicyDirty {
    PolicyDirty {
        policies: index.policies().keys().cloned().collect(),
        pods: index.pods().map(|pod| pod.name.clone()).collect(),
        namespaces: BTreeSet::new(),
        nodes: index.nodes().map(|node| node.name.clone()).collect(),
    }
}

struct Judge<'a> {
    index: &'a Index,
    compiler: &'a PolicyCompiler,
    tables: Tables,
}

impl Judge<'_> {
    fn flow(&self, from: Found<'_>, target: &Target<'_>) -> Explained {
        let to = target.found;
        let steps = [(Direction::Egress, from, to), (Direction::Ingress, to, from)];
        let steps: Vec<Step> = steps
            .into_iter()
            .filter_map(|(direction, (ip, pod), peer)| {
                Some(self.step(direction, ip, pod?, peer, target.port))
            })
            .collect();
        let mut explained = Explained {
            from: place(from),
            to: place(to),
            port: target.port.to_string(),
            service: target.via.as_ref().map(ToString::to_string),
            asked: None,
            notes: Vec::new(),
            share: None,
            source_port: None,
            becomes: None,
            ways: Vec::new(),
            so_far: None,
            allowed: steps.iter().all(|step| step.allowed),
            verdict: Verdict::default(),
            steps,
            elsewhere: Vec::new(),
        };
        explained.verdict = Verdict::of(&explained);
        explained
    }

    fn step(
        &self,
        direction: Direction,
        ip: IpAddr,
        pod: &Pod,
        (peer, other): Found<'_>,
        port: Port,
    ) -> Step {
        let at = place((ip, Some(pod)));
        let other = other.map(|other| &other.name);
        if let Some(reason) = reasons::exempt(self.index, pod, direction, peer, other) {
            return Step::exempt(direction, at, reason);
        }
        let number = match (port.proto, peer) {
            (Some(proto), _) => proto.number(),
            (None, IpAddr::V4(_)) => proto::ICMP,
            (None, IpAddr::V6(_)) => proto::ICMPV6,
        };
        let flow = (peer, number, port.number);
        let selection = Selection::of(self.index, self.compiler, &pod.name, direction);
        let of_pod = self.compiler.pods().get(&pod.name);
        let sets = of_pod.map_or([SET_NONE; 2], |pod| {
            [pod.sets, pod.audit].map(|sets| sets[direction as usize])
        });
        let [(allowed, rule), audit] = sets.map(|set| self.verdict(direction, set, flow));
        let dry_run = (audit.0 != allowed).then_some(audit);
        selection.step(at, allowed, rule, dry_run)
    }

    /// What a set says of a flow with a peer, a protocol and a port.
    fn verdict(
        &self,
        direction: Direction,
        set: SetId,
        (peer, proto, port): (IpAddr, u8, u16),
    ) -> (bool, Option<Decision>) {
        let judgement = judge(&self.tables, set, peer, proto, port);
        let rule = judgement.rule().and_then(|rule| {
            let row = self.tables.rules.get(rule as usize)?;
            let policy = self.tables.policies.get(row.policy as usize)?;
            Decision::of(self.index, policy, direction, row.place)
        });
        (judgement.is_allowed(), rule)
    }
}

impl Explained {
    /// Says of its ends that nobody has them, where somebody should. `is_asked`: the target, by itself; `leaves_by`: the device by which
    /// packets to it leave this node; `is_own`: of this node, as the tables have it.
    fn note_unowned(
        &mut self,
        index: &Index,
        is_asked: bool,
        leaves_by: Option<&str>,
        is_own: impl Fn(IpAddr) -> bool,
    ) {
        let via: Option<Name> = self.service.as_ref().and_then(|name| name.parse().ok());
        let from = Met {
            addr: self.from.ip,
            is_asked: false,
            via: None,
            leaves_by: None,
        };
        let to = Met {
            addr: self.to.ip,
            is_asked,
            via: via.as_ref(),
            leaves_by,
        };
        let ends = [from, to].into_iter().filter(|end| !is_own(end.addr));
        let notes = ends.filter_map(|end| unowned::note(index, end));
        self.notes.extend(notes);
    }
}

fn place((ip, pod): Found<'_>) -> Place {
    Place {
        ip,
        pod: pod.map(|pod| pod.name.to_string()),
    }
}
