//! Peers and ports of a rule in words, from the rows that lead to it.

use std::collections::BTreeSet;

use dataplane_common::{
    addr::proto,
    policy::{CLASS_ANY, RuleBits, port_prefix},
};

use super::EnforcedTables;
use crate::compile::policy::ports::{PortPrefix, PortSpan};

/// So many are told one by one.
const TOLD: usize = 6;

impl EnforcedTables<'_> {
    /// Who satisfies a rule: the addresses and ranges that lead to it. Of several that hold an address the longest counts.
    pub(super) fn peers(&self, set: u32, place: u32) -> String {
        let has = |bits: &u32| self.bits.get(bits).is_some_and(|bits| bits.has(place));
        if has(&self.header(set).any_peer) {
            return "any".to_owned();
        }
        let rows = self.peer_rules.iter();
        let rows = rows.filter(|(key, bits)| key.set == set && has(bits));
        let classes: BTreeSet<u32> = rows.map(|(key, _)| key.class).collect();
        let known = classes.iter().filter_map(|class| self.classes.get(class));
        let mut peers: Vec<String> = known.flatten().cloned().collect();
        if classes.contains(&CLASS_ANY) {
            peers.push("all others".to_owned());
        }
        some_of(&peers)
    }

    pub(super) fn ports(&self, set: u32, place: u32) -> String {
        let has = |bits: &RuleBits| bits.has(place);
        let rows = self.port_rules.iter().filter(|(_, key, _)| key.set == set);
        let rows = rows.filter(|(.., bits)| self.bits.get(bits).is_some_and(has));
        let prefixes = rows.map(|(length, key, _)| {
            let (proto, port) = (u16::from_be(key.proto_be), u16::from_be(key.port_be));
            PortPrefix::of(*length, proto as u8, port)
        });
        spans(&prefixes.collect())
    }
}

fn some_of(texts: &[String]) -> String {
    match texts {
        [] => "none".to_owned(),
        texts if texts.len() <= TOLD => texts.join("; "),
        texts => format!("{}; {} more", texts[..TOLD].join("; "), texts.len() - TOLD),
    }
}

/// Prefixes as ranges. Those that a shorter one covers have their rows because of other rules.
fn spans(prefixes: &BTreeSet<PortPrefix>) -> String {
    let is_covered = |prefix: &PortPrefix| {
        let mut shorter = PortPrefix::covering(prefix.length).skip(1);
        prefix.length > port_prefix::ANY
            && shorter.any(|length| prefixes.contains(&PortPrefix::of(length, prefix.proto, prefix.port)))
    };
    let own = prefixes.iter().filter(|prefix| !is_covered(prefix));
    let mut spans: Vec<PortSpan> = Vec::new();
    for prefix in own {
        if prefix.length < port_prefix::PROTOCOL {
            return "any".to_owned();
        }
        let more = u16::MAX.checked_shr(prefix.length - port_prefix::PROTOCOL);
        spans.push(PortSpan {
            proto: prefix.proto,
            first: prefix.port,
            last: prefix.port | more.unwrap_or(0),
        });
    }
    spans.sort_unstable();
    let mut joined: Vec<PortSpan> = Vec::new();
    for span in spans {
        match joined.last_mut() {
            Some(last) if last.proto == span.proto && last.last.checked_add(1) == Some(span.first) => {
                last.last = span.last;
            }
            _ => joined.push(span),
        }
    }
    some_of(&joined.into_iter().map(text).collect::<Vec<_>>())
}

fn text(span: PortSpan) -> String {
    let PortSpan { proto, first, last } = span;
    let name = match proto {
        proto::TCP => "TCP".to_owned(),
        proto::UDP => "UDP".to_owned(),
        proto::SCTP => "SCTP".to_owned(),
        other => format!("protocol {other}"),
    };
    match (first, last) {
        (0, u16::MAX) => name,
        (first, last) if first == last => format!("{first}/{name}"),
        _ => format!("{first}-{last}/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::policy::ports::prefixes;

    #[test]
    fn prefixes_are_the_ranges_that_they_were_made_of() {
        let of = |spans: &[(u8, u16, u16)]| -> BTreeSet<PortPrefix> {
            let spans = spans.iter().map(|(proto, first, last)| PortSpan {
                proto: *proto,
                first: *first,
                last: *last,
            });
            spans.flat_map(prefixes).collect()
        };
        for (expected, made_of) in [
            ("80/TCP", &[(6, 80, 80)][..]),
            ("81-90/TCP", &[(6, 81, 90)]),
            ("53/TCP; 53/UDP", &[(17, 53, 53), (6, 53, 53)]),
            ("TCP", &[(6, 0, u16::MAX)]),
            ("1-65535/UDP", &[(17, 1, u16::MAX)]),
            // The second is there because of another rule.
            ("TCP", &[(6, 0, u16::MAX), (6, 80, 80)]),
            ("none", &[]),
        ] {
            assert_eq!(spans(&of(made_of)), expected);
        }
        let any = PortPrefix::of(port_prefix::ANY, 0, 0);
        let mut prefixes = of(&[(6, 80, 80)]);
        prefixes.insert(any);
        assert_eq!(spans(&prefixes), "any");
        assert_eq!(some_of(&vec!["a".to_owned(); 8]), "a; a; a; a; a; a; 2 more");
    }
}
