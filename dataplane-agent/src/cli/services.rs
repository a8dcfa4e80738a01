//! `services`: what is served, by what a running agent says and by what the pinned tables hold, and what is not.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    str::FromStr,
    time::Duration,
};

use anyhow::Context;
use dataplane_common::device::own_flags;
use serde::Serialize;

use super::{
    alone::{self, Places, Said},
    ask,
    names::SERVICE,
    output::{self, Output, note, number, percent, table},
    pinned,
};
use crate::{
    bpf::pins::Pins,
    compile::FrontendAddr,
    served::{self, Clients, Condition, Problem, Served},
    store::{
        Store as _,
        bpf::BpfStore,
        flows::{self, Flow, FlowState},
        served::{TableFrontend, read},
    },
};

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Listing {
    Table,
    Wide,
    Json,
}

/// Which Service somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// `namespace/name`.
    Named(String),
    At(IpAddr),
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(addr) = text.parse() {
            return Ok(Self::At(addr));
        }
        let name = text.strip_prefix(SERVICE).unwrap_or(text);
        match name.split('/').collect::<Vec<_>>()[..] {
            [namespace, service] if !namespace.is_empty() && !service.is_empty() => {
                Ok(Self::Named(name.to_owned()))
            }
            _ => Err(format!("`{text}` is neither namespace/service nor an address")),
        }
    }
}

/// What to print.
#[derive(Clone, Copy, Debug)]
pub struct Asked<'a> {
    pub service: Option<&'a Which>,
    pub places: Places<'a>,
    /// Only what is wrong.
    pub problems: bool,
}

/// What is served, and what is not.
#[derive(Debug, Default, Serialize)]
pub struct Shown {
    objects: Vec<ShownObject>,
    problems: Vec<Problem>,
    conditions: Vec<Condition>,
}

#[derive(Debug, PartialEq, Serialize)]
struct ShownObject {
    /// `kind namespace/name`; empty where no agent knows it.
    object: String,
    frontends: Vec<ShownFrontend>,
}

#[derive(Debug, PartialEq, Serialize)]
struct ShownFrontend {
    at: String,
    clients: Clients,
    /// Endpoints that get new connections.
    endpoints: usize,
    /// Where the tables could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    backends: Option<Vec<ShownBackend>>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
struct ShownBackend {
    at: SocketAddr,
    state: &'static str,
    /// On this node.
    local: bool,
    /// Of new connections, from 0 to 1.
    share: f64,
    /// Flows that go there now, half-open ones left out; `None`: they could not be read.
    flows: Option<usize>,
}

/// Prints the Services of an agent and its tables, or only what is wrong with them.
pub fn run(asked: &Asked<'_>, output: Listing) -> anyhow::Result<()> {
    let Places { socket, .. } = asked.places;
    let format = if output == Listing::Json {
        Output::Json
    } else {
        Output::Table
    };
    if asked.problems {
        let served = ask::value(socket, "/services").map_err(|error| {
            let way_out = "without --problems, what the tables serve is shown";
            alone::only_an_agent(&error, "problems", way_out)
        })?;
        let mut shown = Shown::of_agent(served, None);
        if let Some(service) = asked.service {
            shown.narrow(service, asked.places)?;
        }
        return format.print(&shown.problems, |problems| of_problems(problems));
    }
    let mut shown = answer(asked, output, ask::WITHIN)?.noted();
    if let Some(service) = asked.service {
        shown.narrow(service, asked.places)?;
    }
    let is_wide = output == Listing::Wide;
    format.print(&shown, |shown| render(shown, is_wide))
}

/// All that an agent serves, or that its tables do; with as much of endpoints as `output` shows. `within`: how long the agent may be
/// silent.
pub fn answer(asked: &Asked<'_>, output: Listing, within: Duration) -> anyhow::Result<Said<Shown>> {
    let Places { bpffs, socket } = asked.places;
    let of_agent = ask::value_within(socket, "/services", within);
    match of_agent {
        Ok(served) => {
            let tables = match output {
                Listing::Table => None,
                // Who may only ask the agent gets what it says.
                Listing::Json => Tables::read(bpffs, true).ok(),
                Listing::Wide => Some(Tables::read(bpffs, true)?),
            };
            Ok(Said::by_agent(Shown::of_agent(served, tables.as_ref())))
        }
        Err(error) if matches!(asked.service, Some(Which::Named(_))) => {
            let way_out = "without a name, all that the tables serve is shown; `-o wide` has the endpoints";
            Err(alone::only_an_agent(&error, "names", way_out))
        }
        Err(error) => {
            let with_flows = output != Listing::Table;
            let tables = alone::instead(error, || Tables::read(bpffs, with_flows))?;
            Ok(tables.map(|tables| Shown::of_tables(&tables)))
        }
    }
}

/// What the pinned tables hold.
pub(super) struct Tables {
    pub frontends: Vec<TableFrontend>,
    /// `None`: they could not be read, or nobody asked for them.
    pub flows: Option<Vec<Flow>>,
}

/// Flows by protocol and backend, half-open ones left out.
pub(super) type FlowsOf<'a> = HashMap<(u8, SocketAddr), Vec<&'a Flow>>;

/// Whether a flow began at a frontend.
pub(super) fn began_at(flow: &Flow, at: &FrontendAddr) -> bool {
    let FrontendAddr { addr, port, proto } = *at;
    flow.proto == proto.number()
        && flow.asked.port() == port
        && flow.asked.is_ipv4() == addr.is_ipv4()
        && (addr.is_unspecified() || flow.asked.ip() == addr)
}

/// What is said of a Service of which nothing is served and nothing is refused: why, where the agent knows it.
pub(super) fn unknown(socket: &Path, service: &str) -> String {
    let why: anyhow::Result<Option<String>> = ask::value(socket, &format!("/unserved?service={service}"));
    // An agent that is older does not say.
    why.ok().flatten().unwrap_or_else(|| {
        format!(
            "no Service {service} is served here, and none is refused: `kubectl get service` says whether there is one"
        )
    })
}

impl Tables {
    fn read(bpffs: &Path, with_flows: bool) -> anyhow::Result<Self> {
        let pins = pinned(bpffs)?;
        let store = BpfStore::open(&pins)?;
        if with_flows {
            return Self::of(&pins, &store);
        }
        Ok(Self {
            frontends: frontends(&store)?,
            flows: None,
        })
    }

    /// Flows are left out where their tables cannot be read, which is said on stderr.
    pub fn of(pins: &Pins, store: &BpfStore) -> anyhow::Result<Self> {
        let flows = flows::read(pins)
            .inspect_err(|error| note(format_args!("no flows: failed to read their tables: {error}")));
        Ok(Self {
            frontends: frontends(store)?,
            flows: flows.ok(),
        })
    }

    /// `None`: flows could not be read.
    pub fn flows_of_backends(&self) -> Option<FlowsOf<'_>> {
        let mut of_backend = FlowsOf::new();
        let flows = self.flows.as_ref()?;
        for flow in flows.iter().filter(|flow| flow.state != FlowState::HalfOpen) {
            of_backend
                .entry((flow.proto, flow.backend))
                .or_default()
                .push(flow);
        }
        Some(of_backend)
    }

    /// Frontends in words, with the same key as the agent's.
    fn shown(&self) -> Vec<((String, bool), Vec<ShownBackend>)> {
        let of_backend = self.flows_of_backends();
        let shown = self.frontends.iter().map(|frontend| {
            let proto = frontend.at.proto.number();
            let is_here = |flow: &&&Flow| began_at(flow, &frontend.at);
            let backends = frontend.backends.iter().map(|backend| ShownBackend {
                at: backend.addr,
                state: backend.state(),
                local: backend.local,
                share: backend.share(),
                flows: of_backend.as_ref().map(|flows| {
                    let there = flows.get(&(proto, backend.addr)).into_iter().flatten();
                    there.filter(is_here).count()
                }),
            });
            ((served::at(&frontend.at), frontend.external), backends.collect())
        });
        shown.collect()
    }
}

fn frontends(store: &BpfStore) -> anyhow::Result<Vec<TableFrontend>> {
    read(store).context("failed to read the pinned tables")
}

impl Shown {
    fn of_agent(served: Served, tables: Option<&Tables>) -> Self {
        let backends: Option<HashMap<_, _>> = tables.map(|tables| tables.shown().into_iter().collect());
        let objects = served.objects.into_iter().map(|object| ShownObject {
            object: object.object,
            frontends: object
                .frontends
                .into_iter()
                .map(|frontend| {
                    let key = (frontend.at.clone(), frontend.clients == Clients::External);
                    ShownFrontend {
                        at: frontend.at,
                        clients: frontend.clients,
                        endpoints: frontend.endpoints,
                        // What is not there yet, or has no room, leads nowhere.
                        backends: backends
                            .as_ref()
                            .map(|backends| backends.get(&key).cloned().unwrap_or_default()),
                    }
                })
                .collect(),
        });
        Self {
            objects: objects.collect(),
            problems: served.problems,
            conditions: served.conditions,
        }
    }

    fn of_tables(tables: &Tables) -> Self {
        let mut frontends: Vec<ShownFrontend> = Vec::new();
        for ((at, external), backends) in tables.shown() {
            // Those of clients inside come first.
            if let Some(same) = frontends.last_mut()
                && external
                && same.at == at
                && same.backends.as_deref() == Some(&backends)
            {
                same.clients = Clients::All;
                continue;
            }
            frontends.push(ShownFrontend {
                at,
                clients: if external {
                    Clients::External
                } else {
                    Clients::Internal
                },
                endpoints: backends.iter().filter(|backend| backend.share > 0.0).count(),
                backends: Some(backends),
            });
        }
        Self {
            objects: vec![ShownObject {
                object: String::new(),
                frontends,
            }],
            ..Self::default()
        }
    }

    /// Leaves what is about one Service.
    fn narrow(&mut self, service: &Which, places: Places<'_>) -> anyhow::Result<()> {
        let Places { bpffs, socket } = places;
        match service {
            Which::At(addr) => self.narrow_to(*addr, node_ports_answer(bpffs, *addr)),
            Which::Named(service) => {
                anyhow::ensure!(self.is_narrowed(service), "{}", unknown(socket, service));
                Ok(())
            }
        }
    }

    /// Leaves what is about one Service; whether anything is.
    fn is_narrowed(&mut self, service: &str) -> bool {
        let object = format!("Service {service}");
        self.objects.retain(|one| one.object == object);
        self.problems.retain(|one| one.object == object);
        !self.objects.is_empty() || !self.problems.is_empty()
    }

    /// Leaves what leads from one address.
    fn narrow_to(&mut self, addr: IpAddr, node_ports: bool) -> anyhow::Result<()> {
        for object in &mut self.objects {
            let is_there = |frontend: &ShownFrontend| served::is_at(&frontend.at, addr, node_ports);
            object.frontends.retain(is_there);
        }
        self.objects.retain(|object| !object.frontends.is_empty());
        let of_these = |problem: &Problem| self.objects.iter().any(|one| one.object == problem.object);
        self.problems.retain(of_these);
        anyhow::ensure!(!self.objects.is_empty(), "no Service has {addr} here");
        Ok(())
    }
}

/// Whether node ports answer at an address of this node; false where its table cannot be read.
pub(super) fn node_ports_answer(bpffs: &Path, addr: IpAddr) -> bool {
    let read =
        || -> anyhow::Result<Vec<(IpAddr, u32)>> { Ok(BpfStore::open(&pinned(bpffs)?)?.own_addresses()?) };
    let mut own = read().unwrap_or_default().into_iter();
    own.any(|(own, flags)| own == addr && flags & own_flags::NODE_PORT != 0)
}

fn of_problems(problems: &[Problem]) -> String {
    let problems = output::problems(problems, "NOT SERVED BECAUSE");
    problems.trim_start_matches('\n').to_owned()
}

fn render(shown: &Shown, is_wide: bool) -> String {
    let problems = output::problems(&shown.problems, "NOT SERVED BECAUSE");
    let rows = shown.objects.iter().flat_map(|object| {
        object
            .frontends
            .iter()
            .flat_map(|frontend| rows(&object.object, frontend, is_wide))
    });
    let header = ["OBJECT", "AT", "CLIENTS", "ENDPOINTS", "STATE", "SHARE", "FLOWS"];
    let header = if is_wide { &header[..] } else { &header[..4] };
    let services = table(header, rows);
    format!("{}{problems}", services.trim_start_matches('\n'))
}

/// The line of a frontend, and in wide lists one for each backend below it.
fn rows(object: &str, frontend: &ShownFrontend, is_wide: bool) -> Vec<Vec<String>> {
    let mut rows = vec![vec![
        object.to_owned(),
        frontend.at.clone(),
        frontend.clients.as_str().to_owned(),
        frontend.endpoints.to_string(),
    ]];
    let backends = frontend.backends.iter().flatten().filter(|_| is_wide);
    rows.extend(backends.map(|backend| {
        vec![
            String::new(),
            String::new(),
            if backend.local { "here" } else { "" }.to_owned(),
            backend.at.to_string(),
            backend.state.to_owned(),
            percent(backend.share),
            number(backend.flows),
        ]
    }));
    rows
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        served::{ServedFrontend, ServedObject},
        store::served::TableBackend,
    };

    fn served() -> Served {
        Served {
            objects: vec![ServedObject {
                object: "Service ns/a".to_owned(),
                frontends: ["10.96.0.1:80/TCP", "node port 30080/TCP (IPv4)"]
                    .map(|at| ServedFrontend {
                        at: at.to_owned(),
                        clients: Clients::All,
                        endpoints: 2,
                    })
                    .into(),
            }],
            problems: vec![Problem {
                object: "Service ns/b".to_owned(),
                field: "spec.clusterIP".to_owned(),
                reason: "missing".to_owned(),
                cause: crate::model::Cause::Invalid,
                file: None,
            }],
            conditions: Vec::new(),
        }
    }

    fn tables() -> Tables {
        let backend = |last: u8, slots| TableBackend {
            addr: SocketAddr::from(([10, 244, 1, last], 8080)),
            state: 1,
            local: last == 1,
            slots,
            of: 4,
            id: u32::from(last),
        };
        let frontend = |external| TableFrontend {
            at: FrontendAddr {
                addr: [10, 96, 0, 1].into(),
                port: 80,
                proto: crate::model::Protocol::Tcp,
            },
            external,
            backends: vec![backend(1, 1), backend(2, 3)],
            owner: 7,
            service: 3,
        };
        let flow = |last: u8, state| Flow {
            proto: 6,
            client: "10.244.1.9:4000".parse().unwrap(),
            asked: "10.96.0.1:80".parse().unwrap(),
            backend: SocketAddr::from(([10, 244, 1, last], 8080)),
            seen_as: None,
            state,
            idle: Duration::ZERO,
        };
        Tables {
            frontends: vec![frontend(false), frontend(true)],
            flows: Some(vec![
                flow(2, FlowState::Established),
                flow(2, FlowState::HalfOpen),
            ]),
        }
    }

    #[test]
    fn problems_stand_alone_or_below_the_services() {
        let problems = of_problems(&served().problems);
        assert!(problems.starts_with(" OBJECT"), "{problems}");
        assert!(problems.contains("Service ns/b"), "{problems}");
        assert!(!problems.contains("10.96.0.1"), "{problems}");
        let all = render(&Shown::of_agent(served(), None), false);
        assert!(all.starts_with(" OBJECT"), "{all}");
        assert!(all.contains("10.96.0.1:80/TCP"), "{all}");
        assert!(all.contains("missing"), "{all}");
        assert!(!all.contains("SHARE"), "{all}");
    }

    #[test]
    fn endpoints_come_from_the_tables_with_their_shares_and_flows() {
        let shown = Shown::of_agent(served(), Some(&tables()));
        let text = render(&shown, true);
        let words = |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
        let lines: Vec<Vec<String>> = text.lines().map(words).collect();
        assert!(
            lines.contains(&words("here 10.244.1.1:8080 active 25.0 % 0")),
            "{text}"
        );
        assert!(
            lines.contains(&words("10.244.1.2:8080 active 75.0 % 1")),
            "{text}"
        );
        // And the same without an agent.
        let alone = Shown::of_tables(&tables());
        assert_eq!(alone.objects[0].frontends[..], shown.objects[0].frontends[..1]);
        let without_flows = Shown::of_tables(&Tables {
            flows: None,
            ..tables()
        });
        let backends = without_flows.objects[0].frontends[0].backends.as_ref().unwrap();
        assert!(backends.iter().all(|backend| backend.flows.is_none()));
    }

    #[test]
    fn one_service_alone_is_shown() {
        let narrowed = |service: &str| {
            let mut shown = Shown::of_agent(served(), None);
            let is_own = |addr: IpAddr| addr == IpAddr::from([192, 0, 2, 11]);
            let is_there = match service.parse().unwrap() {
                Which::Named(service) => shown.is_narrowed(&service),
                Which::At(addr) => shown.narrow_to(addr, is_own(addr)).is_ok(),
            };
            is_there.then_some((shown.objects.len(), shown.problems.len()))
        };
        assert_eq!(narrowed("ns/a"), Some((1, 0)));
        assert_eq!(narrowed("svc/ns/a"), Some((1, 0)));
        assert_eq!(narrowed("10.96.0.1"), Some((1, 0)));
        assert_eq!(narrowed("10.96.0.11").or(narrowed("192.0.2.12")), None);
        assert_eq!(narrowed("192.0.2.11"), Some((1, 0)), "a node port");
        assert_eq!(narrowed("fd00::1"), None);
        assert_eq!(narrowed("ns/b"), Some((0, 1)));
        assert_eq!(narrowed("ns/c"), None);
        for wrong in ["", "shop", "shop/", "/web", "a/b/c"] {
            assert!(wrong.parse::<Which>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn without_a_word_of_the_agent_whether_there_is_a_service_others_know() {
        let said = unknown(Path::new("/nonexistent/agent.sock"), "ns/c");
        assert!(said.starts_with("no Service ns/c is served here"), "{said}");
    }
}
