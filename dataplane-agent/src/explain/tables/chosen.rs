//! Which endpoints a Service may choose for a flow.

use std::net::SocketAddr;

use dataplane_common::service::{Service, service_flags};

use super::{Flow, Here, Query, SOURCE_PORT};
use crate::{
    bpf::world::{Choice, OfClient},
    explain::Share,
};

/// Why a Service with session affinity has one endpoint for a client.
const REMEMBERED: &str = "session affinity: its client is remembered with it";
const BY_ADDRESS: &str =
    "session affinity: its client is not remembered yet, and its address alone leads it there";

/// An endpoint that a Service may choose for a flow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chosen {
    pub share: Option<Share>,
    /// One that leads there.
    pub source_port: u16,
    pub at: SocketAddr,
    /// Of the backend.
    pub id: Option<u32>,
    /// Why it is the only one.
    pub note: Option<&'static str>,
}

impl Here<'_> {
    /// The endpoints that a service may choose for a flow.
    pub(super) fn endpoints(
        &self,
        query: &Query,
        flow: &Flow<'_>,
        index: u32,
        service: &Service,
    ) -> Vec<Chosen> {
        let choice = self.world.choice(index);
        let is_kept = service.head.flags & service_flags::AFFINITY != 0;
        let kept = is_kept.then(|| self.world.kept(index, &choice, flow.from.0));
        let only = |id: Option<u32>, note| {
            let chosen = id.and_then(|id| {
                Some(Chosen {
                    share: None,
                    source_port: flow.source_port,
                    at: self.world.backend_at(id)?,
                    id: Some(id),
                    note: Some(note),
                })
            });
            chosen.into_iter().collect()
        };
        match kept.flatten() {
            Some(OfClient::Remembered(id)) => only(Some(id), REMEMBERED),
            Some(OfClient::ByAddress(number)) => only(choice.ids.get(number).copied(), BY_ADDRESS),
            // The protocol does not count there.
            Some(OfClient::ByFlow) => self.by_flow(query, flow, &choice, 0),
            None => self.by_flow(query, flow, &choice, service.proto),
        }
    }

    /// Each endpoint with the source port that leads there, or the one of the source port that is asked for.
    fn by_flow(&self, query: &Query, flow: &Flow<'_>, choice: &Choice, proto: u8) -> Vec<Chosen> {
        let from = |port| SocketAddr::new(flow.from.0, port);
        let only = query
            .source_port
            .and_then(|port| choice.of_flow(from(port), flow.asked, proto));
        let ports = match query.source_port {
            Some(port) => vec![Some(port); choice.ids.len()],
            None => choice.source_ports(flow.from.0, SOURCE_PORT, flow.asked, proto),
        };
        let all = (0..choice.ids.len()).zip(choice.shares());
        let chosen = all.filter(|(number, slots)| match query.source_port {
            Some(_) => Some(*number) == only,
            None => *slots > 0,
        });
        chosen
            .filter_map(|(number, slots)| {
                let share = Share {
                    slots,
                    of: choice.slots(),
                };
                let id = choice.ids[number];
                Some(Chosen {
                    share: Some(share),
                    source_port: ports[number].unwrap_or(flow.source_port),
                    at: self.world.backend_at(id)?,
                    id: Some(id),
                    note: None,
                })
            })
            .collect()
    }
}
