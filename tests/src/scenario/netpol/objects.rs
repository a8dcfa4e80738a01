//! The objects of a case as an API server would show them, and what its actions make of them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::file::{Action, Case, Host, Labels, Namespace, Pod, Port};
use super::layout::Layout;
use crate::manifests::PodObject;

/// What an action does to one object.
#[derive(Debug, PartialEq)]
pub enum Change {
    Apply(Value),
    /// The object may be no more than its kind and name.
    Delete(Value),
}

/// The pods that there are, by id; they decide what a change of labels means.
#[derive(Debug)]
pub struct Objects<'a> {
    layout: &'a Layout,
    pods: BTreeMap<String, Pod>,
}

impl<'a> Objects<'a> {
    /// The state before the first step: nodes, namespaces and pods, in an order in which they can be created.
    pub fn begin(case: &Case, layout: &'a Layout) -> Result<(Self, Vec<Value>)> {
        let mut objects: Vec<Value> = layout.nodes.iter().map(super::layout::Node::manifest).collect();
        objects.extend(case.namespaces.iter().map(namespace));
        for host in &case.hosts {
            objects.push(host_pod(host, layout)?);
        }
        let pods: BTreeMap<String, Pod> = case.pods.iter().map(|pod| (pod.id(), pod.clone())).collect();
        for pod in pods.values() {
            objects.push(manifest(pod, layout)?);
        }
        Ok((Self { layout, pods }, objects))
    }

    /// Notes an action and tells what it does.
    pub fn act(&mut self, action: &Action) -> Result<Change> {
        Ok(match action {
            Action::Create { object } | Action::Update { object } => Change::Apply(object.clone()),
            Action::Delete { object } => Change::Delete(object.clone()),
            Action::UpdateLabels { object } => {
                let metadata = &object["metadata"];
                let text = |field: &str| metadata[field].as_str().unwrap_or_default();
                let id = format!("{}/{}", text("namespace"), text("name"));
                let pod = self
                    .pods
                    .get_mut(&id)
                    .with_context(|| format!("there is no pod {id}"))?;
                pod.labels = labels(&metadata["labels"]).with_context(|| format!("labels of {id}"))?;
                Change::Apply(manifest(pod, self.layout)?)
            }
            Action::CreatePod { pod } => {
                self.pods.insert(pod.id(), pod.clone());
                Change::Apply(manifest(pod, self.layout)?)
            }
            Action::DeletePod { pod } => {
                let id = pod.id();
                let pod = self
                    .pods
                    .remove(&id)
                    .with_context(|| format!("there is no pod {id}"))?;
                Change::Delete(manifest(&pod, self.layout)?)
            }
        })
    }

    /// Where an id is dialled at: a pod that there is now, a host or an address outside.
    pub fn address(&self, case: &Case, id: &str) -> Result<IpAddr> {
        let pod = self.pods.get(id).map(|pod| (pod.ip, pod.ip6));
        let hosts = case.hosts.iter().map(|host| (&host.id, host.ip, host.ip6));
        let externals = case.externals.iter();
        let mut others = hosts.chain(externals.map(|external| (&external.id, external.ip, external.ip6)));
        let (ip, ip6) = pod
            .or_else(|| others.find(|other| other.0 == id).map(|other| (other.1, other.2)))
            .with_context(|| format!("{id} is not there in this step"))?;
        case.address(ip, ip6)
            .with_context(|| format!("{id} has no address of the case's family"))
    }

    /// The pods that there are now, by id.
    pub fn pods(&self) -> &BTreeMap<String, Pod> {
        &self.pods
    }
}

fn labels(value: &Value) -> Result<Labels> {
    if value.is_null() {
        return Ok(Labels::new());
    }
    Ok(serde_json::from_value(value.clone())?)
}

fn namespace(namespace: &Namespace) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": namespace.name, "labels": namespace.labels},
    })
}

fn manifest(pod: &Pod, layout: &Layout) -> Result<Value> {
    let node = layout.node_of(pod)?;
    let addresses: Vec<IpAddr> = pod.ip.into_iter().chain(pod.ip6).collect();
    let object = PodObject {
        namespace: &pod.ns,
        name: &pod.name,
        labels: json!(pod.labels),
        ports: ports(&pod.ports),
        node: &node.name,
        node_ips: &node.addresses,
        addresses: &addresses,
        host_network: false,
    };
    Ok(object.manifest())
}

fn host_pod(host: &Host, layout: &Layout) -> Result<Value> {
    let node = layout.node_of_host(host)?;
    let object = PodObject {
        namespace: &host.ns,
        name: host.id.rsplit('/').next().unwrap_or(&host.id),
        labels: json!(host.labels),
        ports: ports(&host.ports),
        node: &node.name,
        node_ips: &node.addresses,
        addresses: &node.addresses,
        host_network: true,
    };
    Ok(object.manifest())
}

fn ports(ports: &[Port]) -> Vec<Value> {
    let shown = |port: &Port| json!({"containerPort": port.port, "protocol": port.proto, "name": port.name});
    ports.iter().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> Case {
        Case::parse(
            br#"{"schema": "scenario-netpol/1", "id": "n", "name": "n", "family": "IPv4",
                "namespaces": [{"name": "x", "labels": {"ns": "x"}}],
                "pods": [{"ns": "x", "name": "a", "labels": {"pod": "a"}, "ip": "10.244.1.11", "ports": []}],
                "hosts": [{"id": "host/n1", "ip": "192.168.77.11", "ns": "x", "nodelabels": {"os": "linux"}}],
                "steps": [
                    {"actions": [{"verb": "updateLabels", "object": {"metadata":
                        {"namespace": "x", "name": "a", "labels": {"new": "1"}}}}],
                     "expected": {"ids": [], "table": {}}},
                    {"actions": [{"verb": "deletePod", "pod": {"ns": "x", "name": "a"}}],
                     "expected": {"ids": [], "table": {}}}]}"#,
        )
        .unwrap()
    }

    #[test]
    fn labels_are_replaced_and_pods_go() {
        let case = case();
        let layout = Layout::of(&case).unwrap();
        let (mut objects, all) = Objects::begin(&case, &layout).unwrap();
        let kinds: Vec<_> = all
            .iter()
            .map(|object| object["kind"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["Node", "Namespace", "Pod", "Pod"]);
        assert_eq!(all[0]["metadata"]["labels"]["os"], "linux");
        let Change::Apply(pod) = objects.act(&case.steps[0].actions[0]).unwrap() else {
            panic!("nothing was applied")
        };
        assert_eq!(pod["metadata"]["labels"], json!({"new": "1"}));
        assert_eq!(pod["status"]["podIP"], "10.244.1.11");
        let Change::Delete(pod) = objects.act(&case.steps[1].actions[0]).unwrap() else {
            panic!("nothing was deleted")
        };
        assert_eq!(pod["metadata"]["name"], "a");
        assert!(objects.pods().is_empty());
        assert!(objects.act(&case.steps[1].actions[0]).is_err());
    }
}
