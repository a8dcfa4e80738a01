//! The numbers of policies in `RULES`: derived from their names, so that an agent that starts again gives the same.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::policy::PolicyRule;

use crate::{compile::policy::sets::ResolvedRule, model::ObjectRef};

/// The policies of the sets in the tables, by number, each with how many sets have it.
#[derive(Debug, Default)]
pub struct Names(BTreeMap<u32, (ObjectRef, usize)>);

impl Names {
    /// The policy's number. Where another in use has it already, it is the next that is free.
    pub fn number(&self, policy: &ObjectRef) -> u32 {
        let mut number = hash(&policy.to_string());
        loop {
            match self.0.get(&number) {
                Some((other, _)) if other != policy => number = number.wrapping_add(1),
                _ => return number,
            }
        }
    }

    /// A rule's element of `RULES`.
    pub fn row(&self, rule: &ResolvedRule) -> PolicyRule {
        PolicyRule {
            policy: self.number(&rule.policy),
            place: rule.place,
            action: rule.action as u8,
            pad: [0; 3],
        }
    }

    /// One set more that has it.
    pub fn hold(&mut self, number: u32, policy: &ObjectRef) {
        self.0.entry(number).or_insert_with(|| (policy.clone(), 0)).1 += 1;
    }

    /// One set fewer that has them.
    pub fn release(&mut self, numbers: &BTreeSet<u32>) {
        for number in numbers {
            if let Some((_, users)) = self.0.get_mut(number) {
                *users -= 1;
                if *users == 0 {
                    self.0.remove(number);
                }
            }
        }
    }

    /// The policy with a number.
    pub fn get(&self, number: u32) -> Option<&ObjectRef> {
        self.0.get(&number).map(|(policy, _)| policy)
    }
}

/// FNV-1a.
fn hash(text: &str) -> u32 {
    let step = |hash: u32, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193);
    text.bytes().fold(0x811c_9dc5, step)
}
