//! Writes that are refused, and tables without room: nothing is ever allowed that was forbidden before and is to be.

use super::*;

/// The first flow that the tables allow, though neither before nor after it is to be. Of a dry run nothing is allowed.
fn opened(memory: &Memory, before: &Verdicts, after: &Verdicts) -> Option<Flow> {
    let mut both = before.iter().zip(after);
    let wrong =
        both.find(|((flow, before), (_, after))| !flow.1 && !**before && !**after && says(memory, **flow));
    wrong.map(|((flow, _), _)| *flow)
}

/// A cluster, some pods' interfaces, the tables and the agent.
struct Node {
    random: Random,
    world: World,
    bound: Bound,
    memory: Memory,
    agent: Agent,
}

impl Node {
    fn new(seed: u64, limits: Limits) -> Self {
        let (world, memory) = (World::default(), Memory::new(limits));
        Self {
            random: Random(seed),
            agent: Agent::start(&memory, &world),
            bound: Bound::new(),
            world,
            memory,
        }
    }

    /// Changes something, and sometimes starts the agent again; returns the flows to look at.
    fn change(&mut self) -> Vec<Flow> {
        batch(&mut self.random, &mut self.world);
        let mut interfaces: BTreeSet<u32> = self.bound.keys().copied().collect();
        self.bound = bind(&mut self.random, &self.world, &self.bound);
        interfaces.extend(self.bound.keys());
        if self.random.below(5) == 0 {
            self.agent = Agent::start(&self.memory, &self.world);
        } else {
            self.agent.look(&self.world);
        }
        self.agent.bind(&self.bound);
        flows(&interfaces)
    }

    fn expected(&self, flows: &[Flow]) -> Verdicts {
        expected(&self.world, &self.bound, self.agent.has_sets(), flows)
    }

    /// Runs, and reclaims too, while some writes are refused; returns what was reported, and what was opened.
    fn run(
        &mut self,
        flows: &[Flow],
        refused: &std::ops::Range<usize>,
        reclaims: bool,
    ) -> (Report, Option<(usize, Flow)>) {
        let (before, after) = (verdicts(&self.memory, flows), self.expected(flows));
        let mut wrong = None;
        let memory = std::mem::replace(&mut self.memory, Memory::new(LIMITS));
        let mut store = Faulty::new(memory, |attempt, memory: &Memory| {
            let found = || opened(memory, &before, &after).map(|flow| (attempt, flow));
            wrong = wrong.or_else(found);
            refused.contains(&attempt)
        });
        let report = self.agent.run(&mut store);
        if reclaims {
            // What fails is tried again by the next one.
            let _refused = self.agent.syncer.reclaim(&mut store, &mut self.agent.compiler);
        }
        self.memory = store.memory;
        wrong = wrong.or_else(|| opened(&self.memory, &before, &after).map(|flow| (usize::MAX, flow)));
        (report, wrong)
    }
}

#[test]
fn policy_refused_writes_open_nothing_and_are_made_good() {
    let mut refused_runs = 0;
    for seed in 0..cases() {
        let mut node = Node::new(seed, LIMITS);
        for _ in 0..6 {
            batch(&mut node.random, &mut node.world);
        }
        for step in 0..BATCHES {
            let context = format!("seed {seed}, step {step}");
            let flows = node.change();
            for _ in 0..node.random.below(3) {
                let start = 1 + node.random.below(60);
                let refused = start..start + 1 + node.random.below(30);
                let reclaims = node.random.below(2) == 0;
                let (report, wrong) = node.run(&flows, &refused, reclaims);
                assert_eq!(wrong, None, "{context}: refused {refused:?}");
                refused_runs += usize::from(!report.failed.is_empty());
            }
            if node.random.below(2) == 0 {
                let (report, wrong) = node.run(&flows, &(0..0), false);
                assert_eq!(wrong, None, "{context}: tried again");
                assert!(report.failed.is_empty(), "{context}: {:?}", report.failed);
                assert_eq!(verdicts(&node.memory, &flows), node.expected(&flows), "{context}");
            }
        }
        let flows = node.change();
        node.run(&flows, &(0..0), false);
        let mut store = Faulty::new(node.memory, |_, _: &Memory| false);
        node.agent.settle(&mut store);
        assert_no_garbage(&node.agent, &store.memory, &format!("seed {seed}"));
    }
    assert!(refused_runs > 0);
    println!("{refused_runs} runs with refused writes");
}

/// Tables of which one is small.
fn cramped(which: usize) -> Limits {
    let mut policy = LIMITS.policy;
    match which {
        0 => policy.pods = 1,
        1 => policy.peers = 2,
        2 => policy.ranges = 1,
        3 => policy.sets = 4,
        4 => policy.peer_rules = 3,
        5 => policy.port_rules = 4,
        6 => policy.bits = 4,
        _ => policy.rules = 6,
    }
    Limits { policy, ..LIMITS }
}

#[test]
fn policy_full_tables_close_what_they_have_no_room_for() {
    let mut full = BTreeSet::new();
    for seed in 0..cases().max(16) {
        let which = seed as usize % 8;
        let mut node = Node::new(seed, cramped(which));
        for _ in 0..6 {
            batch(&mut node.random, &mut node.world);
        }
        for step in 0..BATCHES {
            let context = format!("seed {seed}, step {step}, table {which}");
            let flows = node.change();
            let (report, wrong) = node.run(&flows, &(0..0), true);
            assert_eq!(wrong, None, "{context}");
            let (says, after) = (verdicts(&node.memory, &flows), node.expected(&flows));
            let is_open = |(flow, says): (&Flow, &bool)| !flow.1 && *says && !after[flow];
            assert_eq!(
                says.iter().find(|(flow, says)| is_open((flow, says))),
                None,
                "{context}: {:?}",
                report.failed
            );
            if report.failed.is_empty() {
                assert_eq!(says, after, "{context}");
            } else {
                full.insert(which);
                assert!(
                    report.failed.values().all(|failure| !failure.refused),
                    "{context}"
                );
            }
        }
        node.world = World::default();
        node.bound = Bound::new();
        node.agent.look(&node.world);
        node.agent.bind(&node.bound);
        let (report, _) = node.run(&[], &(0..0), false);
        assert!(report.failed.is_empty());
        let mut store = Faulty::new(node.memory, |_, _: &Memory| false);
        node.agent.settle(&mut store);
        assert_no_garbage(
            &node.agent,
            &store.memory,
            &format!("seed {seed}: nothing is left"),
        );
    }
    assert_eq!(full, (0..8).collect(), "every table was full");
}
