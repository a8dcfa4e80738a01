//! Addresses and ranges: led from class to class.

use std::{
    collections::{BTreeMap, HashSet},
    ops::ControlFlow,
};

use dataplane_common::policy::{CLASS_ANY, RuleAction, RuleBits};

use super::{
    PolicySyncer, build,
    programmed::{is_v6, ranges_beneath},
};
use crate::{
    compile::policy::{
        PolicyCompiler,
        classes::{ClassId, Place},
        sets::{PolicySet, SetId},
    },
    store::{Store, StoreError},
    sync::{Failure, Report, Subject},
};

/// The compiler's class that the addresses of a place are to find.
pub fn label(compiler: &PolicyCompiler, place: Place) -> ClassId {
    let classes = compiler.classes();
    classes.of(place).unwrap_or_else(|| {
        let longest = if is_v6(place) { 128 } else { 32 };
        let mut beneath = ranges_beneath(place, (0..=longest).rev());
        let class = beneath.find_map(|range| classes.of(Place::Range(range)));
        class.unwrap_or(CLASS_ANY)
    })
}

fn subject(place: Place) -> Subject {
    match place {
        Place::Addr(addr) => format!("policy peer {addr}").into(),
        Place::Range(range) => format!("policy range {range}").into(),
    }
}

impl PolicySyncer {
    /// The places that are to have another class, with the one that they have and the compiler's that they are to have.
    pub(super) fn moving(&self, compiler: &PolicyCompiler) -> impl Iterator<Item = (Place, u32, ClassId)> {
        self.touched.iter().filter_map(|place| {
            let (class, label) = (self.programmed.resolve(*place), label(compiler, *place));
            let is = self.programmed.classes.get(&class).and_then(|class| class.label);
            (is != Some(label)).then_some((*place, class, label))
        })
    }

    /// Leads every touched place to its class. What fails stays touched.
    pub(super) fn put_places(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        report: &mut Report,
    ) {
        let touched = std::mem::take(&mut self.touched);
        // A new range comes before what leaves it to it, and addresses before the ranges that are taken from under them.
        let order = |place: &Place| match (compiler.classes().of(*place), place) {
            (Some(_), Place::Range(_)) => 0,
            (Some(_), Place::Addr(_)) => 1,
            (None, _) => 2,
        };
        let mut ordered: Vec<Place> = touched.into_iter().collect();
        ordered.sort_by_key(order);
        for place in ordered {
            match self.put_place(store, compiler, place) {
                Ok(ControlFlow::Break(())) => {}
                Ok(ControlFlow::Continue(())) => {
                    self.leaving.insert(place);
                }
                Err(error) => {
                    report.failed(subject(place), &error);
                    self.touched.insert(place);
                }
            }
        }
    }

    /// Breaks when the place is as it is to be.
    fn put_place(
        &mut self,
        store: &mut dyn Store,
        compiler: &PolicyCompiler,
        place: Place,
    ) -> Result<ControlFlow<()>, StoreError> {
        let programmed = &mut self.programmed;
        let label = label(compiler, place);
        let is_gone = compiler.classes().of(place).is_none();
        let written = programmed.places.get(&place).copied();
        if is_gone && written.is_none() {
            return Ok(ControlFlow::Break(()));
        }
        let before = programmed.resolve(place);
        let old = programmed.old_rows(before);
        if is_gone {
            let beneath = programmed.resolve_beneath(place);
            if programmed.old_rows(beneath) == old {
                self.is_stale = self.is_stale || !programmed.are_alike(before, beneath);
                programmed.delete_place(store, place)?;
                return Ok(ControlFlow::Break(()));
            }
        }
        let is_labelled = programmed.classes.get(&before).and_then(|class| class.label) == Some(label);
        if written.is_none() || !is_labelled {
            let class = programmed.class_for(store, compiler, label, &old)?;
            self.is_stale = self.is_stale || !programmed.are_alike(before, class);
            programmed.put_place(store, place, class)?;
        }
        Ok(if is_gone {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        })
    }

    /// Finds the sets that would allow more than they are to, because a place has another class than it is to have.
    pub(super) fn find_opened(
        &self,
        compiler: &PolicyCompiler,
        report: &Report,
        broken: &mut BTreeMap<SetId, Failure>,
    ) {
        let mut seen = HashSet::new();
        for (place, class, label) in self.moving(compiler) {
            let Some(failure) = report.failed.get(&subject(place)) else {
                continue;
            };
            if !seen.insert((class, label)) {
                continue;
            }
            for (set, image) in &self.programmed.images {
                let Some(made) = compiler.sets().get(*set) else {
                    continue;
                };
                let desired = build::row(compiler, *set, label);
                let actual = self.programmed.row(*image, class);
                if opens(made, &desired, &actual) {
                    let reason = format!("{}: {}", subject(place), failure.reason);
                    let failure = Failure {
                        reason,
                        refused: failure.refused,
                    };
                    broken.entry(*set).or_insert(failure);
                }
            }
        }
    }
}

/// Whether a peer that satisfies `actual` may be allowed what one that satisfies `desired` is not.
fn opens(set: &PolicySet, desired: &RuleBits, actual: &RuleBits) -> bool {
    let mut rules = (0..).zip(&set.key.rules);
    rules.any(|(number, rule)| match (desired.has(number), actual.has(number)) {
        (false, true) => rule.action != RuleAction::Deny,
        (true, false) => rule.action != RuleAction::Allow,
        _ => false,
    })
}
