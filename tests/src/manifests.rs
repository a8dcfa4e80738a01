//! The folder of manifests that every agent of a cluster reads, one object a file, each written by an atomic rename.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::shape::PodShape;

/// Kinds that a scenario may hold.
const KINDS: [(&str, &str); 5] = [
    ("v1", "Node"),
    ("v1", "Namespace"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
];

/// A folder of manifests.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// A neighbour of `dir` on the same file system, where files are written before they are moved in.
    staging: PathBuf,
}

impl Manifests {
    /// Makes the folder inside `parent`.
    pub fn create(parent: &Path) -> Result<Self> {
        let manifests = Self {
            dir: parent.join("manifests"),
            staging: parent.join("staging"),
        };
        for dir in [&manifests.dir, &manifests.staging] {
            fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        }
        Ok(manifests)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Creates or replaces an object.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let name = file_name(object)?;
        let staged = self.staging.join(&name);
        fs::write(&staged, serde_json::to_vec_pretty(object)?)
            .with_context(|| format!("failed to write {}", staged.display()))?;
        fs::rename(&staged, self.dir.join(&name)).with_context(|| format!("failed to publish {name}"))
    }

    /// Removes an object, which must be there.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let name = file_name(object)?;
        fs::remove_file(self.dir.join(&name)).with_context(|| format!("failed to remove {name}"))
    }
}

/// Refuses kinds that the schema does not know.
pub fn check_kind(object: &Value) -> Result<()> {
    let field = |name| object.get(name).and_then(Value::as_str).unwrap_or_default();
    let (version, kind) = (field("apiVersion"), field("kind"));
    if !KINDS.contains(&(version, kind)) {
        bail!("unknown kind {kind:?} of {version:?}");
    }
    Ok(())
}

fn file_name(object: &Value) -> Result<String> {
    check_kind(object)?;
    let kind = object["kind"].as_str().unwrap_or_default().to_lowercase();
    let name = object["metadata"]["name"]
        .as_str()
        .context("an object has no name")?;
    let namespace = object["metadata"]["namespace"].as_str().unwrap_or("-");
    Ok(format!("{kind}_{namespace}_{name}.json").replace('/', "_"))
}

/// A running, ready pod as the API would show it.
pub fn pod(pod: &PodShape, namespace: &str, host_ips: &[std::net::IpAddr]) -> Value {
    let PodShape {
        name,
        node,
        addresses,
        host_network,
    } = pod;
    let ips = |ips: &[std::net::IpAddr]| ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
    let ready = |kind| json!({"type": kind, "status": "True"});
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{name}"), "labels": {"pod": name}},
        "spec": {
            "nodeName": node,
            "hostNetwork": host_network,
            "containers": [{"name": "main", "image": "none"}],
        },
        "status": {
            "phase": "Running",
            "podIP": addresses.first(),
            "podIPs": ips(addresses),
            "hostIP": host_ips.first(),
            "hostIPs": ips(host_ips),
            "conditions": [ready("Initialized"), ready("Ready"), ready("ContainersReady"), ready("PodScheduled")],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_by_kind_namespace_and_name() {
        let service =
            json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "namespace": "b"}});
        assert_eq!(file_name(&service).unwrap(), "service_b_a.json");
        let unknown = json!({"apiVersion": "v1", "kind": "Gateway", "metadata": {"name": "a"}});
        assert!(file_name(&unknown).is_err());
    }
}
