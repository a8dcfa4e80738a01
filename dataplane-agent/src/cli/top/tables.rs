//! The picture without an agent: Services by a frontend's address, endpoints by their own, Pods by their interfaces.

use std::{collections::BTreeMap, path::Path};

use anyhow::Context;
use jiff::Timestamp;

use crate::{
    bpf::counters,
    cli::pinned,
    load::{EndpointLoad, Load, PodLoad, ServiceLoad},
    metrics::kernel_side,
    netlink::tables::{device_name, device_names},
    served,
    store::{
        bpf::BpfStore,
        served::{endpoints, read, state},
        traffic::TrafficTables,
    },
};

/// What the pinned tables have counted.
pub fn load(bpffs: &Path) -> anyhow::Result<Load> {
    let failed = "failed to read the pinned tables";
    let pins = pinned(bpffs)?;
    let store = BpfStore::open(&pins)?;
    let counts =
        TrafficTables::open(&pins).context("failed to open the tables of what goes over Services")?;
    // A Service is called by its first frontend: node ports say least.
    let mut frontends = read(&store).context(failed)?;
    frontends.sort_by_key(|frontend| frontend.at.addr.is_unspecified());
    let mut of_owner: BTreeMap<u32, ServiceLoad> = BTreeMap::new();
    for frontend in frontends {
        of_owner.entry(frontend.owner).or_insert_with(|| ServiceLoad {
            object: served::at(&frontend.at),
            ..ServiceLoad::default()
        });
    }
    for endpoint in endpoints(&store).context(failed)? {
        let traffic = counts.backend(endpoint.id);
        // A Service that is gone has no frontend.
        let Some(service) = of_owner.get_mut(&endpoint.owner) else {
            continue;
        };
        service.traffic += traffic;
        service.endpoints.push(EndpointLoad {
            at: endpoint.addr,
            pod: None,
            state: state(endpoint.state).to_owned(),
            traffic,
        });
    }
    let mut services: Vec<ServiceLoad> = of_owner.into_values().collect();
    services.sort_unstable_by(|one, other| one.object.cmp(&other.object));
    let devices = device_names().unwrap_or_default();
    let pods = counts
        .drops()
        .context(failed)?
        .into_iter()
        .map(|(ifindex, drops)| PodLoad {
            pod: device_name(&devices, ifindex),
            here: true,
            drops,
            ..PodLoad::default()
        });
    let mut pods: Vec<PodLoad> = pods.collect();
    pods.sort_unstable_by(|one, other| one.pod.cmp(&other.pod));
    Ok(Load {
        at: Timestamp::now(),
        services,
        pods,
        drops: kernel_side::drops(&counters::read(&pins).context(failed)?),
    })
}
