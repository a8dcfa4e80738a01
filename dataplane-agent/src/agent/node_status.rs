//! What this node's Node object says of its datapath, as an annotation: whether it is ready, and how each device is handled.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use dataplane_common::device::device_flags;
use serde::Serialize;
use tokio::{sync::watch, time};

use crate::{
    attach::state::State,
    bpf::kernel,
    config::Config,
    health::Progress,
    host::{HostDevice, HostState},
    served::ConditionKind,
};

/// Between looks at what is to be said.
const LOOK: Duration = Duration::from_secs(5);
/// A start may last so long before the node says that it is not ready: most restarts then change nothing.
const START: Duration = Duration::from_secs(30);
/// All annotations of an object together may have 256 KiB.
const DEVICES_AT_MOST: usize = 64;
const REASON_AT_MOST: usize = 200;

/// The annotation's content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeStatus {
    version: &'static str,
    /// Everything has been programmed once, and the kernel takes what is written.
    ready: bool,
    /// Uplinks and tunnels, by name.
    devices: BTreeMap<String, DeviceStatus>,
    /// Conditions of `status` that do not hold.
    unmet: Vec<&'static str>,
}

/// Which programs a device has, in the words of `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct DeviceStatus {
    tc: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    xdp: Option<&'static str>,
    /// Why it is left to TC, where it might have had XDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    without_xdp: Option<String>,
}

impl NodeStatus {
    fn new(
        progress: &Progress,
        devices: &BTreeMap<u32, HostDevice>,
        fallbacks: &BTreeMap<u32, String>,
        tc: &'static str,
    ) -> Self {
        let device = |(ifindex, device): (&u32, &HostDevice)| {
            let has_xdp = device.entry.flags & device_flags::XDP != 0;
            let reason = fallbacks.get(ifindex).filter(|_| !has_xdp);
            let status = DeviceStatus {
                tc,
                // The agent attaches it in no other mode.
                xdp: has_xdp.then_some("driver"),
                without_xdp: reason.map(|reason| reason.chars().take(REASON_AT_MOST).collect()),
            };
            (device.name.clone(), status)
        };
        let of_network = devices.iter().filter(|(_, device)| device.name != "lo");
        let unmet = progress.conditions.iter().filter(|one| !one.status);
        Self {
            version: env!("CARGO_PKG_VERSION"),
            ready: progress.is_healthy(),
            devices: of_network.map(device).take(DEVICES_AT_MOST).collect(),
            unmet: unmet.map(|one| ConditionKind::as_str(one.kind)).collect(),
        }
    }
}

/// Says from now on what holds.
pub fn spawn(
    config: &Config,
    progress: &watch::Sender<Progress>,
    host: &watch::Receiver<Option<HostState>>,
    told: watch::Sender<Option<String>>,
) {
    let bpffs = config.bpffs.clone();
    tokio::spawn(keep(bpffs, progress.subscribe(), host.clone(), told));
}

/// Says what holds, whenever it is something else, until nobody listens.
async fn keep(
    bpffs: PathBuf,
    progress: watch::Receiver<Progress>,
    host: watch::Receiver<Option<HostState>>,
    told: watch::Sender<Option<String>>,
) {
    let tc = if kernel::has_tcx() { "tcx" } else { "clsact" };
    let began = Instant::now();
    let mut every = time::interval(LOOK);
    loop {
        tokio::select! {
            _ = every.tick() => {}
            () = told.closed() => return,
        }
        let devices = host.borrow().as_ref().map(|host| host.devices.clone());
        let Some(devices) = devices else { continue };
        let fallbacks = State::read(&bpffs).record.xdp_fallback;
        let status = NodeStatus::new(&progress.borrow(), &devices, &fallbacks, tc);
        if !status.ready && began.elapsed() < START {
            continue;
        }
        // Numbers, texts and lists of them always can be written.
        let text = serde_json::to_string(&status).ok();
        told.send_if_modified(|told| {
            let is_news = *told != text;
            if is_news {
                *told = text;
            }
            is_news
        });
    }
}

#[cfg(test)]
mod tests {
    use dataplane_common::device::Device;

    use super::*;
    use crate::served::Condition;

    fn device(name: &str, flags: u32) -> HostDevice {
        HostDevice {
            name: name.to_owned(),
            kind: String::new(),
            entry: Device {
                flags,
                ..Device::default()
            },
        }
    }

    #[test]
    fn the_annotation_says_how_each_device_is_handled_and_what_does_not_hold() {
        let condition = |kind, status| Condition {
            kind,
            status,
            message: String::new(),
        };
        let mut progress = Progress {
            conditions: vec![
                condition(ConditionKind::SourceFollowed, true),
                condition(ConditionKind::TablesHaveRoom, false),
            ],
            ..Progress::default()
        };
        let devices = BTreeMap::from([
            (1, device("lo", 0)),
            (2, device("eth0", device_flags::ETHERNET | device_flags::XDP)),
            (3, device("eth1", device_flags::ETHERNET)),
            (4, device("wg0", device_flags::TUNNEL)),
        ]);
        // What a device once lacked it may have by now.
        let fallbacks = BTreeMap::from([
            (2, "an old reason".to_owned()),
            (3, format!("the driver has no XDP{}", "!".repeat(500))),
        ]);
        let status = NodeStatus::new(&progress, &devices, &fallbacks, "tcx");
        assert!(!status.ready, "nothing is programmed yet");
        progress.started = true;
        let status = NodeStatus::new(&progress, &devices, &fallbacks, "tcx");
        let mut said: serde_json::Value = serde_json::to_value(&status).unwrap();
        let reason = said["devices"]["eth1"]["withoutXdp"].take();
        assert_eq!(reason.as_str().unwrap().len(), REASON_AT_MOST);
        assert_eq!(
            said,
            serde_json::json!({
                "version": env!("CARGO_PKG_VERSION"), "ready": true,
                "devices": {
                    "eth0": {"tc": "tcx", "xdp": "driver"},
                    "eth1": {"tc": "tcx", "withoutXdp": null},
                    "wg0": {"tc": "tcx"},
                },
                "unmet": ["TablesHaveRoom"],
            })
        );
    }
}
