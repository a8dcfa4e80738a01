//! What a pod sends from addresses that are not its own.

use std::net::{Ipv4Addr, SocketAddr};
use std::thread;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::built;
use dataplane_tests::links::Links;
use dataplane_tests::manifests::pod;
use serde_json::{Value, json};

use crate::stage::{PORT, Stage, address};

/// Nobody's, in the range of the pod's node.
const MADE_UP: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 77);
/// The pod's on the same node.
const FRONTS: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 11);
const REASON: &str = "source-not-own";

#[test]
fn a_pod_sends_from_its_own_addresses_alone_unless_it_sends_for_others() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let mut stage = Stage::set("sources", &agent, &[], &[])?;
    let to = address("back2", PORT)?;
    let mut links = Links::open(&stage.cluster.member_netns("other")?)?;
    for addr in [MADE_UP, FRONTS] {
        links.add_address("eth0", (addr.into(), 32))?;
    }
    ensure!(stage.connects("other", to)? && stage.connects("front", to)?);
    ensure!(
        stage.counted("node1", REASON)? == 0,
        "both have sent as themselves"
    );

    for (number, (source, told)) in [
        (MADE_UP, "shop/other as 10.244.1.77"),
        (FRONTS, "shop/other as shop/front (10.244.1.11)"),
    ]
    .into_iter()
    .enumerate()
    {
        ensure!(!stage.connects_as("other", source, to)?, "{source}");
        ensure!(stage.counted("node1", REASON)? > number as u64, "{source}");
        let verdicts = stage.command("node1", &["verdicts"])?;
        let last = verdicts
            .as_array()
            .and_then(|all| all.last())
            .context("nothing was told")?;
        ensure!(last["reason"] == REASON && last["from"] == told, "{last:#}");
    }

    let seen = watched(&stage, to)?;
    ensure!(
        seen["reason"] == REASON && seen["from"] == "10.244.1.77" && seen["from_pod"] == "shop/other",
        "{seen:#}"
    );

    let shape = stage.cluster.shape();
    let other = shape
        .pods
        .iter()
        .find(|pod| pod.name == "other")
        .context("no pod")?;
    let mut annotated = pod(other, "shop", &shape.node(&other.node)?.addresses);
    annotated["metadata"]["annotations"] = json!({"dataplane/any-source": "true"});
    stage.folder.apply(&annotated)?;
    stage.settle()?;
    let before = stage.counted("node1", REASON)?;
    ensure!(
        !stage.connects_as("other", MADE_UP, to)?,
        "the answer has no way back"
    );
    ensure!(stage.counted("node1", REASON)? == before, "it sends for others");
    ensure!(stage.connects("other", to)?);
    Ok(())
}

/// What `monitor` shows of the pod, by its name, while it sends from an address that nobody has.
fn watched(stage: &Stage, to: SocketAddr) -> Result<Value> {
    let bpffs = stage.agents.bpffs("node1")?.to_str().context("no path")?;
    let of_pod = [
        "monitor",
        "--from",
        "shop/other",
        "--verdict",
        "drop",
        "--count",
        "1",
        "--seconds",
        "60",
        "--bpffs",
        bpffs,
    ];
    thread::scope(|scope| {
        let watching = scope.spawn(|| stage.command("node1", &of_pod));
        while !watching.is_finished() {
            ensure!(!stage.connects_as("other", MADE_UP, to)?);
        }
        watching
            .join()
            .ok()
            .context("the thread of `monitor` has panicked")?
    })
}
