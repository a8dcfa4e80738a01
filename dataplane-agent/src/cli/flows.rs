//! `flows`: connections through Services, and those that policies have allowed, as the pinned tables have them, with the names that a
//! running agent knows.

use std::{
    net::{IpAddr, SocketAddr},
    path::Path,
    thread,
    time::Duration,
};

use anyhow::Context;
use ipnet::IpNet;
use serde::Serialize;

use super::{
    alone::{self, Places, Said},
    ask,
    names::{Names, SERVICE},
    output::{Output, clear_screen, table},
    pinned,
};
use crate::{
    explain::{End, Port},
    store::flows::{self, Flow, FlowState},
    sync::encode,
};

/// Which flows to show.
#[derive(Debug, Default, clap::Args)]
pub struct Filter {
    /// From this client: namespace/pod, an address or a range of them.
    #[arg(long)]
    pub from: Option<Who>,
    /// To this Service (svc/namespace/service), endpoint (namespace/pod), address or range of them.
    #[arg(long)]
    pub to: Option<Who>,
    /// The port that the client asked for, or the endpoint's, such as 80/TCP.
    #[arg(long)]
    pub port: Option<Port>,
    #[arg(long, value_enum)]
    pub state: Option<FlowState>,
    /// No more than these, the most recently used first; 0: all.
    #[arg(long, default_value = "100")]
    pub limit: usize,
    /// Show them anew every two seconds, until it is interrupted.
    #[arg(long, short)]
    pub watch: bool,
}

/// Between two looks of `--watch`.
const AGAIN: Duration = Duration::from_secs(2);

/// A name or addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// `namespace/pod` or `svc/namespace/service`.
    Named(String),
    Within(IpNet),
}

impl std::str::FromStr for Who {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(range) = text.parse() {
            return Ok(Self::Within(range));
        }
        // An address with a length that is none would be taken for a name.
        let is_range = text
            .split_once('/')
            .is_some_and(|(addr, _)| addr.parse::<IpAddr>().is_ok());
        match text.parse() {
            Ok(End::Addr(addr)) => Ok(Self::Within(addr.into())),
            Ok(named) if !is_range => Ok(Self::Named(named.to_string())),
            Err(error) if text.parse::<SocketAddr>().is_ok() => Err(error),
            _ => Err(format!(
                "`{text}` is neither namespace/pod, svc/namespace/service, an address nor a range of addresses"
            )),
        }
    }
}

impl Who {
    /// That packets come from there.
    pub fn check_sender(&self) -> anyhow::Result<()> {
        match self {
            Self::Named(name) if name.starts_with(SERVICE) => anyhow::bail!(
                "nothing comes from {name}: what goes to it comes from its clients, and its answers from its endpoints, see --to"
            ),
            _ => Ok(()),
        }
    }

    fn name(&self) -> Option<&str> {
        match self {
            Self::Named(name) => Some(name),
            Self::Within(_) => None,
        }
    }
}

/// The names that are asked for.
pub fn named<'a>(asked: impl IntoIterator<Item = &'a Option<Who>>) -> impl Iterator<Item = &'a str> {
    asked.into_iter().flatten().filter_map(Who::name)
}

/// One flow as it is shown.
#[derive(Debug, Serialize)]
pub struct Shown {
    protocol: &'static str,
    from: SocketAddr,
    from_pod: Option<String>,
    to: SocketAddr,
    /// `svc/namespace/service`, or what else has the address.
    service: Option<String>,
    endpoint: SocketAddr,
    endpoint_pod: Option<String>,
    /// What the endpoint sees in place of the client's address.
    seen_as: Option<SocketAddr>,
    state: FlowState,
    idle_seconds: u64,
}

/// Prints the flows of the tables that `filter` lets through.
pub fn run(places: Places<'_>, filter: &Filter, output: Output) -> anyhow::Result<()> {
    if let Some(from) = &filter.from {
        from.check_sender()?;
    }
    loop {
        if filter.watch && output == Output::Table {
            clear_screen()?;
        }
        print_once(places, filter, output)?;
        if !filter.watch {
            return Ok(());
        }
        thread::sleep(AGAIN);
    }
}

fn print_once(places: Places<'_>, filter: &Filter, output: Output) -> anyhow::Result<()> {
    let Places { bpffs, socket } = places;
    let pins = pinned(bpffs)?;
    let mut flows = flows::read_all(&pins).context("failed to read the tables of flows")?;
    flows.retain(|flow| filter.lets_through(flow));
    let by_name = named([&filter.from, &filter.to]).next().is_some();
    let mut names = Names::default();
    let asked = if by_name {
        learn(&mut names, socket, &flows, ask::WITHIN)
    } else {
        Ok(())
    };
    asked.context("names are known to a running agent alone; filter by addresses without one")?;
    if by_name {
        names.note_unknown(socket, named([&filter.from, &filter.to]));
    }
    let mut shown: Vec<Shown> = flows.iter().map(|flow| Shown::of(flow, &names)).collect();
    shown.retain(|shown| filter.lets_named_through(shown));
    let found = shown.len();
    if filter.limit > 0 {
        shown.truncate(filter.limit);
    }
    if !by_name {
        flows.truncate(shown.len());
        match learn(&mut names, socket, &flows, ask::WITHIN) {
            Ok(()) => shown = flows.iter().map(|flow| Shown::of(flow, &names)).collect(),
            Err(error) => alone::unnamed(&error),
        }
    }
    output.print_or_note(&shown, |shown| render(shown, found), "there is no such flow now")
}

/// Asks an agent for the names of what is in these flows, each time `within`.
fn learn(names: &mut Names, socket: &Path, flows: &[Flow], within: Duration) -> anyhow::Result<()> {
    names.learn_services(socket, within)?;
    let ends = flows
        .iter()
        .flat_map(|flow| [flow.client.ip(), flow.backend.ip()]);
    names.learn_pods(socket, ends, within)
}

/// Flows that were used most recently.
#[derive(Debug, Serialize)]
pub struct Latest {
    flows: Vec<Shown>,
    /// How many there are in all.
    found: usize,
}

/// `limit` flows of the tables, with names if the agent tells any, each time `within`.
pub fn latest(places: Places<'_>, limit: usize, within: Duration) -> anyhow::Result<Said<Latest>> {
    let Places { bpffs, socket } = places;
    let mut flows = flows::read_all(&pinned(bpffs)?).context("failed to read the tables of flows")?;
    let found = flows.len();
    flows.truncate(limit);
    let mut names = Names::default();
    // Addresses have to do where it tells none.
    let alone = learn(&mut names, socket, &flows, within).err();
    let flows = flows.iter().map(|flow| Shown::of(flow, &names)).collect();
    Ok(Said {
        value: Latest { flows, found },
        alone,
    })
}

impl Filter {
    fn lets_through(&self, flow: &Flow) -> bool {
        let is = |who: &Option<Who>, addrs: &[SocketAddr]| match who {
            Some(Who::Within(range)) => addrs.iter().any(|addr| range.contains(&addr.ip())),
            _ => true,
        };
        let of_port = |port: Port| {
            port.proto.is_some_and(|proto| proto.number() == flow.proto)
                && [flow.asked.port(), flow.backend.port()].contains(&port.number)
        };
        is(&self.from, &[flow.client])
            && is(&self.to, &[flow.asked, flow.backend])
            && self.port.is_none_or(of_port)
            && self.state.is_none_or(|state| state == flow.state)
    }

    fn lets_named_through(&self, shown: &Shown) -> bool {
        let is = |who: &Option<Who>, names: &[&Option<String>]| match who {
            Some(Who::Named(name)) => names.iter().any(|known| known.as_ref() == Some(name)),
            _ => true,
        };
        is(&self.from, &[&shown.from_pod]) && is(&self.to, &[&shown.service, &shown.endpoint_pod])
    }
}

impl Shown {
    fn of(flow: &Flow, names: &Names) -> Self {
        let pod = |addr: SocketAddr| names.pod(addr.ip()).cloned();
        Self {
            protocol: encode::protocol_name(flow.proto).unwrap_or("other"),
            from: flow.client,
            from_pod: pod(flow.client),
            to: flow.asked,
            service: names.service(flow.proto, flow.asked).cloned(),
            endpoint: flow.backend,
            endpoint_pod: pod(flow.backend),
            seen_as: flow.seen_as,
            state: flow.state,
            idle_seconds: flow.idle.as_secs(),
        }
    }
}

fn render(shown: &[Shown], found: usize) -> String {
    let named = |addr: SocketAddr, name: &Option<String>| match name {
        Some(name) => format!("{name} ({addr})"),
        None => addr.to_string(),
    };
    let rows = shown.iter().map(|one| {
        vec![
            one.protocol.to_owned(),
            named(one.from, &one.from_pod),
            named(one.to, &one.service),
            named(one.endpoint, &one.endpoint_pod),
            one.seen_as.map_or_else(String::new, |addr| addr.to_string()),
            one.state.as_str().to_owned(),
            format!("{} s", one.idle_seconds),
        ]
    });
    let rows = table(
        &["PROTOCOL", "FROM", "TO", "ENDPOINT", "SEEN AS", "STATE", "IDLE"],
        rows,
    );
    let rows = rows.trim_start_matches('\n');
    match found - shown.len() {
        0 => rows.to_owned(),
        more => format!("{rows}{more} more: --limit 0 shows all\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow() -> Flow {
        Flow {
            proto: 6,
            client: "10.244.1.5:41000".parse().unwrap(),
            asked: "192.0.2.11:30080".parse().unwrap(),
            backend: "10.244.2.6:8080".parse().unwrap(),
            seen_as: None,
            state: FlowState::Established,
            idle: Duration::from_secs(3),
        }
    }

    fn filter(of: impl FnOnce(&mut Filter)) -> Filter {
        let mut filter = Filter::default();
        of(&mut filter);
        filter
    }

    #[test]
    fn filters_are_about_either_end() {
        let who = |text: &str| Some(text.parse::<Who>().unwrap());
        for (is_shown, filter) in [
            (true, Filter::default()),
            (true, filter(|filter| filter.from = who("10.244.1.0/24"))),
            (false, filter(|filter| filter.from = who("10.244.2.6"))),
            (true, filter(|filter| filter.to = who("10.244.2.6"))),
            (true, filter(|filter| filter.to = who("192.0.2.11"))),
            (true, filter(|filter| filter.port = "8080/TCP".parse().ok())),
            (true, filter(|filter| filter.port = "30080".parse().ok())),
            (false, filter(|filter| filter.port = "8080/UDP".parse().ok())),
            (false, filter(|filter| filter.state = Some(FlowState::Closing))),
        ] {
            assert_eq!(filter.lets_through(&flow()), is_shown, "{filter:?}");
        }
        for wrong in ["", "a", "svc/a", "a/b/c", "10.0.0.0/99", "/a"] {
            let read = wrong.parse::<Who>();
            assert!(wrong == "svc/a" || read.is_err(), "{wrong}: {read:?}");
        }
    }

    #[test]
    fn names_stand_before_addresses() {
        let mut names = Names::default();
        names.name_pod("10.244.2.6".parse().unwrap(), "shop/db-0");
        names.name_service("node port 30080/TCP (IPv4)", "svc/shop/db");
        let text = render(&[Shown::of(&flow(), &names)], 3);
        assert!(text.contains("svc/shop/db (192.0.2.11:30080)"), "{text}");
        assert!(text.contains("shop/db-0 (10.244.2.6:8080)"), "{text}");
        assert!(text.ends_with("2 more: --limit 0 shows all\n"), "{text}");
        let by_name = |name: &str| filter(|filter| filter.to = Some(Who::Named(name.to_owned())));
        let shown = Shown::of(&flow(), &names);
        assert!(by_name("svc/shop/db").lets_named_through(&shown));
        assert!(by_name("shop/db-0").lets_named_through(&shown));
        assert!(!by_name("shop/web").lets_named_through(&shown));
    }
}
