//! kube-proxy's rules on this machine: where they are, and the removal of those that are a table of its own.
//!
//! By nftables kube-proxy has a table `kube-proxy` in either family. By iptables its chains stand in tables that others
//! share, and only iptables itself takes them out without a trace; by IPVS there is a device `kube-ipvs0`.

use std::{fmt, fs, io};

use super::{
    firewall,
    socket::{RequestSocket, attributes, push_attribute, read_string},
    tables::Link,
};
use crate::bpf::sys;

const NFTABLES: u16 = 10 << 8;
/// `enum nf_tables_msg_types`.
const GET_TABLES: u16 = NFTABLES | 1;
const DELETE_TABLE: u16 = NFTABLES | 2;
const GET_CHAINS: u16 = NFTABLES | 4;

const NFGENMSG_LEN: usize = 4;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;

const OWN_TABLE: &str = "kube-proxy";
/// A chain of that table as long as it has rules.
const OWN_CHAIN: &str = "services";
/// The chain through which kube-proxy's rules of iptables are entered.
const SHARED_CHAIN: &str = "KUBE-SERVICES";
const IPVS_DEVICE: &str = "kube-ipvs0";

/// An address family, as nftables calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RuleFamily {
    Ip,
    Ip6,
}

impl RuleFamily {
    const ALL: [Self; 2] = [Self::Ip, Self::Ip6];

    const fn number(self) -> u8 {
        match self {
            Self::Ip => libc::AF_INET as u8,
            Self::Ip6 => libc::AF_INET6 as u8,
        }
    }

    fn of(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.number() == number)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        }
    }
}

/// A place where kube-proxy has rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rules {
    Nftables(RuleFamily),
    IptablesNft(RuleFamily),
    IptablesLegacy(RuleFamily),
    Ipvs,
}

impl Rules {
    /// The value of kube-proxy's `--proxy-mode`.
    pub const fn mode(self) -> &'static str {
        match self {
            Self::Nftables(_) => "nftables",
            Self::IptablesNft(_) | Self::IptablesLegacy(_) => "iptables",
            Self::Ipvs => "ipvs",
        }
    }
}

impl fmt::Display for Rules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nftables(family) => write!(f, "nftables table {} {OWN_TABLE}", family.as_str()),
            Self::IptablesNft(family) => write!(f, "{} {SHARED_CHAIN} of iptables-nft", family.as_str()),
            Self::IptablesLegacy(family) => {
                write!(f, "{} {SHARED_CHAIN} of iptables-legacy", family.as_str())
            }
            Self::Ipvs => write!(f, "IPVS behind {IPVS_DEVICE}"),
        }
    }
}

/// Where kube-proxy has rules, in order.
pub fn find(links: &[Link]) -> io::Result<Vec<Rules>> {
    let mut found: Vec<Rules> = chains()?
        .iter()
        .filter_map(|chain| {
            let family = RuleFamily::of(chain.family)?;
            match (chain.table.as_str(), chain.name.as_str()) {
                (OWN_TABLE, OWN_CHAIN) => Some(Rules::Nftables(family)),
                ("nat", SHARED_CHAIN) => Some(Rules::IptablesNft(family)),
                _ => None,
            }
        })
        .collect();
    for family in RuleFamily::ALL {
        if legacy_tables(family).lines().any(|table| table == "filter") {
            let rules = sys::legacy_filter_rules(family == RuleFamily::Ip6)?;
            if firewall::legacy_chain(&rules, &[SHARED_CHAIN]).is_some() {
                found.push(Rules::IptablesLegacy(family));
            }
        }
    }
    if links.iter().any(|link| link.name == IPVS_DEVICE) {
        found.push(Rules::Ipvs);
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// Removes the tables `ip kube-proxy` and `ip6 kube-proxy`, and nothing else. Returns which there were.
pub fn remove() -> io::Result<Vec<RuleFamily>> {
    let mut socket = RequestSocket::open_netfilter()?;
    let name = [OWN_TABLE.as_bytes(), b"\0"].concat();
    let mut removed = Vec::new();
    for family in RuleFamily::ALL {
        if has_table(&mut socket, family.number(), &name)? {
            let mut body = vec![family.number(), 0, 0, 0];
            push_attribute(&mut body, NFTA_TABLE_NAME, &name);
            socket.change_all(NFTABLES, &[(DELETE_TABLE, 0, body)])?;
            removed.push(family);
        }
    }
    Ok(removed)
}

/// Whether nftables has a table. `name` ends with a zero.
pub fn has_table(socket: &mut RequestSocket, family: u8, name: &[u8]) -> io::Result<bool> {
    let is_it = |message: &Vec<u8>| {
        let body = message.get(NFGENMSG_LEN..).unwrap_or_default();
        message.first() == Some(&family)
            && attributes(body).any(|(kind, value)| kind == NFTA_TABLE_NAME && value == name)
    };
    Ok(dump(socket, GET_TABLES)?.iter().any(is_it))
}

/// A chain of nftables, iptables' own among them.
#[derive(Debug)]
struct Chain {
    family: u8,
    table: String,
    name: String,
}

fn chains() -> io::Result<Vec<Chain>> {
    let mut socket = RequestSocket::open_netfilter()?;
    let parse = |message: &[u8]| {
        let body = message.get(NFGENMSG_LEN..)?;
        Some(Chain {
            family: *message.first()?,
            table: text(body, NFTA_CHAIN_TABLE)?,
            name: text(body, NFTA_CHAIN_NAME)?,
        })
    };
    let found = dump(&mut socket, GET_CHAINS)?;
    Ok(found.iter().filter_map(|message| parse(message)).collect())
}

fn dump(socket: &mut RequestSocket, kind: u16) -> io::Result<Vec<Vec<u8>>> {
    match socket.dump(kind, &[0; NFGENMSG_LEN]) {
        Ok(messages) => Ok(messages.into_iter().map(|message| message.body).collect()),
        // A kernel without nftables.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn text(body: &[u8], wanted: u16) -> Option<String> {
    let found = attributes(body).find(|&(kind, _)| kind == wanted);
    found.map(|(_, value)| read_string(value))
}

/// The tables of iptables-legacy. Asking for one that is not there would make it.
fn legacy_tables(family: RuleFamily) -> String {
    let path = match family {
        RuleFamily::Ip => "/proc/thread-self/net/ip_tables_names",
        RuleFamily::Ip6 => "/proc/thread-self/net/ip6_tables_names",
    };
    fs::read_to_string(path).unwrap_or_default()
}
