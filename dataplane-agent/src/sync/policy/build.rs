//! New sets and new classes, with all their rows: written while nothing refers to them.

use std::collections::BTreeMap;

use dataplane_common::policy::{PolicySet, RuleBits, SET_RULES, set_flags};

use super::programmed::{Programmed, Set};
use crate::{
    compile::policy::{
        PolicyCompiler,
        classes::ClassId,
        sets::{self, SetId},
        tables::port_key,
    },
    store::{Store, StoreError},
};

/// The rules of a set that a class satisfies, as compiled.
pub fn row(compiler: &PolicyCompiler, set: SetId, class: ClassId) -> RuleBits {
    let any = || compiler.sets().get(set).map(|set| set.any_peer);
    let row = compiler.peer_rules(set, class).or_else(any);
    row.unwrap_or_default()
}

/// The header of a set whose rules begin there.
pub fn header(set: &sets::PolicySet, rules: u32, any_peer: u32) -> PolicySet {
    PolicySet {
        rules,
        any_peer,
        admin_rules: set.admin_rules,
        words: set.key.rules.len().div_ceil(64) as u8,
        flags: if set.key.deny_by_default {
            0
        } else {
            set_flags::ALLOW_BY_DEFAULT
        },
    }
}

impl Programmed {
    /// Writes a set, which is the compiler's image from then on. What is half written is taken back.
    pub fn build(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        set: SetId,
    ) -> Result<(), StoreError> {
        let id = self.free_set()?;
        self.sets.insert(id, Set::default());
        self.old.insert(id);
        let outcome = self.write_set(store, compiler, set, id);
        if outcome.is_ok() {
            self.old.remove(&id);
            self.images.insert(set, id);
        } else {
            // What stays is found among the unused sets.
            let _refused = self.remove_set(store, id);
        }
        outcome
    }

    fn write_set(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        set: SetId,
        id: u32,
    ) -> Result<(), StoreError> {
        let Some(made) = compiler.sets().get(set).cloned() else {
            return Ok(());
        };
        debug_assert!(made.key.rules.len() <= SET_RULES as usize);
        let rules = self.free_rules(made.key.rules.len() as u32)?;
        let any_peer = self.bits.hold(store, &made.any_peer);
        if let Some(of_set) = self.sets.get_mut(&id) {
            of_set.rules = rules;
            of_set.made = Some(made.clone());
            of_set.header = header(
                &made,
                rules.map_or(0, |slice| slice.start),
                *any_peer.as_ref().unwrap_or(&0),
            );
        }
        any_peer?;
        for (rule, index) in made.key.rules.iter().zip(rules.map_or(0, |slice| slice.start)..) {
            let policy = self.names.number(&rule.policy);
            if let Some(of_set) = self.sets.get_mut(&id)
                && of_set.policies.insert(policy)
            {
                self.names.hold(policy, &rule.policy);
            }
            store.write_rule(index, &self.names.row(rule))?;
            self.writes += 1;
        }
        for (prefix, content) in &made.by_port {
            let (length, key) = (prefix.length, port_key(id, *prefix));
            let bits = self.bits.hold(store, content)?;
            if let Err(error) = store.put_port_rules(length, key, bits) {
                self.bits.release(bits);
                return Err(error);
            }
            self.writes += 1;
            if let Some(of_set) = self.sets.get_mut(&id) {
                of_set.ports.insert((length, key), bits);
            }
        }
        for label in compiler.classes_of(set) {
            let Some(content) = compiler.peer_rules(set, label) else {
                continue;
            };
            let classes: Vec<u32> = self.with_label(label).collect();
            for class in classes {
                self.put_row(store, id, class, &content)?;
            }
        }
        let header = self
            .sets
            .get(&id)
            .map_or_else(PolicySet::default, |set| set.header);
        store.write_set(id, &header)?;
        self.writes += 1;
        Ok(())
    }

    /// A class that is to the images what the compiler says of its class `label`, and to old sets what `old` says.
    pub fn class_for(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        label: ClassId,
        old: &BTreeMap<u32, u32>,
    ) -> Result<u32, StoreError> {
        if let Some(class) = self.with_label(label).find(|class| self.old_rows(*class) == *old) {
            return Ok(class);
        }
        let id = self.free_class();
        self.add_class(id);
        let outcome = self.write_class(store, compiler, label, old, id);
        match outcome {
            Ok(()) => {
                self.label(id, label);
                Ok(id)
            }
            Err(error) => {
                // What stays is found among the empty classes.
                let _refused = self.remove_class(store, id);
                Err(error)
            }
        }
    }

    fn write_class(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        label: ClassId,
        old: &BTreeMap<u32, u32>,
        id: u32,
    ) -> Result<(), StoreError> {
        for set in compiler.sets_of(label) {
            let image = self.images.get(&set).copied();
            if let (Some(image), Some(content)) = (image, compiler.peer_rules(set, label)) {
                self.put_row(store, image, id, &content)?;
            }
        }
        for (set, bits) in old {
            let content = self.bits.get(*bits);
            self.put_row(store, *set, id, &content)?;
        }
        Ok(())
    }
}
