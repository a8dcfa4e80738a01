//! The folder of manifests that every agent of a cluster reads, one object a file, each written by an atomic rename.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::shape::PodShape;

/// Kinds that a scenario may hold.
const KINDS: [(&str, &str); 9] = [
    ("v1", "Node"),
    ("v1", "Namespace"),
    ("v1", "Pod"),
    ("v1", "Service"),
    ("discovery.k8s.io/v1", "EndpointSlice"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("policy.networking.k8s.io/v1alpha2", "ClusterNetworkPolicy"),
    ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy"),
    ("policy.networking.k8s.io/v1alpha1", "BaselineAdminNetworkPolicy"),
];

/// A folder of manifests.
#[derive(Debug)]
pub struct Manifests {
    dir: PathBuf,
    /// A neighbour of `dir` on the same file system, where files are written before they are moved in.
    staging: PathBuf,
    /// What each file holds.
    files: Mutex<BTreeMap<String, Value>>,
}

impl Manifests {
    /// Makes the folder inside `parent`.
    pub fn create(parent: &Path) -> Result<Self> {
        let manifests = Self {
            dir: parent.join("manifests"),
            staging: parent.join("staging"),
            files: Mutex::default(),
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
        fs::rename(&staged, self.dir.join(&name)).with_context(|| format!("failed to publish {name}"))?;
        self.files().insert(name, object.clone());
        Ok(())
    }

    /// Removes an object, which must be there.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let name = file_name(object)?;
        self.remove(&name)
    }

    /// Makes the folder hold these objects and no others, touching no file that is right already.
    pub fn replace(&self, objects: &[Value]) -> Result<()> {
        let mut wanted = BTreeMap::new();
        for object in objects {
            wanted.insert(file_name(object)?, object);
        }
        let old: Vec<String> = {
            let files = self.files();
            wanted.retain(|name, object| files.get(name) != Some(*object));
            let kept = objects.iter().map(file_name).collect::<Result<BTreeSet<_>>>()?;
            files
                .keys()
                .filter(|name| !kept.contains(*name))
                .cloned()
                .collect()
        };
        old.iter().try_for_each(|name| self.remove(name))?;
        wanted.into_values().try_for_each(|object| self.apply(object))
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.files().remove(name);
        fs::remove_file(self.dir.join(name)).with_context(|| format!("failed to remove {name}"))
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<String, Value>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
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
#[derive(Debug)]
pub struct PodObject<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
    pub labels: Value,
    /// `containerPort`, `protocol` and `name` of each.
    pub ports: Vec<Value>,
    pub node: &'a str,
    pub node_ips: &'a [IpAddr],
    pub addresses: &'a [IpAddr],
    pub host_network: bool,
}

impl PodObject<'_> {
    pub fn manifest(&self) -> Value {
        let Self {
            namespace,
            name,
            labels,
            ports,
            node,
            node_ips,
            addresses,
            host_network,
        } = self;
        let ips = |ips: &[IpAddr]| ips.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
        let ready = |kind| json!({"type": kind, "status": "True"});
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name, "namespace": namespace, "uid": format!("uid-{namespace}-{name}"), "labels": labels,
            },
            "spec": {
                "nodeName": node,
                "hostNetwork": host_network,
                "containers": [{"name": "main", "image": "none", "ports": ports}],
            },
            "status": {
                "phase": "Running",
                "podIP": addresses.first(),
                "podIPs": ips(addresses),
                "hostIP": node_ips.first(),
                "hostIPs": ips(node_ips),
                "conditions": [ready("Initialized"), ready("Ready"), ready("ContainersReady"), ready("PodScheduled")],
            },
        })
    }
}

/// A pod of a cluster, with its name for a label.
pub fn pod(pod: &PodShape, namespace: &str, host_ips: &[IpAddr]) -> Value {
    let object = PodObject {
        namespace,
        name: &pod.name,
        labels: json!({"pod": pod.name}),
        ports: Vec::new(),
        node: &pod.node,
        node_ips: host_ips,
        addresses: &pod.addresses,
        host_network: pod.host_network,
    };
    object.manifest()
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

    #[test]
    fn a_folder_is_replaced_by_what_differs() {
        let parent = std::env::temp_dir().join(format!("dpt-manifests-{}", std::process::id()));
        fs::create_dir_all(&parent).unwrap();
        let manifests = Manifests::create(&parent).unwrap();
        let namespace = |name: &str, team: &str| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {"team": team}}});
        for name in ["a", "b", "c"] {
            manifests.apply(&namespace(name, "one")).unwrap();
        }
        let inode = |name: &str| {
            let path = manifests.dir().join(format!("namespace_-_{name}.json"));
            Some(std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).ok()?))
        };
        let before = ["a", "b", "c"].map(inode);
        manifests
            .replace(&[namespace("a", "one"), namespace("b", "two")])
            .unwrap();
        assert_eq!(inode("a"), before[0]);
        assert_ne!(inode("b"), before[1]);
        assert_eq!(inode("c"), None);
        fs::remove_dir_all(&parent).unwrap();
    }
}
