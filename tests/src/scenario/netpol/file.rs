//! The schema `scenario-netpol/1`: its types, and what is checked when a file is read. Keys that only inform are passed
//! over; a verb, a protocol or a sign of a table that the schema does not have is an error.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::worker::protocol::Proto;

pub const SCHEMA: &str = "scenario-netpol/1";

/// One case.
#[derive(Debug, Deserialize)]
pub struct Case {
    pub schema: String,
    pub id: String,
    pub name: String,
    #[serde(default)]
    pub tags: Vec<String>,
    pub family: Family,
    pub namespaces: Vec<Namespace>,
    #[serde(default)]
    pub pods: Vec<Pod>,
    #[serde(default)]
    pub hosts: Vec<Host>,
    #[serde(default)]
    pub externals: Vec<External>,
    pub steps: Vec<Step>,
}

/// The address family that the tables are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Family {
    IPv4,
    IPv6,
}

pub type Labels = BTreeMap<String, String>;

#[derive(Debug, Deserialize)]
pub struct Namespace {
    pub name: String,
    #[serde(default)]
    pub labels: Labels,
}

/// A pod, which listens on all of its ports.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Pod {
    pub ns: String,
    pub name: String,
    #[serde(default)]
    pub labels: Labels,
    pub ip: Option<IpAddr>,
    pub ip6: Option<IpAddr>,
    #[serde(default)]
    pub ports: Vec<Port>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Port {
    pub port: u16,
    pub proto: Proto,
    /// Empty if it has none.
    #[serde(default)]
    pub name: String,
}

/// A node's address, and the host-network pod that listens there.
#[derive(Debug, Deserialize)]
pub struct Host {
    pub id: String,
    pub ip: Option<IpAddr>,
    pub ip6: Option<IpAddr>,
    #[serde(default)]
    pub ports: Vec<Port>,
    #[serde(default)]
    pub nodelabels: Labels,
    pub ns: String,
    #[serde(default)]
    pub labels: Labels,
}

/// An address outside the cluster.
#[derive(Debug, Deserialize)]
pub struct External {
    pub id: String,
    pub ip: Option<IpAddr>,
    pub ip6: Option<IpAddr>,
}

#[derive(Debug, Deserialize)]
pub struct Step {
    #[serde(default)]
    pub actions: Vec<Action>,
    pub expected: Expected,
}

/// What happens before a table is probed.
#[derive(Debug, Deserialize)]
#[serde(tag = "verb", rename_all = "camelCase")]
pub enum Action {
    Create {
        object: Value,
    },
    Update {
        object: Value,
    },
    /// The object may be no more than its kind and name.
    Delete {
        object: Value,
    },
    /// `metadata` of a Pod, whose labels become these.
    UpdateLabels {
        object: Value,
    },
    CreatePod {
        pod: Pod,
    },
    DeletePod {
        pod: Pod,
    },
}

/// Who reaches whom: a row for each source, for every protocol and port.
#[derive(Debug, Deserialize)]
pub struct Expected {
    pub ids: Vec<String>,
    pub table: BTreeMap<String, Vec<String>>,
}

/// A judged cell of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell<'a> {
    pub from: &'a str,
    pub to: &'a str,
    pub proto: Proto,
    pub port: u16,
    /// Whether it must connect; else it must not.
    pub connects: bool,
}

impl Case {
    /// Decodes and validates a file's text.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let case: Self = serde_json::from_slice(text)?;
        case.check()?;
        Ok(case)
    }

    /// The address of the case's family.
    pub fn address(&self, ip: Option<IpAddr>, ip6: Option<IpAddr>) -> Option<IpAddr> {
        match self.family {
            Family::IPv4 => ip,
            Family::IPv6 => ip6,
        }
    }

    /// All pods that there ever are, those of actions that create some included.
    pub fn all_pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.iter().chain(self.created())
    }

    fn created(&self) -> impl Iterator<Item = &Pod> {
        let actions = self.steps.iter().flat_map(|step| &step.actions);
        actions.filter_map(|action| match action {
            Action::CreatePod { pod } => Some(pod),
            _ => None,
        })
    }

    /// Every protocol and port of a table.
    pub fn ports(&self) -> Result<BTreeSet<(Proto, u16)>> {
        let keys = self.steps.iter().flat_map(|step| step.expected.table.keys());
        keys.map(|key| proto_and_port(key)).collect()
    }

    fn check(&self) -> Result<()> {
        ensure!(self.schema == SCHEMA, "unknown schema {:?}", self.schema);
        let pods: Vec<String> = self.all_pods().map(Pod::id).collect();
        let hosts = self.hosts.iter().map(|host| &host.id);
        let others = hosts.chain(self.externals.iter().map(|external| &external.id));
        let known: BTreeSet<&String> = pods.iter().chain(others).collect();
        for (number, step) in self.steps.iter().enumerate() {
            let place = || format!("step {}", number + 1);
            let unknown = step.expected.ids.iter().find(|id| !known.contains(id));
            ensure!(unknown.is_none(), "{}: nobody is {unknown:?}", place());
            step.expected.cells().with_context(place)?;
        }
        ensure!(!self.steps.is_empty(), "the case has no step");
        Ok(())
    }
}

impl Pod {
    /// As tables name it.
    pub fn id(&self) -> String {
        format!("{}/{}", self.ns, self.name)
    }
}

impl Expected {
    /// The cells that are judged: `.` and `X`.
    pub fn cells(&self) -> Result<Vec<Cell<'_>>> {
        let mut cells = Vec::new();
        for (key, rows) in &self.table {
            let (proto, port) = proto_and_port(key)?;
            ensure!(
                rows.len() == self.ids.len(),
                "{key}: {} rows for {} ids",
                rows.len(),
                self.ids.len()
            );
            for (from, row) in self.ids.iter().zip(rows) {
                let signs = row.chars().count();
                ensure!(
                    signs == self.ids.len(),
                    "{key}: the row of {from} has {signs} cells"
                );
                for (to, sign) in self.ids.iter().zip(row.chars()) {
                    let connects = match sign {
                        '.' => true,
                        'X' => false,
                        's' | 'a' | 'd' | '?' | '-' => continue,
                        other => bail!("{key}: {other:?} is no verdict"),
                    };
                    cells.push(Cell {
                        from,
                        to,
                        proto,
                        port,
                        connects,
                    });
                }
            }
        }
        Ok(cells)
    }
}

/// `TCP/80`.
fn proto_and_port(key: &str) -> Result<(Proto, u16)> {
    let (proto, port) = key
        .split_once('/')
        .with_context(|| format!("{key:?} is no protocol and port"))?;
    let proto = match proto {
        "TCP" => Proto::Tcp,
        "UDP" => Proto::Udp,
        "SCTP" => Proto::Sctp,
        other => bail!("unknown protocol {other:?}"),
    };
    let port = port
        .parse()
        .with_context(|| format!("{key:?} is no protocol and port"))?;
    Ok((proto, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected(key: &str, rows: &[&str]) -> Expected {
        Expected {
            ids: vec!["x/a".to_owned(), "x/b".to_owned()],
            table: BTreeMap::from([(key.to_owned(), rows.iter().map(|row| (*row).to_owned()).collect())]),
        }
    }

    #[test]
    fn only_defined_cells_are_judged() {
        let table = expected("UDP/53", &["s.", "X?"]);
        let cells = table.cells().unwrap();
        let wanted: Vec<_> = cells
            .iter()
            .map(|cell| (cell.from, cell.to, cell.port, cell.connects))
            .collect();
        assert_eq!(wanted, [("x/a", "x/b", 53, true), ("x/b", "x/a", 53, false)]);
    }

    #[test]
    fn a_table_of_the_wrong_size_or_with_unknown_signs_is_refused() {
        for (key, rows) in [
            ("TCP/80", ["s.", "."].as_slice()),
            ("TCP/80", &["s."]),
            ("TCP/80", &["s.", "y."]),
            ("ICMP/8", &["s.", ".."]),
            ("TCP", &["s.", ".."]),
        ] {
            assert!(expected(key, rows).cells().is_err(), "{key} {rows:?}");
        }
    }

    #[test]
    fn who_is_in_no_list_cannot_be_probed() {
        let text = |id: &str| {
            format!(
                r#"{{"schema": "{SCHEMA}", "id": "n", "name": "n", "family": "IPv4", "namespaces": [],
                    "externals": [{{"id": "ext/1", "ip": "203.0.113.10"}}],
                    "steps": [{{"actions": [], "expected": {{"ids": ["{id}"], "table": {{}}}}}}]}}"#
            )
        };
        Case::parse(text("ext/1").as_bytes()).unwrap();
        assert!(Case::parse(text("ext/2").as_bytes()).is_err());
    }
}
