//! The stage: manifests read from a folder, the cluster that they describe, agents and web servers in it.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use dataplane_tests::agent::{AgentOptions, Agents};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::manifests::Manifests;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use dataplane_tests::web;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::api::Api;

/// The client outside.
pub const OUTSIDE: &str = "outside";
const OUTSIDE_ADDRESSES: [&str; 2] = ["203.0.113.10", "2001:db8:ff::10"];

/// Everything that runs.
#[derive(Debug)]
pub struct Stage {
    pub objects: Vec<Value>,
    pub manifests: Manifests,
    // Dropped in this order: the agents before the cluster they run in.
    pub agents: Agents,
    pub cluster: Cluster,
    /// In place of the folder.
    pub api: Option<Api>,
}

impl Stage {
    /// Builds the cluster, starts the web servers and the agents, and waits until all is programmed.
    pub fn set(folder: &Path, agent: &Path, api: Option<Api>) -> Result<Self> {
        let objects = read(folder)?;
        let cluster = Cluster::build("demo", shape(&objects)?, &Helper::find()?)?;
        for pod in of_kind(&objects, "Pod") {
            for port in pod["spec"]["containers"][0]["ports"]
                .as_array()
                .into_iter()
                .flatten()
            {
                let port = port["containerPort"]
                    .as_u64()
                    .context("a container port is no number")?;
                let name = name(pod).to_owned();
                web::serve(pod_netns(&cluster, &name), name, u16::try_from(port)?)?;
            }
        }
        let manifests = Manifests::create_in(&cluster.places().work, api.as_ref().map(|api| &api.served))?;
        for object in &objects {
            manifests.apply(object)?;
        }
        let options = AgentOptions {
            program: agent.to_owned(),
            flags: Vec::new(),
        };
        let mut stage = Self {
            agents: Agents::reading(&cluster, &manifests, options)?,
            objects,
            manifests,
            cluster,
            api,
        };
        stage.settle()?;
        Ok(stage)
    }

    /// Waits until the agents have programmed what the folder holds.
    pub fn settle(&mut self) -> Result<()> {
        self.agents.settled()
    }

    /// The namespace of a pod or of the client outside.
    pub fn netns(&self, name: &str) -> PathBuf {
        if name == OUTSIDE {
            self.cluster.places().netns(name)
        } else {
            pod_netns(&self.cluster, name)
        }
    }

    /// Names of the pods that serve.
    pub fn servers(&self) -> Vec<String> {
        of_kind(&self.objects, "Pod")
            .filter(|pod| pod["spec"]["containers"][0]["ports"].is_array())
            .map(|pod| name(pod).to_owned())
            .collect()
    }

    /// Takes a pod out of service as a cluster would: not ready, and gone from the slices.
    pub fn take_out(&mut self, leaving: &str) -> Result<()> {
        for object in &self.objects {
            if let Some(api) = &self.api {
                api.take_out(object, leaving)?;
                continue;
            }
            let mut object = object.clone();
            if object["kind"] == "Pod" && name(&object) == leaving {
                object["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
            } else if let Some(endpoints) = object["endpoints"].as_array_mut() {
                endpoints.retain(|endpoint| endpoint["targetRef"]["name"] != leaving);
            } else {
                continue;
            }
            self.manifests.apply(&object)?;
        }
        self.settle()
    }
}

fn pod_netns(cluster: &Cluster, pod: &str) -> PathBuf {
    cluster.places().netns(&format!("pod-{pod}"))
}

/// The name of an object.
pub fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// The objects of one kind.
pub fn of_kind<'a>(objects: &'a [Value], kind: &'a str) -> impl Iterator<Item = &'a Value> {
    objects.iter().filter(move |object| object["kind"] == kind)
}

/// Every document of every YAML file of a folder.
fn read(folder: &Path) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    let entries = fs::read_dir(folder).with_context(|| format!("failed to list {}", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    for file in files
        .iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "yaml"))
    {
        let text = fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
        for document in serde_norway::Deserializer::from_str(&text) {
            let object = Value::deserialize(document)
                .with_context(|| format!("failed to decode {}", file.display()))?;
            objects.push(object);
        }
    }
    Ok(objects)
}

/// The cluster that Node and Pod objects describe, and a client outside.
fn shape(objects: &[Value]) -> Result<Shape> {
    let node = |node: &Value| -> Result<NodeShape> {
        let cidrs = strings(&node["spec"]["podCIDRs"], "/nothing");
        Ok(NodeShape {
            name: name(node).to_owned(),
            addresses: addresses(&node["status"]["addresses"], "/address")?,
            extra_addresses: Vec::new(),
            pod_cidrs: cidrs
                .iter()
                .map(|cidr| parse_prefix(cidr))
                .collect::<Result<_>>()?,
        })
    };
    let pod = |pod: &Value| -> Result<PodShape> {
        Ok(PodShape {
            name: name(pod).to_owned(),
            node: pod["spec"]["nodeName"]
                .as_str()
                .context("a pod has no node")?
                .to_owned(),
            addresses: addresses(&pod["status"]["podIPs"], "/ip")?,
            host_network: false,
        })
    };
    Ok(Shape {
        nodes: of_kind(objects, "Node").map(node).collect::<Result<_>>()?,
        pods: of_kind(objects, "Pod").map(pod).collect::<Result<_>>()?,
        externals: vec![ExternalShape {
            name: OUTSIDE.to_owned(),
            addresses: OUTSIDE_ADDRESSES
                .iter()
                .map(|ip| Ok(ip.parse()?))
                .collect::<Result<_>>()?,
        }],
        network: Network::Routed,
    })
}

fn addresses(list: &Value, field: &str) -> Result<Vec<IpAddr>> {
    strings(list, field)
        .iter()
        .map(|ip| ip.parse().with_context(|| format!("{ip} is no address")))
        .collect()
}

/// The strings of a list, or of a field of each of its elements.
fn strings(list: &Value, field: &str) -> Vec<String> {
    let elements = list.as_array().into_iter().flatten();
    elements
        .filter_map(|each| {
            each.as_str()
                .or_else(|| each.pointer(field)?.as_str())
                .map(str::to_owned)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_examples_describe_a_cluster() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples");
        let objects = read(&folder).unwrap();
        let shape = shape(&objects).unwrap();
        assert_eq!(shape.nodes.len(), 2);
        assert!(
            shape
                .nodes
                .iter()
                .all(|node| node.addresses.len() == 2 && node.pod_cidrs.len() == 2)
        );
        assert_eq!(shape.pods.len(), 6);
        assert!(shape.pods.iter().all(|pod| pod.addresses.len() == 2));
    }
}
