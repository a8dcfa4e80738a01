//! The names of addresses, as far as a running agent says.

use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use super::{ask, output::note};
use crate::{
    compile::FrontendAddr,
    model::Cause,
    served::{self, Problem, Served},
    sync::encode,
};

/// What the name of a Service begins with, and that of a Pod does not.
pub const SERVICE: &str = "svc/";
/// Addresses of one question to the agent.
const AT_ONCE: usize = 100;

/// Who has which address.
#[derive(Debug, Default)]
pub struct Names {
    pods: HashMap<IpAddr, String>,
    /// The nodes of these Pods.
    nodes: HashMap<IpAddr, String>,
    /// By [`served::at`].
    services: HashMap<String, String>,
    /// What of these has no room in the tables.
    unwritten: HashMap<String, String>,
}

impl Names {
    /// Asks the agent which Services are where. `within`: how long it may be silent.
    pub fn learn_services(&mut self, socket: &Path, within: Duration) -> anyhow::Result<()> {
        self.take_services(ask::value_within(socket, "/services", within)?);
        Ok(())
    }

    fn take_services(&mut self, served: Served) {
        self.services.clear();
        let full = served.problems.into_iter();
        let full: Vec<Problem> = full.filter(|one| one.cause == Cause::TableFull).collect();
        self.unwritten.clear();
        for object in served.objects {
            let name = match object.object.split_once(' ') {
                Some(("Service", name)) => format!("{SERVICE}{name}"),
                _ => object.object,
            };
            for frontend in object.frontends {
                if let Some(problem) = full.iter().find(|one| one.is_about(&frontend.at)) {
                    self.unwritten.insert(frontend.at.clone(), problem.reason.clone());
                }
                self.services.insert(frontend.at, name.clone());
            }
        }
    }

    /// Asks the agent which Pods have these addresses, each time `within`.
    pub fn learn_pods(
        &mut self,
        socket: &Path,
        addrs: impl Iterator<Item = IpAddr>,
        within: Duration,
    ) -> anyhow::Result<()> {
        learn(&mut self.pods, socket, "names", addrs, within)
    }

    /// Asks the agent on which nodes the Pods with these addresses are, each time `within`.
    pub fn learn_nodes(
        &mut self,
        socket: &Path,
        addrs: impl Iterator<Item = IpAddr>,
        within: Duration,
    ) -> anyhow::Result<()> {
        learn(&mut self.nodes, socket, "nodes", addrs, within)
    }

    /// `namespace/name`.
    #[must_use]
    pub fn pod(&self, addr: IpAddr) -> Option<&String> {
        self.pods.get(&addr)
    }

    /// The node of the Pod with an address.
    #[must_use]
    pub fn node(&self, addr: IpAddr) -> Option<&String> {
        self.nodes.get(&addr)
    }

    /// `svc/namespace/name`, or what else is there: at its own address first, then the node ports.
    #[must_use]
    pub fn service(&self, proto: u8, at: SocketAddr) -> Option<&String> {
        let serving = FrontendAddr::serving(at, encode::protocol(proto)?);
        serving.iter().find_map(|at| self.services.get(&served::at(at)))
    }

    /// What has no room in the tables of who is served there, by the same order.
    #[must_use]
    pub fn unwritten(&self, proto: u8, at: SocketAddr) -> Option<&String> {
        let serving = FrontendAddr::serving(at, encode::protocol(proto)?);
        let serving = serving.map(|at| served::at(&at));
        let holder = serving.iter().find(|at| self.services.contains_key(*at))?;
        self.unwritten.get(holder)
    }

    /// Says which of these names nobody has now; they may come.
    pub fn note_unknown<'a>(&self, socket: &Path, names: impl IntoIterator<Item = &'a str>) {
        let (services, pods): (Vec<&str>, Vec<&str>) =
            names.into_iter().partition(|name| name.starts_with(SERVICE));
        for name in services {
            if !self.services.values().any(|known| known == name) {
                note(format_args!("nothing is served as {name} now"));
            }
        }
        if pods.is_empty() {
            return;
        }
        // An agent that is older does not say.
        let known: anyhow::Result<Vec<String>> = ask::value(socket, &format!("/pods?of={}", pods.join(",")));
        let Ok(known) = known else { return };
        for name in pods {
            if !known.iter().any(|known| known == name) {
                note(format_args!("no Pod is called {name} now"));
            }
        }
    }

    #[cfg(test)]
    pub fn name_pod(&mut self, addr: IpAddr, name: &str) {
        self.pods.insert(addr, name.to_owned());
    }

    #[cfg(test)]
    pub fn name_service(&mut self, at: &str, name: &str) {
        self.services.insert(at.to_owned(), name.to_owned());
    }
}

/// Asks the agent for what `path` has of these addresses, each time `within`.
fn learn(
    known: &mut HashMap<IpAddr, String>,
    socket: &Path,
    path: &str,
    addrs: impl Iterator<Item = IpAddr>,
    within: Duration,
) -> anyhow::Result<()> {
    let addrs: Vec<IpAddr> = addrs.collect::<BTreeSet<_>>().into_iter().collect();
    for some in addrs.chunks(AT_ONCE) {
        let list: Vec<String> = some.iter().map(ToString::to_string).collect();
        let path = format!("/{path}?of={}", list.join(","));
        let said: HashMap<IpAddr, String> = ask::value_within(socket, &path, within)?;
        known.extend(said);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use dataplane_common::addr::proto;

    use super::*;
    use crate::served::{Clients, ServedFrontend, ServedObject};

    #[test]
    fn what_of_a_service_has_no_room_is_known_by_its_address() {
        let frontend = |at: &str| ServedFrontend {
            at: at.to_owned(),
            clients: Clients::All,
            endpoints: 0,
        };
        let problem = |at: &str, cause| Problem {
            object: "Service shop/two".to_owned(),
            field: String::new(),
            reason: format!("{at}: 1 of 1 endpoints are not written"),
            cause,
            file: None,
        };
        let mut names = Names::default();
        names.take_services(Served {
            objects: vec![ServedObject {
                object: "Service shop/two".to_owned(),
                frontends: [
                    "10.96.0.8:8/UDP",
                    "10.96.0.8:81/UDP",
                    "node port 30081/UDP (IPv4)",
                ]
                .map(frontend)
                .into(),
            }],
            problems: vec![
                problem("10.96.0.8:81/UDP", Cause::TableFull),
                problem("node port 30081/UDP (IPv4)", Cause::TableFull),
                problem("10.96.0.8:8/UDP", Cause::Conflict),
            ],
            conditions: Vec::new(),
        });
        let said = |at: &str, proto| {
            let why = names.unwritten(proto, at.parse().unwrap());
            why.map(String::as_str)
        };
        let text = "10.96.0.8:81/UDP: 1 of 1 endpoints are not written";
        assert_eq!(said("10.96.0.8:81", proto::UDP), Some(text));
        assert!(said("192.0.2.1:30081", proto::UDP).is_some());
        for (at, proto) in [
            ("10.96.0.8:81", proto::TCP),
            ("10.96.0.8:8", proto::UDP),
            ("10.96.0.9:81", proto::UDP),
        ] {
            assert_eq!(said(at, proto), None, "{at}");
        }
    }
}
