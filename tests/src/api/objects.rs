//! Makes an API server hold what a scenario says: objects with their status, replaced where they cannot be changed.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::client::{Client, Outcome};

/// What only the server writes.
const SERVERS: [&str; 6] = [
    "uid",
    "creationTimestamp",
    "resourceVersion",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "generation",
];

/// Keeps an object that a scenario wants to see being deleted.
const KEPT: &str = "dataplane.test/kept";

/// The resource of a kind: its name in paths, whether it has a namespace, and a status of its own.
fn resource(kind: &str) -> Result<(&'static str, bool, bool)> {
    Ok(match kind {
        "Node" => ("nodes", false, true),
        "Namespace" => ("namespaces", false, false),
        "Pod" => ("pods", true, true),
        "Service" => ("services", true, true),
        "EndpointSlice" => ("endpointslices", true, false),
        "NetworkPolicy" => ("networkpolicies", true, false),
        "ClusterNetworkPolicy" => ("clusternetworkpolicies", false, false),
        "AdminNetworkPolicy" => ("adminnetworkpolicies", false, false),
        "BaselineAdminNetworkPolicy" => ("baselineadminnetworkpolicies", false, false),
        "CustomResourceDefinition" => ("customresourcedefinitions", false, false),
        "ServiceAccount" => ("serviceaccounts", true, false),
        "ClusterRole" => ("clusterroles", false, false),
        "ClusterRoleBinding" => ("clusterrolebindings", false, false),
        other => bail!("no test writes a {other}"),
    })
}

/// The path of an object's collection, and its own.
pub fn paths(object: &Value) -> Result<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (plural, is_namespaced, _) = resource(&text(&object["kind"]))?;
    let version = text(&object["apiVersion"]);
    let root = if version == "v1" {
        "/api/v1".to_owned()
    } else {
        format!("/apis/{version}")
    };
    let name = object["metadata"]["name"]
        .as_str()
        .context("an object has no name")?;
    let collection = if is_namespaced {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        format!("{root}/namespaces/{namespace}/{plural}")
    } else {
        format!("{root}/{plural}")
    };
    let own = format!("{collection}/{name}");
    Ok((collection, own))
}

/// Creates an object, or makes it what this says, its status included.
pub fn apply(client: &Client, object: &Value) -> Result<()> {
    let (collection, own) = paths(object)?;
    let (_, is_namespaced, has_status) = resource(object["kind"].as_str().unwrap_or_default())?;
    let is_leaving = object["metadata"].get("deletionTimestamp").is_some();
    let mut wanted = accepted(object);
    if is_leaving {
        wanted["metadata"]["finalizers"] = json!([KEPT]);
    }
    let status = wanted.as_object_mut().and_then(|fields| fields.remove("status"));
    let mut outcome = client.create(&collection, &wanted)?;
    if outcome.is(404) && is_namespaced {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or("default");
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        apply(client, &namespace)?;
        outcome = client.create(&collection, &wanted)?;
    }
    // A Service that is there has its address, which is found taken before its name is.
    let is_there = outcome.is(409) || (outcome.is(422) && matches!(client.get(&own)?, Outcome::Done(_)));
    if is_there {
        outcome = replace(client, &own, &wanted)?;
        let is_gone = |there: &Value| there["metadata"].get("deletionTimestamp").is_some();
        if outcome.is(422) {
            // What cannot be changed is made anew.
            delete(client, object)?;
            outcome = client.create(&collection, &wanted)?;
        } else if !is_leaving && matches!(&outcome, Outcome::Done(there) if is_gone(there)) {
            // It was being deleted, and what kept it is not wanted any more.
            outcome = client.create(&collection, &wanted)?;
        }
    }
    let there = outcome.done().with_context(|| own.clone())?;
    if let Some(status) = status.filter(|_| has_status) {
        let mut there = there;
        // Conditions are merged by the server; a status is what it is said to be.
        there["status"] = status;
        client
            .put(&format!("{own}/status"), &there)?
            .done()
            .with_context(|| format!("{own}/status"))?;
    }
    if is_leaving {
        client.delete(&own)?.done().with_context(|| own.clone())?;
    }
    Ok(())
}

fn replace(client: &Client, own: &str, wanted: &Value) -> Result<Outcome> {
    let there = client.get(own)?.done()?;
    let mut wanted = wanted.clone();
    wanted["metadata"]["resourceVersion"] = there["metadata"]["resourceVersion"].clone();
    client.put(own, &wanted)
}

/// Deletes an object and waits until it is gone. One that is not there is an error.
pub fn delete(client: &Client, object: &Value) -> Result<()> {
    let (_, own) = paths(object)?;
    let there = client.delete(&own)?.done().with_context(|| own.clone())?;
    if there["metadata"].get("finalizers").is_some() {
        // Without the last one it goes by itself.
        client.patch(&own, &json!({"metadata": {"finalizers": null}}))?;
    }
    if object["kind"] == "Namespace" {
        // No controller is there to do it.
        let mut there = client.get(&own)?;
        if let Outcome::Done(namespace) = &mut there {
            namespace["spec"]["finalizers"] = json!([]);
            client.put(&format!("{own}/finalize"), namespace)?.done()?;
        }
    }
    for _ in 0..200 {
        if client.get(&own)?.is(404) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    bail!("{own} does not go")
}

/// What a server accepts of an object as a scenario has it.
fn accepted(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|field, _| !SERVERS.contains(&field.as_str()));
    }
    match object["kind"].as_str() {
        Some("Service") => {
            let families = object["spec"]["clusterIPs"].as_array().map_or(0, Vec::len);
            if families == 2 && object["spec"].get("ipFamilyPolicy").is_none() {
                object["spec"]["ipFamilyPolicy"] = json!("RequireDualStack");
            }
        }
        Some("Pod") => {
            if let Some(containers) = object["spec"]["containers"].as_array_mut() {
                let apart = take_repeated_names(containers);
                containers.extend(apart);
                for container in containers {
                    container["image"] = json!("none");
                }
            }
        }
        _ => {}
    }
    object
}

/// Ports whose name another port of their container has too, each in a container of its own: there the server allows it.
fn take_repeated_names(containers: &mut [Value]) -> Vec<Value> {
    let mut apart = Vec::new();
    for container in containers {
        let mut names = BTreeSet::new();
        let Some(ports) = container["ports"].as_array_mut() else {
            continue;
        };
        for port in std::mem::take(ports) {
            let is_repeated = port["name"]
                .as_str()
                .is_some_and(|name| !names.insert(name.to_owned()));
            if is_repeated {
                let number = apart.len() + 2;
                apart.push(json!({"name": format!("main-{number}"), "ports": [port]}));
            } else {
                ports.push(port);
            }
        }
    }
    apart
}

/// Every object of the kinds of scenarios that is there.
pub fn all(client: &Client, kinds: &[(&str, &str)]) -> Result<Vec<Value>> {
    let mut found = Vec::new();
    for (version, kind) in kinds {
        let root = if *version == "v1" {
            "/api/v1".to_owned()
        } else {
            format!("/apis/{version}")
        };
        let (plural, _, _) = resource(kind)?;
        let outcome = client.get(&format!("{root}/{plural}"))?;
        if outcome.is(404) {
            continue;
        }
        let mut list = outcome.done()?;
        for mut item in list["items"]
            .as_array_mut()
            .map(std::mem::take)
            .unwrap_or_default()
        {
            item["apiVersion"] = json!(version);
            item["kind"] = json!(kind);
            found.push(item);
        }
    }
    Ok(found)
}

/// What a cluster has from the start.
pub fn is_builtin(object: &Value) -> bool {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    match object["kind"].as_str() {
        Some("Namespace") => ["default", "kube-system", "kube-public", "kube-node-lease"].contains(&name),
        Some("Service" | "EndpointSlice") => {
            name == "kubernetes" && object["metadata"]["namespace"] == "default"
        }
        _ => false,
    }
}
