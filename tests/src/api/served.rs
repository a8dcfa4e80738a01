//! A server as agents of a test cluster find it: with their account, its rights, and the custom resources of policies.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::client::Client;
use super::server::Server;
use super::{account, objects};
use crate::agent::patient;

/// How long the server may take to serve what was defined.
const SERVE: Duration = Duration::from_secs(30);
const GROUP: &str = "policy.networking.k8s.io";
/// The custom resources: kind, plural and version.
const POLICIES: [(&str, &str, &str); 3] = [
    ("ClusterNetworkPolicy", "clusternetworkpolicies", "v1alpha2"),
    ("AdminNetworkPolicy", "adminnetworkpolicies", "v1alpha1"),
    (
        "BaselineAdminNetworkPolicy",
        "baselineadminnetworkpolicies",
        "v1alpha1",
    ),
];

/// A server and an administrator's client.
#[derive(Debug)]
pub struct Served {
    pub server: Server,
    pub client: Client,
}

impl Served {
    /// Starts a server that keeps its data in `dir`.
    pub fn start(binaries: &Path, dir: &Path) -> Result<Self> {
        let server = Server::start(binaries, dir)?;
        let client = server.client()?;
        account::install(&client)?;
        for (kind, _, _) in POLICIES {
            objects::apply(&client, &definition(kind))?;
        }
        let end = Instant::now() + patient(SERVE);
        for (_, plural, version) in POLICIES {
            while client.get(&format!("/apis/{GROUP}/{version}/{plural}"))?.is(404) {
                ensure!(Instant::now() < end, "the server does not serve {plural}");
                sleep(Duration::from_millis(50));
            }
        }
        Ok(Self { server, client })
    }
}

/// The definition of a kind of cluster-wide policies, by a schema that takes everything: what is refused is the agent's to say.
#[must_use]
pub fn definition(kind: &str) -> Value {
    let (_, plural, version) = POLICIES
        .into_iter()
        .find(|known| known.0 == kind)
        .unwrap_or(POLICIES[0]);
    let version = json!({
        "name": version, "served": true, "storage": true,
        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}},
    });
    // Names of this group are protected.
    let approval = "https://github.com/kubernetes-sigs/network-policy-api/pull/30";
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{plural}.{GROUP}"),
            "annotations": {"api-approved.kubernetes.io": approval},
        },
        "spec": {
            "group": GROUP, "scope": "Cluster",
            "names": {"kind": kind, "plural": plural, "singular": kind.to_lowercase()},
            "versions": [version],
        },
    })
}
