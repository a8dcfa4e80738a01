//! The objects, reduced to the fields that are used.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    net::{IpAddr, Ipv4Addr},
    num::NonZeroI64,
    sync::Arc,
};

use dataplane_common::addr::proto;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{Labels, Name};

/// A layer 4 protocol. Services are served for TCP and UDP; policies and the names of ports know SCTP too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// The IANA number.
    pub const fn number(self) -> u8 {
        match self {
            Protocol::Tcp => proto::TCP,
            Protocol::Udp => proto::UDP,
            Protocol::Sctp => proto::SCTP,
        }
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        }
    }
}

/// A Service.
#[expect(
    clippy::struct_excessive_bools,
    reason = "as many independent fields of the API"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Empty: its endpoints are somebody else's business. First, because it is looked at alone.
    pub selector: Labels,
    /// The index knows it without.
    #[serde(skip)]
    pub name: Name,
    pub proxied: Proxied,
    pub cluster_ips: Box<[IpAddr]>,
    pub external_ips: Box<[IpAddr]>,
    /// Load balancer ingress addresses with `ipMode: VIP`.
    pub ingress_ips: Box<[IpAddr]>,
    /// The families of the Service: those of its node ports.
    pub ipv4: bool,
    pub ipv6: bool,
    pub ports: Box<[ServicePort]>,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`, where it means anything: the Service has an external address of some kind.
    pub external_local: bool,
    /// `healthCheckNodePort`, where one is needed: type LoadBalancer and `externalTrafficPolicy: Local`.
    pub health_check_node_port: Option<u16>,
    /// `loadBalancerSourceRanges`: who may use [`Service::ingress_ips`], by family; empty means everybody.
    pub source_ranges: Box<[IpNet]>,
    /// `sessionAffinity: ClientIP`: how long after its last connection a client keeps its endpoint, in seconds.
    pub affinity_s: Option<u32>,
    pub publish_not_ready: bool,
    /// `metadata.creationTimestamp` in nanoseconds, 0 when unknown: of two Services that claim one address and port
    /// the older is served.
    pub created_ns: i64,
}

/// Whether a Service is served here. If not, nothing of it is programmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Proxied {
    Here,
    /// `clusterIP: None`.
    Headless,
    ExternalName,
    /// Its labels leave it to another proxy.
    Elsewhere,
}

impl Proxied {
    pub fn is_here(self) -> bool {
        self == Self::Here
    }
}

/// A port of a [`Service`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// Its place in `spec.ports`.
    pub place: u16,
    /// Empty when it has none.
    pub name: Arc<str>,
    pub proto: Protocol,
    pub port: u16,
    pub node_port: Option<u16>,
    pub target: TargetPort,
}

/// `targetPort`: used only where endpoints are derived from Pods.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    Number(u16),
    Name(Arc<str>),
}

/// `addressType` of a slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SliceFamily {
    V4,
    V6,
    /// Host names, which are not served.
    Fqdn,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointSlice {
    pub name: Name,
    /// The label `kubernetes.io/service-name`, in the slice's own namespace.
    pub service: Option<Name>,
    pub family: SliceFamily,
    pub ports: Arc<[SlicePort]>,
    pub endpoints: Endpoints,
    /// When the change happened that it is the last to show, as its annotation says, in nanoseconds since 1970.
    pub changed_ns: Option<NonZeroI64>,
}

/// A port of every endpoint of a slice.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SlicePort {
    pub name: Arc<str>,
    pub proto: Protocol,
    pub port: u16,
}

/// One endpoint, with the conditions' defaults applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint<A = IpAddr> {
    pub addr: A,
    pub ready: bool,
    pub serving: bool,
    pub terminating: bool,
    pub placement: Arc<Placement>,
}

/// The endpoints of a slice. Nothing is there as often, so they take no more room than their family needs.
#[derive(Clone, Debug, PartialEq)]
pub enum Endpoints {
    V4(Box<[Endpoint<Ipv4Addr>]>),
    Any(Box<[Endpoint]>),
}

impl Endpoints {
    pub fn iter(&self) -> impl Iterator<Item = Endpoint> {
        let (v4, any): (&[Endpoint<Ipv4Addr>], &[Endpoint]) = match self {
            Endpoints::V4(v4) => (v4, &[]),
            Endpoints::Any(any) => (&[], any),
        };
        let v4 = v4.iter().map(|endpoint| endpoint.at(endpoint.addr.into()));
        v4.chain(any.iter().cloned())
    }
}

impl FromIterator<Endpoint> for Endpoints {
    fn from_iter<T: IntoIterator<Item = Endpoint>>(endpoints: T) -> Self {
        let any: Vec<Endpoint> = endpoints.into_iter().collect();
        // Of their final size from the start: what a list leaves that grows and shrinks, others seldom fit into.
        let mut v4 = Vec::with_capacity(any.len());
        for endpoint in &any {
            let IpAddr::V4(addr) = endpoint.addr else {
                return Endpoints::Any(any.into());
            };
            v4.push(endpoint.at(addr));
        }
        Endpoints::V4(v4.into())
    }
}

impl<A> Endpoint<A> {
    /// The same at another address.
    pub fn at<B>(&self, addr: B) -> Endpoint<B> {
        Endpoint {
            addr,
            ready: self.ready,
            serving: self.serving,
            terminating: self.terminating,
            placement: self.placement.clone(),
        }
    }
}

/// Where endpoints are, and for whom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Placement {
    pub node: Option<Arc<str>>,
    pub zone_hints: Box<[Arc<str>]>,
    pub node_hints: Box<[Arc<str>]>,
}

/// A Pod.
#[expect(
    clippy::struct_excessive_bools,
    reason = "as many independent fields of the API"
)]
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    pub name: Name,
    pub node: Option<Arc<str>>,
    pub labels: Labels,
    /// The first of each family.
    pub ips: Vec<IpAddr>,
    /// What tells it from another Pod of its name; 0 when unknown.
    pub uid: u64,
    /// More addresses that its interface has, as the annotation [`Pod::EXTRA_ADDRESSES`] says.
    pub extra_ips: Box<[IpAddr]>,
    /// It may send from any address, as the annotation [`Pod::ANY_SOURCE`] says.
    pub any_source: bool,
    pub host_network: bool,
    /// Succeeded or failed: it owns no address any more.
    pub finished: bool,
    /// The condition `Ready`.
    pub ready: bool,
    /// It has a deletion timestamp.
    pub terminating: bool,
    /// The phase is `Running`.
    pub running: bool,
    /// The named ports of its containers.
    pub ports: Arc<[PodPort]>,
    /// The ports of its containers that its node is to forward.
    pub host_ports: Vec<HostPort>,
    /// `metadata.creationTimestamp` in nanoseconds, 0 when unknown.
    pub created_ns: i64,
}

impl Pod {
    /// Addresses that are not in the Pod's status: a list with commas.
    pub const EXTRA_ADDRESSES: &str = "dataplane/extra-addresses";

    /// `true`: it sends for others (a router, a VPN), from addresses that are not its own.
    pub const ANY_SOURCE: &str = "dataplane/any-source";

    /// [`Pod::uid`] for the text of a UID.
    pub fn uid_of(text: &str) -> u64 {
        if text.is_empty() {
            return 0;
        }
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        hasher.finish()
    }
}

/// A named port of a container.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PodPort {
    pub name: Arc<str>,
    pub proto: Protocol,
    pub port: u16,
}

/// A port of a container that its node forwards.
#[derive(Clone, Debug, PartialEq)]
pub struct HostPort {
    /// Where it stands, such as `spec.containers[0].ports[0]`.
    pub field: String,
    pub host_ip: HostIp,
    pub port: u16,
    pub proto: Protocol,
    /// The container's port.
    pub target: u16,
}

/// `hostIP`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostIp {
    /// Every address of the node.
    Any,
    /// This one, or every one of its family where it is unspecified.
    One(IpAddr),
}

/// A Node.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub name: Name,
    pub labels: Labels,
    pub internal_ips: Vec<IpAddr>,
    /// Every address that its status names, `internal_ips` among them.
    pub ips: Vec<IpAddr>,
    /// The first of each family: where the addresses of its Pods come from, if it says so.
    pub pod_cidrs: Vec<IpNet>,
    /// It is being deleted, or the cluster autoscaler is about to remove it.
    pub leaving: bool,
}

impl Node {
    /// The label `topology.kubernetes.io/zone`, unless it is empty.
    pub fn zone(&self) -> Option<&str> {
        self.labels
            .get("topology.kubernetes.io/zone")
            .filter(|zone| !zone.is_empty())
    }
}

/// A Namespace.
#[derive(Clone, Debug, PartialEq)]
pub struct Namespace {
    pub name: Name,
    /// With [`Namespace::NAME_LABEL`].
    pub labels: Labels,
    /// Its `NetworkPolicy` objects report what they would do, and do nothing.
    pub dry_run: bool,
}

impl Namespace {
    /// The label that the API server gives every namespace: its name.
    pub const NAME_LABEL: &str = "kubernetes.io/metadata.name";
}
