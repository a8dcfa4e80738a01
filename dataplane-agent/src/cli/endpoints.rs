//! `endpoints`: each endpoint of each Service, with what goes there and what it refuses; by the pinned tables, with the names that a
//! running agent knows.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::Path,
};

use anyhow::Context;
use serde::Serialize;

use super::{
    alone::{self, Places},
    ask,
    names::Names,
    output::{Output, note, number, percent, table},
    pinned,
    services::{FlowsOf, Listing, Tables, Which, began_at, node_ports_answer, unknown},
    top::numbers::size,
};
use crate::{
    compile::FrontendAddr,
    load::Traffic,
    model::ObjectRef,
    served::{self, Served},
    store::{
        bpf::BpfStore,
        flows::Flow,
        served::{TableEndpoint, TableFrontend, endpoints, state},
        traffic::TrafficTables,
    },
    sync::encode,
};

/// A row.
#[derive(Debug, PartialEq, Serialize)]
struct Shown {
    /// `kind namespace/name`, where an agent knows it.
    object: Option<String>,
    /// A frontend that leads there; of an endpoint to which none leads any more, one of its Service. Node ports come last.
    frontend: Option<String>,
    endpoint: SocketAddr,
    protocol: &'static str,
    pod: Option<String>,
    node: Option<String>,
    state: &'static str,
    /// On this node.
    local: bool,
    /// Of new connections of Pods and processes of this node, from 0 to 1. The largest, where several ports of the Service lead there.
    share: f64,
    /// Of those from outside; `None`: the Service takes none. Where these are led apart (`externalTrafficPolicy: Local`), by what leads
    /// them alone: a cluster IP follows another policy.
    external_share: Option<f64>,
    /// Flows that go there now, half-open ones left out; `None`: they could not be read.
    flows: Option<usize>,
    #[serde(flatten)]
    traffic: Traffic,
}

/// What an agent knows of endpoints.
#[derive(Default)]
struct Known {
    /// By [`encode::owner`].
    objects: HashMap<u32, String>,
    names: Names,
}

/// Prints the endpoints of all Services, or of one.
pub fn run(service: Option<&Which>, places: Places<'_>, output: Listing) -> anyhow::Result<()> {
    let Places { bpffs, socket } = places;
    let mut known = Known::default();
    let counted = match ask::value::<Served>(socket, "/services") {
        Ok(served) => {
            known.objects = owners(&served);
            let mut counted = Counted::read(bpffs)?;
            if let Some(service) = service {
                counted.narrow(service, &served, places)?;
            }
            let addrs: Vec<IpAddr> = counted.endpoints.iter().map(|(one, _)| one.addr.ip()).collect();
            let mut named = known.names.learn_pods(socket, addrs.iter().copied(), ask::WITHIN);
            if named.is_ok() && output != Listing::Table {
                named = known.names.learn_nodes(socket, addrs.into_iter(), ask::WITHIN);
            }
            if let Err(error) = named {
                alone::unnamed(&error);
            }
            counted
        }
        Err(error) if matches!(service, Some(Which::Named(_))) => {
            let way_out = "without a name, the endpoints of all Services are shown, by address";
            return Err(alone::only_an_agent(&error, "names", way_out));
        }
        Err(error) => {
            let mut counted = alone::instead(error, || Counted::read(bpffs))?.noted();
            if let Some(Which::At(addr)) = service {
                counted.narrow_to(*addr, node_ports_answer(bpffs, *addr))?;
            }
            counted
        }
    };
    let shown = counted.shown(&known);
    match output {
        Listing::Json => Output::Json.print(&shown, |_| String::new()),
        Listing::Table | Listing::Wide => {
            Output::Table.print(&shown, |shown| render(shown, output == Listing::Wide))
        }
    }
}

/// The names of Services, and of Pods with host ports, as their endpoints have them.
fn owners(served: &Served) -> HashMap<u32, String> {
    let objects = served.objects.iter().filter_map(|one| {
        let object: ObjectRef = one.object.parse().ok()?;
        Some((encode::owner(&object), one.object.clone()))
    });
    objects.collect()
}

/// What the pinned tables hold, and what they have counted.
struct Counted {
    tables: Tables,
    endpoints: Vec<(TableEndpoint, Traffic)>,
}

impl Counted {
    fn read(bpffs: &Path) -> anyhow::Result<Self> {
        let pins = pinned(bpffs)?;
        let store = BpfStore::open(&pins)?;
        let traffic =
            TrafficTables::open(&pins).context("failed to open the tables of what goes over Services")?;
        let endpoints = endpoints(&store).context("failed to read the pinned tables")?;
        let counted = endpoints.into_iter().map(|one| (one, traffic.backend(one.id)));
        Ok(Self {
            endpoints: counted.collect(),
            tables: Tables::of(&pins, &store)?,
        })
    }

    /// Leaves the endpoints of one Service. Says so on stderr where it has none.
    fn narrow(&mut self, service: &Which, served: &Served, places: Places<'_>) -> anyhow::Result<()> {
        let Places { bpffs, socket } = places;
        let service = match service {
            Which::Named(service) => service,
            Which::At(addr) => return self.narrow_to(*addr, node_ports_answer(bpffs, *addr)),
        };
        anyhow::ensure!(self.is_narrowed(service, served), "{}", unknown(socket, service));
        if self.endpoints.is_empty() {
            note(format_args!(
                "Service {service} has no endpoint: `explain` with `--to svc/{service}` says why"
            ));
        }
        Ok(())
    }

    /// Leaves the endpoints of one Service; whether there is one.
    fn is_narrowed(&mut self, service: &str, served: &Served) -> bool {
        let object = format!("Service {service}");
        let owner = object.parse().ok().map(|object| encode::owner(&object));
        self.endpoints.retain(|(one, _)| Some(one.owner) == owner);
        served.objects.iter().any(|one| one.object == object)
            || served.problems.iter().any(|one| one.object == object)
    }

    /// Leaves the endpoints of those Services that have an address, by what the tables say. `node_ports`: they answer there.
    fn narrow_to(&mut self, addr: IpAddr, node_ports: bool) -> anyhow::Result<()> {
        let is_there = |frontend: &&TableFrontend| match frontend.at.addr {
            of_all if of_all.is_unspecified() => node_ports && of_all.is_ipv4() == addr.is_ipv4(),
            own => own == addr,
        };
        let there = self.tables.frontends.iter().filter(is_there);
        let owners: HashSet<u32> = there.map(|frontend| frontend.owner).collect();
        anyhow::ensure!(!owners.is_empty(), "no Service has {addr} here");
        self.endpoints.retain(|(one, _)| owners.contains(&one.owner));
        if self.endpoints.is_empty() {
            note(format_args!("no endpoint is behind {addr}"));
        }
        Ok(())
    }

    fn shown(&self, known: &Known) -> Vec<Shown> {
        let mut of_owner: HashMap<u32, Vec<&TableFrontend>> = HashMap::new();
        for frontend in &self.tables.frontends {
            of_owner.entry(frontend.owner).or_default().push(frontend);
        }
        let flows = self.tables.flows_of_backends();
        let rows = self.endpoints.iter().map(|(endpoint, traffic)| {
            let frontends = of_owner.get(&endpoint.owner).map_or(&[][..], Vec::as_slice);
            Shown::of(endpoint, *traffic, frontends, flows.as_ref(), known)
        });
        let mut rows: Vec<Shown> = rows.collect();
        rows.sort_by(|one, other| one.place().cmp(&other.place()));
        rows
    }
}

impl Shown {
    /// `frontends`: of its Service.
    fn of(
        endpoint: &TableEndpoint,
        traffic: Traffic,
        frontends: &[&TableFrontend],
        flows: Option<&FlowsOf<'_>>,
        known: &Known,
    ) -> Self {
        let TableEndpoint { id, addr, proto, .. } = *endpoint;
        let frontends = frontends.iter().filter(|frontend| frontend.at.proto == proto);
        let share_of = |frontend: &TableFrontend| {
            let backend = frontend.backends.iter().find(|backend| backend.id == id)?;
            Some(backend.share())
        };
        let of_scope = |external| frontends.clone().filter(move |one| one.external == external);
        let is_apart = |one: &&&TableFrontend| of_scope(false).all(|inside| inside.service != one.service);
        let mut outside: Vec<&&TableFrontend> = of_scope(true).collect();
        if outside.iter().any(is_apart) {
            outside.retain(is_apart);
        }
        let share = |one: &&TableFrontend| share_of(one).unwrap_or(0.0);
        let first = frontends.clone().min_by_key(|frontend| {
            let FrontendAddr { addr, .. } = frontend.at;
            (share_of(frontend).is_none(), addr.is_unspecified())
        });
        let flows = flows.map(|flows| {
            let is_its = |flow: &&&Flow| frontends.clone().any(|frontend| began_at(flow, &frontend.at));
            let there = flows.get(&(proto.number(), addr)).into_iter().flatten();
            there.filter(is_its).count()
        });
        Self {
            object: known.objects.get(&endpoint.owner).cloned(),
            frontend: first.map(|frontend| served::at(&frontend.at)),
            endpoint: addr,
            protocol: proto.as_str(),
            pod: known.names.pod(addr.ip()).cloned(),
            node: known.names.node(addr.ip()).cloned(),
            state: state(endpoint.state),
            local: endpoint.local,
            share: of_scope(false).map(share).reduce(f64::max).unwrap_or(0.0),
            external_share: outside.into_iter().map(share).reduce(f64::max),
            flows,
            traffic,
        }
    }

    /// Where it stands in the list.
    fn place(&self) -> (bool, Option<&String>, Option<&String>, SocketAddr, &'static str) {
        let object = self.object.as_ref();
        let frontend = self.frontend.as_ref().filter(|_| object.is_none());
        // Those of Services that are gone come last.
        let is_gone = object.is_none() && frontend.is_none();
        (is_gone, object, frontend, self.endpoint, self.protocol)
    }
}

fn render(shown: &[Shown], is_wide: bool) -> String {
    let header = [
        "OBJECT",
        "ENDPOINT",
        "POD",
        "HERE",
        "STATE",
        "SHARE",
        "FLOWS",
        "CONNECTIONS",
        "REFUSED",
    ];
    let more = [
        "NODE",
        "FROM OUTSIDE",
        "DROPPED",
        "PACKETS IN",
        "OUT",
        "BYTES IN",
        "OUT",
    ];
    let header = if is_wide {
        [&header[..], &more[..]].concat()
    } else {
        header.to_vec()
    };
    let rows = shown.iter().map(|one| {
        let mut row = row(one);
        if is_wide {
            row.extend(more_of(one));
        }
        row
    });
    table(&header, rows).trim_start_matches('\n').to_owned()
}

fn row(one: &Shown) -> Vec<String> {
    let or_dash = |name: Option<&String>| name.map_or_else(|| "-".to_owned(), Clone::clone);
    vec![
        or_dash(one.object.as_ref().or(one.frontend.as_ref())),
        format!("{}/{}", one.endpoint, one.protocol),
        or_dash(one.pod.as_ref()),
        if one.local { "here" } else { "" }.to_owned(),
        one.state.to_owned(),
        percent(one.share),
        number(one.flows),
        one.traffic.connections.to_string(),
        one.traffic.refused.to_string(),
    ]
}

/// What is estimated is rounded.
fn more_of(one: &Shown) -> [String; 7] {
    [
        one.node.clone().unwrap_or_else(|| "-".to_owned()),
        one.external_share.map_or_else(|| "-".to_owned(), percent),
        one.traffic.dropped.to_string(),
        size(one.traffic.packets_in),
        size(one.traffic.packets_out),
        size(one.traffic.bytes_in),
        size(one.traffic.bytes_out),
    ]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dataplane_common::backend::backend_state;

    use super::*;
    use crate::{
        model::Protocol,
        store::{
            flows::{Flow, FlowState},
            served::TableBackend,
        },
    };

    const SERVICE: &str = "Service shop/web";

    fn owner(object: &str) -> u32 {
        encode::owner(&object.parse().unwrap())
    }

    fn addr(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 244, 1, last], 8080))
    }

    /// A Service with a node port: its first endpoint here refuses, of its second one is only left what goes on; and an endpoint of
    /// a Service that is gone.
    fn counted() -> Counted {
        let endpoint = |last: u8, state, owner| TableEndpoint {
            id: u32::from(last),
            owner,
            addr: addr(last),
            proto: Protocol::Tcp,
            state,
            local: last == 1,
        };
        let traffic = |connections, refused| Traffic {
            connections,
            refused,
            bytes_in: 64_000,
            ..Traffic::default()
        };
        let of_service = owner(SERVICE);
        let frontend = |at: &str, external, of| {
            let at: SocketAddr = at.parse().unwrap();
            TableFrontend {
                at: FrontendAddr {
                    addr: at.ip(),
                    port: at.port(),
                    proto: Protocol::Tcp,
                },
                external,
                backends: vec![TableBackend {
                    addr: addr(1),
                    state: backend_state::ACTIVE,
                    local: true,
                    slots: 1,
                    of,
                    id: 1,
                }],
                owner: of_service,
                service: u32::from(at.port()),
            }
        };
        let flow = |last: u8, asked: &str, state| Flow {
            proto: 6,
            client: "10.244.1.9:4000".parse().unwrap(),
            asked: asked.parse().unwrap(),
            backend: addr(last),
            seen_as: None,
            state,
            idle: Duration::ZERO,
        };
        Counted {
            tables: Tables {
                frontends: vec![
                    frontend("0.0.0.0:30080", false, 1),
                    frontend("0.0.0.0:30080", true, 1),
                    frontend("10.96.0.1:80", false, 4),
                ],
                flows: Some(vec![
                    flow(1, "10.96.0.1:80", FlowState::Established),
                    flow(1, "192.0.2.1:30080", FlowState::Established),
                    flow(1, "10.96.0.1:80", FlowState::HalfOpen),
                    flow(1, "10.96.0.2:80", FlowState::Established),
                    flow(2, "10.96.0.1:80", FlowState::Closing),
                ]),
            },
            endpoints: vec![
                (endpoint(3, backend_state::DRAINING, 99), traffic(1, 0)),
                (endpoint(2, backend_state::DRAINING, of_service), traffic(5, 0)),
                (endpoint(1, backend_state::ACTIVE, of_service), traffic(7, 3)),
            ],
        }
    }

    fn rows(text: &str) -> Vec<Vec<&str>> {
        text.lines()
            .map(|line| line.split_whitespace().collect())
            .collect()
    }

    #[test]
    fn each_endpoint_has_a_row_with_what_went_there_and_what_it_refused() {
        let mut known = Known::default();
        known.objects.insert(owner(SERVICE), SERVICE.to_owned());
        known.names.name_pod(addr(1).ip(), "shop/web-0");
        let text = render(&counted().shown(&known), false);
        let rows = rows(&text);
        assert_eq!(rows.len(), 4, "{text}");
        for (row, expected) in [
            (
                1,
                "Service shop/web 10.244.1.1:8080/TCP shop/web-0 here active 100.0 % 2 7 3",
            ),
            (2, "Service shop/web 10.244.1.2:8080/TCP - draining 0.0 % 1 5 0"),
            (3, "- 10.244.1.3:8080/TCP - draining 0.0 % 0 1 0"),
        ] {
            assert_eq!(rows[row].join(" "), expected, "{text}");
        }
    }

    #[test]
    fn without_an_agent_a_service_is_its_address() {
        let shown = counted().shown(&Known::default());
        let text = render(&shown, true);
        let first = rows(&text)[1].join(" ");
        assert_eq!(
            first, "10.96.0.1:80/TCP 10.244.1.1:8080/TCP - here active 100.0 % 2 7 3 - 100.0 % 0 0 0 64.0k 0",
            "{text}"
        );
        assert_eq!(shown[2].frontend, None, "of a Service that is gone");
        let value = serde_json::to_value(&shown[0]).unwrap();
        assert_eq!(
            (&value["refused"], &value["endpoint"]),
            (&3.into(), &"10.244.1.1:8080".into())
        );
    }

    #[test]
    fn clients_outside_that_are_led_apart_have_a_share_of_their_own() {
        let external_share = |counted: &Counted| counted.shown(&Known::default())[0].external_share;
        let mut counted = counted();
        let mut cluster_ip = counted.tables.frontends[2].clone();
        cluster_ip.external = true;
        counted.tables.frontends.push(cluster_ip);
        assert_eq!(external_share(&counted), Some(1.0));
        // No endpoint is here, and the node port has a Service of its own for them.
        let of_outside = &mut counted.tables.frontends[1];
        of_outside.backends.clear();
        of_outside.service += 1;
        assert_eq!(external_share(&counted), Some(0.0));
    }

    #[test]
    fn one_service_alone_is_shown_and_one_that_nobody_knows_is_an_error() {
        let served = Served {
            objects: vec![served::ServedObject {
                object: SERVICE.to_owned(),
                frontends: Vec::new(),
            }],
            ..Served::default()
        };
        assert_eq!(owners(&served)[&owner(SERVICE)], SERVICE);
        let mut narrowed = counted();
        assert!(narrowed.is_narrowed("shop/web", &served));
        assert_eq!(narrowed.endpoints.len(), 2);
        assert!(!counted().is_narrowed("shop/none", &served));
    }

    #[test]
    fn the_service_that_has_an_address_is_shown() {
        let narrowed = |addr: &str, node_ports| {
            let mut counted = counted();
            let narrowed = counted.narrow_to(addr.parse().unwrap(), node_ports);
            narrowed.map(|()| counted.endpoints.len()).ok()
        };
        assert_eq!(narrowed("10.96.0.1", false), Some(2));
        assert_eq!(narrowed("192.0.2.1", true), Some(2), "its node port");
        for (addr, node_ports) in [("192.0.2.1", false), ("10.96.0.2", false), ("fd00::1", true)] {
            assert_eq!(narrowed(addr, node_ports), None, "{addr}");
        }
    }
}
