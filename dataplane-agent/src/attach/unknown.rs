//! Interfaces that may be a pod's and that nobody knows: which of them are closed, and which are left alone.
//!
//! A new interface may be that of a pod whose policies forbid what reaches it, as long as such a pod is expected. One that
//! was there for a while when no pod was expected is somebody else's, and is left alone from then on. What is left alone
//! is remembered beyond a restart, which therefore closes nothing; what is closed carries its programs, and is
//! recognised by them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use crate::{host::Unknown, netlink::pods::InterfaceId};

/// How much later than a pod's interface its Pod may become known.
const FOREIGN_AFTER: Duration = Duration::from_secs(30);
/// So long an interface may be closed before that is told.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is known of them.
#[derive(Debug, Default)]
pub struct UnknownInterfaces {
    /// Those left alone, and since when; `None`: for as long as it takes.
    left: BTreeMap<InterfaceId, Option<Instant>>,
    closed: BTreeMap<InterfaceId, Instant>,
}

impl UnknownInterfaces {
    /// Takes over what an earlier process has left alone.
    pub fn new(left: impl IntoIterator<Item = InterfaceId>) -> Self {
        Self {
            left: left.into_iter().map(|interface| (interface, None)).collect(),
            closed: BTreeMap::new(),
        }
    }

    /// Those that are to be closed. `found`: all that there are. `has_programs`: by ifindex.
    pub fn update(
        &mut self,
        found: &BTreeSet<InterfaceId>,
        unknown: Unknown,
        now: Instant,
        has_programs: impl Fn(u32) -> bool,
    ) -> BTreeSet<InterfaceId> {
        self.left.retain(|interface, _| found.contains(interface));
        let closed: BTreeSet<InterfaceId> = match unknown {
            Unknown::Keep => {
                let kept = found.iter().filter(|interface| has_programs(interface.ifindex));
                kept.copied().collect()
            }
            Unknown::Leave => {
                for interface in found {
                    self.left.entry(*interface).or_insert(Some(now));
                }
                BTreeSet::new()
            }
            Unknown::Close => {
                self.left.retain(|_, since| {
                    since.is_none_or(|since| now.saturating_duration_since(since) >= FOREIGN_AFTER)
                });
                let left = &self.left;
                found
                    .iter()
                    .filter(|interface| !left.contains_key(interface))
                    .copied()
                    .collect()
            }
        };
        // One that only keeps its programs may be that of a pod which an earlier process knew.
        let told = (unknown == Unknown::Close).then_some(&closed);
        self.closed
            .retain(|interface, _| told.is_some_and(|told| told.contains(interface)));
        for interface in told.into_iter().flatten() {
            self.closed.entry(*interface).or_insert(now);
        }
        closed
    }

    /// Those that are left alone, to be remembered.
    pub fn left(&self) -> BTreeSet<InterfaceId> {
        self.left.keys().copied().collect()
    }

    /// Those that have been closed for longer than a pod takes to become known, while one is expected.
    pub fn closed_for_long(&self, now: Instant) -> impl Iterator<Item = u32> {
        let long = self
            .closed
            .iter()
            .filter(move |(_, since)| now.saturating_duration_since(**since) >= PATIENCE);
        long.map(|(interface, _)| interface.ifindex)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(ifindex: u32) -> InterfaceId {
        InterfaceId {
            ifindex,
            namespace: 3,
        }
    }

    fn interfaces(indexes: &[u32]) -> BTreeSet<InterfaceId> {
        indexes.iter().map(|ifindex| interface(*ifindex)).collect()
    }

    #[test]
    fn new_interfaces_are_closed_while_a_pod_is_expected_and_old_ones_are_left_alone() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let none = |_| false;
        let mut unknown = UnknownInterfaces::default();
        assert!(
            unknown
                .update(&interfaces(&[1]), Unknown::Leave, at(0), none)
                .is_empty()
        );
        assert!(
            unknown
                .update(&interfaces(&[1, 2]), Unknown::Leave, at(20), none)
                .is_empty()
        );
        let closed = unknown.update(&interfaces(&[1, 2, 3]), Unknown::Close, at(30), none);
        assert_eq!(closed, interfaces(&[2, 3]));
        assert_eq!(unknown.left(), interfaces(&[1]));
        let closed = unknown.update(&interfaces(&[1, 2, 3]), Unknown::Close, at(90), none);
        assert_eq!(closed, interfaces(&[2, 3]), "however long it takes");
        assert_eq!(unknown.closed_for_long(at(90)).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(unknown.closed_for_long(at(31)).count(), 0);
        assert!(
            unknown
                .update(&interfaces(&[1, 2, 3]), Unknown::Leave, at(91), none)
                .is_empty()
        );
        let closed = unknown.update(&interfaces(&[1, 2, 3]), Unknown::Close, at(92), none);
        assert_eq!(closed, interfaces(&[2, 3]), "it may be the next one's");
        assert!(
            unknown
                .update(&interfaces(&[]), Unknown::Close, at(93), none)
                .is_empty()
        );
        let closed = unknown.update(&interfaces(&[1]), Unknown::Close, at(94), none);
        assert_eq!(closed, interfaces(&[1]), "another of that number");
    }

    #[test]
    fn a_restart_closes_nothing_and_opens_nothing() {
        let now = Instant::now();
        let mut before = UnknownInterfaces::default();
        before.update(&interfaces(&[1]), Unknown::Leave, now, |_| false);
        let mut after = UnknownInterfaces::new(before.left());
        let found = interfaces(&[1, 2, 3]);
        let has_programs = |ifindex| ifindex == 2;
        assert_eq!(
            after.update(&found, Unknown::Keep, now, has_programs),
            interfaces(&[2])
        );
        assert_eq!(
            after.closed_for_long(now + PATIENCE).count(),
            0,
            "it may be a pod's that was known before, and is not closed then"
        );
        assert_eq!(
            after.update(&found, Unknown::Close, now, has_programs),
            interfaces(&[2, 3]),
            "the last one has come meanwhile"
        );
    }
}
