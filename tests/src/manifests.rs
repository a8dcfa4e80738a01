//! The objects that every agent of a cluster reads: a folder of manifests, one object a file, each written by an atomic
//! rename, or an API server.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::api::objects;
use crate::api::served::Served;
use crate::shape::{NodeShape, PodShape};

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

/// A folder of manifests, or what stands for it.
#[derive(Debug)]
pub struct Manifests {
    place: Place,
    /// What each file holds, by the name that it has or would have.
    files: Mutex<BTreeMap<String, Value>>,
}

#[derive(Debug)]
enum Place {
    Folder {
        dir: PathBuf,
        /// A neighbour of `dir` on the same file system, where files are written before they are moved in.
        staging: PathBuf,
    },
    Api(Arc<Served>),
}

impl Manifests {
    /// Makes the folder inside `parent`.
    pub fn create(parent: &Path) -> Result<Self> {
        let (dir, staging) = (parent.join("manifests"), parent.join("staging"));
        for dir in [&dir, &staging] {
            fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        }
        Ok(Self {
            place: Place::Folder { dir, staging },
            files: Mutex::default(),
        })
    }

    /// Objects of a server, of which those that scenarios may hold are deleted first.
    pub fn of_server(served: Arc<Served>) -> Result<Self> {
        // What is in a namespace goes before it.
        let kinds: Vec<_> = KINDS.iter().rev().copied().collect();
        for object in objects::all(&served.client, &kinds)? {
            if !objects::is_builtin(&object) {
                objects::delete(&served.client, &object)?;
            }
        }
        Ok(Self {
            place: Place::Api(served),
            files: Mutex::default(),
        })
    }

    /// A folder, or a server if there is one.
    pub fn create_in(parent: &Path, served: Option<&Arc<Served>>) -> Result<Self> {
        match served {
            Some(served) => Self::of_server(served.clone()),
            None => Self::create(parent),
        }
    }

    /// The folder; empty where a server stands for it.
    pub fn dir(&self) -> &Path {
        match &self.place {
            Place::Folder { dir, .. } => dir,
            Place::Api(_) => Path::new(""),
        }
    }

    /// The server that stands for the folder.
    pub fn served(&self) -> Option<&Arc<Served>> {
        match &self.place {
            Place::Folder { .. } => None,
            Place::Api(served) => Some(served),
        }
    }

    /// Creates or replaces an object.
    pub fn apply(&self, object: &Value) -> Result<()> {
        let name = file_name(object)?;
        match &self.place {
            Place::Folder { dir, staging } => {
                let staged = staging.join(&name);
                fs::write(&staged, serde_json::to_vec_pretty(object)?)
                    .with_context(|| format!("failed to write {}", staged.display()))?;
                fs::rename(&staged, dir.join(&name)).with_context(|| format!("failed to publish {name}"))?;
            }
            Place::Api(served) => objects::apply(&served.client, object)?,
        }
        self.files().insert(name, object.clone());
        Ok(())
    }

    /// Removes an object, which must be there.
    pub fn delete(&self, object: &Value) -> Result<()> {
        let name = file_name(object)?;
        self.remove(&name)
    }

    /// Knows no more of an object that is gone.
    pub fn forget(&self, object: &Value) -> Result<()> {
        self.files().remove(&file_name(object)?);
        Ok(())
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
        let place = |object: &Value| KINDS.iter().position(|(_, kind)| object["kind"] == *kind);
        let mut old: Vec<_> = old
            .into_iter()
            .map(|name| (self.files().get(&name).map(place), name))
            .collect();
        old.sort();
        old.iter().rev().try_for_each(|(_, name)| self.remove(name))?;
        // Nodes and namespaces are there before what is on and in them.
        let mut new: Vec<&Value> = wanted.into_values().collect();
        new.sort_by_key(|object| place(object));
        new.into_iter().try_for_each(|object| self.apply(object))
    }

    fn remove(&self, name: &str) -> Result<()> {
        let object = self.files().get(name).cloned();
        match &self.place {
            Place::Folder { dir, .. } => {
                fs::remove_file(dir.join(name)).with_context(|| format!("failed to remove {name}"))?;
            }
            Place::Api(served) => {
                let object = object.with_context(|| format!("failed to delete {name}: it is not there"))?;
                objects::delete(&served.client, &object)?;
            }
        }
        self.files().remove(name);
        Ok(())
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

/// A node of a cluster.
pub fn node(node: &NodeShape) -> Value {
    let cidrs: Vec<String> = node
        .pod_cidrs
        .iter()
        .map(|(ip, length)| format!("{ip}/{length}"))
        .collect();
    let ips: Vec<Value> = node
        .addresses
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": node.name},
        "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs}, "status": {"addresses": ips},
    })
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
