//! What following costs: the server in requests and bytes, and us in memory. Prints what `docs/kubernetes.md` states.

use std::time::Duration;

use serde_json::json;

use super::seen::{Bed, service};

const PODS: usize = 600;
const SERVICES: u8 = 200;

#[test]
fn a_node_asks_little_and_keeps_little() {
    let Some(bed) = Bed::start() else { return };
    for number in 1..=SERVICES {
        bed.apply(&service(&format!("s{number}"), number));
        bed.apply(&slice(number));
    }
    for number in 0..PODS {
        bed.apply(&pod(number));
    }
    for number in 2..=50 {
        let addresses = json!([{"type": "InternalIP", "address": format!("192.0.2.{number}")}]);
        let name = format!("node{number}");
        bed.apply(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": addresses},
        }));
    }
    let before = allocated();
    let mut seen = bed.follow();
    seen.until("the first list", |seen| seen.is_complete);
    seen.for_a_time(Duration::from_secs(1));
    let kept = allocated().saturating_sub(before);
    let start = seen.report();
    let objects: usize = start.kinds.values().map(|kind| kind.objects).sum();
    assert!(objects > PODS + 2 * usize::from(SERVICES), "{start:?}");
    assert_eq!(
        start.kinds["Node"].objects, 1,
        "of Nodes only the own one is asked for"
    );
    seen.for_a_time(Duration::from_secs(70));
    let minute = seen.report();
    let (requests, bytes) = (
        minute.requests - start.requests,
        minute.received_bytes - start.received_bytes,
    );
    println!(
        "start: {} requests, {} bytes for {objects} objects; 70 s without changes: {requests} requests, {bytes} bytes; \
         {} bytes of memory an object, with the decoded object",
        start.requests,
        start.received_bytes,
        kept / objects,
    );
    // A list, a question for the version and a watch for each of six kinds, a page more of Pods; of three kinds that are not
    // there a list, whether the server is ready, and what it has.
    assert!(start.requests <= 6 * 3 + 1 + 3 * 3, "{start:?}");
    assert!(requests <= 8, "{minute:?}");
    assert!(bytes < 20_000, "{minute:?}");
    assert!(kept / objects < 2500, "{kept}");
}

fn pod(number: usize) -> serde_json::Value {
    let (high, low) = (number / 250, number % 250 + 1);
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": format!("shop-frontend-7d4b9c6f5d-{number:05}"), "namespace": "ns",
            "labels": {"app": "shop", "tier": "frontend", "pod-template-hash": "7d4b9c6f5d"},
        },
        "spec": {
            "nodeName": format!("node{}", number % 50 + 1),
            "containers": [{"name": "main", "image": "none", "ports": [{"containerPort": 8080, "name": "http"}]}],
        },
        "status": {
            "phase": "Running", "podIP": format!("10.244.{high}.{low}"),
            "podIPs": [{"ip": format!("10.244.{high}.{low}")}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn slice(number: u8) -> serde_json::Value {
    let endpoint = |low: u8| json!({"addresses": [format!("10.244.{low}.{number}")], "conditions": {"ready": true}, "nodeName": format!("node{low}")});
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": format!("s{number}-x7k2p"), "namespace": "ns",
            "labels": {"kubernetes.io/service-name": format!("s{number}")},
        },
        "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": (1..=3).map(endpoint).collect::<Vec<_>>(),
    })
}

/// Bytes of memory that this process has allocated and not freed.
fn allocated() -> usize {
    // SAFETY: it only reads the allocator's counts.
    unsafe { libc::mallinfo2() }.uordblks
}
