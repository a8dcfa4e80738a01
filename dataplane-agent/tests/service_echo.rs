//! Pings to Service addresses: answered when asked for, and for as long as the address is a Service's. Needs root and the
//! BPF object; without them the test says so and does nothing.

mod needs;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_tests::{
    agent::{AgentOptions, Agents},
    cluster::Cluster,
    manifests::{self, Manifests},
    netns::NetNs,
    ping,
    process::Helper,
    shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix},
};
use serde_json::json;

fn ips(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn shape() -> Shape {
    Shape {
        nodes: vec![NodeShape {
            name: "node1".to_owned(),
            addresses: ips(&["192.168.77.11", "fd00:77::11"]),
            extra_addresses: Vec::new(),
            pod_cidrs: ["10.244.1.0/24", "fd00:10:244:1::/64"]
                .map(|text| parse_prefix(text).unwrap())
                .to_vec(),
        }],
        pods: vec![PodShape {
            name: "client1".to_owned(),
            node: "node1".to_owned(),
            addresses: ips(&["10.244.1.10", "fd00:10:244:1::10"]),
            host_network: false,
        }],
        externals: vec![ExternalShape {
            name: "ext".to_owned(),
            addresses: ips(&["203.0.113.10", "2001:db8:10::9"]),
        }],
        network: Network::Routed,
    }
}

const INSIDE: [&str; 2] = ["10.96.0.1", "fd00:96::1"];
const OUTSIDE: [&str; 2] = ["198.51.100.7", "2001:db8:ff::7"];

/// Who asks which addresses.
const ASKED: [(&str, [&str; 2]); 5] = [
    ("pod-client1", INSIDE),
    ("node1", INSIDE),
    ("ext", OUTSIDE),
    ("pod-client1", OUTSIDE),
    ("node1", OUTSIDE),
];

fn all_are(cluster: &Cluster, answered: bool) -> Result<()> {
    let within = Duration::from_millis(if answered { 3000 } else { 300 });
    for (from, addresses) in ASKED {
        let netns = NetNs::open(&cluster.places().netns(from))?;
        for to in ips(&addresses) {
            // Odd, and more than fits a short header.
            for payload in [&b"p"[..], &[0x5a; 1001]] {
                let seen = netns.enter(|| ping::is_answered(to, payload, within))?;
                ensure!(
                    seen == answered,
                    "{from} -> {to}, {} bytes: {seen}",
                    payload.len()
                );
            }
        }
    }
    Ok(())
}

#[test]
fn pings_to_services_are_answered_if_that_is_asked_for_and_while_they_are_there() -> Result<()> {
    if !needs::ready() {
        return Ok(());
    }
    let mut cluster = Cluster::build(
        "echo",
        shape(),
        &Helper::built_with(Path::new(env!("CARGO_BIN_EXE_dataplane-agent")))?,
    )?;
    for to in ips(&OUTSIDE) {
        cluster.set_route("ext", to, Some("node1"))?;
    }
    let folder = Manifests::create(&cluster.places().work)?;
    let shape = cluster.shape();
    let addresses = shape.nodes[0].addresses.iter();
    let addresses: Vec<_> = addresses
        .map(|addr| json!({"type": "InternalIP", "address": addr}))
        .collect();
    folder.apply(&json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node1"},
        "spec": {"podCIDRs": ["10.244.1.0/24", "fd00:10:244:1::/64"]}, "status": {"addresses": addresses},
    }))?;
    folder.apply(&manifests::pod(&shape.pods[0], "ns", &shape.nodes[0].addresses))?;
    // Without endpoints: an answer says nothing of them.
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "echo", "namespace": "ns"},
        "spec": {
            "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"], "externalIPs": OUTSIDE,
            "clusterIP": INSIDE[0], "clusterIPs": INSIDE, "ports": [{"port": 80}, {"port": 81, "name": "b"}],
        },
    });
    folder.apply(&service)?;
    for (flags, answered) in [(&["--service-echo", "answer"][..], true), (&[], false)] {
        let options = AgentOptions {
            program: PathBuf::from(env!("CARGO_BIN_EXE_dataplane-agent")),
            flags: ["--socket-lb", "off", "--health-addr", "off"]
                .iter()
                .chain(flags)
                .map(ToString::to_string)
                .collect(),
        };
        let mut agents = Agents::start(&cluster, folder.dir(), options)?;
        let problems = agents.settle();
        ensure!(problems.is_empty(), "{problems:?}");
        all_are(&cluster, answered)?;
        if answered {
            folder.delete(&service)?;
            ensure!(agents.settle().is_empty());
            all_are(&cluster, false)?;
            folder.apply(&service)?;
            ensure!(agents.settle().is_empty());
            all_are(&cluster, true)?;
        }
    }
    Ok(())
}
