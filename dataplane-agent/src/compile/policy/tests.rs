//! The compiled tables against the API reference, and a history of changes against a fresh start.

mod crowd;
mod writing;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::policy::{RuleBits, SET_NONE};
use serde_json::{Value, json};

use super::{
    PolicyCompiler, Subjects,
    classes::Place,
    random::{Change, OUTSIDE, PORTS, PROTOCOLS, Random, change},
    reference::{self, World},
    tables::{Tables, judge},
};
use crate::{
    decode::{Decoded, decode},
    model::{Dirty, Index, Name, Object, ObjectRef, policy::Direction},
};

/// Histories that are run: each has some nine thousand verdicts, all together more than a million. `DATAPLANE_POLICY_CASES` says
/// otherwise.
const CASES: u64 = 130;

struct Cluster {
    index: Index,
    compiler: PolicyCompiler,
}

impl Cluster {
    fn new() -> Self {
        let pods = (1..=7).map(|number| Name::new(["x", "y", "z"][number % 3], &format!("p{number}")));
        Self::about(Subjects::These(pods.collect()))
    }

    fn about(subjects: Subjects) -> Self {
        Self {
            index: Index::new("n1"),
            compiler: PolicyCompiler::new(subjects),
        }
    }

    fn of(world: &World) -> Self {
        let mut cluster = Self::new();
        let mut dirty = Dirty::default();
        let World {
            namespaces,
            pods,
            nodes,
            policies,
        } = world;
        for object in [policies, pods, nodes, namespaces].into_iter().flatten() {
            dirty.merge(cluster.index.apply(object_of(object).1));
        }
        cluster.compiler.update(&cluster.index, &dirty.policy);
        cluster
    }

    fn apply(&mut self, object: &Value) -> super::Changes {
        let dirty = self.index.apply(object_of(object).1);
        self.compiler.update(&self.index, &dirty.policy)
    }

    fn take(&mut self, change: &Change) -> super::Changes {
        let dirty = match change {
            Change::Apply(object) => self.index.apply(object_of(object).1),
            Change::Delete(object) => self.index.delete(&object_of(object).0),
        };
        self.compiler.update(&self.index, &dirty.policy)
    }

    /// Everything that decides, without ids: for each pod and direction the rules, and what each port and place satisfies.
    fn dump(&self) -> BTreeMap<String, String> {
        let mut dump = BTreeMap::new();
        for (name, pod) in self.compiler.pods() {
            let sets = [("in earnest", pod.sets), ("audit", pod.audit)];
            let sets = sets.iter().flat_map(|(kind, sets)| {
                let of_direction = |direction: Direction| (kind, direction, sets[direction as usize]);
                Direction::ALL.map(of_direction)
            });
            for (kind, direction, id) in sets {
                let key = format!("{name} {} {kind}", direction.as_str());
                let Some(set) = self.compiler.sets().get(id) else {
                    assert_eq!(id, SET_NONE);
                    dump.insert(key, "open".to_owned());
                    continue;
                };
                let rules: Vec<_> = set
                    .key
                    .rules
                    .iter()
                    .map(|rule| (&rule.policy, rule.place, rule.action))
                    .collect();
                let places: BTreeMap<Place, RuleBits> = self
                    .compiler
                    .classes()
                    .places()
                    .map(|(place, class)| (place, set.by_class(self.compiler.classes().atoms(class))))
                    .collect();
                let text = format!(
                    "{} {rules:?} {:?} {places:?}",
                    set.key.deny_by_default, set.by_port
                );
                dump.insert(key, text);
            }
        }
        dump
    }

    /// How many different classes there are.
    fn classes(&self) -> usize {
        let classes = self.compiler.classes().places().map(|(_, class)| class);
        classes.collect::<BTreeSet<_>>().len()
    }
}

fn object_of(value: &Value) -> (ObjectRef, Object) {
    match decode(value) {
        Decoded::Object {
            key,
            object,
            problems,
        } if problems.is_empty() => (key, object),
        other => panic!("{other:?} of {value}"),
    }
}

/// Compares every verdict; returns how many.
fn compare(world: &World, cluster: &Cluster, is_audit: bool, context: &str) -> usize {
    let tables = Tables::of(&cluster.compiler);
    let mut addrs: Vec<IpAddr> = OUTSIDE.iter().map(|addr| addr.parse().unwrap()).collect();
    for pod in &world.pods {
        let ips = pod["status"]["podIPs"].as_array().unwrap().iter();
        addrs.extend(ips.map(|ip| ip["ip"].as_str().unwrap().parse::<IpAddr>().unwrap()));
    }
    addrs.push("172.16.0.1".parse().unwrap());
    let mut judged = 0;
    for pod in &world.pods {
        let subject = pod["spec"]["hostNetwork"] != true && pod["status"]["phase"] == "Running";
        if !subject {
            continue;
        }
        let name = object_of(pod).0.name;
        for direction in Direction::ALL {
            let of_pod = &cluster.compiler.pods()[&name];
            let set = if is_audit { of_pod.audit } else { of_pod.sets }[direction as usize];
            for addr in &addrs {
                for (proto, number) in PROTOCOLS {
                    let ports = if proto == "ICMP" { &[0][..] } else { &PORTS };
                    for port in ports {
                        let found = judge(&tables, set, *addr, number, *port).is_allowed();
                        let expected = reference::allows(world, direction.as_str(), pod, *addr, proto, *port);
                        assert_eq!(
                            found,
                            expected,
                            "{context}: {} {name} {addr} {proto}/{port}\n{world:#?}",
                            direction.as_str()
                        );
                        judged += 1;
                    }
                }
            }
        }
    }
    judged
}

/// A policy that selects all Pods of `x` for ingress, and has no rule.
fn closing(name: &str, annotations: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"namespace": "x", "name": name, "annotations": annotations},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    })
}

#[test]
fn only_what_isolates_a_pod_answers_for_what_no_rule_decides() {
    let pod = Name::new("x", "p1");
    let mut cluster = Cluster::about(Subjects::These([pod.clone()].into()));
    let cluster_policy = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "no-metrics"},
        "spec": {
            "tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
            "ingress": [{"action": "Deny", "from": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"number": 9}}}]}],
        },
    });
    let objects = [
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}),
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "x", "name": "p1"},
            "spec": {"nodeName": "n1", "containers": [{"name": "c"}]},
            "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]},
        }),
        cluster_policy,
        closing("in-force", &json!({})),
        closing("tried", &json!({"dataplane/dry-run": "true"})),
    ];
    let mut dirty = Dirty::default();
    for object in &objects {
        dirty.merge(cluster.index.apply(object_of(object).1));
    }
    cluster.compiler.update(&cluster.index, &dirty.policy);
    let isolating = |direction, audit| {
        let policies = cluster.compiler.isolating(&pod, direction, audit).iter();
        policies.map(ToString::to_string).collect::<Vec<_>>()
    };
    let in_force = "NetworkPolicy x/in-force";
    assert_eq!(isolating(Direction::Ingress, false), [in_force]);
    assert_eq!(
        isolating(Direction::Ingress, true),
        [in_force, "NetworkPolicy x/tried"]
    );
    assert!(isolating(Direction::Egress, true).is_empty());
    let of_pod = &cluster.compiler.pods()[&pod];
    assert_eq!(of_pod.policies[Direction::Ingress as usize].len(), 3);
}

#[test]
fn policy_tables_say_what_the_api_reference_says_after_any_history() {
    let cases = std::env::var("DATAPLANE_POLICY_CASES").map_or(CASES, |cases| cases.parse().unwrap());
    let mut judged = 0;
    for seed in 0..cases {
        let mut random = Random(seed);
        let (mut world, mut cluster) = (World::default(), Cluster::new());
        for step in 0..40 {
            let change = change(&mut random, &mut world);
            cluster.take(&change);
            if random.below(4) == 0 {
                cluster.compiler.drop_unused();
            }
            if step % 20 == 19 {
                let context = format!("seed {seed}, step {step}");
                judged += compare(&world.in_earnest(), &cluster, false, &context);
                judged += compare(&world, &cluster, true, &context);
            }
        }
        cluster.compiler.drop_unused();
        let mut fresh = Cluster::of(&world);
        fresh.compiler.drop_unused();
        assert_eq!(cluster.dump(), fresh.dump(), "seed {seed}");
        assert_eq!(cluster.classes(), fresh.classes(), "seed {seed}");
    }
    println!("{judged} verdicts");
}
