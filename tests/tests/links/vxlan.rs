//! An overlay of flannel's shape: VXLAN with UDP checksums off, masquerading of what enters it from elsewhere, and inner
//! checksums that are still partial when we translate. A wrong one costs a minute of retransmissions in the field.

use anyhow::{Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::shape::{Network, Uplink};

use crate::bed::{Bed, all_transfers};

fn transfers(datapath: &str) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let flags = ["--socket-lb", "off", "--datapath", datapath];
    let mut bed = Bed::build(
        &format!("vxlan-{datapath}"),
        agent,
        &flags,
        (Network::Vxlan, Uplink::Card),
        |_| Ok(()),
    )?;
    // The switch completes the checksums of what it sends to a node, so receivers check every one.
    let result = all_transfers(&bed, |_, done| {
        ensure!(done.ms < 5000, "it took {} ms", done.ms);
        Ok(())
    });
    bed.hold();
    result
}

#[test]
fn overlay_xdp() -> Result<()> {
    transfers("xdp")
}

#[test]
fn overlay_tc() -> Result<()> {
    transfers("tc")
}
