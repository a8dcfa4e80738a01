//! What goes over each Service, endpoint and Pod of a node, as the agent tells its commands: numbers that only grow, so that
//! whoever asks twice knows the rates.

use std::{collections::BTreeMap, net::SocketAddr};

pub use dataplane_common::traffic::Traffic;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// The whole picture, at a moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    pub at: Timestamp,
    /// Those that have frontends here, by name. Of more than [`IDLE_AT_MOST`], those over which nothing has gone are left out.
    pub services: Vec<ServiceLoad>,
    /// Pods of this node with programs at their interface, and Pods elsewhere that are endpoints, by name.
    pub pods: Vec<PodLoad>,
    /// Packets that this node has dropped, or refused in an endpoint's place, by reason as in `dataplane_packets_total`. Exact.
    pub drops: BTreeMap<String, u64>,
}

/// See [`Load::services`].
pub const IDLE_AT_MOST: usize = 1000;

/// A Service.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceLoad {
    /// `kind namespace/name`.
    pub object: String,
    #[serde(flatten)]
    pub traffic: Traffic,
    pub endpoints: Vec<EndpointLoad>,
}

/// An endpoint, with what its Service has sent there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointLoad {
    pub at: SocketAddr,
    /// `namespace/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// `active`, `serving`, `draining` or `gone`.
    pub state: String,
    #[serde(flatten)]
    pub traffic: Traffic,
}

impl EndpointLoad {
    /// Whether new connections may go there.
    pub fn is_active(&self) -> bool {
        self.state == "active"
    }
}

/// A Pod, as an endpoint and as one that policies are about.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodLoad {
    /// `namespace/name`.
    pub pod: String,
    /// It is on this node.
    pub here: bool,
    /// What came to it through Services.
    #[serde(flatten)]
    pub traffic: Traffic,
    /// Packets that were dropped at its interface. Exact.
    pub drops: u64,
}
