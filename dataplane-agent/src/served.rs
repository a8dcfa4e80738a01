//! What is served and what is not, as the agent tells its commands.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::{Deserialize, Serialize};

use crate::{
    compile::{Balancer, Compiled, FrontendAddr, services::describe},
    model::{Cause, ObjectRef, Rejected},
    sync::{Failure, Subject},
};

/// The whole picture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Services, and Pods with host ports, that have at least one frontend; by kind and name.
    pub objects: Vec<ServedObject>,
    pub problems: Vec<Problem>,
    pub conditions: Vec<Condition>,
}

/// A statement on the agent as a whole, in the shape of Kubernetes' conditions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    /// What is stated.
    #[serde(rename = "type")]
    pub kind: ConditionKind,
    /// Whether it holds.
    pub status: bool,
    pub message: String,
}

/// What is stated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionKind {
    /// All that the source holds is known.
    SourceFollowed,
    /// Every object can be used in full.
    ObjectsUsable,
    /// All that is wanted fits into the tables.
    TablesHaveRoom,
    /// The kernel takes every write.
    KernelAcceptsWrites,
    /// No other proxy has rules on this node.
    OnlyProxy,
}

impl ConditionKind {
    pub const ALL: [ConditionKind; 5] = [
        ConditionKind::SourceFollowed,
        ConditionKind::ObjectsUsable,
        ConditionKind::TablesHaveRoom,
        ConditionKind::KernelAcceptsWrites,
        ConditionKind::OnlyProxy,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            ConditionKind::SourceFollowed => "SourceFollowed",
            ConditionKind::ObjectsUsable => "ObjectsUsable",
            ConditionKind::TablesHaveRoom => "TablesHaveRoom",
            ConditionKind::KernelAcceptsWrites => "KernelAcceptsWrites",
            ConditionKind::OnlyProxy => "OnlyProxy",
        }
    }

    const fn concerns(self, cause: Cause) -> bool {
        match cause {
            Cause::Unfollowed => matches!(self, ConditionKind::SourceFollowed),
            Cause::TableFull => matches!(self, ConditionKind::TablesHaveRoom),
            Cause::WriteRefused => matches!(self, ConditionKind::KernelAcceptsWrites),
            Cause::OtherProxy => matches!(self, ConditionKind::OnlyProxy),
            Cause::Invalid | Cause::Unsupported | Cause::Conflict | Cause::Disabled | Cause::Unreadable => {
                matches!(self, ConditionKind::ObjectsUsable)
            }
        }
    }
}

/// A condition's message names so many of what it is about.
const NAMED_AT_MOST: usize = 10;

/// The conditions that follow from the problems.
pub fn conditions(problems: &[Problem]) -> Vec<Condition> {
    let condition = |kind: ConditionKind| {
        let mut of_kind: Vec<&Problem> = problems
            .iter()
            .filter(|problem| kind.concerns(problem.cause))
            .collect();
        // Who is hit first, what could not be written after that.
        of_kind.sort_by_key(|problem| problem.object.is_empty());
        let mut parts: Vec<String> = of_kind
            .iter()
            .take(NAMED_AT_MOST)
            .map(ToString::to_string)
            .collect();
        if of_kind.len() > NAMED_AT_MOST {
            parts.push(format!("and {} more", of_kind.len() - NAMED_AT_MOST));
        }
        Condition {
            kind,
            status: of_kind.is_empty(),
            message: parts.join("; "),
        }
    };
    ConditionKind::ALL.map(condition).into()
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in [&self.object, &self.field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(&self.reason)
    }
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
    pub cause: Cause,
    /// The document that it comes from, if it is in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

impl Problem {
    /// Whether it is about a frontend, as [`at`] has it.
    pub fn is_about(&self, at: &str) -> bool {
        let rest = self.reason.strip_prefix(at);
        rest.is_some_and(|rest| rest.starts_with(": "))
    }
}

impl ServedObject {
    /// `None`: nothing leads to it. `endpoints`: how many a balancer leads to.
    pub fn of(
        object: &ObjectRef,
        compiled: &Compiled,
        endpoints: impl Fn(&Balancer) -> usize,
    ) -> Option<Self> {
        let balancers = compiled.balancers.iter();
        let frontends: Vec<ServedFrontend> = balancers
            .map(|balancer| frontend(balancer, endpoints(balancer)))
            .collect();
        (!frontends.is_empty()).then(|| Self {
            object: object.to_string(),
            frontends,
        })
    }
}

/// A frontend's address in words.
pub fn at(frontend: &FrontendAddr) -> String {
    let mut at = describe(frontend);
    if frontend.addr.is_unspecified() {
        at += of_family(frontend.addr);
    }
    at
}

/// Whether a frontend in words serves what is sent to an address. `node_ports`: they answer there.
pub fn is_at(frontend: &str, addr: IpAddr, node_ports: bool) -> bool {
    if frontend.ends_with(of_family(addr)) {
        return node_ports;
    }
    let socket = frontend
        .split('/')
        .next()
        .and_then(|at| at.parse::<SocketAddr>().ok());
    socket.is_some_and(|socket| socket.ip() == addr)
}

/// What tells the node ports of one family from those of the other.
const fn of_family(addr: IpAddr) -> &'static str {
    if addr.is_ipv4() { " (IPv4)" } else { " (IPv6)" }
}

fn frontend(balancer: &Balancer, endpoints: usize) -> ServedFrontend {
    let clients = match (balancer.internal, balancer.external) {
        (true, false) => Clients::Internal,
        (false, true) => Clients::External,
        _ => Clients::All,
    };
    ServedFrontend {
        at: at(&balancer.frontend),
        clients,
        endpoints,
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
            cause: problem.cause,
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
            cause: failure.cause(),
            file: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_is_a_condition_that_names_what_is_not_served() {
        let problem = |number: usize, cause| Problem {
            object: format!("Service ns/s{number}"),
            field: String::new(),
            reason: "10.96.0.1:80/TCP: table FRONTENDS_V4 is full (2 entries)".to_owned(),
            cause,
            file: None,
        };
        let problems: Vec<Problem> = (0..12).map(|number| problem(number, Cause::TableFull)).collect();
        let conditions = conditions(&problems);
        let state = |kind| {
            conditions
                .iter()
                .find(|condition| condition.kind == kind)
                .unwrap()
        };
        let room = state(ConditionKind::TablesHaveRoom);
        assert!(!room.status);
        assert!(
            room.message
                .starts_with("Service ns/s0: 10.96.0.1:80/TCP: table FRONTENDS_V4 is full")
        );
        assert!(room.message.ends_with("; and 2 more"), "{}", room.message);
        assert!(state(ConditionKind::ObjectsUsable).status);
        assert!(state(ConditionKind::KernelAcceptsWrites).status);
    }
}
