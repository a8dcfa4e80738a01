//! Our own types for what Kubernetes says: narrow, validated, comparable. Nothing downstream of [`crate::decode`]
//! sees an API type.

pub mod index;
mod packed;
pub mod policies;
pub mod policy;
pub mod policy_words;
pub mod shared;
mod types;

use std::{fmt, path::PathBuf, str::FromStr, sync::Arc};

use arcstr::ArcStr;
pub use index::{Dirty, Index, Previous};
pub use packed::Packed;
pub use policies::PolicyDirty;
pub use policy::Policy;
use serde::{Deserialize, Serialize};
pub use shared::Labels;
pub use types::{
    Endpoint, EndpointSlice, Endpoints, HostIp, HostPort, Namespace, Node, Placement, Pod, PodPort, Protocol,
    Proxied, Service, ServicePort, SliceFamily, SlicePort, TargetPort,
};

/// Namespace and name, in one piece and behind a single word: there are as many as objects, and each is named in many
/// places. The namespace is empty for cluster-scoped objects.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(ArcStr);

/// Between namespace and name, neither of which can contain it. It sorts before all else, so names order as pairs do.
const SEPARATOR: char = '\0';
/// Comes before all that names may contain.
const AFTER_SEPARATOR: char = '\u{1}';

impl Name {
    /// Comes before every name.
    pub const FIRST: Self = Self(arcstr::literal!(""));

    pub fn new(namespace: &str, name: &str) -> Self {
        Self(format!("{namespace}{SEPARATOR}{name}").into())
    }

    /// Comes behind every name of a namespace, and before those of all that follow.
    pub fn behind(namespace: &str) -> Self {
        Self(format!("{namespace}{AFTER_SEPARATOR}").into())
    }

    pub fn namespace(&self) -> &str {
        self.parts().0
    }

    pub fn name(&self) -> &str {
        self.parts().1
    }

    fn parts(&self) -> (&str, &str) {
        self.0.split_once(SEPARATOR).unwrap_or(("", &self.0))
    }
}

impl FromStr for Name {
    type Err = ();

    /// Reads what `Display` writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        match text.split_once('/') {
            Some(("", _) | (_, "")) => Err(()),
            Some((namespace, name)) => Ok(Self::new(namespace, name)),
            None if text.is_empty() => Err(()),
            None => Ok(Self::new("", text)),
        }
    }
}

impl Default for Name {
    fn default() -> Self {
        Self::FIRST
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.parts() {
            ("", name) => f.write_str(name),
            (namespace, name) => write!(f, "{namespace}/{name}"),
        }
    }
}

/// The kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Node,
    Namespace,
    Pod,
    Service,
    EndpointSlice,
    NetworkPolicy,
    ClusterNetworkPolicy,
    AdminNetworkPolicy,
    BaselineAdminNetworkPolicy,
}

impl Kind {
    pub const ALL: [Kind; 9] = [
        Kind::Node,
        Kind::Namespace,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::NetworkPolicy,
        Kind::ClusterNetworkPolicy,
        Kind::AdminNetworkPolicy,
        Kind::BaselineAdminNetworkPolicy,
    ];

    pub const fn as_str(self) -> &'static str {
        match self {
            Kind::Node => "Node",
            Kind::Namespace => "Namespace",
            Kind::Pod => "Pod",
            Kind::Service => "Service",
            Kind::EndpointSlice => "EndpointSlice",
            Kind::NetworkPolicy => "NetworkPolicy",
            Kind::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Kind::AdminNetworkPolicy => "AdminNetworkPolicy",
            Kind::BaselineAdminNetworkPolicy => "BaselineAdminNetworkPolicy",
        }
    }

    /// The API group and version that is read.
    pub const fn api_version(self) -> &'static str {
        match self {
            Kind::Node | Kind::Namespace | Kind::Pod | Kind::Service => "v1",
            Kind::EndpointSlice => "discovery.k8s.io/v1",
            Kind::NetworkPolicy => "networking.k8s.io/v1",
            Kind::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
            Kind::AdminNetworkPolicy | Kind::BaselineAdminNetworkPolicy => {
                "policy.networking.k8s.io/v1alpha1"
            }
        }
    }

    pub const fn is_namespaced(self) -> bool {
        matches!(
            self,
            Kind::Pod | Kind::Service | Kind::EndpointSlice | Kind::NetworkPolicy
        )
    }

    /// A network policy of some kind: it becomes a [`Policy`].
    pub const fn is_policy(self) -> bool {
        match self {
            Kind::NetworkPolicy
            | Kind::ClusterNetworkPolicy
            | Kind::AdminNetworkPolicy
            | Kind::BaselineAdminNetworkPolicy => true,
            Kind::Node | Kind::Namespace | Kind::Pod | Kind::Service | Kind::EndpointSlice => false,
        }
    }

    pub fn parse(kind: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|known| known.as_str() == kind)
    }
}

/// Which object: kind and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    pub kind: Kind,
    pub name: Name,
}

impl ObjectRef {
    pub fn service(name: &Name) -> Self {
        Self {
            kind: Kind::Service,
            name: name.clone(),
        }
    }
}

impl FromStr for ObjectRef {
    type Err = ();

    /// Reads what `Display` writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (kind, name) = text.split_once(' ').ok_or(())?;
        let kind = Kind::parse(kind).ok_or(())?;
        let name = name.parse()?;
        Ok(Self { kind, name })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind.as_str(), self.name)
    }
}

/// A decoded object. Sources and the [`Index`] may keep the same one.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    Node(Arc<Node>),
    Namespace(Arc<Namespace>),
    Pod(Arc<Pod>),
    /// There are many, and most are never looked at again: name and all else.
    Service(Name, Packed<Service>),
    EndpointSlice(Arc<EndpointSlice>),
    Policy(Arc<Policy>),
}

impl From<Service> for Object {
    fn from(service: Service) -> Self {
        let packed = Packed::new(&service);
        Object::Service(service.name, packed)
    }
}

/// The document that an object comes from.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Origin {
    pub file: Arc<PathBuf>,
    /// Counted from 1; 0 is the file as a whole.
    pub document: usize,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if self.document > 0 {
            write!(f, ": document {}", self.document)?;
        }
        Ok(())
    }
}

/// What kind of reason keeps something from being served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// It says something that cannot be.
    #[default]
    Invalid,
    /// It says something that this version does not do.
    Unsupported,
    /// Another object has what it asks for.
    Conflict,
    /// A setting of the agent forbids it.
    Disabled,
    /// The document could not be read.
    Unreadable,
    /// The source does not say at the moment; what it said last stays in force.
    Unfollowed,
    /// A table has no room.
    TableFull,
    /// The kernel refused to write it.
    WriteRefused,
    /// Another proxy serves this node too.
    OtherProxy,
}

impl Cause {
    pub const ALL: [Cause; 9] = [
        Cause::Invalid,
        Cause::Unsupported,
        Cause::Conflict,
        Cause::Disabled,
        Cause::Unreadable,
        Cause::Unfollowed,
        Cause::TableFull,
        Cause::WriteRefused,
        Cause::OtherProxy,
    ];

    /// The label in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Cause::Invalid => "invalid",
            Cause::Unsupported => "unsupported",
            Cause::Conflict => "conflict",
            Cause::Disabled => "disabled",
            Cause::Unreadable => "unreadable",
            Cause::Unfollowed => "unfollowed",
            Cause::TableFull => "table-full",
            Cause::WriteRefused => "write-refused",
            Cause::OtherProxy => "other-proxy",
        }
    }

    /// What it means, for people.
    pub const fn text(self) -> &'static str {
        match self {
            Cause::Invalid => "the object says something that cannot be",
            Cause::Unsupported => "the object says something that this version does not do",
            Cause::Conflict => "another object has what it asks for",
            Cause::Disabled => "a setting of the agent forbids it",
            Cause::Unreadable => "the document could not be read",
            Cause::Unfollowed => {
                "the API server does not say at the moment; what it said last stays in force"
            }
            Cause::TableFull => "a table has no room: a `--max-…` flag makes it larger",
            Cause::WriteRefused => "the kernel refused to write it; it is tried again",
            Cause::OtherProxy => "kube-proxy's rules are on this node too",
        }
    }
}

/// A part of an object that cannot be used, and why. `field` is a path such as `spec.ports[0].port`, empty for the
/// object as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Problem {
    pub field: String,
    pub reason: String,
    pub cause: Cause,
}

impl Problem {
    /// A problem of what the object says.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
            cause: Cause::Invalid,
        }
    }

    /// The same with another cause.
    #[must_use]
    pub fn because(self, cause: Cause) -> Self {
        Self { cause, ..self }
    }
}

/// Something in the source that is not served, wholly or in part.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rejected {
    /// `None` for objects that come from the API server.
    pub origin: Option<Origin>,
    /// `kind namespace/name`, or what little is known of it.
    pub object: String,
    pub problem: Problem,
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            origin,
            object,
            problem:
                Problem {
                    field,
                    reason,
                    cause: _,
                },
        } = self;
        if let Some(origin) = origin {
            write!(f, "{origin}: ")?;
        }
        for part in [object, field] {
            if !part.is_empty() {
                write!(f, "{part}: ")?;
            }
        }
        f.write_str(reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_as_they_are_written() {
        for (namespace, name) in [("shop", "db-0"), ("", "node1")] {
            let name = Name::new(namespace, name);
            assert_eq!(name.to_string().parse(), Ok(name));
        }
        for wrong in ["", "/a", "a/"] {
            assert_eq!(wrong.parse::<Name>(), Err(()), "{wrong}");
        }
    }
}
