//! From API objects to our own types: defaults applied, every field that is used validated, the rest dropped.
//!
//! What the API server would never accept makes the object as a whole unusable, so that its last good version stays
//! in force. What it accepts but we cannot honour (SCTP, an address in an odd spelling) costs that part alone.

mod pod;
mod policy;
mod service;
mod slice;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::{api::core::v1 as core, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::model::{Cause, Kind, Labels, Name, Namespace, Node, Object, ObjectRef, Problem, Protocol};

/// The cluster autoscaler's taint on a node that it is about to remove.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// What became of a document.
#[derive(Debug)]
pub enum Decoded {
    /// Not a kind that is read.
    Ignored { kind: String },
    /// Usable, save for `problems`.
    Object {
        key: ObjectRef,
        object: Object,
        problems: Vec<Problem>,
    },
    /// Unusable. `key` is known when the document at least says what it is.
    Failed {
        key: Option<ObjectRef>,
        problems: Vec<Problem>,
    },
}

/// An object that is refused as a whole.
type Refused = Vec<Problem>;

/// Decodes one object.
pub fn decode(value: &Value) -> Decoded {
    let failed = |field, reason: &str| Decoded::Failed {
        key: None,
        problems: vec![Problem::new(field, reason)],
    };
    if !value.is_object() {
        return failed("", "not an object");
    }
    let Some(kind_name) = value.get("kind").and_then(Value::as_str) else {
        return failed("kind", "missing");
    };
    let Some(api_version) = value.get("apiVersion").and_then(Value::as_str) else {
        return failed("apiVersion", "missing");
    };
    let Some(kind) = Kind::parse(kind_name).filter(|kind| same_group(*kind, api_version)) else {
        return Decoded::Ignored {
            kind: kind_name.to_owned(),
        };
    };
    let key = match key(kind, value) {
        Ok(key) => key,
        Err(problem) => {
            return Decoded::Failed {
                key: None,
                problems: vec![problem],
            };
        }
    };
    if api_version != kind.api_version() {
        let reason = format!("{api_version} is not read, only {}", kind.api_version());
        return Decoded::Failed {
            key: Some(key),
            problems: vec![Problem::new("apiVersion", reason).because(Cause::Unsupported)],
        };
    }
    let mut problems = Vec::new();
    let name = key.name.clone();
    let object = match kind {
        Kind::Node => parse(value).map(|node| Object::Node(self::node(name, node, &mut problems).into())),
        Kind::Namespace => parse(value)
            .map(|namespace| Object::Namespace(self::namespace(name, namespace, &mut problems).into())),
        Kind::Pod => parse(value).map(|pod| Object::Pod(pod::decode(name, pod, &mut problems).into())),
        Kind::Service => parse(value)
            .and_then(|service| service::decode(name, service, &mut problems))
            .map(Object::from),
        Kind::EndpointSlice => parse(value)
            .and_then(|slice| slice::decode(name, &slice, &mut problems))
            .map(|slice| Object::EndpointSlice(slice.into())),
        Kind::NetworkPolicy
        | Kind::ClusterNetworkPolicy
        | Kind::AdminNetworkPolicy
        | Kind::BaselineAdminNetworkPolicy => {
            policy::decode(&key, value, &mut problems).map(|policy| Object::Policy(Arc::new(policy)))
        }
    };
    match object {
        Ok(object) => Decoded::Object {
            key,
            object,
            problems,
        },
        Err(mut refused) => {
            refused.append(&mut problems);
            Decoded::Failed {
                key: Some(key),
                problems: refused,
            }
        }
    }
}

fn same_group(kind: Kind, api_version: &str) -> bool {
    let group = |version: &str| version.rsplit_once('/').map(|(group, _)| group.to_owned());
    group(kind.api_version()) == group(api_version)
}

fn key(kind: Kind, value: &Value) -> Result<ObjectRef, Problem> {
    let metadata = |field| value.get("metadata").and_then(|metadata| metadata.get(field));
    let name = match metadata("name") {
        Some(Value::String(name)) if !name.is_empty() => name,
        None | Some(Value::Null | Value::String(_)) => return Err(Problem::new("metadata.name", "missing")),
        Some(_) => return Err(Problem::new("metadata.name", "not a string")),
    };
    let namespace = match metadata("namespace") {
        _ if !kind.is_namespaced() => "",
        None | Some(Value::Null) => "default",
        Some(Value::String(namespace)) if namespace.is_empty() => "default",
        Some(Value::String(namespace)) => namespace,
        Some(_) => return Err(Problem::new("metadata.namespace", "not a string")),
    };
    for (field, text) in [("metadata.name", &**name), ("metadata.namespace", namespace)] {
        if text.contains(|c: char| c == '/' || c.is_control()) {
            let reason = format!("{text:?} is no name: it contains `/` or a control character");
            return Err(Problem::new(field, reason));
        }
    }
    Ok(ObjectRef {
        kind,
        name: Name::new(namespace, name),
    })
}

fn parse<T: DeserializeOwned>(value: &Value) -> Result<T, Refused> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = if path == "." { String::new() } else { path };
        vec![Problem::new(field, error.into_inner().to_string())]
    })
}

fn node(name: Name, node: core::Node, problems: &mut Vec<Problem>) -> Node {
    let mut internal_ips: Vec<IpAddr> = Vec::new();
    let mut ips = Vec::new();
    let addresses = node
        .status
        .and_then(|status| status.addresses)
        .unwrap_or_default();
    for (i, address) in addresses.into_iter().enumerate() {
        let is_internal = address.type_ == "InternalIP";
        if !is_internal && address.type_ != "ExternalIP" {
            continue;
        }
        match parse_ip(&address.address) {
            Ok(ip) => {
                internal_ips.extend(is_internal.then_some(ip));
                ips.push(ip);
            }
            Err(reason) => problems.push(Problem::new(format!("status.addresses[{i}].address"), reason)),
        }
    }
    let spec = node.spec.unwrap_or_default();
    let pod_cidrs = pod_cidrs(spec.pod_cidrs, spec.pod_cidr, problems);
    let taints = spec.taints.unwrap_or_default();
    Node {
        name,
        labels: labels(&node.metadata.labels.unwrap_or_default(), problems),
        internal_ips,
        ips,
        pod_cidrs,
        leaving: node.metadata.deletion_timestamp.is_some()
            || taints.iter().any(|taint| taint.key == TO_BE_DELETED),
    }
}

/// The first of each family.
fn pod_cidrs(all: Option<Vec<String>>, first: Option<String>, problems: &mut Vec<Problem>) -> Vec<IpNet> {
    let all = all.unwrap_or_default().into_iter().enumerate();
    let mut texts: Vec<(String, String)> = all
        .map(|(i, text)| (format!("spec.podCIDRs[{i}]"), text))
        .collect();
    if texts.is_empty() {
        texts.extend(first.map(|text| ("spec.podCIDR".to_owned(), text)));
    }
    let mut cidrs: Vec<IpNet> = Vec::new();
    for (field, text) in texts.into_iter().filter(|(_, text)| !text.is_empty()) {
        match text.parse::<IpNet>() {
            Ok(cidr)
                if cidrs
                    .iter()
                    .any(|other| other.addr().is_ipv4() == cidr.addr().is_ipv4()) => {}
            Ok(cidr) => cidrs.push(cidr.trunc()),
            Err(_) => problems.push(Problem::new(field, format!("`{text}` is no range of addresses"))),
        }
    }
    cidrs
}

fn namespace(name: Name, namespace: core::Namespace, problems: &mut Vec<Problem>) -> Namespace {
    let mut all = namespace.metadata.labels.unwrap_or_default();
    all.insert(Namespace::NAME_LABEL.to_owned(), name.name().to_owned());
    let annotations = namespace.metadata.annotations.as_ref();
    let dry_run = annotations.and_then(|annotations| annotations.get(policy::DRY_RUN));
    Namespace {
        name,
        labels: labels(&all, problems),
        dry_run: policy::dry_run(dry_run.map(String::as_str), problems),
    }
}

/// `metadata.creationTimestamp` in nanoseconds; 0 when unknown. Beyond the years 1677 to 2262 the nearest of them.
fn created_ns(metadata: &ObjectMeta) -> i64 {
    let nanoseconds = metadata
        .creation_timestamp
        .as_ref()
        .map_or(0, |time| time.0.as_nanosecond());
    let (least, most) = (i128::from(i64::MIN), i128::from(i64::MAX));
    i64::try_from(nanoseconds.clamp(least, most)).unwrap_or(0)
}

/// An address as Kubernetes has always read it: leading zeros in IPv4 are decimal, never octal, and an IPv4 address
/// written as IPv6 is that IPv4 address.
fn parse_ip(text: &str) -> Result<IpAddr, String> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Ok(ip.to_canonical());
    }
    let octets: Option<Vec<u8>> = text
        .split('.')
        .map(|octet| {
            let digits =
                !octet.is_empty() && octet.len() <= 8 && octet.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| octet.parse().ok()).flatten()
        })
        .collect();
    match octets.as_deref() {
        Some(&[a, b, c, d]) => Ok(Ipv4Addr::new(a, b, c, d).into()),
        _ => Err(format!("`{text}` is no IP address")),
    }
}

/// An address range; its host bits do not count.
fn parse_cidr(text: &str) -> Result<IpNet, String> {
    let range = text.split_once('/').and_then(|(addr, prefix)| {
        let is_number = !prefix.is_empty() && prefix.bytes().all(|byte| byte.is_ascii_digit());
        let prefix = is_number.then(|| prefix.parse().ok()).flatten()?;
        IpNet::new(parse_ip(addr).ok()?, prefix).ok()
    });
    range
        .map(|range| range.trunc())
        .ok_or_else(|| format!("`{text}` is no address range such as 192.0.2.0/24"))
}

/// A port that is required to be one.
fn parse_port(port: i32, field: impl FnOnce() -> String) -> Result<u16, Problem> {
    u16::try_from(port)
        .ok()
        .filter(|port| *port != 0)
        .ok_or_else(|| Problem::new(field(), format!("{port} is no port (1-65535)")))
}

/// What a `protocol` field says.
enum ProtocolField {
    Served(Protocol),
    /// A protocol of the API that is not served.
    NotYet(Problem),
    Unknown(Problem),
}

fn parse_protocol(protocol: Option<&str>, field: impl FnOnce() -> String) -> ProtocolField {
    match protocol {
        None | Some("" | "TCP") => ProtocolField::Served(Protocol::Tcp),
        Some("UDP") => ProtocolField::Served(Protocol::Udp),
        Some("SCTP") => ProtocolField::NotYet(
            Problem::new(field(), "SCTP is not supported yet").because(Cause::Unsupported),
        ),
        Some(other) => ProtocolField::Unknown(Problem::new(field(), format!("`{other}` is no protocol"))),
    }
}

/// An object's labels; none where one cannot be.
fn labels(labels: &BTreeMap<String, String>, problems: &mut Vec<Problem>) -> Labels {
    Labels::new(labels).unwrap_or_else(|| {
        problems.push(Problem::new("metadata.labels", "a key or value contains NUL"));
        Labels::default()
    })
}

fn label<'a>(metadata: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    metadata.labels.as_ref()?.get(name).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_decimal() {
        assert_eq!(parse_ip("010.096.000.041"), Ok("10.96.0.41".parse().unwrap()));
        assert_eq!(parse_ip("::ffff:10.96.0.41"), Ok("10.96.0.41".parse().unwrap()));
        assert!(parse_ip("10.96.0.256").is_err());
        assert!(parse_ip("10.96.0").is_err());
        assert!(parse_ip("10.96.0.0x1").is_err());
    }

    #[test]
    fn ranges_are_read_as_kubernetes_does() {
        assert_eq!(
            parse_cidr("203.0.113.010/025"),
            Ok("203.0.113.0/25".parse().unwrap())
        );
        assert_eq!(parse_cidr("2001:db8::1/64"), Ok("2001:db8::/64".parse().unwrap()));
        for wrong in ["203.0.113.0", "203.0.113.0/33", "203.0.113.0/+8", "a/8", "/"] {
            assert!(parse_cidr(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_node_that_is_about_to_go_is_told() {
        let leaving = |metadata: &str, spec: &str| {
            let text = format!(
                r#"{{"apiVersion": "v1", "kind": "Node", "metadata": {{"name": "a"{metadata}}}{spec}}}"#
            );
            let decoded = decode(&serde_json::from_str(&text).unwrap());
            let Decoded::Object {
                object: Object::Node(node),
                ..
            } = decoded
            else {
                panic!("{decoded:?}");
            };
            node.leaving
        };
        assert!(!leaving("", ""));
        assert!(leaving(r#", "deletionTimestamp": "2026-01-01T00:00:00Z""#, ""));
        let taint = |key| format!(r#", "spec": {{"taints": [{{"key": "{key}", "effect": "NoSchedule"}}]}}"#);
        assert!(leaving("", &taint("ToBeDeletedByClusterAutoscaler")));
        assert!(!leaving("", &taint("DeletionCandidateOfClusterAutoscaler")));
    }

    #[test]
    fn an_object_of_another_group_is_ignored() {
        let value = serde_json::json!({"apiVersion": "serving.knative.dev/v1", "kind": "Service"});
        assert!(matches!(decode(&value), Decoded::Ignored { .. }));
    }

    #[test]
    fn a_wrong_type_is_reported_with_its_field() {
        let value = serde_json::json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"},
            "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": "eighty"}]},
        });
        let Decoded::Failed {
            key: Some(key),
            problems,
        } = decode(&value)
        else {
            panic!("decoded");
        };
        assert_eq!(key.to_string(), "Service default/a");
        assert_eq!(problems[0].field, "spec.ports[0].port");
    }
}
