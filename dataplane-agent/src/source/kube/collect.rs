//! Puts together what comes of all kinds: batches for the agent, and all that is wrong at the moment.
//!
//! What is in force changes on evidence alone: a complete list, or a change that a watch told. A kind that cannot be read
//! keeps what it had, and until every kind has been read once nothing may be deleted.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
};

use tokio::sync::{oneshot, watch};

use super::{
    api::ApiError,
    follow::{Changed, News},
    item::Item,
    state::{Phase, State},
};
use crate::{
    model::{
        Cause, Kind, Name, Object, ObjectRef, Problem, Rejected,
        policy::{Peer, Policy},
    },
    source::{Batch, Change},
};

/// What is known of a kind.
#[derive(Debug, Default)]
struct Known {
    phase: Phase,
    /// For Nodes: not this node's own alone.
    all: bool,
    versions: HashMap<Name, u64>,
    /// The latest version that anything of it has been seen with. Changes come in the order of versions.
    latest: u64,
    problems: BTreeMap<Name, Vec<Problem>>,
}

/// What the API server held of a kind when somebody asked.
#[derive(Debug)]
pub struct Held {
    /// Of the list.
    pub version: u64,
    /// With the version of each.
    pub names: Vec<(Name, u64)>,
}

/// What the API server held of all kinds; `None` for a kind that the cluster does not have.
#[derive(Debug)]
pub struct Target {
    pub kinds: Vec<(Kind, Option<Held>)>,
    /// Told the revision that holds it.
    pub reply: oneshot::Sender<u64>,
}

/// The sum of what has come.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is asked by itself, and none follows from another"
)]
pub struct Collector {
    node: Arc<str>,
    state: State,
    kinds: BTreeMap<Kind, Known>,
    failing: BTreeMap<Kind, ApiError>,
    /// Asks for all Nodes, once a policy looks at them.
    all_nodes: watch::Sender<bool>,
    /// How often this node's own object has come.
    node_came: watch::Sender<u64>,
    /// This node's own object has been there.
    has_node: bool,
    changes: Vec<Change>,
    /// Policies that wait for all Nodes to be read, and what came of policies since.
    held_back: Vec<Change>,
    revision: u64,
    complete: bool,
    rejected: Vec<Rejected>,
    is_rejected_stale: bool,
    is_new: bool,
    targets: Vec<Target>,
}

impl Collector {
    pub fn new(
        node: Arc<str>,
        state: State,
        all_nodes: watch::Sender<bool>,
        node_came: watch::Sender<u64>,
    ) -> Self {
        Self {
            node,
            state,
            kinds: Kind::ALL
                .into_iter()
                .map(|kind| (kind, Known::default()))
                .collect(),
            failing: BTreeMap::new(),
            all_nodes,
            node_came,
            has_node: false,
            changes: Vec::new(),
            held_back: Vec::new(),
            revision: 0,
            complete: false,
            rejected: Vec::new(),
            is_rejected_stale: true,
            is_new: true,
            targets: Vec::new(),
        }
    }

    /// Takes in what has come.
    pub fn take(&mut self, news: News) {
        match news {
            News::Listed { kind, items, all } => {
                self.works(kind);
                let listed: HashSet<Name> = items.iter().map(|item| item.key.name.clone()).collect();
                let held = self.kinds.entry(kind).or_default();
                held.phase = Phase::Listed;
                held.all = all;
                let gone = held.versions.keys().filter(|name| !listed.contains(*name));
                let gone: Vec<Name> = gone.cloned().collect();
                for name in gone {
                    self.delete(ObjectRef { kind, name });
                }
                for item in items {
                    self.apply(item);
                }
                self.is_rejected_stale = true;
            }
            News::Absent(kind) => {
                self.works(kind);
                let held = self.kinds.entry(kind).or_default();
                held.phase = Phase::Absent;
                let gone: Vec<Name> = held.versions.keys().cloned().collect();
                for name in gone {
                    self.delete(ObjectRef { kind, name });
                }
            }
            News::Changed { kind, changes } => {
                self.works(kind);
                for change in changes {
                    match change {
                        Changed::Applied(item) => self.apply(item),
                        Changed::Deleted(item) => {
                            let held = self.kinds.entry(kind).or_default();
                            held.latest = held.latest.max(item.version);
                            self.delete(item.key);
                        }
                    }
                }
            }
            News::Working(kind) => self.works(kind),
            News::Failing(kind, error) => {
                self.is_rejected_stale |= self.failing.get(&kind) != Some(&error);
                self.failing.insert(kind, error);
            }
        }
        for (kind, held) in &self.kinds {
            self.state.holds(*kind, held.versions.len());
        }
        let has_all_nodes = self.kinds.get(&Kind::Node).is_some_and(|held| held.all);
        if has_all_nodes {
            self.changes.append(&mut self.held_back);
        }
    }

    fn works(&mut self, kind: Kind) {
        self.is_rejected_stale |= self.failing.remove(&kind).is_some();
    }

    fn apply(&mut self, item: Item) {
        let Item {
            key,
            version,
            object,
            problems,
        } = item;
        let held = self.kinds.entry(key.kind).or_default();
        let name = key.name.clone();
        let is_new = held.versions.insert(name.clone(), version).is_none();
        held.latest = held.latest.max(version);
        let known = held.problems.get(&name);
        if known.map_or(&[][..], Vec::as_slice) != problems.as_slice() {
            self.is_rejected_stale = true;
            if problems.is_empty() {
                held.problems.remove(&name);
            } else {
                held.problems.insert(name, problems);
            }
        }
        if key.kind == Kind::Node && key.name.name() == &*self.node {
            self.is_rejected_stale |= !self.has_node;
            self.has_node = true;
            if is_new {
                self.node_came.send_modify(|times| *times += 1);
            }
        }
        // Of what cannot be understood the last version that could stays in force.
        let Some(object) = object else { return };
        if let Object::Policy(policy) = &object
            && names_nodes(policy)
        {
            self.all_nodes
                .send_if_modified(|all| !std::mem::replace(all, true));
        }
        self.change(Change::Apply {
            key,
            object,
            origin: None,
        });
    }

    fn delete(&mut self, key: ObjectRef) {
        let held = self.kinds.entry(key.kind).or_default();
        self.is_rejected_stale |= held.problems.remove(&key.name).is_some();
        if held.versions.remove(&key.name).is_some() {
            self.change(Change::Delete(key));
        }
    }

    fn change(&mut self, change: Change) {
        let (Change::Apply { key, .. } | Change::Delete(key)) = &change;
        let has_all_nodes = self.kinds.get(&Kind::Node).is_some_and(|held| held.all);
        if key.kind.is_policy() && *self.all_nodes.borrow() && !has_all_nodes {
            self.held_back.push(change);
        } else {
            self.changes.push(change);
        }
    }

    /// What is new since the last one.
    pub fn batch(&mut self) -> Option<Batch> {
        let is_read = |held: &Known| held.phase != Phase::Waiting;
        let complete =
            self.complete || (self.kinds.values().all(is_read) && self.has_node && self.held_back.is_empty());
        let rejected = if std::mem::take(&mut self.is_rejected_stale) {
            self.all_rejected()
        } else {
            self.rejected.clone()
        };
        let is_news = !self.changes.is_empty() || complete != self.complete || rejected != self.rejected;
        let is_first = std::mem::take(&mut self.is_new);
        if !is_news && !is_first {
            return None;
        }
        self.complete = complete;
        self.rejected.clone_from(&rejected);
        self.revision += 1;
        Some(Batch {
            revision: self.revision,
            complete,
            changes: std::mem::take(&mut self.changes),
            rejected,
            ignored: BTreeMap::new(),
        })
    }

    fn all_rejected(&self) -> Vec<Rejected> {
        let rejected = |object: String, problem: Problem| Rejected {
            origin: None,
            object,
            problem,
        };
        let of_objects = self.kinds.iter().flat_map(|(kind, held)| {
            held.problems.iter().flat_map(move |(name, problems)| {
                let object = ObjectRef {
                    kind: *kind,
                    name: name.clone(),
                };
                problems
                    .iter()
                    .map(move |problem| rejected(object.to_string(), problem.clone()))
            })
        });
        let of_kinds: BTreeSet<Rejected> = self
            .failing
            .iter()
            .map(|(kind, error)| {
                // What keeps one kind from being read keeps all, if it is about the server.
                let object = if error.is_of_the_server() {
                    ""
                } else {
                    kind.as_str()
                };
                let problem = Problem::new("", error.to_string()).because(Cause::Unfollowed);
                rejected(object.to_owned(), problem)
            })
            .collect();
        let nodes = self.kinds.get(&Kind::Node);
        let is_listed = nodes.is_some_and(|held| held.phase == Phase::Listed);
        let no_node = (is_listed && !self.has_node).then(|| {
            let reason = "there is no such Node in the cluster: is --node-name right? Nothing is changed until it is there";
            rejected(
                format!("Node {}", self.node),
                Problem::new("", reason).because(Cause::Unfollowed),
            )
        });
        of_objects.chain(of_kinds).chain(no_node).collect()
    }

    /// Answers once what the server held is in a batch.
    pub fn wait_for(&mut self, target: Target) {
        self.targets.push(target);
    }

    /// Answers those whose targets are reached.
    pub fn answer(&mut self) {
        let mut waiting = std::mem::take(&mut self.targets);
        for target in &mut waiting {
            target
                .kinds
                .retain(|(kind, wanted)| !self.holds(*kind, wanted.as_ref()));
        }
        for target in waiting {
            if target.reply.is_closed() {
                continue;
            }
            if target.kinds.is_empty() && self.held_back.is_empty() {
                // Whoever asked may have gone.
                let _gone = target.reply.send(self.revision);
            } else {
                self.targets.push(target);
            }
        }
    }

    /// Whether all that a server held of a kind is here, or something later.
    fn holds(&self, kind: Kind, wanted: Option<&Held>) -> bool {
        let Some(held) = self.kinds.get(&kind) else {
            return true;
        };
        let Some(Held { version, names }) = wanted else {
            return held.phase == Phase::Absent;
        };
        let has = |(name, version): &(Name, u64)| match held.versions.get(name) {
            Some(held) => held >= version,
            // It has been deleted since.
            None => held.latest > *version,
        };
        let known: HashSet<&Name> = names.iter().map(|(name, _)| name).collect();
        let is_later = |(name, held): (&Name, &u64)| held > version || known.contains(name);
        held.phase == Phase::Listed && names.iter().all(has) && held.versions.iter().all(is_later)
    }
}

fn names_nodes(policy: &Policy) -> bool {
    let rules = policy.rules.iter().flatten().flatten();
    let mut peers = rules.flat_map(|rule| rule.peers.iter().flatten());
    peers.any(|peer| matches!(peer, Peer::Nodes(_)))
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;
    use serde_json::{json, value::to_raw_value};

    use super::*;
    use crate::{metrics::source::SourceMetrics, source::kube::item::read_item};

    fn item(kind: Kind, name: &str, version: u64, spec: &serde_json::Value) -> Item {
        let mut object =
            json!({"metadata": {"name": name, "resourceVersion": version.to_string()}, "spec": spec});
        if kind.is_namespaced() {
            object["metadata"]["namespace"] = "ns".into();
        }
        read_item(kind, &to_raw_value(&object).unwrap()).unwrap().unwrap()
    }

    fn service(name: &str, version: u64) -> Item {
        let spec = json!({"clusterIP": "10.96.0.1", "ports": [{"port": 80}]});
        item(Kind::Service, name, version, &spec)
    }

    fn node(name: &str) -> Item {
        item(Kind::Node, name, 1, &json!({}))
    }

    fn listed(kind: Kind, items: Vec<Item>) -> News {
        let all = false;
        News::Listed { kind, items, all }
    }

    fn collector() -> (Collector, watch::Receiver<bool>) {
        let (all_nodes, seen) = watch::channel(false);
        let state = State::new(SourceMetrics::new(&Registry::new()).unwrap());
        let (node_came, _) = watch::channel(0);
        (Collector::new("a".into(), state, all_nodes, node_came), seen)
    }

    /// All kinds but these are listed, and empty.
    fn others(collector: &mut Collector, but: &[Kind]) {
        for kind in Kind::ALL.into_iter().filter(|kind| !but.contains(kind)) {
            collector.take(listed(kind, vec![]));
        }
    }

    #[test]
    fn nothing_is_complete_before_every_kind_and_the_node_are_there() {
        let (mut collector, _) = collector();
        others(&mut collector, &[Kind::Service, Kind::AdminNetworkPolicy]);
        let batch = collector.batch().unwrap();
        assert!(!batch.complete);
        let reasons: Vec<String> = batch.rejected.iter().map(ToString::to_string).collect();
        assert!(
            reasons[0].starts_with("Node a: there is no such Node"),
            "{reasons:?}"
        );
        collector.take(listed(Kind::Service, vec![service("s", 5)]));
        collector.take(News::Absent(Kind::AdminNetworkPolicy));
        let batch = collector.batch().unwrap();
        assert_eq!((batch.complete, batch.changes.len()), (false, 1));
        collector.take(listed(Kind::Node, vec![node("a")]));
        let batch = collector.batch().unwrap();
        assert!(batch.complete && batch.rejected.is_empty());
        assert_eq!(collector.batch(), None);
    }

    #[test]
    fn a_later_list_deletes_what_is_gone_and_a_failure_deletes_nothing() {
        let (mut collector, _) = collector();
        others(&mut collector, &[Kind::Service]);
        collector.take(listed(Kind::Service, vec![service("s", 5), service("t", 6)]));
        collector.batch();
        let forbidden = ApiError::Forbidden {
            message: "services is forbidden".to_owned(),
        };
        collector.take(News::Failing(Kind::Service, forbidden));
        let batch = collector.batch().unwrap();
        assert!(batch.changes.is_empty());
        assert!(batch.rejected.iter().any(|one| one.object == "Service"));
        collector.take(listed(Kind::Service, vec![service("t", 6)]));
        let batch = collector.batch().unwrap();
        let deleted = Change::Delete(ObjectRef::service(&Name::new("ns", "s")));
        assert!(batch.changes.contains(&deleted));
        assert!(!batch.rejected.iter().any(|one| one.object == "Service"));
    }

    #[test]
    fn what_cannot_be_understood_leaves_the_last_version_in_force() {
        let (mut collector, _) = collector();
        others(&mut collector, &[Kind::Service]);
        collector.take(listed(Kind::Service, vec![service("s", 5)]));
        collector.batch();
        let bad = item(Kind::Service, "s", 6, &json!({"type": "Other"}));
        let changes = vec![Changed::Applied(bad)];
        let kind = Kind::Service;
        collector.take(News::Changed { kind, changes });
        let batch = collector.batch().unwrap();
        assert!(batch.changes.is_empty());
        assert!(batch.rejected.iter().any(|one| one.object == "Service ns/s"));
    }

    #[tokio::test]
    async fn a_target_is_reached_when_all_of_it_is_held() {
        let (mut collector, _) = collector();
        others(&mut collector, &[Kind::Service]);
        collector.take(listed(Kind::Service, vec![service("s", 5), service("gone", 4)]));
        collector.batch();
        let (reply, mut answer) = oneshot::channel();
        let name = |name| Name::new("ns", name);
        let names = vec![(name("s"), 7), (name("t"), 8), (name("short"), 6)];
        let wanted = Some(Held { version: 9, names });
        let kinds = vec![(Kind::Service, wanted)];
        collector.wait_for(Target { kinds, reply });
        let kind = Kind::Service;
        for change in [
            Changed::Applied(service("s", 7)),
            Changed::Applied(service("t", 8)),
            Changed::Deleted(service("gone", 9)),
        ] {
            collector.answer();
            assert!(answer.try_recv().is_err());
            let changes = vec![change];
            collector.take(News::Changed { kind, changes });
        }
        // Later than the target. What was deleted since it was asked for is not waited for.
        let changes = vec![Changed::Applied(service("new", 10))];
        collector.take(News::Changed { kind, changes });
        let revision = collector.batch().unwrap().revision;
        collector.answer();
        assert_eq!(answer.try_recv(), Ok(revision));
    }

    #[test]
    fn a_policy_that_names_nodes_waits_until_they_are_read() {
        let (mut collector, seen) = collector();
        others(&mut collector, &[Kind::AdminNetworkPolicy, Kind::Node]);
        collector.take(listed(Kind::Node, vec![node("a")]));
        let spec = json!({
            "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"nodes": {"matchLabels": {"a": "b"}}}]}],
        });
        let policy = item(Kind::AdminNetworkPolicy, "p", 3, &spec);
        collector.take(listed(Kind::AdminNetworkPolicy, vec![policy]));
        assert!(*seen.borrow());
        let batch = collector.batch().unwrap();
        assert!(!batch.complete);
        let is_policy = |change: &Change| matches!(change, Change::Apply { key, .. } if key.kind.is_policy());
        assert!(!batch.changes.iter().any(is_policy));
        let (kind, items, all) = (Kind::Node, vec![node("a"), node("b")], true);
        collector.take(News::Listed { kind, items, all });
        let batch = collector.batch().unwrap();
        assert!(batch.complete && batch.changes.last().is_some_and(is_policy));
    }
}
