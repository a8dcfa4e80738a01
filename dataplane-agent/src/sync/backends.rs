//! Entries of `BACKENDS`: promoted before any table chooses them, demoted when none does any more.

use std::net::SocketAddr;

use dataplane_common::{
    backend::{Backend, backend_state},
    sock::SockBackend,
};

use super::{
    NoRoom, Report, Syncer,
    desired::Uses,
    encode::{self, Whereabouts},
    ids::Given,
};
use crate::{
    compile::BackendKey,
    model::{ObjectRef, Protocol},
    store::Store,
};

/// An endpoint as one Service or Pod has it. Each of them has an id of its own for it, so that the flows of one that
/// loses the endpoint move, and the others' stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct OwnedBackend {
    /// [`encode::owner`].
    pub owner: u32,
    pub key: BackendKey,
}

impl Syncer {
    /// Numbers new backends, and writes what makes a backend more usable or changes where it is.
    pub(super) fn put_backends(&mut self, store: &mut dyn Store, report: &mut Report) {
        let mut touched = std::mem::take(&mut self.touched.backends);
        touched.retain(|key| !self.put_backend(store, report, key));
        self.touched.backends = touched;
    }

    /// Whether nothing is left to do for a backend. A demotion waits until no table chooses it any more.
    fn put_backend(&mut self, store: &mut dyn Store, report: &mut Report, key: &OwnedBackend) -> bool {
        let Some(uses) = self.desired.uses(key) else {
            return false;
        };
        let Some(given) = self.programmed.backend_ids.give(key, |id| named(store, id)) else {
            let limit = self.limits.backends;
            report.not_tried(describe(&key.key), &NoRoom::Backends { limit });
            return false;
        };
        let at_least = match given {
            Given::Same(id) => rank(read(store, id).head.state),
            Given::New(_) => 0,
        };
        let state = state(uses);
        rank(state) >= at_least && self.write_backend(store, report, key, given, state, uses)
    }

    /// Writes the backends' final states.
    pub(super) fn demote_backends(&mut self, store: &mut dyn Store, report: &mut Report) {
        let in_use = self.backends_of_stale_services(store);
        for key in std::mem::take(&mut self.touched.backends) {
            let Some(id) = self.programmed.backend_id(store, &key) else {
                if self.desired.uses(&key).is_some() {
                    self.touched.backends.insert(key);
                }
                continue;
            };
            if in_use.contains(&id) {
                self.touched.backends.insert(key);
                continue;
            }
            let wanted = self.desired.uses(&key);
            let uses = wanted.unwrap_or_default();
            let done = self.write_backend(store, report, &key, Given::Same(id), state(uses), uses);
            if !done {
                self.touched.backends.insert(key);
            } else if wanted.is_none() {
                self.programmed.garbage.backends.insert(key);
            }
        }
    }

    fn write_backend(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        key: &OwnedBackend,
        given: Given,
        state: u8,
        uses: Uses,
    ) -> bool {
        let (id, is_new) = match given {
            Given::Same(id) => (id, false),
            Given::New(id) => (id, true),
        };
        let before = read(store, id);
        let generation = if encode::owned_backend(&before) == Some(*key) {
            before.head.generation
        } else {
            before.head.generation.wrapping_add(1).max(1)
        };
        let addr = &key.key.addr;
        let place = if self.host.own_addresses.contains_key(addr) {
            Whereabouts::Host
        } else if let Some(interface) = self.host.pod_interfaces.get(addr) {
            Whereabouts::Local(Some(interface))
        } else if uses.local {
            Whereabouts::Local(None)
        } else {
            Whereabouts::Remote
        };
        let backend = encode::backend(key, generation, state, place);
        if backend == before {
            return true;
        }
        let done = report.note(|| describe(&key.key), store.write_backend(id, &backend));
        if !done && is_new {
            self.programmed.backend_ids.take_back(id, key);
        }
        if done
            && key.key.proto == Protocol::Udp
            && serves_datagrams(before.head.state)
            && !serves_datagrams(state)
        {
            report.lost.insert(SocketAddr::new(*addr, key.key.port));
        }
        done
    }
}

/// What the table says of a backend id: it is mapped, so nothing of it is kept beside.
pub(super) fn read(store: &dyn Store, id: u32) -> Backend {
    // Only an id beyond the table's end cannot be read.
    store.read_backend(id).unwrap_or_default()
}

/// Who has a backend id, or had it last.
pub fn named(store: &dyn Store, id: u32) -> Option<OwnedBackend> {
    encode::owned_backend(&read(store, id))
}

/// Whether a backend that a socket was given serves its Service still.
pub fn serves(store: &dyn Store, given: SockBackend) -> bool {
    let head = read(store, given.backend).head;
    head.generation == given.backend_generation && serves_datagrams(head.state)
}

/// Whether UDP flows stay with a backend in this state.
fn serves_datagrams(state: u8) -> bool {
    matches!(state, backend_state::ACTIVE | backend_state::SERVING)
}

impl Syncer {
    /// Those of an owner's backends whose entries are in the table and active, and their ids.
    pub(super) fn active_backends(
        &self,
        store: &dyn Store,
        owner: &ObjectRef,
        backends: &[BackendKey],
    ) -> (Vec<BackendKey>, Vec<u32>) {
        let owner = encode::owner(owner);
        let id = |key: BackendKey| {
            let key = OwnedBackend { owner, key };
            let id = self.programmed.backend_id(store, &key)?;
            let backend = read(store, id);
            let is_active = backend.head.state == backend_state::ACTIVE;
            (is_active && encode::owned_backend(&backend) == Some(key)).then_some(id)
        };
        let numbered = backends.iter().filter_map(|key| Some((*key, id(*key)?)));
        numbered.unzip()
    }
}

/// The state in which a backend belongs.
fn state(uses: Uses) -> u8 {
    if uses.chosen {
        backend_state::ACTIVE
    } else if uses.serving {
        backend_state::SERVING
    } else {
        backend_state::DRAINING
    }
}

/// States by how much they allow.
fn rank(state: u8) -> u8 {
    match state {
        backend_state::ACTIVE => 3,
        backend_state::SERVING => 2,
        backend_state::DRAINING => 1,
        _ => 0,
    }
}

pub fn describe(key: &BackendKey) -> String {
    let BackendKey { addr, port, proto } = key;
    format!(
        "backend {}/{}",
        std::net::SocketAddr::new(*addr, *port),
        proto.as_str()
    )
}
