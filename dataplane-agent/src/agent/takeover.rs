//! When connections that netfilter translates are entered into the tables, and when their entries are looked at again.

use std::{io, net::SocketAddr};

use dataplane_common::{
    addr::proto,
    backend::{Backend, backend_flags, backend_state},
    service::Scope,
    tables::Env,
};

use super::{Agent, explain::Tables};
use crate::{
    bpf::{sys, world::World},
    netlink::{
        conntrack::{self, Connection, Phase},
        nat,
        socket::RequestSocket,
    },
    store::{Store, left::LeftFlows},
    sync::{Report, encode},
    takeover::{self, Endpoints, Entries, Owner, Role},
};

/// What is left to netfilter.
#[derive(Debug)]
pub struct Takeover {
    flows: LeftFlows,
    /// Connections are still to be entered.
    begun: bool,
    /// No new flow will take a port that one of them has.
    ports_taken: bool,
    /// There may be such connections.
    any: bool,
    told: Option<String>,
}

impl Takeover {
    pub fn new(flows: LeftFlows) -> io::Result<Self> {
        Ok(Self {
            begun: flows.is_begun()?,
            ports_taken: false,
            any: flows.count()? > 0,
            flows,
            told: None,
        })
    }

    /// Takes the ports that netfilter's connections have, before anything is served. What begins after this node's addresses
    /// are in the tables takes its port itself.
    fn take_ports(&mut self, tables: &Tables, store: &dyn Store) -> io::Result<()> {
        let entries = entries(tables, store)?;
        if !entries.datagrams {
            self.flows.end_datagrams()?;
        }
        self.flows.enter(&entries)?;
        self.ports_taken = true;
        Ok(())
    }

    /// Enters the connections that netfilter translates, once everything is served.
    fn enter(&mut self, tables: &Tables, store: &dyn Store) -> io::Result<()> {
        let entries = entries(tables, store)?;
        self.any = entries.need_netfilter();
        if self.any {
            keep_nat();
        }
        self.flows.enter(&entries)?;
        self.flows.end()?;
        self.begun = false;
        if self.any {
            tracing::info!(
                connections = entries.count(),
                "left to netfilter, which translates them: they began before the datapath"
            );
        }
        Ok(())
    }

    /// Forgets those that netfilter has forgotten.
    fn look_again(&mut self, tables: &Tables, store: &dyn Store) -> io::Result<()> {
        let known = entries(tables, store)?;
        self.flows.keep(&known)?;
        self.any = known.own > 0 || self.flows.count()? > 0;
        if self.any {
            keep_nat();
            return Ok(());
        }
        tracing::info!("no connection is left to netfilter any more");
        nat::release()
    }
}

/// Whoever removes the last rules of somebody else must not end netfilter's NAT.
fn keep_nat() {
    if let Err(error) = nat::keep() {
        tracing::warn!(
            "failed to keep netfilter's NAT ({error}): when no other rule uses it any more, connections that began before the datapath break"
        );
    }
}

impl Agent {
    /// Before services are first written.
    pub(super) fn before_serving(&mut self) {
        if let Some(takeover) = &self.takeover
            && takeover.begun
            && !takeover.ports_taken
        {
            tokio::task::block_in_place(|| self.syncer.write_host(&mut *self.store));
            self.with_takeover(Takeover::take_ports);
        }
    }

    /// Writes the Services, if that may be the first time that all of them are served, and enters netfilter's connections: from
    /// then on what is in no table is ours. Before policies are written: they judge a connection that is left by its endpoint, and
    /// one that is not entered yet by the Service's address, which no policy allows.
    pub(super) fn take_over(&mut self) -> Option<Report> {
        if !self.takeover.as_ref()?.begun {
            return None;
        }
        let report = tokio::task::block_in_place(|| self.syncer.run(&mut *self.store));
        if !report.failed.values().any(|failure| failure.refused) {
            self.with_takeover(Takeover::enter);
        }
        Some(report)
    }

    /// Every now and then, while there are connections that are left to netfilter.
    pub(super) fn look_at_left_flows(&mut self) {
        if self.takeover.as_ref().is_some_and(|takeover| takeover.begun) {
            self.with_takeover(Takeover::enter);
        }
        if self.takeover.as_ref().is_some_and(|takeover| takeover.any) {
            self.with_takeover(Takeover::look_again);
        }
    }

    fn with_takeover(&mut self, run: impl FnOnce(&mut Takeover, &Tables, &dyn Store) -> io::Result<()>) {
        let (Some(takeover), Some(tables)) = (&mut self.takeover, &self.tables) else {
            return;
        };
        let store = &*self.store;
        let outcome = tokio::task::block_in_place(|| {
            run(takeover, tables, store).or_else(|error| {
                // Datagrams are served in any case: few are of an exchange that began before.
                if takeover.begun {
                    takeover.flows.end_datagrams()?;
                }
                Err(error)
            })
        });
        let problem = outcome.err().map(|error| {
            format!("failed to read netfilter's connections ({error}); TCP connections that began before the datapath are left to it until that succeeds")
        });
        if problem != takeover.told
            && let Some(problem) = &problem
        {
            tracing::warn!("{problem}");
        }
        takeover.told = problem;
    }
}

/// The entries of all connections that netfilter knows and that the datapath would take for its own.
fn entries(tables: &Tables, store: &dyn Store) -> io::Result<Entries> {
    let world = World::open(&tables.pins, tables.constants)?;
    let (first, last) = (tables.constants.snat_port_min, tables.constants.snat_port_max);
    let is_ours = |at: SocketAddr| (first..=last).contains(&at.port()) && world.is_own(at.ip());
    let is_of_interest = |connection: &Connection| {
        connection.is_translated() && connection.phase != Phase::Over || is_ours(connection.reply.dst)
    };
    let mut socket = RequestSocket::open_netfilter()?;
    let connections = conntrack::connections(&mut socket, is_of_interest)?;
    if connections.is_empty() {
        return Ok(Entries::default());
    }
    let mut endpoints = Endpoints::default();
    for id in 0..store.limits().backends {
        let backend = store.read_backend(id).map_err(io::Error::other)?;
        if backend.head.state != backend_state::GONE {
            let key = address(&backend);
            endpoints.all.entry(key).or_default().push(id);
        }
    }
    let now_ticks = sys::ticks();
    let role = |connection: &Connection| role(connection, &world, &mut endpoints);
    Ok(takeover::entries(&connections, now_ticks, role, is_ours))
}

fn role(connection: &Connection, world: &World, endpoints: &mut Endpoints) -> Role {
    let Connection {
        proto,
        original,
        reply,
        ..
    } = *connection;
    let mut scopes = [Scope::Internal, Scope::External].into_iter();
    let service = scopes.find_map(|scope| world.find_service(original.dst, proto, scope));
    let Some((service, head)) = service.and_then(|service| Some((service, world.service_head(service)?)))
    else {
        return Role::Other;
    };
    if world.is_own(original.src.ip()) {
        return Role::Own;
    }
    endpoints
        .chosen
        .entry(service)
        .or_insert_with(|| world.choice(service).ids.into_iter().collect());
    let id = endpoints.of(service, reply.src, proto);
    Role::Service(Owner {
        service,
        service_generation: head.generation,
        backend: id.and_then(|id| Some((id, world.backend_head(id)?.generation))),
    })
}

fn address(backend: &Backend) -> (SocketAddr, u8) {
    let has = |flag| backend.head.flags & flag != 0;
    let addr = encode::ip(backend.addr_be, has(backend_flags::IPV6));
    let at = SocketAddr::new(addr, u16::from_be(backend.head.port_be));
    (
        at,
        if has(backend_flags::UDP) {
            proto::UDP
        } else {
            proto::TCP
        },
    )
}
