//! What an earlier process left in the tables: its numbers are taken over before any is given out.

use dataplane_common::{
    backend::backend_state,
    service::{PORT_SETS, service_flags},
};

use super::{
    desired::Touched,
    encode,
    programmed::{Programmed, ServiceId, Slot},
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
    touched.frontends.extend(programmed.frontends.keys().copied());
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
    backends(store, limits.backends, &mut programmed, touched)?;
    services(store, limits.services, &mut programmed)?;
    Ok(programmed)
}

fn backends(
    store: &dyn Store,
    limit: u32,
    programmed: &mut Programmed,
    touched: &mut Touched,
) -> Result<(), StoreError> {
    let mut idle = Vec::new();
    for id in 1..limit {
        let backend = store.read_backend(id)?;
        let Some(key) = encode::owned_backend(&backend) else {
            continue;
        };
        programmed.backend_ids.restore(id, key);
        if matches!(backend.head.state, backend_state::ACTIVE | backend_state::SERVING) {
            touched.backends.insert(key);
        } else {
            idle.push((backend.head.generation, id, key));
        }
    }
    // When they became idle is not recorded; those that were reused least come first.
    idle.sort_unstable();
    for (_, id, key) in idle {
        if programmed.backend_ids.get(&key) == Some(id) {
            programmed.backend_ids.retire(&key);
        }
    }
    Ok(())
}

fn services(store: &dyn Store, limit: u32, programmed: &mut Programmed) -> Result<(), StoreError> {
    for index in 1..limit {
        let value = store.read_service(index)?;
        if value.head.generation == 0 && value.port_be == 0 {
            continue;
        }
        let id = ServiceId::Found(index);
        programmed.service_ids.restore(index, id.clone());
        let mut slot = Slot {
            value,
            ..Slot::default()
        };
        if value.head.flags & service_flags::DELETED != 0 {
            programmed.set_slot(index, slot);
            if programmed.ranges.contains_key(&index) {
                // Its deletion was interrupted.
                programmed.found.insert(index);
            } else {
                programmed.service_ids.retire(&id);
            }
            continue;
        }
        read_slice(store, index, &mut slot, programmed)?;
        programmed.set_slot(index, slot);
        programmed.found.insert(index);
    }
    Ok(())
}

/// Reads a service's slice and takes its room. A head that makes no sense is left without slice, and so rewritten.
fn read_slice(
    store: &dyn Store,
    index: u32,
    slot: &mut Slot,
    programmed: &mut Programmed,
) -> Result<(), StoreError> {
    let head = slot.value.head;
    if head.size_class == 0 {
        return Ok(());
    }
    let limit = store.limits().maglev;
    let slots = encode::slot_words(head.size_class);
    if head.slots_offset == 0 || head.slots_offset.checked_add(slots).is_none_or(|end| end > limit) {
        return Ok(());
    }
    let mut count = [0];
    store.read_maglev(head.slots_offset - 1, &mut count)?;
    let Some(ids) = usize::try_from(count[0])
        .ok()
        .filter(|ids| *ids <= maglev::MAX_BACKENDS)
    else {
        return Ok(());
    };
    let Some(slice) = encode::slice_at(head.slots_offset, ids, head.size_class) else {
        return Ok(());
    };
    if !programmed.arena.reserve(slice) {
        return Ok(());
    }
    slot.slice = Some(slice);
    programmed.unverified.insert(index);
    Ok(())
}
