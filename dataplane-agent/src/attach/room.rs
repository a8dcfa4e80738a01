//! Tables that have hardly any room left, in words with the flag that gives them more.

use std::{io, time::Duration};

use bytemuck::Pod;
use dataplane_common::flow::{Flow4, Flow6, FlowKey4, FlowKey6};

use super::inspect::TableUse;
use crate::{
    bpf::{
        map_names as names,
        pins::Pins,
        sys::{self, MapFd},
    },
    store::flags::flag_of,
};

/// A full table of flows that has none without a packet for so long forgets connections.
const YOUNG: Duration = Duration::from_mins(10);
/// Kernels keep some places of each CPU free, which are many of a table smaller than this.
const SMALL: u32 = 4096;

/// What there is to know of tables in use.
pub fn warnings(pins: &Pins, uses: &[TableUse]) -> Vec<String> {
    let short = uses.iter().filter(|used| is_short(used));
    short
        .filter_map(|used| refuses(used).or_else(|| forgets(used, idlest(pins, used.name)?)))
        .collect()
}

fn is_short(used: &TableUse) -> bool {
    let limit = used.limit as usize;
    let is_flows = matches!(used.name, names::FLOWS_V4 | names::FLOWS_V6);
    if is_flows && used.limit < SMALL {
        return used.entries >= limit / 2;
    }
    used.entries >= limit - limit / 10
}

fn refuses(used: &TableUse) -> Option<String> {
    let flag = flag_of(used.name)?;
    let TableUse { name, entries, limit } = used;
    Some(format!(
        "{name} has {entries} of {limit} entries: what is more finds no room; {flag} makes it larger"
    ))
}

/// `idle`: since the last packet of the flow that is forgotten next.
fn forgets(used: &TableUse, idle: Duration) -> Option<String> {
    let TableUse { name, entries, limit } = used;
    (idle < YOUNG).then(|| {
        format!(
            "{name} has {entries} of {limit} entries, and none without a packet for more than {} s: connections are forgotten for others; --max-flows makes it larger",
            idle.as_secs()
        )
    })
}

/// The time since its last packet of the flow that has had none for longest, where a table is one of flows.
fn idlest(pins: &Pins, table: &str) -> Option<Duration> {
    match table {
        names::FLOWS_V4 => idlest_of::<FlowKey4, Flow4>(pins, table, |flow| flow.meta.seen_ticks),
        names::FLOWS_V6 => idlest_of::<FlowKey6, Flow6>(pins, table, |flow| flow.meta.seen_ticks),
        _ => return None,
    }
    // Who cannot read it has said so already.
    .ok()
}

fn idlest_of<K: Pod, V: Pod>(pins: &Pins, table: &str, seen: impl Fn(&V) -> u32) -> io::Result<Duration> {
    let now = sys::ticks();
    let map: MapFd<K, V> = MapFd::new(pins.open_map(table)?)?;
    let mut idlest = Duration::ZERO;
    map.for_each(|_, flow| idlest = idlest.max(sys::since_ticks(now, seen(flow))))?;
    Ok(idlest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::flags::FLAGS;

    fn used(name: &'static str, entries: usize, limit: u32) -> TableUse {
        TableUse { name, entries, limit }
    }

    #[test]
    fn a_table_that_is_nearly_full_is_told_with_its_flag() {
        assert!(!is_short(&used(names::SERVICES, 58_000, 65_536)));
        let full = used(names::SERVICES, 59_000, 65_536);
        assert!(is_short(&full));
        let said = refuses(&full).unwrap();
        assert!(
            said.contains("59000 of 65536") && said.contains("--max-services"),
            "{said}"
        );
        assert_eq!(
            refuses(&used(names::HALF_OPEN_V4, 9, 10)),
            None,
            "it forgets by design"
        );
    }

    #[test]
    fn a_table_of_flows_that_forgets_only_old_ones_is_in_order() {
        let full = used(names::FLOWS_V4, 262_000, 262_144);
        assert!(is_short(&full) && !is_short(&used(names::FLOWS_V4, 200_000, 262_144)));
        assert!(is_short(&used(names::FLOWS_V4, 33, 64)));
        assert_eq!(forgets(&full, YOUNG), None);
        let said = forgets(&full, Duration::from_secs(20)).unwrap();
        assert!(said.contains("20 s") && said.contains("--max-flows"), "{said}");
    }

    #[test]
    fn every_table_that_a_flag_is_told_for_is_counted() {
        for (name, flag) in FLAGS {
            assert!(names::ALL.contains(&name) && flag.starts_with("--max-"), "{name}");
        }
    }
}
