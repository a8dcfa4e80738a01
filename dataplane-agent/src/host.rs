//! What the agent knows of its own machine, and the seam to the part that finds it out.
//!
//! The kernel side (`bpf::start`) watches devices, addresses and pod interfaces by netlink, attaches
//! programs, and publishes a [`HostState`] whenever it changes. The agent's loop turns it into table entries and
//! says in [`WantedPods`] which pods' interfaces to look for. Plain data only: nothing here makes a system call.

use std::{collections::BTreeMap, fmt, net::IpAddr};

use dataplane_common::{addr::Mac, device::Device};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    netlink::kube_proxy::Rules,
    store::{Store, left::LeftFlows, sockets::GivenSockets},
};

/// One observation of the machine, complete in itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostState {
    /// The [`WantedPods::revision`] that this observation answers: interfaces were looked up after it was published,
    /// and the programs of every interface named below are attached.
    pub wanted_revision: u64,
    /// Every address of the host's network namespace, loopback included.
    pub own_addresses: BTreeMap<IpAddr, OwnAddress>,
    /// The uplinks and tunnel devices that carry our programs, by ifindex; and `lo` with `--localhost-node-ports`.
    pub devices: BTreeMap<u32, HostDevice>,
    /// The interfaces of this node's pods, by pod address: those of [`WantedPods`] that were found.
    pub pod_interfaces: BTreeMap<IpAddr, PodInterface>,
    /// The same interfaces by ifindex, with their pods as `namespace/name`; also those that a CNI plugin has told. Only those
    /// that carry their programs.
    pub bound_pods: BTreeMap<u32, String>,
    /// Where kube-proxy has rules.
    pub kube_proxy: Vec<Rules>,
}

/// An address of this node. Whether node ports answer at it is the agent's decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnAddress {
    pub ifindex: u32,
    pub device: String,
    pub reach: Reach,
}

/// How far an address reaches (`IFA_SCOPE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Any address on `lo`, and 127.0.0.0/8 and `::1` anywhere.
    Loopback,
    /// 169.254.0.0/16 and `fe80::/10`.
    Link,
    Global,
}

/// A device of `DEVICES`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostDevice {
    pub name: String,
    /// `rtnl_link`'s kind, such as `vxlan` or `wireguard`; empty for hardware.
    pub kind: String,
    /// The entry as the table gets it.
    pub entry: Device,
}

/// The host-side interface of a pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInterface {
    pub ifindex: u32,
    pub name: String,
    /// The pod's own link-layer address.
    pub pod_mac: Mac,
    /// From which the pod expects its packets: the interface's own, or that of the bridge above it.
    pub host_mac: Mac,
    /// Both its programs are attached and packets may be handed to it directly.
    pub fast_path: bool,
}

/// The pods of this node whose interfaces are wanted: not host-network, not finished.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WantedPods {
    /// Grows with each publication. A growth without other change asks for a fresh look at the machine; the answer
    /// is a [`HostState`] that carries this number, published even when nothing else differs.
    pub revision: u64,
    /// `namespace/name`, by each of the pod's addresses.
    pub pods: BTreeMap<IpAddr, String>,
    /// Each `InternalIP` of this node's Node object: a device that carries one is an uplink, and they are the source of
    /// what leaves by a device without an address of its own.
    pub node_addresses: Vec<IpAddr>,
    /// What becomes of interfaces that may be a pod's and that nobody knows.
    pub unknown: Unknown,
    /// Interfaces that a CNI plugin has told, by `namespace/name`.
    pub claims: BTreeMap<String, Claim>,
}

/// What becomes of an interface that may be a pod's and that nobody knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Unknown {
    /// It stays as it is, until it is known which pods are to be expected.
    #[default]
    Keep,
    /// It gets its programs, and is closed while policies are in force: it may be that of a pod which policies select.
    Close,
    /// It is nobody's business.
    Leave,
}

/// What a CNI plugin tells of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Its host-side interface.
    pub ifindex: u32,
    /// The pod's network namespace, as the host's numbers it.
    pub namespace: i32,
    pub addrs: Vec<IpAddr>,
    /// The Pod's; empty when unknown.
    pub uid: String,
}

/// What the kernel side hands to the agent's loop when it has started.
pub struct Kernel {
    /// The pinned tables.
    pub store: Box<dyn Store + Send>,
    /// `None` until the first observation.
    pub host: watch::Receiver<Option<HostState>>,
    /// `None` without socket hooks.
    pub given_sockets: Option<GivenSockets>,
    pub left_flows: LeftFlows,
    /// What the programs were loaded with.
    pub constants: dataplane_common::config::Config,
}

impl fmt::Debug for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kernel")
            .field("host", &self.host)
            .finish_non_exhaustive()
    }
}
