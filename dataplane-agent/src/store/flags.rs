//! Tables that refuse what is more, and the flags that say how large they are.

use std::fmt;

use crate::bpf::map_names as names;

pub const FLAGS: [(&str, &str); 18] = [
    (names::FRONTENDS_V4, "--max-frontends"),
    (names::FRONTENDS_V6, "--max-frontends"),
    (names::SERVICES, "--max-services"),
    (names::BACKENDS, "--max-backends"),
    (names::MAGLEV, "--max-maglev"),
    (names::RANGES_V4, "--max-source-ranges"),
    (names::RANGES_V6, "--max-source-ranges"),
    (names::OWN_ADDRS_V4, "--max-addresses"),
    (names::OWN_ADDRS_V6, "--max-addresses"),
    (names::DEVICES, "--max-devices"),
    (names::PEERS_V4, "--max-policy-peers"),
    (names::PEERS_V6, "--max-policy-peers"),
    (names::CIDRS_V4, "--max-policy-ranges"),
    (names::CIDRS_V6, "--max-policy-ranges"),
    (names::PEER_RULES, "--max-policy-peers"),
    (names::PORT_RULES, "--max-policy-rules"),
    (names::POLICY_SETS, "--max-policy-rules"),
    (names::RULES, "--max-policy-rules"),
];

/// The flag that makes a table larger.
pub fn flag_of(table: &str) -> Option<&'static str> {
    let of_table = FLAGS.iter().find(|(name, _)| *name == table);
    of_table.map(|(_, flag)| *flag)
}

/// The size of a full table, and its flag.
pub(super) struct Size {
    pub table: &'static str,
    pub limit: u32,
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} entries", self.limit)?;
        match flag_of(self.table) {
            Some(flag) => write!(f, ", {flag}"),
            None => Ok(()),
        }
    }
}
