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
    served::{self, Served},
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
}

impl Names {
    /// Asks the agent which Services are where. `within`: how long it may be silent.
    pub fn learn_services(&mut self, socket: &Path, within: Duration) -> anyhow::Result<()> {
        let served: Served = ask::value_within(socket, "/services", within)?;
        self.services.clear();
        for object in served.objects {
            let name = match object.object.split_once(' ') {
                Some(("Service", name)) => format!("{SERVICE}{name}"),
                _ => object.object,
            };
            for frontend in object.frontends {
                self.services.insert(frontend.at, name.clone());
            }
        }
        Ok(())
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
