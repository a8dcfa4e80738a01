//! What many objects say alike is kept once: names of nodes, zones and ports, whole lists of ports, label sets.

use std::{
    collections::{BTreeMap, HashSet},
    hash::Hash,
    sync::{Arc, LazyLock, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};

use super::{Placement, PodPort, SlicePort};

/// Values in use somewhere. Those that nobody uses any more leave when the pool has doubled since they last did.
struct Pool<T: ?Sized>(LazyLock<Mutex<(HashSet<Arc<T>>, usize)>>);

/// Below this size nothing is swept.
const SWEEP_AT_LEAST: usize = 1024;

impl<T: ?Sized + Eq + Hash> Pool<T> {
    const fn new() -> Self {
        Self(LazyLock::new(|| Mutex::new((HashSet::new(), SWEEP_AT_LEAST))))
    }

    /// The value itself where it is known, else `make`'s.
    fn share(&self, value: &T, make: impl FnOnce() -> Arc<T>) -> Arc<T> {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (known, sweep_at) = &mut *pool;
        if let Some(shared) = known.get(value) {
            return shared.clone();
        }
        if known.len() >= *sweep_at {
            known.retain(|value| Arc::strong_count(value) > 1);
            *sweep_at = (known.len() * 2).max(SWEEP_AT_LEAST);
        }
        let shared = make();
        known.insert(shared.clone());
        shared
    }
}

static TEXTS: Pool<str> = Pool::new();
static PORTS: Pool<[SlicePort]> = Pool::new();
static POD_PORTS: Pool<[PodPort]> = Pool::new();
static PLACEMENTS: Pool<Placement> = Pool::new();

/// A text that is likely to be there already.
pub fn text(text: &str) -> Arc<str> {
    TEXTS.share(text, || text.into())
}

/// The ports of a slice: most slices of a cluster have one of a few lists.
pub fn ports(ports: Vec<SlicePort>) -> Arc<[SlicePort]> {
    PORTS.share(&ports.clone(), || ports.into())
}

/// Where an endpoint is.
pub fn placement(placement: Placement) -> Arc<Placement> {
    PLACEMENTS.share(&placement.clone(), || Arc::new(placement))
}

/// The named ports of a Pod's containers: all replicas have the same.
pub fn pod_ports(ports: Vec<PodPort>) -> Arc<[PodPort]> {
    POD_PORTS.share(&ports.clone(), || ports.into())
}

/// Labels or a selector, sorted by key, in one piece: each key and each value ends with NUL, which neither can contain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Labels(Arc<str>);

impl Labels {
    /// `None` when a text contains NUL, which the API server does not accept.
    pub fn new(labels: &BTreeMap<String, String>) -> Option<Self> {
        let mut text = String::new();
        for part in labels.iter().flat_map(|(key, value)| [key, value]) {
            if part.contains('\0') {
                return None;
            }
            text.push_str(part);
            text.push('\0');
        }
        Some(Self(text.into()))
    }

    /// The same, kept once for all that have them.
    #[must_use]
    pub fn shared(self) -> Self {
        Self(TEXTS.share(&self.0, || self.0.clone()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What [`pairs`] reads.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        pairs(&self.0)
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.iter()
            .find(|(known, _)| *known == key)
            .map(|(_, value)| value)
    }
}

/// Keys and values of the text of [`Labels`].
pub fn pairs(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let mut parts = text.split_terminator('\0');
    std::iter::from_fn(move || Some((parts.next()?, parts.next()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_read_as_they_were() {
        let map: BTreeMap<String, String> = [("app", "web"), ("empty", ""), ("tier", "front")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into();
        let labels = Labels::new(&map).unwrap();
        assert_eq!(labels.get("empty"), Some(""));
        assert_eq!(labels.get("tier"), Some("front"));
        assert_eq!(labels.get("web"), None, "a value is no key");
        assert_eq!(labels.iter().count(), 3);
        let nul = [("a".to_owned(), "b\0c".to_owned())].into();
        assert_eq!(Labels::new(&nul), None);
    }

    #[test]
    fn what_is_shared_is_there_once_and_leaves_when_nobody_has_it() {
        let pool: Pool<str> = Pool::new();
        let share = |text: &str| pool.share(text, || text.into());
        let kept = share("kept");
        assert!(Arc::ptr_eq(&kept, &share("kept")));
        for number in 0..10 * SWEEP_AT_LEAST {
            share(&format!("{number}"));
        }
        assert!(pool.0.lock().unwrap().0.len() <= SWEEP_AT_LEAST);
        assert!(Arc::ptr_eq(&kept, &share("kept")));
    }
}
