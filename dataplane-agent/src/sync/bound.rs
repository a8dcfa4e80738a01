//! Keeps `BOUND_*`, `POD_RANGES`, `SOURCES_*` and `SOURCE_CHECKED` equal to what is known of this node's pod addresses.
//!
//! What nobody has is refused in this node's range, so an address is entered when its interface has its programs, before
//! the pod's policies: an interface without a row of `POD_POLICY` is closed. It is removed before the revision of policies
//! changes, by which flows that lead there are judged anew. An interface is checked once all its addresses are entered, and
//! until the first of them goes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use dataplane_common::unbound::{PodRange, range_index};
use ipnet::IpNet;

use super::Report;
use crate::store::{
    Store, StoreError,
    policy::{BoundRows, SourcePlace},
};

/// The programmed and the desired rows.
#[derive(Debug, Default)]
pub struct BoundSyncer {
    programmed: BoundRows,
    desired: BoundRows,
}

/// What a run did.
#[derive(Debug, Default)]
pub struct BoundReport {
    pub report: Report,
    /// Flows may lead to addresses that nobody has any more.
    pub lost: bool,
}

impl BoundSyncer {
    /// Reads what the tables hold already, which stays until something else is desired.
    pub fn restore(store: &dyn Store) -> Result<Self, StoreError> {
        let programmed = store.bound_rows()?;
        Ok(Self {
            desired: programmed.clone(),
            programmed,
        })
    }

    /// `addrs`: the interface of each address. `checked`: the interfaces whose pods send from these alone.
    pub fn set(&mut self, addrs: BTreeMap<IpAddr, u32>, ranges: [PodRange; 2], checked: &BTreeSet<u32>) {
        let of_checked = addrs.iter().filter(|(_, ifindex)| checked.contains(ifindex));
        let mut own: Vec<(u32, IpAddr)> = of_checked.map(|(addr, ifindex)| (*ifindex, *addr)).collect();
        own.sort_unstable();
        let checked = own.iter().map(|(ifindex, _)| *ifindex).collect();
        let mut sources = BTreeMap::new();
        for (ifindex, addr) in own {
            sources
                .entry(SourcePlace::of(ifindex, addr))
                .or_insert((addr, ifindex));
        }
        self.desired = BoundRows {
            addrs,
            sources,
            checked,
            ranges,
        };
    }

    /// Whether these addresses are written.
    pub fn has(&self, addrs: &[IpAddr]) -> bool {
        addrs.iter().all(|addr| self.programmed.addrs.contains_key(addr))
    }

    /// Writes what differs: new addresses, ranges, what is checked, and then what is gone.
    pub fn run(&mut self, store: &mut dyn Store) -> BoundReport {
        let mut outcome = BoundReport::default();
        let report = &mut outcome.report;
        let Self { programmed, desired } = self;
        for (addr, ifindex) in &desired.addrs {
            if programmed.addrs.get(addr) != Some(ifindex)
                && report.note(|| entry(*addr), store.put_bound(*addr, *ifindex))
            {
                // Its flows were another's.
                outcome.lost |= programmed.addrs.insert(*addr, *ifindex).is_some();
            }
        }
        for (index, range) in desired.ranges.iter().enumerate() {
            if programmed.ranges[index] != *range
                && report.note(
                    || "range of pod addresses".to_owned(),
                    store.write_pod_range(index as u32, range),
                )
            {
                programmed.ranges[index] = *range;
                outcome.lost = true;
            }
        }
        check_sources(programmed, desired, report, store);
        let addrs = programmed.addrs.keys().copied();
        let gone: Vec<IpAddr> = addrs.filter(|addr| !desired.addrs.contains_key(addr)).collect();
        for addr in gone {
            if report.note(|| entry(addr), store.delete_bound(addr)) {
                programmed.addrs.remove(&addr);
                outcome.lost = true;
            }
        }
        outcome
    }

    /// Compares the tables with what we believe is in them; the next run makes good what differs. Returns how much that is.
    pub fn audit(&mut self, store: &dyn Store) -> Result<usize, StoreError> {
        let found = store.bound_rows()?;
        let differing = usize::from(found != self.programmed);
        self.programmed = found;
        Ok(differing)
    }
}

/// Makes equal which interfaces are checked, and what is looked at first.
fn check_sources(
    programmed: &mut BoundRows,
    desired: &BoundRows,
    report: &mut Report,
    store: &mut dyn Store,
) {
    let gone: Vec<u32> = programmed.checked.difference(&desired.checked).copied().collect();
    for ifindex in gone {
        if report.note(|| interface(ifindex), store.delete_source_checked(ifindex)) {
            programmed.checked.remove(&ifindex);
        }
    }
    let vacated: Vec<SourcePlace> = programmed
        .sources
        .keys()
        .filter(|place| !desired.sources.contains_key(place))
        .copied()
        .collect();
    for place in vacated {
        if report.note(|| source(place), store.write_source(place, None)) {
            programmed.sources.remove(&place);
        }
    }
    for (place, own) in &desired.sources {
        if programmed.sources.get(place) != Some(own)
            && report.note(|| source(*place), store.write_source(*place, Some(*own)))
        {
            programmed.sources.insert(*place, *own);
        }
    }
    // One that an address is missing of would lose packets.
    let incomplete: BTreeSet<u32> = desired
        .addrs
        .iter()
        .filter(|(addr, ifindex)| programmed.addrs.get(addr) != Some(ifindex))
        .map(|(_, ifindex)| *ifindex)
        .collect();
    for ifindex in desired.checked.difference(&incomplete) {
        if !programmed.checked.contains(ifindex)
            && report.note(|| interface(*ifindex), store.put_source_checked(*ifindex))
        {
            programmed.checked.insert(*ifindex);
        }
    }
}

fn interface(ifindex: u32) -> String {
    format!("check of sources at interface {ifindex}")
}

fn source(place: SourcePlace) -> String {
    match place {
        SourcePlace::V4(place) => format!("IPv4 source at place {place}"),
        SourcePlace::V6(place) => format!("IPv6 source at place {place}"),
    }
}

fn entry(addr: IpAddr) -> String {
    format!("pod address {addr}")
}

/// The elements of `POD_RANGES` for these ranges, one of each family at the most.
pub fn pod_ranges(ranges: &[IpNet]) -> [PodRange; 2] {
    let mut elements = [PodRange::default(); 2];
    for range in ranges {
        let (version, words) = match range {
            IpNet::V4(range) => (
                4,
                [range.network(), range.hostmask()].map(|addr| [u32::from_ne_bytes(addr.octets()), 0, 0, 0]),
            ),
            IpNet::V6(range) => (
                6,
                [range.network(), range.hostmask()].map(|addr| bytemuck::cast(addr.octets())),
            ),
        };
        let [network_be, free_be] = words;
        elements[range_index(version) as usize] = PodRange { network_be, free_be };
    }
    elements
}

#[cfg(test)]
mod tests {
    use dataplane_common::source::{SOURCE_PLACES, source_place};

    use super::*;
    use crate::store::{Limits, faulty::Faulty, memory::Memory, policy::PolicyLimits};

    const LIMITS: Limits = Limits {
        frontends: 1,
        services: 1,
        backends: 1,
        maglev: 100,
        source_ranges: 1,
        policy: PolicyLimits::new(10, 10, 64),
    };

    fn addrs(rows: &[(&str, u32)]) -> BTreeMap<IpAddr, u32> {
        rows.iter()
            .map(|(addr, ifindex)| (addr.parse().unwrap(), *ifindex))
            .collect()
    }

    fn ranges() -> [PodRange; 2] {
        pod_ranges(&["10.244.1.0/24".parse().unwrap(), "fd00:1::/64".parse().unwrap()])
    }

    #[test]
    fn a_range_has_its_network_and_its_free_bits_in_the_order_of_packets() {
        let [v4, v6] = ranges();
        assert_eq!(v4.network_be[0].to_ne_bytes(), [10, 244, 1, 0]);
        assert_eq!(v4.free_be[0].to_ne_bytes(), [0, 0, 0, 255]);
        let free: [u8; 16] = bytemuck::cast(v6.free_be);
        assert_eq!(free[..8], [0; 8]);
        assert_eq!(free[8..], [0xff; 8]);
        assert_eq!(pod_ranges(&[]), [PodRange::default(); 2]);
    }

    #[test]
    fn a_restart_without_news_writes_nothing_and_what_is_gone_is_told() {
        let mut memory = Memory::new(LIMITS);
        let mut syncer = BoundSyncer::restore(&memory).unwrap();
        let two = addrs(&[("10.244.1.5", 7), ("fd00:1::5", 7)]);
        syncer.set(two.clone(), ranges(), &BTreeSet::new());
        syncer.run(&mut memory);
        assert!(syncer.has(&["10.244.1.5".parse().unwrap()]));
        let writes = memory.writes;

        let mut again = BoundSyncer::restore(&memory).unwrap();
        assert_eq!(again.run(&mut memory).report.writes, 0, "nothing is known yet");
        again.set(two, ranges(), &BTreeSet::new());
        assert!(!again.run(&mut memory).lost);
        assert_eq!(memory.writes, writes);

        again.set(addrs(&[("10.244.1.5", 8)]), ranges(), &BTreeSet::new());
        let outcome = again.run(&mut memory);
        assert!(outcome.lost);
        assert_eq!(outcome.report.writes, 2);
        assert_eq!(memory.policy.bound.addrs, addrs(&[("10.244.1.5", 8)]));
        assert_eq!(again.audit(&memory).unwrap(), 0);
        memory.policy.bound.addrs.clear();
        assert_eq!(again.audit(&memory).unwrap(), 1);
        again.run(&mut memory);
        assert_eq!(memory.policy.bound.addrs.len(), 1);
    }

    #[test]
    fn what_is_refused_is_named_and_tried_again() {
        let mut store = Faulty::new(Memory::new(LIMITS), |attempt, _: &Memory| attempt == 1);
        let mut syncer = BoundSyncer::default();
        syncer.set(addrs(&[("10.244.1.5", 7)]), ranges(), &BTreeSet::new());
        let failed = syncer.run(&mut store).report.failed;
        assert_eq!(
            failed.keys().next().unwrap().to_string(),
            "pod address 10.244.1.5"
        );
        assert!(syncer.run(&mut store).report.failed.is_empty());
        assert_eq!(store.memory.policy.bound.addrs.len(), 1);
    }

    #[test]
    fn an_interface_is_checked_when_its_addresses_are_entered_and_one_of_them_is_looked_at_first() {
        let place = source_place(7);
        let other = 7 + SOURCE_PLACES;
        let rows = addrs(&[
            ("10.244.1.5", 7),
            ("10.244.1.6", 7),
            ("fd00:1::5", 7),
            ("10.244.1.7", other),
            ("10.244.1.8", 9),
        ]);
        let mut memory = Memory::new(LIMITS);
        let mut syncer = BoundSyncer::default();
        syncer.set(rows.clone(), ranges(), &BTreeSet::from([7, other, 11]));
        syncer.run(&mut memory);
        let bound = &memory.policy.bound;
        assert_eq!(bound.checked, BTreeSet::from([7, other]), "11 has no address");
        let expected = [
            (SourcePlace::V4(place), ("10.244.1.5".parse().unwrap(), 7)),
            (SourcePlace::V6(place), ("fd00:1::5".parse().unwrap(), 7)),
        ];
        assert_eq!(bound.sources, BTreeMap::from(expected), "9 is not checked");
        assert_eq!(
            BoundSyncer::restore(&memory)
                .unwrap()
                .run(&mut memory)
                .report
                .writes,
            0
        );

        // The first goes: its place is the other's.
        let left = rows.into_iter().filter(|(_, ifindex)| *ifindex != 7).collect();
        syncer.set(left, ranges(), &BTreeSet::from([other]));
        syncer.run(&mut memory);
        let bound = &memory.policy.bound;
        assert_eq!(bound.checked, BTreeSet::from([other]));
        let expected = (SourcePlace::V4(place), ("10.244.1.7".parse().unwrap(), other));
        assert_eq!(bound.sources, BTreeMap::from([expected]));
        assert_eq!(syncer.audit(&memory).unwrap(), 0);
    }

    #[test]
    fn an_interface_with_an_address_that_found_no_room_is_not_checked() {
        let mut store = Faulty::new(Memory::new(LIMITS), |attempt, _: &Memory| attempt == 1);
        let mut syncer = BoundSyncer::default();
        syncer.set(addrs(&[("10.244.1.5", 7)]), ranges(), &BTreeSet::from([7]));
        syncer.run(&mut store);
        assert_eq!(store.memory.policy.bound.checked, BTreeSet::new());
        syncer.run(&mut store);
        assert_eq!(store.memory.policy.bound.checked, BTreeSet::from([7]));
    }
}
