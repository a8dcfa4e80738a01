//! What goes over Services, endpoints and Pods, with the names that only the loop knows.

use std::{collections::BTreeMap, io, net::SocketAddr};

use jiff::Timestamp;

use super::Agent;
use crate::{
    bpf::counters,
    load::{EndpointLoad, IDLE_AT_MOST, Load, PodLoad, ServiceLoad, Traffic},
    metrics::{kernel_side, services::OverServices},
    model::ObjectRef,
    store::{served, traffic::TrafficTables},
    sync::{Placed, encode},
};

impl Agent {
    pub(super) fn load(&self) -> Result<Load, String> {
        tokio::task::block_in_place(|| self.try_load())
            .map_err(|error| format!("failed to read what goes over Services: {error}"))
    }

    fn try_load(&self) -> io::Result<Load> {
        let Some(tables) = &self.tables else {
            return Ok(Load::default());
        };
        let counts = TrafficTables::open(&tables.pins)?;
        let mut pods: BTreeMap<String, PodLoad> = BTreeMap::new();
        let drops = counts.drops()?;
        for (ifindex, pod) in self.host.iter().flat_map(|host| &host.bound_pods) {
            let here = pods.entry(pod.clone()).or_default();
            here.here = true;
            here.drops += drops.get(ifindex).copied().unwrap_or(0);
        }
        let placed = self.syncer.placed(&*self.store);
        let is_short = placed.len() <= IDLE_AT_MOST;
        let mut services = Vec::new();
        for (object, placed) in placed {
            let service = self.service_load(&counts, &object, &placed);
            for endpoint in &service.endpoints {
                if let Some(pod) = &endpoint.pod {
                    pods.entry(pod.clone()).or_default().traffic += endpoint.traffic;
                }
            }
            if is_short || service.traffic != Traffic::default() {
                services.push(service);
            }
        }
        services.sort_unstable_by(|one, other| one.object.cmp(&other.object));
        for (name, pod) in &mut pods {
            pod.pod.clone_from(name);
        }
        Ok(Load {
            at: Timestamp::now(),
            services,
            pods: pods.into_values().collect(),
            drops: kernel_side::drops(&counters::read(&tables.pins)?),
        })
    }

    /// Brings the metrics up to date that would cost each synchronisation a look at every Service.
    pub(super) fn count_without_local(&self) {
        let without_local = self.syncer.wanted().map(|(_, compiled)| compiled.without_local());
        let (inside, outside) = without_local.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        self.metrics.count_without_local(inside, outside);
    }

    /// What has gone over single Services, where they have metrics; without news where the tables cannot be read.
    pub(super) fn over_services(&mut self) -> Option<OverServices> {
        let (counting, tables) = (self.counting.as_mut()?, self.tables.as_ref()?);
        let over = tokio::task::block_in_place(|| {
            let counts = TrafficTables::open(&tables.pins)?;
            let indices = 0..self.syncer.service_indices();
            let counted = indices.map(|index| counts.service(index)).collect();
            let owner = |index| self.syncer.service_owner(index);
            Ok(counting
                .take(counted, owner, |name| self.index.has_service(name))
                .clone())
        });
        over.inspect_err(|error: &io::Error| tracing::warn!(%error, "failed to read what goes over Services"))
            .ok()
    }

    fn service_load(&self, counts: &TrafficTables, object: &ObjectRef, placed: &Placed) -> ServiceLoad {
        let mut traffic = Traffic::default();
        for index in &placed.services {
            traffic += counts.service(*index);
        }
        let mut endpoints: Vec<EndpointLoad> = Vec::new();
        for (id, backend) in &placed.backends {
            let Some(owned) = encode::owned_backend(backend) else {
                continue;
            };
            let addr = owned.key.addr;
            endpoints.push(EndpointLoad {
                at: SocketAddr::new(addr, owned.key.port),
                pod: self.policies.pod_at(addr).map(ToString::to_string),
                state: served::state(backend.head.state).to_owned(),
                traffic: counts.backend(*id),
            });
        }
        endpoints.sort_unstable_by_key(|endpoint| endpoint.at);
        ServiceLoad {
            object: object.to_string(),
            traffic,
            endpoints,
        }
    }
}
