//! What rules have decided is put down to them, also when their places have become others'.

use dataplane_common::policy::{Counted, Hits};
use serde_json::json;

use super::*;
use crate::sync::policy::hits::Decider;

fn world(ports: &[u16]) -> World {
    let policy = |name: &str, ports: &[u16]| {
        let rules: Vec<Value> = ports
            .iter()
            .map(|port| json!({"ports": [{"port": port}]}))
            .collect();
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": "a"},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": rules},
        })
    };
    World {
        namespaces: Vec::new(),
        pods: vec![json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p1", "namespace": "a"},
            "spec": {"nodeName": "n1"}, "status": {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]},
        })],
        nodes: Vec::new(),
        policies: vec![policy("web", ports), policy("closed", &[])],
    }
}

fn decider(policy: &str, rule: Option<u32>) -> Decider {
    Decider {
        policy: format!("NetworkPolicy a/{policy}").parse().unwrap(),
        direction: Direction::Ingress,
        rule,
    }
}

/// Counts as the datapath does: at every rule, and what no rule decides.
fn judge_some(memory: &mut Memory, pod: u32) {
    let id = memory.policy.pods[&pod].ingress;
    let first = memory.policy.sets[id as usize].rules;
    let rules = memory.policy.rules[first as usize..].iter();
    let number = rules.take_while(|rule| rule.action != 0).count() as u32;
    for (index, of) in (first..first + number)
        .map(Counted::Rule)
        .chain([Counted::Set(id)])
        .enumerate()
    {
        let hits = memory.policy.hits.entry(of).or_default();
        hits.decided += 1 + index as u64;
        hits.dry_run += 10;
    }
}

#[test]
fn policy_verdicts_are_put_down_to_rules_also_when_their_places_are_given_to_others() {
    let bound: Bound = [(100, Name::new("a", "p1"))].into();
    let mut store = Faulty::new(Memory::new(LIMITS), |_: usize, _: &Memory| false);
    let mut agent = Agent::start(&store.memory, &world(&[80, 443]));
    agent.bind(&bound);
    assert!(agent.run(&mut store).failed.is_empty());
    judge_some(&mut store.memory, 100);
    let hits = |decided, dry_run| Hits { decided, dry_run };
    let expected = [
        (decider("closed", None), hits(3, 10)),
        (decider("web", None), hits(3, 10)),
        (decider("web", Some(0)), hits(1, 10)),
        (decider("web", Some(1)), hits(2, 10)),
    ];
    let all = |agent: &Agent, memory: &Memory| -> Vec<(Decider, Hits)> {
        let all = agent.syncer.hits(memory).unwrap().into_iter();
        all.filter(|(_, hits)| *hits != Hits::default()).collect()
    };
    assert_eq!(all(&agent, &store.memory), expected);

    // Another set, and the first one's places are free.
    agent.look(&world(&[8080]));
    assert!(agent.run(&mut store).failed.is_empty());
    assert_eq!(all(&agent, &store.memory), expected, "not free yet");
    agent.settle(&mut store);
    assert!(store.memory.policy.hits.is_empty(), "counted from 0");
    assert_eq!(all(&agent, &store.memory), expected);
    judge_some(&mut store.memory, 100);
    let sum = all(&agent, &store.memory);
    assert!(sum.contains(&(decider("web", Some(0)), hits(2, 20))), "{sum:?}");
    assert!(sum.contains(&(decider("closed", None), hits(5, 20))), "{sum:?}");

    // What sets count that a later process finds and recognises is theirs.
    let mut later = Agent::start(&store.memory, &world(&[8080]));
    later.bind(&bound);
    assert_eq!(later.run(&mut store).writes, 0);
    let found = all(&later, &store.memory);
    assert!(
        found.contains(&(decider("web", Some(0)), hits(1, 10))),
        "{found:?}"
    );
}
