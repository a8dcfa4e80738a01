//! Entries of `BACKENDS`: promoted before any table chooses them, demoted when none does any more.

use dataplane_common::backend::backend_state;

use super::{
    NoRoom, Report, Syncer,
    desired::Uses,
    encode::{self, Whereabouts},
    ids::Given,
};
use crate::{compile::BackendKey, store::Store};

impl Syncer {
    /// Numbers new backends, and writes what makes a backend more usable or changes where it is.
    pub(super) fn put_backends(&mut self, store: &mut dyn Store, report: &mut Report) {
        for key in self.touched.backends.clone() {
            let Some(uses) = self.desired.backends.get(&key).copied() else {
                continue;
            };
            let Some(given) = self.programmed.backend_ids.give(&key) else {
                let limit = self.limits.backends;
                report.not_tried(describe(&key), &NoRoom::Backends { limit });
                continue;
            };
            // A demotion waits until no table chooses the backend any more.
            let at_least = match given {
                Given::Same(id) => rank(self.programmed.backend(id).head.state),
                Given::New(_) => 0,
            };
            let state = state(&uses);
            if rank(state) < at_least {
                continue;
            }
            self.write_backend(store, report, &key, given, state, &uses);
        }
    }

    /// Writes the backends' final states.
    pub(super) fn demote_backends(&mut self, store: &mut dyn Store, report: &mut Report) {
        let in_use = self.backends_of_stale_services();
        for key in std::mem::take(&mut self.touched.backends) {
            let Some(id) = self.programmed.backend_ids.get(&key) else {
                if self.desired.backends.contains_key(&key) {
                    self.touched.backends.insert(key);
                }
                continue;
            };
            if in_use.contains(&id) {
                self.touched.backends.insert(key);
                continue;
            }
            let uses = self.desired.backends.get(&key).copied().unwrap_or_default();
            let done = self.write_backend(store, report, &key, Given::Same(id), state(&uses), &uses);
            if !done {
                self.touched.backends.insert(key);
            } else if uses.total == 0 {
                self.programmed.backend_garbage.push(key);
            }
        }
    }

    fn write_backend(
        &mut self,
        store: &mut dyn Store,
        report: &mut Report,
        key: &BackendKey,
        given: Given,
        state: u8,
        uses: &Uses,
    ) -> bool {
        let (id, is_new) = match given {
            Given::Same(id) => (id, false),
            Given::New(id) => (id, true),
        };
        let before = self.programmed.backend(id);
        let generation = if encode::backend_key(&before) == Some(*key) {
            before.head.generation
        } else {
            before.head.generation.wrapping_add(1).max(1)
        };
        let place = if self.host.own_addresses.contains_key(&key.addr) {
            Whereabouts::Host
        } else if let Some(interface) = self.host.pod_interfaces.get(&key.addr) {
            Whereabouts::Local(Some(interface))
        } else if uses.local > 0 {
            Whereabouts::Local(None)
        } else {
            Whereabouts::Remote
        };
        let backend = encode::backend(key, generation, state, place);
        if backend == before {
            return true;
        }
        let done = report.note(describe(key), store.write_backend(id, &backend));
        if done {
            self.programmed.set_backend(id, backend);
        } else if is_new {
            self.programmed.backend_ids.take_back(key);
        }
        done
    }
}

/// The state in which a backend belongs.
fn state(uses: &Uses) -> u8 {
    if uses.chosen > 0 {
        backend_state::ACTIVE
    } else if uses.serving > 0 {
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
