//! What is served and what is not, as the agent tells its commands.

use serde::{Deserialize, Serialize};

use crate::{
    compile::{Balancer, Compiled, services::describe},
    model::{ObjectRef, Rejected},
    sync::{Failure, Subject},
};

/// The whole picture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Services, and Pods with host ports, that have at least one frontend; by kind and name.
    pub objects: Vec<ServedObject>,
    pub problems: Vec<Problem>,
}

/// A Service or Pod and where it is reached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedObject {
    /// `kind namespace/name`.
    pub object: String,
    pub frontends: Vec<ServedFrontend>,
}

/// An address and port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServedFrontend {
    pub at: String,
    pub clients: Clients,
    /// Endpoints that get new connections.
    pub endpoints: usize,
}

/// Whose connections a frontend takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Clients {
    All,
    /// Pods and host processes of this node.
    Internal,
    /// Those that come from outside this node.
    External,
}

impl Clients {
    pub const fn as_str(self) -> &'static str {
        match self {
            Clients::All => "all",
            Clients::Internal => "internal",
            Clients::External => "external",
        }
    }
}

/// Something that is not served, wholly or in part.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// `kind namespace/name`, or what little is known of it.
    pub object: String,
    /// The path of the field; empty for the object as a whole.
    pub field: String,
    pub reason: String,
    /// The document that it comes from, if it is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

impl ServedObject {
    /// `None`: nothing leads to it.
    pub fn of(object: &ObjectRef, compiled: &Compiled) -> Option<Self> {
        let frontends: Vec<ServedFrontend> = compiled.balancers.iter().map(frontend).collect();
        (!frontends.is_empty()).then(|| Self {
            object: object.to_string(),
            frontends,
        })
    }
}

fn frontend(balancer: &Balancer) -> ServedFrontend {
    let clients = match (balancer.internal, balancer.external) {
        (true, false) => Clients::Internal,
        (false, true) => Clients::External,
        _ => Clients::All,
    };
    let addr = balancer.frontend.addr;
    let mut at = describe(&balancer.frontend);
    if addr.is_unspecified() {
        at += if addr.is_ipv4() { " (IPv4)" } else { " (IPv6)" };
    }
    ServedFrontend {
        at,
        clients,
        endpoints: balancer.backends.len(),
    }
}

impl From<&Rejected> for Problem {
    fn from(rejected: &Rejected) -> Self {
        let Rejected {
            origin,
            object,
            problem,
        } = rejected;
        Self {
            object: object.clone(),
            field: problem.field.clone(),
            reason: problem.reason.clone(),
            file: origin.as_ref().map(ToString::to_string),
        }
    }
}

impl From<(&Subject, &Failure)> for Problem {
    fn from((subject, failure): (&Subject, &Failure)) -> Self {
        let Subject { object, entry } = subject;
        Self {
            object: object.as_ref().map_or_else(String::new, ToString::to_string),
            field: String::new(),
            reason: format!("{entry}: {}", failure.reason),
            file: None,
        }
    }
}
