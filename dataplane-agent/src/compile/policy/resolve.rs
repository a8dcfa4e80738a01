//! From the policies that select a pod to its sets.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use dataplane_common::policy::SET_RULES;

use super::{
    PodPolicy, PolicyCompiler,
    atoms::{Atom, AtomId, NamedPort},
    named::{Number, Question},
    ports::PortSpan,
    sets::{ResolvedRule, SetId, SetKey},
};
use crate::model::{
    Index, ObjectRef, Pod, Policy, Problem, Protocol,
    policy::{Direction, Peer, PortMatch, Rule, Tier},
};

/// Sets that were made in an update, by what they were made from, so that pods that are alike cost a look.
#[derive(Debug, Default)]
pub struct Memo {
    /// Each set is held once.
    made: HashMap<Source, Made>,
    new: BTreeSet<SetId>,
}

type Source = (Direction, Vec<ObjectRef>, Vec<(Arc<str>, Number)>);

#[derive(Clone, Debug)]
struct Made {
    set: SetId,
    problem: Option<Problem>,
}

impl Memo {
    /// The sets to release, and those that are new.
    pub fn finish(self) -> (impl Iterator<Item = SetId>, BTreeSet<SetId>) {
        (self.made.into_values().map(|made| made.set), self.new)
    }
}

impl PolicyCompiler {
    /// The sets of a pod, each with one user more.
    pub(super) fn resolve(&mut self, index: &Index, pod: &Pod, memo: &mut Memo) -> PodPolicy {
        let namespace = index.namespace(pod.name.namespace());
        let about = index.policies().about(pod.name.namespace());
        let mut policies: Vec<&Policy> = about
            .filter(|policy| policy.subject.matches(pod, namespace))
            .collect();
        policies.sort_by(|a, b| a.precedence().cmp(&b.precedence()));
        let mut resolved = PodPolicy::default();
        for direction in Direction::ALL {
            let with_say: Vec<&Policy> = policies
                .iter()
                .copied()
                .filter(|policy| policy.rules(direction).is_some())
                .collect();
            let audit = self.make(index, pod, direction, &with_say, memo);
            let in_earnest: Vec<&Policy> = with_say
                .iter()
                .copied()
                .filter(|policy| !policy.is_dry_run(namespace))
                .collect();
            let made = if in_earnest.len() == with_say.len() {
                self.sets.retain(audit.set);
                audit.clone()
            } else {
                self.make(index, pod, direction, &in_earnest, memo)
            };
            resolved.audit[direction as usize] = audit.set;
            resolved.sets[direction as usize] = made.set;
            resolved.policies[direction as usize] =
                with_say.iter().map(|policy| policy.key.clone()).collect();
            resolved.problems.extend(made.problem);
        }
        resolved
    }

    fn make(
        &mut self,
        index: &Index,
        pod: &Pod,
        direction: Direction,
        policies: &[&Policy],
        memo: &mut Memo,
    ) -> Made {
        let rules = || {
            policies
                .iter()
                .flat_map(|policy| policy.rules(direction).unwrap_or_default())
        };
        let names_ports = rules()
            .flat_map(|rule| rule.ports.iter().flatten())
            .any(|port| matches!(port, PortMatch::Named(..)));
        // Who asks for names has to be known by them; and names for ingress are the pod's own.
        let source = (!names_ports || direction == Direction::Ingress).then(|| {
            let mut ports = Vec::new();
            if names_ports {
                ports.extend(
                    pod.ports
                        .iter()
                        .map(|port| (port.name.clone(), (port.proto, port.port))),
                );
                ports.sort();
            }
            (
                direction,
                policies.iter().map(|policy| policy.key.clone()).collect(),
                ports,
            )
        });
        if let Some(made) = source.as_ref().and_then(|source| memo.made.get(source)).cloned() {
            self.sets.retain(made.set);
            return made;
        }
        let isolated = policies.iter().any(|policy| policy.tier == Tier::Namespace);
        let mut key = SetKey {
            direction,
            deny_by_default: isolated,
            isolated_by: policies
                .iter()
                .filter(|policy| policy.tier == Tier::Namespace)
                .map(|policy| policy.key.clone())
                .collect(),
            rules: Vec::new(),
        };
        for policy in policies {
            // Behind a `NetworkPolicy` there is nothing left to decide.
            if isolated && policy.tier == Tier::Baseline {
                continue;
            }
            for rule in policy.rules(direction).unwrap_or_default() {
                self.resolve_rule(index, pod, policy, rule, &mut key);
            }
        }
        let rules = key.rules.len();
        let problem = (!key.settle()).then(|| {
            Problem::new(
                "",
                format!(
                    "{rules} {} rules, and a pod may have {SET_RULES}: nothing is allowed",
                    direction.as_str()
                ),
            )
        });
        let atoms = key.atoms();
        let (set, is_new) = self.sets.acquire(key);
        if is_new {
            memo.new.insert(set);
            for atom in atoms {
                self.atoms.retain(atom);
            }
        }
        let made = Made { set, problem };
        if let Some(source) = source {
            self.sets.retain(set);
            memo.made.insert(source, made.clone());
        }
        made
    }

    /// Adds what a rule is for a pod: nothing where it matches nothing, several where names of ports make it so.
    fn resolve_rule(&mut self, index: &Index, pod: &Pod, policy: &Policy, rule: &Rule, key: &mut SetKey) {
        let Rule {
            place,
            name: _,
            action,
            peers,
            ports,
        } = rule;
        let (mut spans, mut names) = (Vec::new(), BTreeSet::new());
        for port in ports.iter().flatten() {
            match port {
                PortMatch::Protocol(proto) => spans.push(span(*proto, 0, u16::MAX)),
                PortMatch::Range(proto, first, last) => spans.push(span(*proto, *first, *last)),
                PortMatch::Named(proto, name) if key.direction == Direction::Ingress => {
                    let own = pod.ports.iter().filter(|port| *port.name == **name);
                    let own = own.filter(|port| proto.is_none_or(|proto| proto == port.proto));
                    spans.extend(own.map(|port| span(port.proto, port.port, port.port)));
                }
                PortMatch::Named(proto, name) => {
                    names.insert((name.clone(), *proto));
                }
            }
        }
        let mut add = |peers: Option<Arc<[AtomId]>>, ports: Option<Arc<[PortSpan]>>| {
            key.rules.push(ResolvedRule {
                policy: policy.key.clone(),
                place: *place,
                tier: policy.tier,
                action: *action,
                peers,
                ports,
            });
        };
        spans.sort_unstable();
        spans.dedup();
        if ports.is_none() || !spans.is_empty() {
            let peers = peers
                .as_ref()
                .map(|peers| self.intern_all(index, peers.iter().map(Some), None));
            if peers.as_ref().is_none_or(|peers| !peers.is_empty()) {
                add(peers, ports.is_some().then(|| spans.into()));
            }
        }
        // By number, the peers that give it.
        let mut answers: BTreeMap<Number, BTreeSet<AtomId>> = BTreeMap::new();
        for (name, proto) in names {
            let peers = match peers {
                None => vec![None],
                Some(peers) => peers.iter().map(Some).collect(),
            };
            for peer in peers {
                let question = Question {
                    peer: peer.cloned(),
                    name: name.clone(),
                    proto,
                };
                for (proto, port) in self.questions.ask(index, &question, &pod.name) {
                    let asked_port = NamedPort {
                        name: name.clone(),
                        proto,
                        port,
                    };
                    let atoms = self.intern_all(index, std::iter::once(peer), Some(&asked_port));
                    answers.entry((proto, port)).or_default().extend(atoms.iter());
                }
            }
        }
        for ((proto, port), atoms) in answers {
            add(
                Some(atoms.into_iter().collect()),
                Some(Arc::new([span(proto, port, port)])),
            );
        }
    }

    fn intern_all<'a>(
        &mut self,
        index: &Index,
        peers: impl Iterator<Item = Option<&'a Peer>>,
        port: Option<&NamedPort>,
    ) -> Arc<[AtomId]> {
        let atoms = peers.map(|peer| Atom {
            peer: peer.cloned(),
            port: port.cloned(),
        });
        let ids: BTreeSet<AtomId> = atoms.map(|atom| self.intern(index, atom)).collect();
        ids.into_iter().collect()
    }
}

fn span(proto: Protocol, first: u16, last: u16) -> PortSpan {
    PortSpan {
        proto: proto.number(),
        first,
        last,
    }
}
