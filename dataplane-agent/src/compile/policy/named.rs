//! Named ports of egress rules: what number a name stands for is the destination pod's to say, so such a rule becomes one
//! for each number, about the peers that have it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::atoms::PodAt;
use crate::model::{Index, Name, Pod, Protocol, policy::Peer};

/// A name, asked of peers.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Question {
    /// `None`: anybody.
    pub peer: Option<Peer>,
    pub name: Arc<str>,
    /// `None`: any.
    pub proto: Option<Protocol>,
}

pub type Number = (Protocol, u16);

impl Question {
    /// The Pods that may answer.
    fn peers<'a>(&'a self, index: &'a Index) -> Box<dyn Iterator<Item = &'a Pod> + 'a> {
        match &self.peer {
            Some(Peer::Pods(pods)) => Box::new(index.pods_in(&pods.namespaces)),
            Some(Peer::Block(_)) | None => Box::new(index.pods()),
            Some(Peer::Nodes(_)) => Box::new(std::iter::empty()),
        }
    }

    /// A Pod's answers. Every container may have a port of that name.
    fn answers<'a>(&'a self, (pod, namespace): PodAt<'a>) -> impl Iterator<Item = Number> + 'a {
        let ports = pod
            .ports
            .iter()
            .filter(|port| *port.name == *self.name && self.proto.is_none_or(|proto| proto == port.proto));
        let is_peer = move || match &self.peer {
            None => true,
            Some(Peer::Pods(pods)) => pods.matches(pod, namespace),
            Some(Peer::Block(block)) => pod.ips.iter().any(|ip| block.contains(*ip)),
            Some(Peer::Nodes(_)) => false,
        };
        ports
            .filter(move |_| is_peer())
            .map(|port| (port.proto, port.port))
    }
}

/// The questions in force, and how many Pods give each answer.
#[derive(Debug, Default)]
pub struct Questions {
    by_name: HashMap<Arc<str>, BTreeMap<Question, Asked>>,
    /// What each Pod has answered.
    given: HashMap<Name, BTreeSet<(Question, Number)>>,
}

#[derive(Debug, Default)]
struct Asked {
    answers: BTreeMap<Number, usize>,
    /// Pods of this node whose sets depend on it.
    by: BTreeSet<Name>,
}

impl Questions {
    /// The numbers that a name stands for now; `by` is to hear when they change.
    pub fn ask(&mut self, index: &Index, question: &Question, by: &Name) -> Vec<Number> {
        let questions = self.by_name.entry(question.name.clone()).or_default();
        if !questions.contains_key(question) {
            let mut asked = Asked::default();
            for pod in question.peers(index).filter(|pod| is_peer(pod)) {
                let namespace = index.namespace(pod.name.namespace());
                for number in question.answers((pod, namespace)).collect::<BTreeSet<_>>() {
                    *asked.answers.entry(number).or_default() += 1;
                    let given = self.given.entry(pod.name.clone()).or_default();
                    given.insert((question.clone(), number));
                }
            }
            questions.insert(question.clone(), asked);
        }
        let asked = questions.get_mut(question);
        asked.map_or_else(Vec::new, |asked| {
            asked.by.insert(by.clone());
            asked.answers.keys().copied().collect()
        })
    }

    /// A Pod of this node is compiled anew, and asks again what it has to.
    pub fn forget(&mut self, by: &Name) {
        for questions in self.by_name.values_mut() {
            for asked in questions.values_mut() {
                asked.by.remove(by);
            }
        }
    }

    /// A Pod, or its namespace, is as it is now; returns whose sets depend on an answer that has come or gone.
    pub fn pod_changed(&mut self, name: &Name, pod: Option<PodAt<'_>>) -> BTreeSet<Name> {
        let pod = pod.filter(|(pod, _)| is_peer(pod));
        let mut now = BTreeSet::new();
        if let Some((pod, namespace)) = pod {
            let names: BTreeSet<&str> = pod.ports.iter().map(|port| &*port.name).collect();
            for question in names
                .iter()
                .filter_map(|name| self.by_name.get(*name))
                .flat_map(BTreeMap::keys)
            {
                let answers = question.answers((pod, namespace));
                now.extend(answers.map(|number| (question.clone(), number)));
            }
        }
        let before = self.given.remove(name).unwrap_or_default();
        let mut affected = BTreeSet::new();
        for (question, number) in before.difference(&now) {
            if let Some(asked) = self.asked(question)
                && let Some(count) = asked.answers.get_mut(number)
            {
                *count -= 1;
                if *count == 0 {
                    asked.answers.remove(number);
                    affected.extend(asked.by.iter().cloned());
                }
            }
        }
        for (question, number) in now.difference(&before) {
            if let Some(asked) = self.asked(question) {
                let count = asked.answers.entry(*number).or_default();
                *count += 1;
                if *count == 1 {
                    affected.extend(asked.by.iter().cloned());
                }
            }
        }
        if !now.is_empty() {
            self.given.insert(name.clone(), now);
        }
        affected
    }

    /// Drops the questions that nobody asks any more.
    pub fn drop_unused(&mut self) {
        let mut dropped = false;
        self.by_name.retain(|_, questions| {
            let before = questions.len();
            questions.retain(|_, asked| !asked.by.is_empty());
            dropped |= questions.len() < before;
            !questions.is_empty()
        });
        if dropped {
            let by_name = &self.by_name;
            let is_asked = |question: &Question| {
                let questions = by_name.get(&question.name);
                questions.is_some_and(|questions| questions.contains_key(question))
            };
            self.given.retain(|_, given| {
                given.retain(|(question, _)| is_asked(question));
                !given.is_empty()
            });
        }
    }

    fn asked(&mut self, question: &Question) -> Option<&mut Asked> {
        self.by_name.get_mut(&question.name)?.get_mut(question)
    }
}

/// Pods that have finished own no address, and those with the host's network are no Pods to policies.
pub fn is_peer(pod: &Pod) -> bool {
    !pod.finished && !pod.host_network
}
