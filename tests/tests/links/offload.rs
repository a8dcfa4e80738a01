//! What offloads make of packets: super-packets with partial checksums, complete checksums, and frames of several buffers
//! on links of 9,000 bytes. Every byte is compared.

use anyhow::Result;
use dataplane_tests::cluster::Cluster;
use dataplane_tests::facing_xdp;
use dataplane_tests::links::Links;
use dataplane_tests::netns::NetNs;
use dataplane_tests::shape::Network;

use crate::bed::{Way, expect_path_mtu, pod_device, transfers, underlay, ways};

const JUMBO: u32 = 9000;

/// Makes every link of the cluster one of 9,000 bytes.
fn widen(cluster: &mut Cluster) -> Result<()> {
    let pods: Vec<_> = cluster.shape().pods.clone();
    let switch = underlay(cluster)?;
    let mut links = Links::open(&switch)?;
    for device in ["x1", "n1", "n2", "br0"] {
        links.set_mtu(device, JUMBO)?;
    }
    Links::open(&NetNs::open(&cluster.places().netns("ext1"))?)?.set_mtu("eth0", JUMBO)?;
    for node in ["node1", "node2"] {
        let mut links = Links::open(cluster.node_netns(node)?)?;
        links.set_mtu("eth0", JUMBO)?;
        for pod in pods.iter().filter(|pod| pod.node == node) {
            links.set_mtu(&pod_device(cluster, &pod.name), JUMBO)?;
        }
    }
    for pod in &pods {
        Links::open(&NetNs::open(
            &cluster.places().netns(&format!("pod-{}", pod.name)),
        )?)?
        .set_mtu("eth0", JUMBO)?;
    }
    Ok(())
}

/// Lets every pod and its interface send complete checksums, so that whoever receives checks them.
fn complete(cluster: &mut Cluster) -> Result<()> {
    let names = ways().map(Way::backend).chain(["client1".to_owned()]);
    for name in names {
        let pod = NetNs::open(&cluster.places().netns(&format!("pod-{name}")))?;
        pod.enter(|| facing_xdp::complete_checksums("eth0"))?;
        let node = cluster.shape().node_of(&name).unwrap_or_default().to_owned();
        let device = pod_device(cluster, &name);
        cluster
            .node_netns(&node)?
            .enter(|| facing_xdp::complete_checksums(&device))?;
    }
    Ok(())
}

#[test]
fn jumbo_frames_xdp() -> Result<()> {
    transfers("jumbo", "xdp", Network::Routed, widen, |_, done| {
        expect_path_mtu(done, JUMBO)
    })
}

#[test]
fn jumbo_frames_tc() -> Result<()> {
    let widen_all = |cluster: &mut Cluster| {
        for node in ["node1", "node2"] {
            Links::open(cluster.node_netns(node)?)?.set_mtu("cni0", JUMBO)?;
        }
        widen(cluster)
    };
    transfers("jumbo", "tc", Network::Bridge, widen_all, |_, done| {
        expect_path_mtu(done, JUMBO)
    })
}

#[test]
fn super_packets_on_a_bridge() -> Result<()> {
    transfers(
        "gso",
        "tc",
        Network::Bridge,
        |_| Ok(()),
        |_, done| expect_path_mtu(done, 1500),
    )
}

#[test]
fn complete_checksums() -> Result<()> {
    transfers("complete", "tc", Network::Routed, complete, |_, done| {
        expect_path_mtu(done, 1500)
    })
}
