//! Changes written in their order: no moment with half a policy.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::policy::{PeerRulesKey, RuleBits};

use super::{CASES, Cluster};
use crate::{
    compile::policy::{
        Changes, Dropped, PolicyCompiler,
        classes::Place,
        random::{Change, OUTSIDE, Random, change},
        reference::World,
        tables::{Tables, judge},
    },
    model::Name,
};

/// The tables as somebody has them who writes nothing but what he is told, in that order.
#[derive(Default)]
struct Written {
    tables: Tables,
    pods: BTreeMap<Name, [u32; 2]>,
}

impl Written {
    /// Everything that it says: by pod, direction, address and port.
    fn verdicts(&self) -> BTreeMap<(Name, usize, IpAddr, u16), bool> {
        let mut addrs: BTreeSet<IpAddr> = OUTSIDE.iter().map(|addr| addr.parse().unwrap()).collect();
        addrs.extend((1..=7).map(|number| IpAddr::from([10, 0, 0, number])));
        let mut verdicts = BTreeMap::new();
        for (name, sets) in &self.pods {
            for (direction, set) in sets.iter().enumerate() {
                for addr in &addrs {
                    for port in [80, 443] {
                        let allowed = judge(&self.tables, *set, *addr, 6, port).is_allowed();
                        verdicts.insert((name.clone(), direction, *addr, port), allowed);
                    }
                }
            }
        }
        verdicts
    }

    fn bits(&mut self, bits: RuleBits) -> u32 {
        self.tables.bits.push(bits);
        self.tables.bits.len() as u32 - 1
    }

    fn move_places(&mut self, compiler: &PolicyCompiler, places: &BTreeSet<Place>) {
        for place in places {
            match (*place, compiler.classes().of(*place)) {
                (Place::Addr(addr), Some(class)) => drop(self.tables.peers.insert(addr, class)),
                (Place::Addr(addr), None) => drop(self.tables.peers.remove(&addr)),
                (Place::Range(range), Some(class)) => drop(self.tables.cidrs.insert(range, class)),
                (Place::Range(range), None) => drop(self.tables.cidrs.remove(&range)),
            }
        }
    }

    fn forget_classes(&mut self, classes: &BTreeSet<u32>) {
        self.tables
            .peer_rules
            .retain(|key, _| !classes.contains(&key.class));
    }

    /// Writes changes; after each kind, verdicts are those of before or of after, and before any address moves or pod turns
    /// they are those of before. Where policies alone have changed, that is so until the pods turn.
    fn write(&mut self, compiler: &PolicyCompiler, changes: &Changes, only_policies: bool, context: &str) {
        let Changes {
            sets,
            peer_rules,
            places,
            pods,
            classes_gone,
        } = changes;
        let before = self.verdicts();
        // Headers and ports by way of the whole; they do not change.
        let whole = Tables::of(compiler);
        for id in sets {
            let mut header = whole.sets[id];
            let set = compiler.sets().get(*id).unwrap();
            let first = header.rules as usize;
            header.rules = self.tables.rules.len() as u32;
            self.tables
                .rules
                .extend(&whole.rules[first..first + set.key.rules.len()]);
            header.any_peer = self.bits(set.any_peer);
            for ((length, key), bits) in whole.port_rules.iter().filter(|((_, key), _)| key.set == *id) {
                let bits = self.bits(whole.bits[*bits as usize]);
                self.tables.port_rules.insert((*length, *key), bits);
            }
            self.tables.sets.insert(*id, header);
        }
        for (set, class) in peer_rules {
            if let Some(bits) = compiler.peer_rules(*set, *class) {
                let bits = self.bits(bits);
                let key = PeerRulesKey {
                    set: *set,
                    class: *class,
                };
                assert_eq!(
                    self.tables.peer_rules.insert(key, bits),
                    None,
                    "{context}: a row is written twice"
                );
            }
        }
        assert_eq!(
            self.verdicts(),
            before,
            "{context}: rows that nobody asks for yet"
        );
        self.move_places(compiler, places);
        let moved = self.verdicts();
        if only_policies {
            assert_eq!(
                moved, before,
                "{context}: places moved between classes that are the same to the old sets"
            );
        }
        for name in pods {
            match compiler.pods().get(name) {
                Some(pod) => self.pods.insert(name.clone(), pod.sets),
                None => self.pods.remove(name),
            };
        }
        self.forget_classes(classes_gone);
        let after = self.verdicts();
        let fresh = Written {
            tables: whole,
            pods: self.pods.clone(),
        };
        assert_eq!(
            after,
            fresh.verdicts(),
            "{context}: all that is new has been written"
        );
    }

    fn drop_unused(&mut self, compiler: &mut PolicyCompiler, context: &str) {
        let before = self.verdicts();
        let Dropped {
            places,
            sets,
            classes_gone,
        } = compiler.drop_unused();
        self.move_places(compiler, &places);
        assert_eq!(
            self.verdicts(),
            before,
            "{context}: merged classes are the same to every set that is left"
        );
        self.tables.sets.retain(|id, _| !sets.contains(id));
        self.tables.peer_rules.retain(|key, _| !sets.contains(&key.set));
        self.tables
            .port_rules
            .retain(|(_, key), _| !sets.contains(&key.set));
        self.forget_classes(&classes_gone);
        assert_eq!(
            self.verdicts(),
            before,
            "{context}: what is dropped is not asked for"
        );
        let whole = Tables::of(compiler);
        let keys = |tables: &Tables| {
            tables
                .peer_rules
                .keys()
                .map(|key| (key.set, key.class))
                .collect::<BTreeSet<_>>()
        };
        assert_eq!(
            keys(&self.tables),
            keys(&whole),
            "{context}: no row is left behind"
        );
    }
}

#[test]
fn policy_changes_are_written_without_a_moment_of_half_a_policy() {
    for seed in 0..CASES {
        let mut random = Random(seed ^ 0xa5a5);
        let (mut world, mut cluster) = (World::default(), Cluster::new());
        let mut written = Written::default();
        for step in 0..40 {
            let context = format!("seed {seed}, step {step}");
            let change = change(&mut random, &mut world);
            let (Change::Apply(object) | Change::Delete(object)) = &change;
            let only_policies = object["kind"].as_str().unwrap().ends_with("Policy");
            let changes = cluster.take(&change);
            written.write(&cluster.compiler, &changes, only_policies, &context);
            if random.below(3) == 0 {
                written.drop_unused(&mut cluster.compiler, &context);
            }
        }
    }
}
