//! Who we are, what we may read, and what there is to read.

use std::{fs, time::Duration};

use dataplane_agent::{
    metrics::Metrics,
    model::Kind,
    source::kube::{self, Address, Lack, state::State},
};
use dataplane_tests::api::{account, served};
use serde_json::{Value, json};

use super::seen::{Bed, NODE, Seen, policy, service};

#[test]
fn what_is_wrong_is_said_and_ends_when_it_is_put_right() {
    let Some(bed) = Bed::start() else { return };
    bed.apply(&service("a", 1));
    a_server_that_is_not_there(&bed);
    a_token_that_is_refused(&bed);
    a_node_that_does_not_exist(&bed);
    a_kind_that_may_not_be_read(&bed);
}

fn a_server_that_is_not_there(bed: &Bed) {
    let missing = Seen::try_start("/nonexistent/kubeconfig".as_ref(), &[], NODE)
        .err()
        .unwrap();
    assert!(
        format!("{missing:#}").starts_with("failed to read the kubeconfig /nonexistent/kubeconfig: "),
        "{missing:#}"
    );
    let nobody = ["https://127.0.0.1:1".to_owned()];
    let mut seen = Seen::start(&bed.kubeconfig(), &nobody, NODE);
    seen.until("the server's absence is told", |seen| {
        seen.says("failed to reach the API server at https://127.0.0.1:1: Connection refused")
    });
    assert!(!seen.is_complete);
    assert_eq!(
        seen.rejected.len(),
        1,
        "said once for all kinds: {:?}",
        seen.rejected
    );
    // Of two addresses one will do.
    let servers = [
        nobody[0].clone(),
        format!("https://127.0.0.1:{}", bed.relay.port()),
    ];
    let mut seen = Seen::start(&bed.kubeconfig(), &servers, NODE);
    seen.until("the other server is found", |seen| seen.is_complete);
    assert!(seen.has("Service ns/a"));
}

fn a_token_that_is_refused(bed: &Bed) {
    let kubeconfig = bed.kubeconfig();
    let token = bed.server.dir().join("agent.token");
    fs::write(&token, "expired").unwrap();
    let mut seen = Seen::start(&kubeconfig, &[], NODE);
    seen.until("the refusal is told", |seen| {
        seen.says("the API server refuses the agent's credentials")
    });
    assert!(!seen.is_complete);
    account::write_token(&bed.client, &token).unwrap();
    seen.until("the new token is used", |seen| {
        seen.is_complete && seen.rejected.is_empty()
    });
}

fn a_node_that_does_not_exist(bed: &Bed) {
    let mut seen = Seen::start(&bed.kubeconfig(), &[], "node9");
    seen.until("the missing node is told", |seen| {
        seen.says("Node node9: there is no such Node in the cluster: is --node-name right?")
    });
    seen.until("all else is read", |seen| seen.has("Service ns/a"));
    seen.for_a_time(Duration::from_millis(500));
    assert!(!seen.is_complete, "nothing may be deleted");
    assert_eq!(lacks(bed, "node9"), [Lack::Node]);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node9"}});
    bed.apply(&node);
    seen.until("the node is found", |seen| {
        seen.is_complete && seen.rejected.is_empty()
    });
    assert_eq!(lacks(bed, "node9"), []);
    assert!(!seen.has("Node node1"), "of Nodes only the own one is asked for");
    bed.delete(&node);
}

/// What `preflight` asks for.
fn lacks(bed: &Bed, node: &str) -> Vec<Lack> {
    let address = Address {
        kubeconfig: Some(bed.kubeconfig()),
        servers: Vec::new(),
    };
    let state = State::new(Metrics::new().source);
    let asked = kube::ask_once(&address, node, state, Duration::from_mins(1));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(asked).unwrap().unwrap()
}

fn a_kind_that_may_not_be_read(bed: &Bed) {
    let path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/dataplane-agent";
    let role = bed.client.get(path).unwrap().done().unwrap();
    let rules = role["rules"].as_array().unwrap();
    let is_policies = |rule: &&Value| rule["apiGroups"][0] != "networking.k8s.io";
    let fewer: Vec<&Value> = rules.iter().filter(is_policies).collect();
    bed.client
        .patch(path, &json!({"rules": fewer}))
        .unwrap()
        .done()
        .unwrap();
    let mut seen = bed.follow();
    seen.until("the missing right is told", |seen| {
        seen.says("NetworkPolicy: the agent may not do this: networkpolicies.networking.k8s.io is forbidden")
    });
    seen.until("all else is read", |seen| seen.has("Service ns/a"));
    assert!(!seen.is_complete, "nothing may be deleted");
    let found = lacks(bed, NODE);
    assert!(
        matches!(&found[..], [Lack::Right(Kind::NetworkPolicy, message)] if message.contains("is forbidden")),
        "{found:?}"
    );
    bed.client
        .patch(path, &json!({"rules": rules}))
        .unwrap()
        .done()
        .unwrap();
    seen.until("the right is used", |seen| {
        seen.is_complete && seen.rejected.is_empty()
    });
}

#[test]
fn the_kinds_that_a_cluster_may_lack_are_followed_once_they_are_there() {
    let Some(bed) = Bed::start() else { return };
    bed.apply(&policy("p"));
    let mut seen = bed.follow();
    seen.until("a cluster without them is complete", |seen| seen.is_complete);
    assert!(seen.has("NetworkPolicy ns/p"));
    let definition = served::definition("AdminNetworkPolicy");
    bed.apply(&definition);
    let admin = json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "AdminNetworkPolicy", "metadata": {"name": "q"},
        "spec": {
            "priority": 1, "subject": {"namespaces": {}},
            "egress": [{"action": "Deny", "to": [{"nodes": {"matchLabels": {"role": "storage"}}}]}],
        },
    });
    // A definition takes a moment until it is served.
    let served = "/apis/policy.networking.k8s.io/v1alpha1/adminnetworkpolicies";
    while bed.client.get(served).unwrap().is(404) {
        std::thread::sleep(Duration::from_millis(50));
    }
    bed.apply(&admin);
    bed.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node2"}}));
    seen.catch_up();
    seen.until("the policy and the nodes that it names", |seen| {
        seen.has("AdminNetworkPolicy q") && seen.has("Node node2")
    });
    bed.delete(&definition);
    seen.until("the kind is gone, and with it its objects", |seen| {
        !seen.has("AdminNetworkPolicy q")
    });
    assert!(seen.has("NetworkPolicy ns/p"));
}

#[test]
fn a_kind_that_is_there_in_another_version_is_said_to_be() {
    let Some(bed) = Bed::start() else { return };
    let mut definition = served::definition("AdminNetworkPolicy");
    definition["spec"]["versions"][0]["name"] = "v1beta7".into();
    bed.apply(&definition);
    let served = "/apis/policy.networking.k8s.io/v1beta7/adminnetworkpolicies";
    while bed.client.get(served).unwrap().is(404) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let mut seen = bed.follow();
    seen.until("a cluster without the version is complete", |seen| {
        seen.is_complete
    });
    let kinds = seen.report().kinds;
    let said = kinds["AdminNetworkPolicy"].failing.clone().unwrap_or_default();
    assert!(said.contains("policy.networking.k8s.io/v1beta7 alone"), "{said}");
    assert_eq!(kinds["BaselineAdminNetworkPolicy"].failing, None);
}
