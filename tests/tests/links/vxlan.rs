//! An overlay of flannel's shape: VXLAN with UDP checksums off, masquerading of what enters it from elsewhere, and inner
//! checksums that are still partial when we translate. A wrong one costs a minute of retransmissions in the field.

use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane_tests::agent::patient;
use dataplane_tests::shape::Network;

use crate::bed::transfers;

/// Less than what a wrong checksum costs, on a machine without other work.
const AT_MOST: Duration = Duration::from_secs(5);

fn overlay(datapath: &str) -> Result<()> {
    // The switch completes the checksums of what it sends to a node, so receivers check every one.
    transfers(
        "vxlan",
        datapath,
        Network::Vxlan,
        |_| Ok(()),
        |_, done| {
            ensure!(
                Duration::from_millis(done.ms) < patient(AT_MOST),
                "it took {} ms",
                done.ms
            );
            Ok(())
        },
    )
}

#[test]
fn overlay_xdp() -> Result<()> {
    overlay("xdp")
}

#[test]
fn overlay_tc() -> Result<()> {
    overlay("tc")
}
