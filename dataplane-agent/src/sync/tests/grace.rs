//! What programs may still use stays as it is until a grace period is over that began later.

use proptest::prelude::*;

use super::{Agent, LIMITS, Step, key, step};
use crate::{
    model::{Object, ObjectRef},
    store::{Limits, Store, memory::Memory},
    sync::{arena::Slice, backends::OwnedBackend, encode},
};

/// So few numbers that they soon go to others.
const FEW: Limits = Limits {
    backends: 14,
    ..LIMITS
};

/// What a program that looked at the tables at some moment goes on to use.
struct Seen {
    slices: Vec<(Slice, Vec<u64>)>,
    backends: Vec<(u32, OwnedBackend)>,
    /// Since then, the wait for a grace period has begun.
    is_waiting: bool,
}

impl Seen {
    fn now(memory: &Memory) -> Self {
        let mut seen = Self {
            slices: Vec::new(),
            backends: Vec::new(),
            is_waiting: false,
        };
        for index in 1..FEW.services {
            let head = memory.read_service(index).unwrap().head;
            if head.size_class == 0 {
                continue;
            }
            let mut count = [0];
            memory.read_maglev(head.slots_offset - 1, &mut count).unwrap();
            let slice = encode::slice_at(head.slots_offset, count[0] as usize, head.size_class).unwrap();
            let words = words(memory, slice);
            let ids = encode::slice_ids(&words[..(head.slots_offset - slice.start) as usize]);
            let named = |id| encode::owned_backend(&memory.read_backend(id).unwrap()).unwrap();
            seen.backends.extend(ids.into_iter().map(|id| (id, named(id))));
            seen.slices.push((slice, words));
        }
        seen
    }

    fn is_as_it_was(&self, memory: &Memory) -> bool {
        let mut slices = self.slices.iter();
        let mut backends = self.backends.iter();
        slices.all(|(slice, seen)| words(memory, *slice) == *seen)
            && backends
                .all(|(id, seen)| encode::owned_backend(&memory.read_backend(*id).unwrap()) == Some(*seen))
    }
}

fn words(memory: &Memory, slice: Slice) -> Vec<u64> {
    let mut words = vec![0; slice.len as usize];
    memory.read_maglev(slice.start, &mut words).unwrap();
    words
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_given_to_another_before_its_grace_period(
        steps in proptest::collection::vec((step(), 0..3u8), 1..60)
    ) {
        let mut objects: Vec<(ObjectRef, Object)> = Vec::new();
        let mut memory = Memory::new(FEW);
        let mut agent = Agent::new(&memory);
        let mut seen: Vec<Seen> = Vec::new();
        for (step, wait) in steps {
            match step {
                Step::Apply(object) => {
                    let key = key(&object);
                    objects.retain(|(known, _)| *known != key);
                    objects.push((key, object.clone()));
                    agent.take([object]);
                }
                Step::Delete(key) => {
                    objects.retain(|(known, _)| *known != key);
                    let dirty = agent.index.delete(&key);
                    agent.update(&dirty);
                }
                Step::Restart | Step::Fail(..) => continue,
            }
            agent.syncer.run(&mut memory);
            prop_assert!(seen.iter().all(|seen| seen.is_as_it_was(&memory)));
            prop_assert_eq!(memory.grace_periods, 0);
            seen.push(Seen::now(&memory));
            match wait {
                0 => {
                    agent.syncer.begin_reclaim();
                    for seen in &mut seen {
                        seen.is_waiting = true;
                    }
                }
                1 => {
                    agent.syncer.end_reclaim(&memory);
                    seen.retain(|seen| !seen.is_waiting);
                }
                _ => {}
            }
        }
    }
}
