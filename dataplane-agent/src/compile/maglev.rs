//! Maglev tables (Eisenbud et al., NSDI 2016, section 3.4): every backend has a permutation of the slots, and they
//! take turns in claiming the next free slot of theirs. The table depends on the set of backends alone, so every
//! node computes the same one, and a backend more or less moves few of the others' slots.

use std::{hash::Hasher, net::IpAddr};

use dataplane_common::service::TABLE_SIZES;
use siphasher::sip::SipHasher24;

use super::BackendKey;

/// Fixed, so that every node and every version computes the same tables.
const OFFSET_KEYS: (u64, u64) = (0x6d61_676c_6576_2031, 0x6f66_6673_6574_7331);
const SKIP_KEYS: (u64, u64) = (0x6d61_676c_6576_2032, 0x736b_6970_7320_2020);

/// The most backends that a 16-bit slot can number.
pub const MAX_BACKENDS: usize = 1 << 16;

/// A backend's turns are in proportion to its weight.
pub type Weight = u32;

/// A table of size class `class`: for each slot the place of its backend in `backends`, which is sorted and
/// without duplicates. `weights` is empty where all are equal.
pub fn table(backends: &[BackendKey], weights: &[Weight], class: u8) -> Vec<u16> {
    let mut filler = Filler::default();
    filler.fill(backends, weights, class);
    filler.slots
}

/// Fills one table after the other in the same memory: they are many, and larger than what allocators are quick at.
#[derive(Debug, Default)]
pub struct Filler {
    slots: Vec<u16>,
    /// Whether a slot is taken cannot be told by its value where there are 65536 backends.
    taken: Vec<bool>,
    turns: Vec<Permutation>,
    credit: Vec<Weight>,
}

impl Filler {
    /// The table that was filled last.
    pub fn slots(&self) -> &[u16] {
        &self.slots
    }

    /// As [`table`].
    pub fn fill(&mut self, backends: &[BackendKey], weights: &[Weight], class: u8) {
        let Self {
            slots,
            taken,
            turns,
            credit,
        } = self;
        let size = TABLE_SIZES[usize::from(class)];
        slots.clear();
        slots.resize(size as usize, u16::MAX);
        if backends.is_empty() || size == 0 {
            return;
        }
        taken.clear();
        taken.resize(size as usize, false);
        turns.clear();
        turns.extend(backends.iter().map(|backend| Permutation::new(backend, size)));
        credit.clear();
        credit.resize(backends.len(), 0);
        let heaviest = weights.iter().copied().max().unwrap_or(1).max(1);
        let mut left = size;
        loop {
            for (number, turn) in turns.iter_mut().enumerate() {
                let weight = weights.get(number).copied().unwrap_or(heaviest);
                credit[number] += weight;
                if credit[number] < heaviest {
                    continue;
                }
                credit[number] -= heaviest;
                let slot = loop {
                    let slot = turn.next_slot() as usize;
                    if !taken[slot] {
                        break slot;
                    }
                };
                taken[slot] = true;
                slots[slot] = number as u16;
                left -= 1;
                if left == 0 {
                    return;
                }
            }
        }
    }
}

/// The order in which a backend wants the slots: a walk by a fixed step, which meets all since the size is prime.
#[derive(Debug)]
struct Permutation {
    next: u32,
    step: u32,
    size: u32,
}

impl Permutation {
    fn new(backend: &BackendKey, size: u32) -> Self {
        let modulo = |(k0, k1), modulus: u32| (hash(backend, k0, k1) % u64::from(modulus)) as u32;
        Self {
            next: modulo(OFFSET_KEYS, size),
            step: modulo(SKIP_KEYS, size - 1) + 1,
            size,
        }
    }

    fn next_slot(&mut self) -> u32 {
        let slot = self.next;
        self.next += self.step;
        if self.next >= self.size {
            self.next -= self.size;
        }
        slot
    }
}

fn hash(backend: &BackendKey, k0: u64, k1: u64) -> u64 {
    let BackendKey { addr, port, proto } = backend;
    let mut hasher = SipHasher24::new_with_keys(k0, k1);
    match addr {
        IpAddr::V4(addr) => hasher.write(&addr.octets()),
        IpAddr::V6(addr) => hasher.write(&addr.octets()),
    }
    hasher.write(&port.to_be_bytes());
    hasher.write(&[proto.number()]);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use dataplane_common::service::size_class;

    use super::*;
    use crate::model::Protocol;

    fn backends(count: u32) -> Vec<BackendKey> {
        (0..count)
            .map(|i| BackendKey {
                addr: IpAddr::V4((0x0af4_0000 + i).into()),
                port: 8080,
                proto: Protocol::Tcp,
            })
            .collect()
    }

    fn counts(slots: &[u16], backends: usize) -> Vec<u32> {
        let mut counts = vec![0; backends];
        for slot in slots {
            counts[usize::from(*slot)] += 1;
        }
        counts
    }

    #[test]
    fn every_backend_gets_its_share() {
        for count in [1, 2, 3, 10, 100, 1000] {
            let backends = backends(count);
            let counts = counts(&table(&backends, &[], size_class(backends.len())), backends.len());
            let (min, max) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(max - min <= 1, "{count} backends: {min} to {max} slots");
        }
    }

    #[test]
    fn weights_are_proportions() {
        let counts = counts(&table(&backends(3), &[1, 2, 1], 5), 3);
        assert!((counts[1] - 2 * counts[0]).abs_diff(0) <= 2, "{counts:?}");
    }

    /// Of ten thousand slots, how many move between backends that stay when one of `count` leaves.
    fn disruption(count: u32, class: u8) -> usize {
        let all = backends(count);
        let leaver = count / 2;
        let mut fewer = all.clone();
        fewer.remove(leaver as usize);
        let before = table(&all, &[], class);
        let after = table(&fewer, &[], class);
        let moved = before
            .iter()
            .zip(&after)
            .filter(|(old, new)| all[usize::from(**old)] != fewer[usize::from(**new)])
            .count();
        let unavoidable = before.iter().filter(|slot| u32::from(**slot) == leaver).count();
        (moved - unavoidable) * 10_000 / before.len()
    }

    #[test]
    fn a_leaving_backend_moves_few_of_the_others() {
        // The published tables move 0.6 to 1.3 % at 100 slots a backend and more.
        for (count, class) in [(100, 8), (100, 10), (1000, 11)] {
            let moved = disruption(count, class);
            assert!(moved < 200, "{count} backends in class {class}: {moved} of 10000");
        }
    }

    #[test]
    fn tables_never_change_between_versions() {
        let slots = table(&backends(3), &[], 1);
        assert_eq!(slots.len(), 101);
        let digest = slots.iter().fold(0u64, |sum, slot| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*slot))
        });
        assert_eq!(digest, PINNED, "clients would be spread anew by an upgrade");
    }

    const PINNED: u64 = 11_017_018_675_584_241_408;
}
