//! How often rules have decided: read from the tables, and remembered when their places are about to be another set's.

use std::collections::BTreeMap;

use dataplane_common::policy::{Counted, Hits};

use super::{
    PolicySyncer,
    programmed::{Programmed, Set},
};
use crate::{
    model::{ObjectRef, policy::Direction},
    store::{Store, StoreError},
};

/// What a verdict is put down to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Decider {
    pub policy: ObjectRef,
    pub direction: Direction,
    /// The rule's place in the policy's list for the direction; `None`: no rule decided, and the policy is one of those that
    /// isolate the pod.
    pub rule: Option<u32>,
}

pub type HitsByDecider = BTreeMap<Decider, Hits>;

impl PolicySyncer {
    /// The verdicts of the sets that there are, and of those that there were since this process began. What the sets of an
    /// earlier process had counted is among them as long as they are in use.
    pub fn hits(&self, store: &dyn Store) -> Result<HitsByDecider, StoreError> {
        let mut all = self.programmed.totals.clone();
        for (id, set) in &self.programmed.sets {
            for of in counted(*id, set) {
                add(&mut all, set, of, store.hits(of)?);
            }
        }
        Ok(all)
    }
}

impl Programmed {
    /// Remembers what a set has decided, and counts at its places from 0. No program uses it any more.
    pub(super) fn take_hits(&mut self, store: &mut dyn Store, id: u32) -> Result<(), StoreError> {
        let Some(set) = self.sets.get(&id) else {
            return Ok(());
        };
        for of in counted(id, set) {
            let hits = store.hits(of)?;
            if hits != Hits::default() {
                store.clear_hits(of)?;
                add(&mut self.totals, set, of, hits);
            }
        }
        Ok(())
    }
}

/// Where a set's verdicts are counted.
fn counted(id: u32, set: &Set) -> impl Iterator<Item = Counted> + use<> {
    let rules = set
        .rules
        .map_or(0..0, |slice| slice.start..slice.start + slice.len);
    rules.map(Counted::Rule).chain([Counted::Set(id)])
}

/// Puts verdicts down. Of a set that an earlier process made and this one has not recognised, nobody knows to what.
fn add(all: &mut HitsByDecider, set: &Set, of: Counted, hits: Hits) {
    let Some(key) = set.made.as_ref().map(|made| &made.key) else {
        return;
    };
    let mut add = |policy: &ObjectRef, rule| {
        let decider = Decider {
            policy: policy.clone(),
            direction: key.direction,
            rule,
        };
        let sum = all.entry(decider).or_default();
        sum.decided += hits.decided;
        sum.dry_run += hits.dry_run;
    };
    match of {
        Counted::Set(_) => key.isolated_by.iter().for_each(|policy| add(policy, None)),
        Counted::Rule(index) => {
            let number = index.wrapping_sub(set.header.rules) as usize;
            if let Some(rule) = key.rules.get(number) {
                add(&rule.policy, Some(rule.place));
            }
        }
    }
}
