//! `explain`: what policies say of a flow, by the tables and a running agent's names, by the tables alone, or by a folder of manifests.

use std::{fmt::Write as _, path::Path, process::ExitCode, time::Duration};

use anyhow::{Context, bail, ensure};

use super::{
    alone::{self, Places},
    ask,
    output::{Output, print},
    pinned,
};
use crate::{
    attach::inspect,
    bpf::{constants, links::Links, pins::Pins, world::World},
    explain::{
        Answered, End, Explained, Place, SoFar, Verdict, Way, explain,
        tables::{Here, Query},
        unnamed::Unnamed,
    },
    model::{Index, Kind, Rejected},
    netlink::tables::device_names,
    source::{Change, manifests::Folder},
    store::traffic::TrafficTables,
};

/// A table of many endpoints takes the agent a moment.
const WITHIN: Duration = Duration::from_mins(1);

/// The exit status where nothing is denied, and of a flow nothing is decided here. 2 is that of a wrong command line.
const NOT_DECIDED_HERE: u8 = 3;

/// Prints the answer; the exit status tells it too, so that a script can ask.
pub fn run(
    manifests: Option<&Path>,
    places: Places<'_>,
    query: &Query,
    output: Output,
) -> anyhow::Result<ExitCode> {
    let (explained, problems) = match manifests {
        Some(folder) => by_manifests(folder, query)?,
        None => (by_tables(places, query)?, Vec::new()),
    };
    let text = match output {
        Output::Json => {
            let answer = serde_json::json!({"flows": explained, "problems": problems});
            serde_json::to_string_pretty(&answer)? + "\n"
        }
        Output::Table => render(&explained, &problems),
    };
    print(&text)?;
    Ok(exit_code(&explained))
}

/// As the command line's help has it.
fn exit_code(explained: &[Explained]) -> ExitCode {
    if explained.iter().any(|flow| !flow.allowed) {
        return ExitCode::FAILURE;
    }
    let mut verdicts = explained.iter().map(|flow| flow.verdict);
    if verdicts.any(|verdict| verdict == Verdict::NotDecidedHere) {
        return ExitCode::from(NOT_DECIDED_HERE);
    }
    ExitCode::SUCCESS
}

/// What the tables of an agent say, with the names that it knows.
fn by_tables(places: Places<'_>, query: &Query) -> anyhow::Result<Vec<Explained>> {
    let Query {
        from,
        to,
        port,
        source_port,
    } = query;
    let mut path = format!("/explain?from={from}&to={to}&port={port}");
    if let Some(source_port) = source_port {
        let _infallible = write!(path, "&source_port={source_port}");
    }
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "/?=&_.:-".contains(character);
    ensure!(path.chars().all(is_plain), "no object is called so: {from}, {to}");
    let answered = match ask::value_within(places.socket, &path, WITHIN) {
        Ok(answered) => answered,
        Err(error) => {
            let is_addr = |end: &End| matches!(end, End::Addr(_));
            if !is_addr(from) || !is_addr(to) {
                let way_out = "give addresses, or a folder with --manifests";
                return Err(alone::only_an_agent(&error, "names", way_out));
            }
            return Ok(alone::instead(error, || by_tables_alone(places.bpffs, query))?.noted());
        }
    };
    let Answered { flows, error } = answered;
    match error {
        Some(error) => anyhow::bail!(error),
        None => Ok(flows),
    }
}

/// What the pinned tables say.
fn by_tables_alone(bpffs: &Path, query: &Query) -> anyhow::Result<Vec<Explained>> {
    let pins = pinned(bpffs)?;
    let constants = constants::of_programs(programs(&pins))?;
    let here = Here {
        world: World::open(&pins, constants).context("failed to open the pinned tables")?,
        index: &Index::new(""),
        known: &Unnamed,
        traffic: TrafficTables::open(&pins)
            .context("failed to open the tables of what goes over backends")?,
        devices: device_names().context("failed to list the devices")?,
    };
    Ok(here.explain(query)?)
}

/// The ids of the programs that are attached.
fn programs(pins: &Pins) -> Vec<u32> {
    let links = Links::new(pins);
    let of_links = pins.list_links().unwrap_or_default().into_iter();
    let of_links: Vec<u32> = of_links.filter_map(|link| links.program_id(link)).collect();
    if !of_links.is_empty() {
        return of_links;
    }
    // Before 6.6 those of TC are filters.
    let attached = inspect::attachments(pins.bpffs(), None).unwrap_or_default();
    let ours = attached.iter().filter(|one| one.ours);
    ours.map(|one| one.program_id).collect()
}

/// What the policies in a folder say, and what of them cannot be honoured.
fn by_manifests(folder: &Path, query: &Query) -> anyhow::Result<(Vec<Explained>, Vec<String>)> {
    let mut source = Folder::new(folder.to_owned());
    let batch = source.scan(true);
    if !source.is_readable() {
        let why = batch.rejected.iter().map(ToString::to_string);
        bail!(why.collect::<Vec<_>>().join("; "));
    }
    let mut index = Index::new("");
    for change in batch.changes {
        if let Change::Apply { object, .. } = change {
            index.apply(object);
        }
    }
    let explained = explain(&index, &query.from, &query.to, query.port)?;
    let about_policies = |one: &&Rejected| {
        let kind = one.object.split(' ').next().and_then(Kind::parse);
        kind.is_none_or(Kind::is_policy)
    };
    let problems = batch.rejected.iter().filter(about_policies);
    Ok((explained, problems.map(ToString::to_string).collect()))
}

fn render(explained: &[Explained], problems: &[String]) -> String {
    let mut text = String::new();
    let verdict = |allowed| if allowed { "allowed" } else { "denied" };
    for flow in explained {
        let (from, to) = (describe(&flow.from), describe(&flow.to));
        let service = flow
            .service
            .as_ref()
            .map_or_else(String::new, |service| format!(" of Service {service}"));
        let _infallible = writeln!(
            text,
            "{from} -> {to}{service}, {}: {}",
            flow.port,
            flow.headline()
        );
        for note in &flow.notes {
            let _infallible = writeln!(text, "  {note}");
        }
        if let Some(share) = flow.share {
            let percent = f64::from(share.slots) * 100.0 / f64::from(share.of.max(1));
            let port = flow
                .source_port
                .map_or_else(String::new, |port| format!(", as from port {port}"));
            let _infallible = writeln!(text, "  gets {percent:.1} % of new flows{port}");
        }
        for line in of_the_way(flow) {
            let _infallible = writeln!(text, "  {line}");
        }
        if flow.steps.is_empty() && flow.elsewhere.is_empty() {
            text.push_str("  neither end is a Pod of this cluster: no policy is about them\n");
        }
        for step in &flow.steps {
            let at = describe(&step.at);
            let _infallible = writeln!(text, "  {} of {at}: {}", step.direction, verdict(step.allowed));
            let _infallible = writeln!(text, "    {}", step.reason);
            if let Some(dry_run) = &step.dry_run {
                let _infallible = writeln!(text, "    without dry run {dry_run}");
            }
            if !step.selected_by.is_empty() {
                let _infallible = writeln!(text, "    selected by {}", step.selected_by.join(", "));
            }
        }
        for elsewhere in &flow.elsewhere {
            let _infallible = writeln!(text, "  {}", elsewhere.reason);
        }
        text.push('\n');
    }
    for problem in problems {
        let _infallible = writeln!(text, "{problem}");
    }
    text
}

/// What becomes of the packet, by which device it leaves, and what has come of others.
fn of_the_way(flow: &Explained) -> Vec<String> {
    let mut lines = Vec::new();
    if let Some(becomes) = flow.becomes {
        lines.push(format!(
            "is led to {}, which sees it come from {}",
            becomes.to, becomes.from
        ));
    }
    lines.extend(flow.ways.iter().map(of_way));
    if let Some(so_far) = flow.so_far.filter(|so_far| so_far.refused > 0) {
        let SoFar { connections, refused } = so_far;
        lines.push(format!(
            "refused {refused} of {connections} connections from here: nothing listens at {}",
            flow.port
        ));
    }
    lines
}

fn of_way(way: &Way) -> String {
    let Way {
        to,
        node,
        device,
        mtu,
        forwarded_mtu,
        next_hop,
        neighbour,
        is_silent,
    } = way;
    let to = match node {
        Some(node) => format!("its node {node} ({to})"),
        None => to.to_string(),
    };
    let Some(device) = device else {
        return format!("no route leads to {to}");
    };
    let hop = match next_hop {
        Some(hop) => format!(", next hop {hop}"),
        None => String::new(),
    };
    let known = neighbour
        .as_ref()
        .map_or_else(String::new, |known| format!(" (neighbour {known})"));
    let silent = if *is_silent {
        ", which does not answer: it is down, or the link is"
    } else {
        ""
    };
    let mtu = mtu.map_or_else(String::new, |mtu| format!(" with MTU {mtu}"));
    let unlocked = forwarded_mtu.map_or_else(String::new, |mtu| {
        format!("; packets of clients outside are held to {mtu}, that of the device: the route does not say `mtu lock`")
    });
    format!("{to} is reached by {device}{mtu}{hop}{known}{silent}{unlocked}")
}

fn describe(place: &Place) -> String {
    match &place.pod {
        Some(pod) => format!("{pod} ({})", place.ip),
        None => place.ip.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A flow between Pods of which this node decides so much.
    fn flow(steps: &[(&str, bool)], elsewhere: &[&str]) -> Explained {
        let place = json!({"ip": "10.244.1.10", "pod": "shop/web"});
        let step = |(direction, allowed): &(&str, bool)| json!({"direction": direction, "at": place, "allowed": allowed, "reason": "a rule", "selected_by": []});
        let other = |direction: &&str| json!({"direction": direction, "node": "node2", "reason": "there"});
        let mut flow: Explained = serde_json::from_value(json!({
            "from": place, "to": place, "port": "80/TCP",
            "allowed": steps.iter().all(|(_, allowed)| *allowed),
            "steps": steps.iter().map(step).collect::<Vec<_>>(),
            "elsewhere": elsewhere.iter().map(other).collect::<Vec<_>>(),
        }))
        .unwrap();
        flow.verdict = Verdict::of(&flow);
        flow
    }

    #[test]
    fn a_routes_mtu_that_counts_for_some_is_said_to_be_so() {
        let said = |forwarded: Option<u32>| {
            let way = json!({"to": "10.244.2.21", "device": "eth0", "mtu": 1300, "forwarded_mtu": forwarded});
            of_way(&serde_json::from_value(way).unwrap())
        };
        let plain = "10.244.2.21 is reached by eth0 with MTU 1300";
        assert_eq!(said(None), plain);
        assert_eq!(
            said(Some(1500)),
            format!(
                "{plain}; packets of clients outside are held to 1500, that of the device: the route does not say `mtu lock`"
            )
        );
    }

    #[test]
    fn what_another_node_decides_is_not_called_allowed() {
        let both = ["egress", "ingress"];
        for (flow, head, code) in [
            (flow(&[(both[0], true), (both[1], true)], &[]), "allowed", 0),
            (
                flow(&[(both[0], true)], &both[1..]),
                "allowed here; node2 decides ingress",
                0,
            ),
            (flow(&[(both[0], false)], &both[1..]), "denied", 1),
            (flow(&[], &both), "not decided here", 3),
            (flow(&[], &[]), "allowed", 0),
        ] {
            let text = render(std::slice::from_ref(&flow), &[]);
            let first = text.lines().next().unwrap();
            assert!(first.ends_with(&format!(", 80/TCP: {head}")), "{text}");
            assert_eq!(
                format!("{:?}", exit_code(&[flow])),
                format!("{:?}", ExitCode::from(code)),
                "{text}"
            );
        }
    }
}
