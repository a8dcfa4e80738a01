//! Ports as prefixes: what a longest prefix match finds for a protocol and port.

use std::collections::BTreeMap;

use dataplane_common::policy::{RuleBits, port_prefix};

/// A prefix of (protocol, port), as a key of `PORT_RULES` holds it behind its set. Bits behind the length are 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortPrefix {
    /// Of the whole key: [`port_prefix`].
    pub length: u32,
    pub proto: u8,
    pub port: u16,
}

/// Ports of one protocol, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortSpan {
    pub proto: u8,
    pub first: u16,
    pub last: u16,
}

impl PortPrefix {
    const ANY: PortPrefix = PortPrefix {
        length: port_prefix::ANY,
        proto: 0,
        port: 0,
    };

    /// The prefix of this length that holds a port. Lengths are those of [`port_prefix`] and between its last two.
    pub fn of(length: u32, proto: u8, port: u16) -> Self {
        if length < port_prefix::PROTOCOL {
            return Self::ANY;
        }
        let free = port_prefix::PORT.saturating_sub(length);
        let port = port & u16::MAX.checked_shl(free).unwrap_or(0);
        Self { length, proto, port }
    }

    /// The lengths of all prefixes that hold it, the longest first.
    pub fn covering(length: u32) -> impl Iterator<Item = u32> {
        let lengths = (port_prefix::PROTOCOL..=length).rev();
        lengths.chain(std::iter::once(port_prefix::ANY))
    }
}

/// The fewest prefixes that make up a range.
pub fn prefixes(span: PortSpan) -> Vec<PortPrefix> {
    let PortSpan { proto, first, last } = span;
    let mut prefixes = Vec::new();
    let (mut first, end) = (u32::from(first), u32::from(last) + 1);
    while first < end {
        let aligned = if first == 0 { 16 } else { first.trailing_zeros() };
        let bits = aligned.min((end - first).ilog2());
        prefixes.push(PortPrefix::of(port_prefix::PORT - bits, proto, first as u16));
        first += 1 << bits;
    }
    prefixes
}

/// The rules that each prefix satisfies, from the ports of each rule; `None`: any port and protocol. What a prefix has, all
/// longer ones within it have too.
pub fn rows<'a>(
    rules: impl Iterator<Item = (u32, Option<&'a [PortSpan]>)>,
) -> BTreeMap<PortPrefix, RuleBits> {
    let mut own: BTreeMap<PortPrefix, RuleBits> = BTreeMap::new();
    for (rule, spans) in rules {
        match spans {
            None => own.entry(PortPrefix::ANY).or_default().insert(rule),
            Some(spans) => {
                for prefix in spans.iter().copied().flat_map(prefixes) {
                    own.entry(prefix).or_default().insert(rule);
                }
            }
        }
    }
    let accumulate = |prefix: &PortPrefix| {
        let mut bits = RuleBits::default();
        for length in PortPrefix::covering(prefix.length) {
            let covering = own.get(&PortPrefix::of(length, prefix.proto, prefix.port));
            if let Some(covering) = covering {
                bits.extend(covering);
            }
        }
        (*prefix, bits)
    };
    own.keys().map(accumulate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_prefixes_make_up_the_range_and_nothing_else() {
        for (first, last, most) in [
            (0, u16::MAX, 1),
            (1, u16::MAX, 16),
            (80, 80, 1),
            (80, 81, 1),
            (81, 90, 5),
            (1023, 1024, 2),
            (1, 65534, 30),
        ] {
            let prefixes = prefixes(PortSpan {
                proto: 6,
                first,
                last,
            });
            assert!(prefixes.len() <= most, "{first}-{last}: {}", prefixes.len());
            for port in [
                first.saturating_sub(1),
                first,
                first / 2 + last / 2,
                last,
                last.saturating_add(1),
            ] {
                let holds = prefixes
                    .iter()
                    .filter(|prefix| PortPrefix::of(prefix.length, 6, port) == **prefix);
                assert_eq!(
                    holds.count() == 1,
                    (first..=last).contains(&port),
                    "{port} of {first}-{last}"
                );
            }
        }
    }
}
