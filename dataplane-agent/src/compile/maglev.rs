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
                if !weights.is_empty() {
                    credit[number] += weights.get(number).copied().unwrap_or(heaviest);
                    if credit[number] < heaviest {
                        continue;
                    }
                    credit[number] -= heaviest;
                }
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
    use dataplane_common::{
        balance::{cookie_hash, slot_of},
        service::size_class,
    };

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
        for count in [1, 2, 3, 5, 10, 100, 1000, 5000] {
            let backends = backends(count);
            let counts = counts(&table(&backends, &[], size_class(backends.len())), backends.len());
            let (min, max) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(max - min <= 1, "{count} backends: {min} to {max} slots");
        }
    }

    /// Of 40 connections in a row, each of four backends gets some: at random, one of 25,000 tables leaves one out.
    #[test]
    fn sockets_one_after_the_other_are_spread() {
        let many = backends(4 * 200);
        for few in many.chunks(4) {
            let class = size_class(few.len());
            let slots = table(few, &[], class);
            for step in 1..=8 {
                let cookies = (0..40).map(|socket| 4096 + socket * step);
                let chosen = cookies.map(|cookie| {
                    let slot = slot_of(cookie_hash(cookie), TABLE_SIZES[usize::from(class)]);
                    slots[slot as usize]
                });
                let counts = counts(&chosen.collect::<Vec<u16>>(), few.len());
                assert!(!counts.contains(&0), "{few:?}, in steps of {step}: {counts:?}");
            }
        }
    }

    #[test]
    fn weights_are_proportions() {
        let counts = counts(&table(&backends(3), &[1, 2, 1], 5), 3);
        assert!((counts[1] - 2 * counts[0]).abs_diff(0) <= 2, "{counts:?}");
    }

    fn float(count: usize) -> f64 {
        f64::from(u32::try_from(count).unwrap())
    }

    /// How much of all slots moves between backends that stay when one of `count` leaves: the mean and the worst over
    /// up to 20 leavers.
    fn disruption(count: u32, class: u8) -> (f64, f64) {
        let all = backends(count);
        let before = table(&all, &[], class);
        let leavers: Vec<usize> = (0..all.len()).step_by(all.len().div_ceil(20)).collect();
        let moved: Vec<f64> = leavers
            .iter()
            .map(|&leaver| {
                let mut fewer = all.clone();
                fewer.remove(leaver);
                let after = table(&fewer, &[], class);
                let slots = before.iter().zip(&after);
                let moved = slots.filter(|(old, new)| {
                    usize::from(**old) != leaver && all[usize::from(**old)] != fewer[usize::from(**new)]
                });
                float(moved.count()) / float(before.len())
            })
            .collect();
        let sum: f64 = moved.iter().sum();
        (sum / float(moved.len()), moved.into_iter().fold(0.0, f64::max))
    }

    #[test]
    fn disruption_is_as_published() {
        // At 16381 slots, as every service has them elsewhere: 0.6 % of all flows with 10 backends, 1.3 % with 100.
        let class = size_class(100);
        assert_eq!(TABLE_SIZES[usize::from(class)], 16_381);
        for (count, published) in [(10, 0.006), (100, 0.013)] {
            let (mean, worst) = disruption(count, class);
            assert!(mean < published * 1.1, "{count} backends: {mean}");
            assert!(worst < published * 1.5, "{count} backends: {worst} at worst");
        }
    }

    #[test]
    fn disruption_is_small_in_tables_sized_to_the_service() {
        assert_eq!(disruption(2, size_class(2)), (0.0, 0.0));
        for (count, most) in [
            (3, 0.015),
            (4, 0.015),
            (5, 0.025),
            (7, 0.02),
            (10, 0.03),
            (11, 0.02),
            (20, 0.03),
            (50, 0.02),
            (100, 0.015),
            (200, 0.0125),
            (500, 0.01),
            (1000, 0.0065),
        ] {
            let (mean, _) = disruption(count, size_class(count as usize));
            assert!(mean < most, "{count} backends: {mean}");
        }
    }

    #[test]
    fn tables_have_a_prime_of_slots_and_a_hundred_for_each_backend() {
        let is_prime = |size: u32| {
            (2..size)
                .take_while(|d| d * d <= size)
                .all(|d| !size.is_multiple_of(d))
        };
        assert!(TABLE_SIZES[1..].iter().all(|size| is_prime(*size)));
        let largest = TABLE_SIZES[TABLE_SIZES.len() - 1] as usize;
        for count in 1..largest / 100 {
            let class = usize::from(size_class(count));
            assert!(TABLE_SIZES[class] as usize >= 100 * count, "{count} backends");
            assert!(
                (TABLE_SIZES[class - 1] as usize) < 100 * count,
                "{count} backends"
            );
        }
        assert_eq!(TABLE_SIZES[usize::from(size_class(1))], 101);
        assert_eq!(size_class(MAX_BACKENDS), TABLE_SIZES.len() as u8 - 1);
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
