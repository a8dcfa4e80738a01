//! Whether another policy engine filters forwarded packets by netfilter: a packet that skips the stack skips it too.

use std::{fs, io};

use super::socket::{RequestSocket, attributes, read_string};
use crate::bpf::sys;

/// `NFNL_SUBSYS_NFTABLES`.
const NFTABLES: u16 = 10 << 8;
/// `NFT_MSG_NEWCHAIN`, `NFT_MSG_GETCHAIN` and `NFT_MSG_DELCHAIN`.
const NEW_CHAIN: u16 = NFTABLES | 3;
const GET_CHAINS: u16 = NFTABLES | 4;
const DELETE_CHAIN: u16 = NFTABLES | 5;
const NFGENMSG_LEN: usize = 4;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;

/// How the chains of policy engines begin: Calico, kube-router, Weave, Antrea, Cilium's and Romana's.
const CHAINS: [&str; 7] = [
    "cali-",
    "KUBE-NWPLCY-",
    "KUBE-ROUTER-",
    "WEAVE-NPC",
    "ANTREA-FORWARD",
    "CILIUM_FORWARD",
    "ROMANA-",
];
/// Tables that are a policy engine's own.
const TABLES: [&str; 3] = ["calico", "kindnet-network-policies", "kube-network-policies"];

/// The first chain of a policy engine: among those of nftables, which iptables over it shares, and iptables-legacy's.
pub fn policy_engine() -> io::Result<Option<String>> {
    if let Some(chain) = nftables_chain()? {
        return Ok(Some(chain));
    }
    for (names, is_ipv6) in [
        ("/proc/thread-self/net/ip_tables_names", false),
        ("/proc/thread-self/net/ip6_tables_names", true),
    ] {
        // Asking for a table that is not there would make it.
        let tables = fs::read_to_string(names).unwrap_or_default();
        if tables.lines().any(|table| table == "filter")
            && let Some(chain) = legacy_chain(&sys::legacy_filter_rules(is_ipv6)?, &CHAINS)
        {
            return Ok(Some(format!("iptables-legacy filter/{chain}")));
        }
    }
    Ok(None)
}

/// The first chain of iptables-legacy whose name begins so. Chains begin with an error target that holds their name,
/// terminated by zero.
pub fn legacy_chain(rules: &[u8], prefixes: &[&str]) -> Option<String> {
    let at = (0..rules.len()).find(|&at| {
        prefixes
            .iter()
            .any(|prefix| rules[at..].starts_with(prefix.as_bytes()))
    })?;
    Some(read_string(&rules[at..]))
}

fn nftables_chain() -> io::Result<Option<String>> {
    let mut socket = RequestSocket::open_netfilter()?;
    let chains = match socket.dump(GET_CHAINS, &[0; NFGENMSG_LEN]) {
        Ok(chains) => chains,
        // A kernel without nftables.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    Ok(chains
        .iter()
        .find_map(|chain| engine_chain(chain.body.get(NFGENMSG_LEN..)?)))
}

/// Whether a notice says that a chain has come or gone.
pub fn is_of_chain(kind: u16) -> bool {
    matches!(kind, NEW_CHAIN | DELETE_CHAIN)
}

fn engine_chain(body: &[u8]) -> Option<String> {
    let text = |wanted| {
        attributes(body)
            .find(|&(kind, _)| kind == wanted)
            .map(|(_, value)| read_string(value))
    };
    let (table, name) = (text(NFTA_CHAIN_TABLE)?, text(NFTA_CHAIN_NAME)?);
    let known = TABLES.contains(&table.as_str()) || CHAINS.iter().any(|prefix| name.starts_with(prefix));
    known.then(|| format!("{table}/{name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::socket::push_attribute;

    #[test]
    fn chains_of_policy_engines_are_known_by_name() {
        let chain = |table: &[u8], name: &[u8]| {
            let mut body = Vec::new();
            push_attribute(&mut body, NFTA_CHAIN_TABLE, table);
            push_attribute(&mut body, NFTA_CHAIN_NAME, name);
            engine_chain(&body)
        };
        assert_eq!(
            chain(b"filter\0", b"cali-FORWARD\0").as_deref(),
            Some("filter/cali-FORWARD")
        );
        assert_eq!(
            chain(b"kindnet-network-policies\0", b"postrouting\0").as_deref(),
            Some("kindnet-network-policies/postrouting")
        );
        assert_eq!(chain(b"filter\0", b"FORWARD\0"), None);
        assert_eq!(chain(b"filter\0", b"KUBE-FORWARD\0"), None);
        assert_eq!(chain(b"nat\0", b"CNI-HOSTPORT-DNAT\0"), None);
    }
}
