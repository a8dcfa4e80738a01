//! What the tables of this node say of a flow: its first packet is led through the host build of the datapath, at the hooks
//! of the Pods that are here.

mod chosen;

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::{pipeline::Context, reason::Reason, service::Scope, tables::Env, verdict::Hook};

use self::chosen::Chosen;
use super::{
    Becomes, End, Explained, Place, Port, Share, SoFar, Step, Verdict,
    asked::{self, Asked, Client},
    ends::{self, Error, Found},
    known::{Decided, Known, Told},
    packet, place, unchosen, unserved, ways,
};
use crate::{
    bpf::world::{Outcome, World},
    model::{self, Index, Kind, Name, ObjectRef, Protocol, policy::Direction},
    store::traffic::TrafficTables,
};

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Query {
    pub from: End,
    pub to: End,
    pub port: Port,
    /// Of the source. `None`: of a Service each endpoint, else any.
    pub source_port: Option<u16>,
}

/// In place of a source port where none is asked for: one that applications get.
const SOURCE_PORT: u16 = 32768;

/// The direction of a step that no policy decides: there is no target.
const OF_SERVICE: &str = "service";

/// The index of `lo` (`LOOPBACK_IFINDEX` of the kernel).
pub const LOOPBACK: u32 = 1;

/// The tables, and what is known of what is in them.
#[derive(Debug)]
pub struct Here<'a> {
    pub world: World,
    /// Empty where nobody knows names.
    pub index: &'a Index,
    pub known: &'a dyn Known,
    /// What has gone over backends.
    pub traffic: TrafficTables,
    /// Names of devices.
    pub devices: BTreeMap<u32, String>,
}

/// Why the tables have no answer.
#[derive(Debug, thiserror::Error)]
pub enum Failed {
    #[error(transparent)]
    Ends(#[from] Error),
    /// With the problems of the Service that is asked for.
    #[error("{0}; {1}")]
    Problems(Error, String),
    #[error("there are no tables")]
    NoTables,
    #[error("failed to read the tables")]
    Read(#[from] io::Error),
}

/// A flow to judge: who is at its ends, and where its first packet is sent.
#[derive(Clone, Copy, Debug)]
struct Flow<'a> {
    from: Found<'a>,
    source_port: u16,
    /// The Service's address, or the target's.
    asked: SocketAddr,
    to: Found<'a>,
    port: Port,
}

/// A hook, and at which device.
#[derive(Clone, Copy, Debug)]
struct Entry {
    hook: Hook,
    ifindex: u32,
    from_host: bool,
}

impl Entry {
    fn of_pod(hook: Hook, ifindex: u32) -> Self {
        Self {
            hook,
            ifindex,
            from_host: false,
        }
    }
}

impl<'a> Here<'a> {
    /// Judges a flow as the tables would: for Pods with two addresses in both families, and for a Service with each of the
    /// endpoints that it chooses from, or the one that the source port leads to.
    pub fn explain(&self, query: &Query) -> Result<Vec<Explained>, Failed> {
        let from = ends::sources(self.index, &query.from)?;
        let mut explained = Vec::new();
        for from in &from {
            for asked in self.targets(query, *from)? {
                explained.extend(self.flows(query, *from, &asked)?);
            }
        }
        for one in &mut explained {
            one.verdict = Verdict::of(one);
            self.note_unowned(query, one);
        }
        if explained.is_empty() {
            return Err(Error::Families.into());
        }
        Ok(explained)
    }

    /// Says of addresses that look like a Pod's that no Pod has them.
    fn note_unowned(&self, query: &Query, explained: &mut Explained) {
        // Who knows no names does not know whose addresses there are.
        if self.index.node_name().is_empty() {
            return;
        }
        let to = explained.to.ip;
        let way = explained.ways.iter().find(|way| way.to == to);
        let device = way.and_then(|way| way.device.clone());
        let leaves_by = device.filter(|device| self.is_outward(device));
        let is_asked = query.to == End::Addr(to);
        explained.note_unowned(self.index, is_asked, leaves_by.as_deref(), |addr| {
            self.world.is_own(addr)
        });
    }

    /// Whether packets leave this node by a device.
    fn is_outward(&self, device: &str) -> bool {
        let mut named = self.devices.iter().filter(|(_, name)| *name == device);
        named.any(|(ifindex, _)| *ifindex != LOOPBACK && self.world.device(*ifindex).is_some())
    }

    /// The addresses that the flow may be sent to, and endpoints of a Service without an address of its own.
    fn targets(&self, query: &Query, from: Found<'a>) -> Result<Vec<Asked>, Failed> {
        let direct = |addr: IpAddr| Asked::direct(addr, query.port);
        let mut all = match &query.to {
            End::Service(name) => {
                let service = ends::service(self.index, name).map_err(|error| self.failed(error, name))?;
                self.of_service(&service, query, from)?
            }
            End::Pod(name) => ends::of_pod(self.index, name)?
                .into_iter()
                .map(|(addr, _)| direct(addr))
                .collect(),
            End::Addr(addr) => vec![direct(*addr)],
        };
        all.retain(|asked| asked.at.is_ipv4() == from.0.is_ipv4());
        Ok(all)
    }

    /// The addresses of a Service that the client can ask, or its endpoints if it has none at all.
    fn of_service(
        &self,
        service: &model::Service,
        query: &Query,
        from: Found<'a>,
    ) -> Result<Vec<Asked>, Failed> {
        let node_ports_at = self.node_ports_at()?;
        let client = Client {
            addr: from.0,
            is_outside: from.1.is_none() && !self.world.is_own(from.0),
            node_ports_at: &node_ports_at,
        };
        if service.cluster_ips.is_empty() && !client.is_outside {
            let targets = ends::targets(self.index, &query.to, query.port, from.1)?;
            let endpoint = |target: ends::Target<'a>| Asked {
                at: SocketAddr::new(target.found.0, target.port.number),
                service: target.via,
                kind: None,
            };
            return Ok(targets.into_iter().map(endpoint).collect());
        }
        asked::of_service(service, query.port, client).map_err(|error| self.failed(error, &service.name))
    }

    /// An error about a Service, with what is known to be wrong with it.
    fn failed(&self, error: Error, service: &Name) -> Failed {
        let problems = self.known.problems(service, None);
        if problems.is_empty() {
            Failed::Ends(error)
        } else {
            Failed::Problems(error, problems.join("; "))
        }
    }

    /// Where node ports answer; of these the addresses that this node's object tells, if it tells any.
    fn node_ports_at(&self) -> io::Result<Vec<IpAddr>> {
        let all = self.world.node_ports_at()?;
        let told = self.index.node().map_or(&[][..], |node| &node.ips);
        let both: Vec<IpAddr> = all.iter().copied().filter(|addr| told.contains(addr)).collect();
        Ok(if both.is_empty() { all } else { both })
    }

    fn flows(&self, query: &Query, from: Found<'a>, asked: &Asked) -> Result<Vec<Explained>, Failed> {
        let Query { port, .. } = *query;
        let at = asked.at;
        let service = port.proto.and_then(|proto| {
            let is_inside = self.interface(from).is_some() || self.world.is_own(from.0);
            let scope = if is_inside {
                Scope::Internal
            } else {
                Scope::External
            };
            self.world.find_service(at, proto.number(), scope)
        });
        let flow = Flow {
            from,
            source_port: query.source_port.unwrap_or(SOURCE_PORT),
            asked: at,
            to: ends::at(self.index, at.ip()),
            port: Port {
                number: at.port(),
                ..port
            },
        };
        let of_service = service.and_then(|index| Some((index, self.world.service(index)?)));
        let Some((index, service)) = of_service else {
            return Ok(vec![self.unserved(flow, asked)?]);
        };
        let holder = port.proto.and_then(|proto| self.known.holder(at, proto));
        let name = self.served_as(asked, holder.as_ref(), port.proto);
        let mut explained = Vec::new();
        for chosen in self.endpoints(query, &flow, index, &service) {
            explained.push(self.endpoint(flow, chosen)?);
        }
        if explained.is_empty() {
            explained.push(self.refused(flow)?);
        }
        let unwritten = self.unwritten(&flow);
        for one in &mut explained {
            one.service = Some(name.clone());
            one.asked = Some(at);
            // Where nothing is led anywhere, that is said as the reason.
            let is_refused = one.steps.iter().any(|step| step.direction == OF_SERVICE);
            one.notes.extend(unwritten.clone().filter(|_| !is_refused));
            one.notes.extend(asked.conflict(holder.as_ref(), flow.port));
            one.notes
                .extend(asked.kind.iter().map(|kind| format!("asked at {at}, {kind}")));
        }
        Ok(explained)
    }

    /// What an entry of the tables is called.
    fn served_as(&self, asked: &Asked, holder: Option<&ObjectRef>, proto: Option<Protocol>) -> String {
        if let Some(holder) = holder {
            return match holder.kind {
                Kind::Service => holder.name.to_string(),
                _ => holder.to_string(),
            };
        }
        let service = ends::service_with(self.index, asked.at, proto);
        service.map_or_else(|| asked.at.to_string(), |service| service.name.to_string())
    }

    /// A flow to an address that is no Service's in the tables, or an endpoint of a Service without one.
    fn unserved(&self, flow: Flow<'a>, asked: &Asked) -> Result<Explained, Failed> {
        let mut explained = self.judge(flow, None)?;
        explained.service = asked.service.as_ref().map(ToString::to_string);
        if asked.service.is_some() && asked.kind.is_none() {
            return Ok(explained);
        }
        let Some(unserved) = unserved::at(self.index, asked.at, flow.port, &self.node_ports_at()?) else {
            return Ok(explained);
        };
        let Some(service) = unserved.service() else {
            explained.notes.push(unserved.reason(flow.port, &[]));
            return Ok(explained);
        };
        let at = flow.port.proto.map(|proto| (asked.at, proto));
        let reason = unserved.reason(flow.port, &self.known.problems(&service.name, at));
        explained.push(Step::of_service(&flow, reason));
        Ok(explained)
    }

    /// Judges a flow to one of the endpoints that a Service may choose.
    fn endpoint(&self, flow: Flow<'a>, chosen: Chosen) -> Result<Explained, Failed> {
        let Chosen {
            share,
            source_port,
            at,
            id,
            note,
        } = chosen;
        let flow = Flow {
            source_port,
            to: ends::at(self.index, at.ip()),
            port: Port {
                number: at.port(),
                ..flow.port
            },
            ..flow
        };
        let so_far = id.map(|id| {
            let traffic = self.traffic.backend(id);
            SoFar {
                connections: traffic.connections,
                refused: traffic.refused,
            }
        });
        Ok(Explained {
            so_far,
            notes: note.into_iter().map(str::to_owned).collect(),
            ..self.judge(flow, share)?
        })
    }

    /// A flow whose Service has nowhere to lead it to.
    fn refused(&self, flow: Flow<'a>) -> Result<Explained, Failed> {
        let reason = match self.entry(&flow)? {
            Some(entry) => self.run(entry, &flow, flow.asked)?.stopped(),
            None => None,
        };
        let reason = reason.unwrap_or(Reason::NoEndpoints);
        let mut explained = answer(&flow, None);
        explained.push(self.refusal(&flow, reason));
        Ok(explained)
    }

    /// What of the frontend that a flow asks for has found no room in the tables.
    fn unwritten(&self, flow: &Flow<'_>) -> Option<String> {
        self.known.unwritten(flow.asked, flow.port.proto?)
    }

    /// A step that ends a flow before policies are asked, and why, as far as the objects tell.
    fn refusal(&self, flow: &Flow<'a>, reason: Reason) -> Step {
        let mut step = refusal(flow, reason);
        // Who has endpoints and no room for them drops, as who has them elsewhere does.
        let unwritten = self.unwritten(flow);
        if let Some(unwritten) = unwritten.filter(|_| reason == Reason::NoLocalEndpoints) {
            step.reason = format!("{}: {unwritten}", reason.label());
            return step;
        }
        let holder = flow
            .port
            .proto
            .and_then(|proto| self.known.holder(flow.asked, proto));
        let service = match holder {
            Some(holder) => self
                .index
                .service(&holder.name)
                .filter(|_| holder.kind == Kind::Service),
            None => ends::service_with(self.index, flow.asked, flow.port.proto),
        };
        if let Some(service) = service {
            let port = ends::port_at(&service, flow.asked, flow.port.proto);
            let ipv4 = Some(flow.asked.is_ipv4());
            let why = unchosen::why(self.index, &service, port, ipv4, reason);
            if !why.is_empty() {
                step.reason = format!("{}: {why}", step.reason.trim_end_matches('.'));
            }
        }
        step
    }

    /// Judges a flow at both ends, as far as they are here.
    fn judge(&self, flow: Flow<'a>, share: Option<Share>) -> Result<Explained, Failed> {
        let target = SocketAddr::new(flow.to.0, flow.port.number);
        let is_translated = target != flow.asked;
        let mut explained = answer(&flow, share);
        if is_translated || share.is_some() {
            explained.source_port = Some(flow.source_port);
        }
        let mut told = Vec::new();
        explained.ways = ways::to(&self.world.routing, &self.devices, self.index, flow.to)?;
        if let Some(entry) = self.entry(&flow)? {
            let outcome = self.run(entry, &flow, flow.asked)?;
            if let Some(reason) = outcome.stopped().filter(|reason| !is_of_policy(*reason)) {
                explained.push(self.refusal(&flow, reason));
                return Ok(explained);
            }
            explained.becomes = becomes(&outcome).filter(|becomes| becomes.to != flow.asked);
            told = outcome.told;
        }
        self.step(
            &mut explained,
            Direction::Egress,
            (flow.from, flow.to),
            Told(&told),
        );
        if let Some(ifindex) = self.interface(flow.to)
            // On the fast path both ends are asked at once.
            && !told.iter().any(|event| event.ifindex == ifindex && event.outward == 0)
        {
            let entry = Entry {
                from_host: self.world.is_own(flow.from.0),
                ..Entry::of_pod(Hook::ToPod, ifindex)
            };
            told = self.run(entry, &flow, target)?.told;
        }
        self.step(
            &mut explained,
            Direction::Ingress,
            (flow.to, flow.from),
            Told(&told),
        );
        Ok(explained)
    }

    /// Adds what was decided at one end.
    fn step(
        &self,
        explained: &mut Explained,
        direction: Direction,
        ends: (Found<'_>, Found<'_>),
        told: Told<'_>,
    ) {
        match self.known.decided(&self.world, direction, ends, told) {
            Decided::Here(step) => explained.push(*step),
            Decided::Elsewhere(elsewhere) => explained.elsewhere.push(elsewhere),
            Decided::Nowhere => {}
        }
    }

    /// Where this node meets the flow first. `None`: it does not, or where is not known.
    fn entry(&self, flow: &Flow<'_>) -> io::Result<Option<Entry>> {
        let (from, pod) = flow.from;
        if let Some(ifindex) = self.interface(flow.from) {
            return Ok(Some(Entry::of_pod(Hook::FromPod, ifindex)));
        }
        let is_own = self.world.is_own(from);
        if !is_own && pod.is_some() {
            return Ok(None);
        }
        let by = if is_own { flow.asked.ip() } else { from };
        let device = self.world.routing.way(by)?.map(|way| way.ifindex);
        let device = device.filter(|ifindex| self.world.device(*ifindex).is_some());
        Ok(device.map(|ifindex| Entry {
            hook: match (is_own, ifindex) {
                (false, _) => Hook::FromNetdev,
                (true, LOOPBACK) => Hook::ToLo,
                (true, _) => Hook::ToNetdev,
            },
            ifindex,
            from_host: is_own,
        }))
    }

    /// Leads the flow's first packet, sent to `to`, through a hook.
    fn run(&self, entry: Entry, flow: &Flow<'_>, to: SocketAddr) -> io::Result<Outcome> {
        let Entry {
            hook,
            ifindex,
            from_host,
        } = entry;
        let at = Context {
            hook,
            ifindex,
            from_host,
            l3: 14,
        };
        let from = (flow.from.0, flow.source_port);
        let port = Port {
            number: to.port(),
            ..flow.port
        };
        self.world
            .run(packet::first(from, (to.ip(), to.port()), port), &at)
    }

    /// The interface of an end that is a Pod of this node.
    fn interface(&self, end: Found<'_>) -> Option<u32> {
        self.known.interface(&self.world, end)
    }
}

impl Explained {
    fn push(&mut self, step: Step) {
        self.allowed &= step.allowed;
        self.steps.push(step);
    }
}

/// Nothing has been decided yet.
fn answer(flow: &Flow<'_>, share: Option<Share>) -> Explained {
    Explained {
        from: place(flow.from),
        to: place(flow.to),
        port: flow.port.to_string(),
        service: None,
        asked: None,
        notes: Vec::new(),
        share,
        source_port: None,
        becomes: None,
        ways: Vec::new(),
        so_far: None,
        allowed: true,
        verdict: Verdict::default(),
        steps: Vec::new(),
        elsewhere: Vec::new(),
    }
}

/// What the packet of an outcome has become.
fn becomes(outcome: &Outcome) -> Option<Becomes> {
    Some(Becomes {
        from: packet::source(&outcome.bytes)?,
        to: packet::destination(&outcome.bytes)?,
    })
}

/// A step that ends a flow before policies are asked.
fn refusal(flow: &Flow<'_>, reason: Reason) -> Step {
    Step::of_service(flow, format!("{}: {}", reason.label(), reason.text().trim()))
}

impl Step {
    /// There is no target.
    fn of_service(flow: &Flow<'_>, reason: String) -> Self {
        Self {
            direction: OF_SERVICE.into(),
            at: Place {
                ip: flow.asked.ip(),
                pod: None,
            },
            allowed: false,
            rule: None,
            reason,
            dry_run: None,
            selected_by: Vec::new(),
        }
    }
}

fn is_of_policy(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::PolicyDenied | Reason::PolicyBroken | Reason::PolicyUnknownPod | Reason::PolicyUnreadable
    )
}
