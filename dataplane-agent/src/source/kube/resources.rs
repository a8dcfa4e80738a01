//! The kinds as the API server has them: paths, and what is asked of a collection.

use std::fmt::Write;

use crate::model::Kind;

/// Of Services and their slices, those that are some proxy's business but not ours, or nobody's, need not be sent.
const PROXIED: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// Pods that have finished own no address and are nobody's peers.
const NOT_FINISHED: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// Where the discovery says in which versions the group is there whose policies are no part of Kubernetes itself.
pub const TIER_GROUP: &str = "/apis/policy.networking.k8s.io";
/// Where it says which kinds are there, by version.
pub const TIER_VERSIONS: [&str; 2] = [
    "/apis/policy.networking.k8s.io/v1alpha1",
    "/apis/policy.networking.k8s.io/v1alpha2",
];

/// The resource's name in paths.
pub const fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::Node => "nodes",
        Kind::Namespace => "namespaces",
        Kind::Pod => "pods",
        Kind::Service => "services",
        Kind::EndpointSlice => "endpointslices",
        Kind::NetworkPolicy => "networkpolicies",
        Kind::ClusterNetworkPolicy => "clusternetworkpolicies",
        Kind::AdminNetworkPolicy => "adminnetworkpolicies",
        Kind::BaselineAdminNetworkPolicy => "baselineadminnetworkpolicies",
    }
}

/// The path of its group and version.
pub fn version_path(kind: Kind) -> String {
    match kind.api_version() {
        "v1" => "/api/v1".to_owned(),
        version => format!("/apis/{version}"),
    }
}

/// Whether clusters may lack the kind: it is a custom resource.
pub fn is_optional(kind: Kind) -> bool {
    version_path(kind).starts_with(TIER_GROUP)
}

/// All objects of a kind that are wanted: path and query. `node`: of Nodes only this one.
pub fn collection(kind: Kind, node: Option<&str>) -> String {
    let path = format!("{}/{}", version_path(kind), plural(kind));
    let selector = match (kind, node) {
        (Kind::Service | Kind::EndpointSlice, _) => ("labelSelector", PROXIED.to_owned()),
        (Kind::Pod, _) => ("fieldSelector", NOT_FINISHED.to_owned()),
        (Kind::Node, Some(node)) => ("fieldSelector", format!("metadata.name={node}")),
        _ => return format!("{path}?"),
    };
    format!("{path}?{}={}&", selector.0, encoded(&selector.1))
}

/// A question for one object by its name, which takes no more than the right to list.
pub fn by_name(kind: Kind, namespace: &str, name: &str) -> String {
    let version = version_path(kind);
    let plural = plural(kind);
    let name = encoded(name);
    if kind.is_namespaced() {
        let namespace = encoded(namespace);
        format!("{version}/namespaces/{namespace}/{plural}?fieldSelector=metadata.name%3D{name}")
    } else {
        format!("{version}/{plural}?fieldSelector=metadata.name%3D{name}")
    }
}

/// A text for a query or a part of a path.
pub fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => encoded.push(char::from(byte)),
            // Writing to a string cannot fail.
            _ => drop(write!(encoded, "%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn collections_are_asked_for_what_is_used() {
        assert_eq!(collection(Kind::Namespace, None), "/api/v1/namespaces?");
        assert_eq!(
            collection(Kind::Node, Some("a")),
            "/api/v1/nodes?fieldSelector=metadata.name%3Da&"
        );
        assert_eq!(collection(Kind::Node, None), "/api/v1/nodes?");
        assert!(collection(Kind::EndpointSlice, None).starts_with(
            "/apis/discovery.k8s.io/v1/endpointslices?labelSelector=%21service.kubernetes.io%2Fs"
        ));
        assert!(is_optional(Kind::AdminNetworkPolicy) && !is_optional(Kind::NetworkPolicy));
    }
}
