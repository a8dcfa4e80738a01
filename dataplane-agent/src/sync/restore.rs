//! What an earlier process left in the tables: its numbers are taken over before any is given out.

use dataplane_common::{
    backend::backend_state,
    service::{PORT_SETS, ServiceHead, service_flags},
};

use super::{
    arena::Slice, backends, desired::Touched, encode, programmed::Programmed, service_ids::ServiceId,
};
use crate::{
    compile::maglev,
    store::{Store, StoreError},
};

/// Reads every table. Everything that is found is touched, so that the first run keeps or deletes it.
pub fn restore(store: &dyn Store, touched: &mut Touched) -> Result<Programmed, StoreError> {
    let limits = store.limits();
    let mut programmed = Programmed::new(limits.services, limits.backends, limits.maglev);
    programmed.frontends = store.frontends()?.into_iter().collect();
    touched.frontends.extend(programmed.frontends.keys());
    for (service, range) in store.ranges()? {
        programmed.ranges.entry(service).or_default().insert(range);
    }
    for index in 0..PORT_SETS {
        let set = store.read_ports(index)?;
        if set.any != 0 || set.wildcard != 0 {
            touched.ports.insert(index);
        }
        programmed.ports.push(set);
    }
    programmed.own_addresses = store.own_addresses()?.into_iter().collect();
    programmed.devices = store.devices()?.into_iter().collect();
    restore_backends(store, limits.backends, &mut programmed, touched)?;
    restore_services(store, limits.services, &mut programmed)?;
    Ok(programmed)
}

fn restore_backends(
    store: &dyn Store,
    limit: u32,
    programmed: &mut Programmed,
    touched: &mut Touched,
) -> Result<(), StoreError> {
    let named = |id| backends::named(store, id);
    let mut idle = Vec::new();
    for id in 1..limit {
        let backend = store.read_backend(id)?;
        let Some(key) = encode::owned_backend(&backend) else {
            continue;
        };
        programmed.backend_ids.restore(id, &key, named);
        if matches!(backend.head.state, backend_state::ACTIVE | backend_state::SERVING) {
            touched.backends.insert(key);
        } else {
            idle.push((backend.head.generation, id, key));
        }
    }
    // When they became idle is not recorded; those that were reused least come first.
    idle.sort_unstable();
    for (_, id, key) in idle {
        if programmed.backend_ids.get(&key, named) == Some(id) {
            programmed.backend_ids.retire(&key, named);
        }
    }
    Ok(())
}

fn restore_services(store: &dyn Store, limit: u32, programmed: &mut Programmed) -> Result<(), StoreError> {
    for index in 1..limit {
        let value = store.read_service(index)?;
        if value.head.generation == 0 && value.port_be == 0 {
            continue;
        }
        programmed.service_ids.restore(index);
        if value.head.flags & service_flags::DELETED != 0 {
            if programmed.ranges.contains_key(&index) {
                // Its deletion was interrupted.
                programmed.found.insert(index);
            } else {
                programmed.service_ids.retire(&ServiceId::Found(index));
            }
            continue;
        }
        read_slice(store, index, value.head, programmed)?;
        programmed.found.insert(index);
    }
    Ok(())
}

/// The slice that a service's head leads to; `None`: it has none, or makes no sense.
pub fn find_slice(store: &dyn Store, head: ServiceHead) -> Result<Option<Slice>, StoreError> {
    if head.size_class == 0 {
        return Ok(None);
    }
    let limit = store.limits().maglev;
    let slots = encode::slot_words(head.size_class);
    if head.slots_offset == 0 || head.slots_offset.checked_add(slots).is_none_or(|end| end > limit) {
        return Ok(None);
    }
    let mut count = [0];
    store.read_maglev(head.slots_offset - 1, &mut count)?;
    let ids = usize::try_from(count[0])
        .ok()
        .filter(|ids| *ids <= maglev::MAX_BACKENDS);
    Ok(ids.and_then(|ids| encode::slice_at(head.slots_offset, ids, head.size_class)))
}

/// Reads a service's slice and takes its room. A head that makes no sense is left without slice, and so rewritten.
fn read_slice(
    store: &dyn Store,
    index: u32,
    head: ServiceHead,
    programmed: &mut Programmed,
) -> Result<(), StoreError> {
    let Some(slice) = find_slice(store, head)? else {
        return Ok(());
    };
    if !programmed.arena.reserve(slice) {
        return Ok(());
    }
    programmed.set_slice(index, Some(slice));
    programmed.unverified.insert(index);
    Ok(())
}
