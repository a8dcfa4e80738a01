//! Random clusters whose changes are written into tables in memory: what these say after each single write, and whether
//! anything stays behind.

mod faults;
mod hits;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::policy::{PolicySet, RuleBits};
use serde_json::Value;

use super::{BoundPod, PolicySyncer, programmed::sets_of};
use crate::{
    compile::policy::{
        PolicyCompiler, Subjects,
        random::{OUTSIDE, Random, change},
        reference::{self, World},
        tables::{Tables, judge},
    },
    decode::{Decoded, decode},
    model::{Dirty, Index, Name, Object, ObjectRef, policy::Direction},
    store::{Limits, faulty::Faulty, memory::Memory, policy::PolicyLimits},
    sync::Report,
};

/// Histories that are run. `DATAPLANE_POLICY_CASES` for more.
const CASES: u64 = 12;
const BATCHES: usize = 10;

const LIMITS: Limits = Limits {
    frontends: 2,
    services: 2,
    backends: 2,
    maglev: 2,
    source_ranges: 2,
    policy: PolicyLimits::new(1000, 1000, 4000),
};

/// What is asked of each address.
const ASKED: [(&str, u8, u16); 3] = [("TCP", 6, 80), ("UDP", 17, 443), ("ICMP", 1, 0)];

fn cases() -> u64 {
    std::env::var("DATAPLANE_POLICY_CASES").map_or(CASES, |cases| cases.parse().unwrap())
}

/// Interface, whether of the dry run, direction, peer, what is asked.
type Flow = (u32, bool, Direction, IpAddr, usize);
type Verdicts = BTreeMap<Flow, bool>;

/// The agent's part, which a restart loses.
struct Agent {
    index: Index,
    compiler: PolicyCompiler,
    syncer: PolicySyncer,
}

fn object_of(value: &Value) -> (ObjectRef, Object) {
    match decode(value) {
        Decoded::Object { key, object, .. } => (key, object),
        other => panic!("{other:?} of {value}"),
    }
}

fn objects(world: &World) -> impl Iterator<Item = &Value> {
    let World {
        namespaces,
        pods,
        nodes,
        policies,
    } = world;
    [namespaces, pods, nodes, policies].into_iter().flatten()
}

impl Agent {
    fn start(memory: &Memory, world: &World) -> Self {
        let mut agent = Self {
            index: Index::new("n1"),
            compiler: PolicyCompiler::new(Subjects::Node("n1".into())),
            syncer: PolicySyncer::restore(memory).unwrap(),
        };
        agent.look(world);
        agent
    }

    /// Makes the index equal to a world, and compiles.
    fn look(&mut self, world: &World) {
        let mut dirty = Dirty::default();
        let there: BTreeMap<ObjectRef, Object> = objects(world).map(object_of).collect();
        for kind in crate::model::Kind::ALL {
            let of_kind = there.iter().filter(|(key, _)| key.kind == kind);
            let of_kind = of_kind.map(|(key, object)| (key.name.clone(), object.clone()));
            dirty.merge(self.index.reset(kind, of_kind.collect()));
        }
        let changes = self.compiler.update(&self.index, &dirty.policy);
        self.syncer.update(changes);
    }

    fn bind(&mut self, bound: &Bound) {
        let pods = bound.iter().filter_map(|(ifindex, name)| {
            let addrs = self.index.pod(name)?.ips.clone();
            let name = name.clone();
            Some((*ifindex, BoundPod { name, addrs }))
        });
        self.syncer.set_pods(pods.collect());
    }

    fn run<F: FnMut(usize, &Memory) -> bool>(&mut self, store: &mut Faulty<F>) -> Report {
        self.syncer.run(store, &self.compiler)
    }

    fn has_sets(&self) -> bool {
        let mut sets = self
            .compiler
            .pods()
            .values()
            .flat_map(|pod| [pod.sets, pod.audit]);
        sets.any(|sets| sets != [0, 0])
    }

    /// Reclaims and moves until there is nothing left to do.
    fn settle<F: FnMut(usize, &Memory) -> bool>(&mut self, store: &mut Faulty<F>) {
        for _ in 0..6 {
            self.syncer.reclaim(store, &mut self.compiler).unwrap();
            if self.syncer.has_moves() {
                let report = self.run(store);
                assert!(report.failed.is_empty(), "{:?}", report.failed);
            }
        }
        assert!(!self.syncer.has_garbage() && !self.syncer.has_moves());
        assert!(self.syncer.is_settled());
    }
}

/// The interfaces of pods.
type Bound = BTreeMap<u32, Name>;

fn name(pod: &Value) -> Name {
    object_of(pod).0.name
}

/// Interfaces of most pods of the node; some get another.
fn bind(random: &mut Random, world: &World, before: &Bound) -> Bound {
    let local = world.pods.iter().filter(|pod| {
        pod["spec"]["nodeName"] == "n1"
            && pod["spec"]["hostNetwork"] != true
            && pod["status"]["phase"] == "Running"
    });
    let mut bound = Bound::new();
    for pod in local {
        let name = name(pod);
        let number: u32 = name.name()[1..].parse().unwrap();
        let last = before.iter().find(|(_, known)| **known == name);
        let ifindex = match last {
            Some((ifindex, _)) if random.below(12) > 0 => *ifindex,
            _ if random.below(8) == 0 => continue,
            _ => number * 100 + random.below(50) as u32,
        };
        bound.insert(ifindex, name);
    }
    bound
}

fn peers() -> Vec<IpAddr> {
    let mut addrs: Vec<IpAddr> = OUTSIDE.iter().map(|addr| addr.parse().unwrap()).collect();
    for number in 1..=7u8 {
        addrs.push(IpAddr::from([10, 0, 0, number]));
        addrs.push(format!("fd00::{number}").parse().unwrap());
    }
    addrs.push("172.16.0.1".parse().unwrap());
    addrs
}

/// The flows of these interfaces that tables decide: a pod always reaches itself.
fn flows(interfaces: &BTreeSet<u32>) -> Vec<Flow> {
    let mut flows = Vec::new();
    for ifindex in interfaces {
        let own: [IpAddr; 2] = [
            IpAddr::from([10, 0, 0, (ifindex / 100) as u8]),
            format!("fd00::{}", ifindex / 100).parse().unwrap(),
        ];
        for is_audit in [false, true] {
            for direction in Direction::ALL {
                for addr in peers().into_iter().filter(|addr| !own.contains(addr)) {
                    flows.extend((0..ASKED.len()).map(|asked| (*ifindex, is_audit, direction, addr, asked)));
                }
            }
        }
    }
    flows
}

fn says(memory: &Memory, (ifindex, is_audit, direction, addr, asked): Flow) -> bool {
    let tables = &memory.policy;
    if tables.revision == 0 {
        return true;
    }
    let Some(row) = tables.pods.get(&ifindex) else {
        return false;
    };
    let set = sets_of(row)[direction as usize + if is_audit { 2 } else { 0 }];
    let (_, proto, port) = ASKED[asked];
    judge(tables, set, addr, proto, port).is_allowed()
}

/// What the tables say.
fn verdicts(memory: &Memory, flows: &[Flow]) -> Verdicts {
    flows.iter().map(|flow| (*flow, says(memory, *flow))).collect()
}

/// What the API reference says.
fn expected(world: &World, bound: &Bound, has_sets: bool, flows: &[Flow]) -> Verdicts {
    let in_earnest = world.in_earnest();
    let expect = |(ifindex, is_audit, direction, addr, asked): Flow| {
        if !has_sets {
            return true;
        }
        let Some(of) = bound.get(&ifindex) else {
            return false;
        };
        let world = if is_audit { world } else { &in_earnest };
        let subject = world.pods.iter().find(|pod| name(pod) == *of).unwrap();
        let (proto, _, port) = ASKED[asked];
        reference::allows(world, direction.as_str(), subject, addr, proto, port)
    };
    flows.iter().map(|flow| (*flow, expect(*flow))).collect()
}

/// The first flow of which the tables say neither what was before nor what is to be.
fn neither(memory: &Memory, before: &Verdicts, after: &Verdicts) -> Option<Flow> {
    let mut both = before.iter().zip(after);
    let wrong = both.find(|((flow, before), (_, after))| before == after && says(memory, **flow) != **before);
    wrong.map(|((flow, _), _)| *flow)
}

/// The tables hold what is compiled, once.
fn assert_no_garbage(agent: &Agent, memory: &Memory, context: &str) {
    let tables = &memory.policy;
    let programmed = &agent.syncer.programmed;
    let sets = (0..)
        .zip(&tables.sets)
        .filter(|(_, set)| **set != PolicySet::default());
    let sets: BTreeSet<u32> = sets.map(|(id, _)| id).collect();
    if !agent.has_sets() {
        assert!(
            tables.peers.is_empty() && tables.cidrs.is_empty() && tables.pods.is_empty(),
            "{context}"
        );
        assert!(
            tables.peer_rules.is_empty() && tables.port_rules.is_empty() && sets.is_empty(),
            "{context}"
        );
        assert_eq!(
            (programmed.bits.used(), programmed.rules.used(), tables.revision),
            (0, 0, 0),
            "{context}"
        );
        return;
    }
    let fresh = Tables::of(&agent.compiler);
    let found = (tables.peers.len(), tables.cidrs.len(), tables.port_rules.len());
    assert_eq!(
        found,
        (fresh.peers.len(), fresh.cidrs.len(), fresh.port_rules.len()),
        "{context}"
    );
    assert_eq!(tables.peer_rules.len(), fresh.peer_rules.len(), "{context}");
    let written = fresh.sets.values().filter(|set| set.words > 0 || set.flags > 0);
    assert_eq!(sets.len(), written.count(), "{context}");
    assert_eq!(programmed.bits.used(), fresh.bits.len() - 1, "{context}");
    assert_eq!(programmed.rules.used() as usize, fresh.rules.len(), "{context}");
}

/// Changes that come together.
fn batch(random: &mut Random, world: &mut World) {
    for _ in 0..=random.below(4) {
        change(random, world);
    }
}

#[test]
fn policy_each_write_leaves_the_verdicts_of_before_or_of_after() {
    let mut writes = 0;
    for seed in 0..cases() {
        let mut random = Random(seed);
        let (mut world, mut bound) = (World::default(), Bound::new());
        let mut memory = Memory::new(LIMITS);
        let mut agent = Agent::start(&memory, &world);
        for step in 0..BATCHES {
            let context = format!("seed {seed}, step {step}");
            for _ in 0..if step == 0 { 8 } else { 1 } {
                batch(&mut random, &mut world);
            }
            let mut interfaces: BTreeSet<u32> = bound.keys().copied().collect();
            bound = bind(&mut random, &world, &bound);
            interfaces.extend(bound.keys());
            let restarts = random.below(4) == 0;
            if restarts {
                agent = Agent::start(&memory, &world);
            } else {
                agent.look(&world);
            }
            agent.bind(&bound);
            let flows = flows(&interfaces);
            let before = verdicts(&memory, &flows);
            let after = expected(&world, &bound, agent.has_sets(), &flows);
            let revision = memory.policy.revision;
            let mut wrong = None;
            let mut store = Faulty::new(memory, |attempt, memory: &Memory| {
                let found = || neither(memory, &before, &after).map(|flow| (attempt, flow));
                wrong = wrong.or_else(found);
                false
            });
            let report = agent.run(&mut store);
            assert!(report.failed.is_empty(), "{context}: {:?}", report.failed);
            writes += report.writes;
            let written = verdicts(&store.memory, &flows);
            for (flow, verdict) in &after {
                assert_eq!(
                    written[flow], *verdict,
                    "{context}, restarts {restarts}: {flow:?} {bound:?}"
                );
            }
            if before != after {
                assert_ne!(
                    store.memory.policy.revision, revision,
                    "{context}: flows are judged again"
                );
            }
            memory = store.memory;
            assert_eq!(wrong, None, "{context}, restarts {restarts}: {bound:?}");
            if random.below(2) == 0 {
                let mut wrong = None;
                let mut store = Faulty::new(memory, |attempt, memory: &Memory| {
                    let found = || neither(memory, &after, &after).map(|flow| (attempt, flow));
                    wrong = wrong.or_else(found);
                    false
                });
                agent.settle(&mut store);
                memory = store.memory;
                assert_eq!(wrong, None, "{context}: reclaims");
                assert_no_garbage(&agent, &memory, &context);
                // Nothing has changed, so an agent that starts again has nothing to write.
                let mut again = Agent::start(&memory, &world);
                again.bind(&bound);
                let mut store = Faulty::new(memory, |_, _: &Memory| false);
                let report = again.run(&mut store);
                assert_eq!(report.writes, 0, "{context}: a start without news");
                again.settle(&mut store);
                memory = store.memory;
                assert_no_garbage(&again, &memory, &context);
            }
        }
        world = World::default();
        agent.look(&world);
        agent.bind(&Bound::new());
        let mut store = Faulty::new(memory, |_, _: &Memory| false);
        agent.run(&mut store);
        agent.settle(&mut store);
        assert_no_garbage(&agent, &store.memory, &format!("seed {seed}: nothing is left"));
    }
    println!("{writes} writes");
}

/// What a program has read of the tables at some moment: it goes on to read the rest.
struct Seen {
    memory: Memory,
    flows: Vec<Flow>,
    /// Since then, the wait for a grace period has begun.
    is_waiting: bool,
}

impl Seen {
    /// With the rest as it is now, the verdicts are those of then.
    fn assert_is_good(&self, now: &Memory, context: &str) {
        let mut mixed = now.clone();
        mixed.policy.pods.clone_from(&self.memory.policy.pods);
        mixed.policy.peers.clone_from(&self.memory.policy.peers);
        mixed.policy.cidrs.clone_from(&self.memory.policy.cidrs);
        mixed.policy.revision = self.memory.policy.revision;
        assert_eq!(
            verdicts(&mixed, &self.flows),
            verdicts(&self.memory, &self.flows),
            "{context}"
        );
    }
}

#[test]
fn policy_what_programs_may_still_use_stays_until_a_grace_period_is_over() {
    for seed in 0..cases() {
        let mut random = Random(seed);
        let (mut world, mut bound) = (World::default(), Bound::new());
        let mut agent = Agent::start(&Memory::new(LIMITS), &world);
        let mut store = Faulty::new(Memory::new(LIMITS), |_, _: &Memory| false);
        let mut seen: Vec<Seen> = Vec::new();
        for step in 0..BATCHES {
            batch(&mut random, &mut world);
            bound = bind(&mut random, &world, &bound);
            agent.look(&world);
            agent.bind(&bound);
            agent.run(&mut store);
            seen.push(Seen {
                memory: store.memory.clone(),
                flows: flows(&bound.keys().copied().collect()),
                is_waiting: false,
            });
            match random.below(3) {
                0 => {
                    agent.syncer.begin_reclaim();
                    for seen in &mut seen {
                        seen.is_waiting = true;
                    }
                }
                1 => {
                    agent.syncer.end_reclaim(&mut store, &mut agent.compiler).unwrap();
                    seen.retain(|seen| !seen.is_waiting);
                }
                _ => {}
            }
            for seen in &seen {
                seen.assert_is_good(&store.memory, &format!("seed {seed}, step {step}"));
            }
        }
    }
}

/// What somebody else did to the tables is found and made good.
#[test]
fn policy_an_audit_finds_foreign_changes() {
    let mut found_in = [0; 8];
    for seed in 0..cases() * 4 {
        let mut random = Random(seed);
        let mut world = World::default();
        for _ in 0..10 {
            batch(&mut random, &mut world);
        }
        let bound = bind(&mut random, &world, &Bound::new());
        let flows = flows(&bound.keys().copied().collect());
        let mut agent = Agent::start(&Memory::new(LIMITS), &world);
        agent.bind(&bound);
        let mut store = Faulty::new(Memory::new(LIMITS), |_, _: &Memory| false);
        agent.run(&mut store);
        agent.settle(&mut store);
        assert_eq!(agent.syncer.audit(&store).unwrap(), 0, "seed {seed}");
        let kind = seed as usize % found_in.len();
        let tables = &mut store.memory.policy;
        let set = agent
            .syncer
            .programmed
            .sets
            .values()
            .find(|set| set.rules.is_some());
        match kind {
            0 => drop(tables.peers.pop_first()),
            1 => drop(tables.cidrs.pop_first()),
            2 => drop(tables.peer_rules.pop_first()),
            3 => drop(tables.port_rules.pop_first()),
            4 => drop(tables.pods.pop_first()),
            5 => tables.revision ^= 1,
            6 => tables.bits.fill(RuleBits::default()),
            _ => {
                if let Some(set) = set {
                    tables.rules[set.header.rules as usize].action ^= 3;
                }
            }
        }
        let revision = store.memory.policy.revision;
        let found = agent.syncer.audit(&store).unwrap();
        found_in[kind] += found;
        let report = agent.run(&mut store);
        assert!(
            report.failed.is_empty() && (found > 0 || report.writes == 0),
            "seed {seed}"
        );
        let after = expected(&world, &bound, agent.has_sets(), &flows);
        assert_eq!(verdicts(&store.memory, &flows), after, "seed {seed}");
        if found > 0 && agent.has_sets() {
            assert_ne!(store.memory.policy.revision, revision, "flows are judged again");
        }
        agent.settle(&mut store);
        assert_no_garbage(&agent, &store.memory, &format!("seed {seed}"));
        for set in agent.syncer.programmed.sets.values() {
            let rules = set.made.iter().flat_map(|made| &made.key.rules);
            for (rule, index) in rules.zip(set.header.rules..) {
                let number = store.memory.policy.rules[index as usize].policy;
                assert_eq!(agent.syncer.policy(number), Some(&rule.policy), "seed {seed}");
            }
        }
    }
    assert!(found_in.iter().all(|found| *found > 0), "{found_in:?}");
}
