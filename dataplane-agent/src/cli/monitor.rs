//! `monitor`: what happens to single packets, as it happens: drops, refusals, translations, and what policies have allowed where the agent
//! is told of that. It reads the pinned ring itself, so no agent has to run; one that does knows the names.

mod capture;
mod seen;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io::{self, Write},
    net::IpAddr,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use dataplane_common::{
    monitor::{Event, EventKind, OUTWARD},
    policy::NO_RULE_INDEX,
    reason::Reason,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    time,
};

pub use self::seen::Word;
use self::{
    capture::Capture,
    seen::{By, Seen},
};
use super::{
    alone::{self, Places},
    ask,
    flows::{Who, named},
    names::Names,
    output::{note, unprinted},
    pinned,
};
use crate::{
    attach::inspect,
    bpf::{events::Watch, pins::Pins},
    explain::Port,
    metrics::kernel_side::outcome,
    model::policy::Direction,
    netlink::tables::{device_name, device_names},
    told::{Told, ToldVerdict},
};

/// The hook at which a Pod's own packets are seen.
const FROM_POD: &str = "from_pod";
/// Between two looks at the ring.
const LOOK: Duration = Duration::from_millis(20);
/// Names and devices are asked for again after this time, and so is an agent that did not answer.
const NAMES_FOR: Duration = Duration::from_secs(10);
/// Between two words about what was missed.
const MISSED: Duration = Duration::from_secs(2);
/// Between two questions about verdicts.
const VERDICTS: Duration = Duration::from_millis(200);

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// A line each.
    Text,
    /// A JSON object a line.
    Json,
    /// The packets, for Wireshark: `monitor -o pcapng | wireshark -k -i -`.
    Pcapng,
}

/// What to show.
#[derive(Debug, Default, clap::Args)]
pub struct Filter {
    /// From this Pod (namespace/name), address or range of them.
    #[arg(long)]
    pub from: Option<Who>,
    /// To this Service (svc/namespace/name), Pod, address or range of them, before or behind the translation.
    #[arg(long)]
    pub to: Option<Who>,
    /// The port that the packet is for, before or behind the translation, such as 80/TCP.
    #[arg(long)]
    pub port: Option<Port>,
    /// What became of it; several.
    #[arg(long, value_enum)]
    pub verdict: Vec<Word>,
    /// Why, as in `dataplane_packets_total`; several.
    #[arg(long, value_parser = reason)]
    pub reason: Vec<Reason>,
    /// Stop after so many.
    #[arg(long)]
    pub count: Option<u64>,
    /// Stop after so many seconds.
    #[arg(long)]
    pub seconds: Option<u64>,
}

/// A reason by its label.
fn reason(text: &str) -> Result<Reason, String> {
    let found = Reason::ALL.iter().copied().find(|reason| reason.label() == text);
    found.ok_or_else(|| {
        let labels: Vec<&str> = Reason::ALL.iter().map(|reason| reason.label()).collect();
        format!("no reason is called so; there are {}", labels.join(", "))
    })
}

/// The words under which a reason is shown; none: it is counted alone.
fn words_of(reason: Reason) -> &'static [Word] {
    match reason {
        Reason::PolicyAllowed => &[Word::Allow],
        Reason::DryRunDenied => &[Word::WouldDeny],
        Reason::DryRunAllowed => &[Word::WouldAllow],
        reason => match outcome(reason).0 {
            "dropped" => &[Word::Drop],
            "refused" => &[Word::Refuse],
            "answered" => &[Word::TooBig],
            _ => &[],
        },
    }
}

impl Filter {
    /// That it lets through what may happen: a filter that nothing can pass looks like peace.
    fn check(&self) -> anyhow::Result<()> {
        if let Some(from) = &self.from {
            from.check_sender()?;
        }
        for reason in &self.reason {
            let (label, words) = (reason.label(), words_of(*reason));
            anyhow::ensure!(
                !words.is_empty(),
                "{label} is counted, see `status`, and no packet is shown for it"
            );
            let fits = self.verdict.is_empty() || words.iter().any(|word| self.verdict.contains(word));
            anyhow::ensure!(
                fits,
                "what is shown for {label} has the verdict {}",
                words
                    .iter()
                    .map(|word| word.as_str())
                    .collect::<Vec<_>>()
                    .join(" or ")
            );
        }
        Ok(())
    }

    fn named(&self) -> impl Iterator<Item = &str> {
        named([&self.from, &self.to])
    }

    fn lets_through(&self, seen: &Seen) -> bool {
        let is = |who: &Option<Who>, addrs: &[Option<IpAddr>], names: &[&Option<String>]| match who {
            None => true,
            Some(Who::Within(range)) => addrs.iter().flatten().any(|addr| range.contains(addr)),
            Some(Who::Named(name)) => names.iter().any(|known| known.as_ref() == Some(name)),
        };
        let of_port = |port: Port| {
            port.proto.is_some_and(|proto| proto.as_str() == seen.protocol)
                && [seen.port(), seen.endpoint.map(|at| at.port())].contains(&Some(port.number))
        };
        is(&self.from, &[seen.from], &[&seen.from_pod])
            && is(
                &self.to,
                &[seen.to, seen.endpoint.map(|at| at.ip())],
                &[&seen.to_pod, &seen.service, &seen.endpoint_pod],
            )
            && self.port.is_none_or(of_port)
            && (self.verdict.is_empty() || self.verdict.contains(&seen.verdict))
            && (self.reason.is_empty() || self.reason.iter().any(|reason| reason.label() == seen.reason))
    }
}

/// Prints what happens until it is told to stop, or has shown what was asked for.
pub fn run(places: Places<'_>, filter: &Filter, format: Format) -> anyhow::Result<()> {
    filter.check()?;
    let Places { bpffs, socket } = places;
    let pins = pinned(bpffs)?;
    let mut who = Known::new(socket, &pins);
    who.begin(filter)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("failed to start the runtime")?;
    runtime.block_on(async {
        // Before the kernel side is told, which it has to be again when this ends.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut monitor = Monitor {
            watch: Watch::begin(&pins)?,
            who,
            filter,
            out: Out::new(format)?,
            shown: 0,
            verdicts_after: None,
            asked: None,
            missed: (0, Instant::now()),
        };
        let until = filter
            .seconds
            .map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let outcome = loop {
            match monitor.look() {
                Ok(true) if until.is_none_or(|until| Instant::now() < until) => {}
                outcome => break outcome,
            }
            monitor.tell_missed(MISSED);
            tokio::select! {
                () = time::sleep(LOOK) => {}
                _ = terminate.recv() => break Ok(false),
                _ = interrupt.recv() => break Ok(false),
            }
        };
        monitor.tell_missed(Duration::ZERO);
        outcome.map(drop)
    })
}

struct Monitor<'a> {
    watch: Watch,
    who: Known<'a>,
    filter: &'a Filter,
    out: Out,
    shown: u64,
    /// The last verdict that the agent has told.
    verdicts_after: Option<u64>,
    asked: Option<Instant>,
    /// How many missed events were told, and when.
    missed: (u64, Instant),
}

impl Monitor<'_> {
    /// Shows what has happened since the last look; whether to look again.
    fn look(&mut self) -> anyhow::Result<bool> {
        let mut events = Vec::new();
        while let Some(event) = self.watch.take() {
            events.push(event);
        }
        self.watch.go_on();
        self.who.learn(&events);
        for event in &events {
            let mut seen = Seen::of(event, &self.who.names);
            if seen.hook == FROM_POD
                && let Some(sender) = self.who.pod_at(event.ifindex)
            {
                seen.sent_by(event, sender);
            }
            seen.device.clone_from(&self.who.device(event.ifindex));
            if event.reason == Reason::PolicyDenied as u32 && event.kind == EventKind::Dropped as u8 {
                seen.by = self.decided_by(event);
            }
            if !self.show(&seen, Some(event))? {
                return Ok(false);
            }
        }
        for told in self.allowed() {
            if !self.show(&Seen::of_verdict(told), None)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn show(&mut self, seen: &Seen, event: Option<&Event>) -> anyhow::Result<bool> {
        if !self.filter.lets_through(seen) {
            return Ok(true);
        }
        self.shown += 1;
        self.out.print(seen, event)?;
        Ok(self.filter.count.is_none_or(|count| self.shown < count))
    }

    /// The policy and the rule that denied a packet; where no rule did, the policies that isolate the pod.
    fn decided_by(&mut self, event: &Event) -> Option<By> {
        if event.rule == NO_RULE_INDEX {
            let own = self.who.address(event.pod & !OUTWARD)?;
            let direction = if event.pod & OUTWARD == 0 {
                Direction::Ingress
            } else {
                Direction::Egress
            };
            let direction = direction.as_str();
            let of = format!("address={own}&direction={direction}");
            return Some(By {
                closed: self.who.closed(&of),
                policies: self.who.policies(of),
                ..By::default()
            });
        }
        let rule = self.watch.rule(event)?;
        Some(By {
            policies: self.who.policies(format!("number={}", rule.policy)),
            rule: Some(rule.place),
            action: rule.action().map(|action| action.label().to_owned()),
            closed: None,
        })
    }

    /// Verdicts of policies that are no drops, which no ring tells of.
    fn allowed(&mut self) -> Vec<Told> {
        if !self.who.is_there() || self.asked.is_some_and(|asked| asked.elapsed() < VERDICTS) {
            return Vec::new();
        }
        self.asked = Some(Instant::now());
        let after = self.verdicts_after.unwrap_or(0);
        let told: Vec<Told> =
            ask::value(self.who.socket, &format!("/verdicts?after={after}")).unwrap_or_default();
        // What was decided before this began is for `verdicts`.
        let is_first = self.verdicts_after.is_none();
        self.verdicts_after = Some(told.last().map_or(after, |told| told.number));
        let is_new = |told: &Told| !is_first && told.verdict != ToldVerdict::Denied;
        told.into_iter().filter(is_new).collect()
    }

    /// Says what was missed, no sooner than `after` the last time.
    fn tell_missed(&mut self, after: Duration) {
        let (told, when) = self.missed;
        if when.elapsed() < after {
            return;
        }
        let missed = self.watch.missed();
        if missed > told {
            let more = missed - told;
            note(format_args!(
                "missed {more} events: there were more than can be told; counters have them all"
            ));
        }
        self.missed = (missed, Instant::now());
    }
}

/// What an agent and the kernel know of names.
struct Known<'a> {
    socket: &'a Path,
    pins: &'a Pins,
    /// Interfaces of Pods.
    bound: BTreeMap<u32, IpAddr>,
    names: Names,
    devices: BTreeMap<u32, String>,
    policies: HashMap<String, Vec<String>>,
    closed: HashMap<String, Option<String>>,
    asked_for: HashSet<IpAddr>,
    since: Option<Instant>,
    is_there: bool,
}

impl<'a> Known<'a> {
    fn new(socket: &'a Path, pins: &'a Pins) -> Self {
        Self {
            socket,
            pins,
            bound: BTreeMap::new(),
            names: Names::default(),
            devices: BTreeMap::new(),
            policies: HashMap::new(),
            closed: HashMap::new(),
            asked_for: HashSet::new(),
            since: None,
            is_there: false,
        }
    }

    /// Looks whether an agent tells names: a filter by names needs one, and all else has to do without if there is none.
    fn begin(&mut self, filter: &Filter) -> anyhow::Result<()> {
        match self.refresh() {
            Ok(()) => self.names.note_unknown(self.socket, filter.named()),
            Err(error) if filter.named().next().is_some() => {
                return Err(alone::only_an_agent(&error, "names", "filter by addresses"));
            }
            Err(error) => alone::unnamed(&error),
        }
        Ok(())
    }

    fn is_there(&mut self) -> bool {
        if self.since.is_none_or(|since| since.elapsed() >= NAMES_FOR) {
            let _unnamed = self.refresh();
        }
        self.is_there
    }

    fn refresh(&mut self) -> anyhow::Result<()> {
        self.since = Some(Instant::now());
        self.policies.clear();
        self.closed.clear();
        self.asked_for.clear();
        self.devices = device_names().unwrap_or_default();
        self.bound = inspect::bound(self.pins);
        let told = self.names.learn_services(self.socket, ask::WITHIN);
        self.is_there = told.is_ok();
        told
    }

    /// Asks for the names of those in events that are not known.
    fn learn(&mut self, events: &[Event]) {
        if events.is_empty() || !self.is_there() {
            return;
        }
        let senders = events
            .iter()
            .filter_map(|event| self.bound.get(&event.ifindex).copied());
        let ends = events.iter().flat_map(seen::addresses).chain(senders);
        let unknown: Vec<IpAddr> = ends.filter(|addr| self.asked_for.insert(*addr)).collect();
        self.is_there = self
            .names
            .learn_pods(self.socket, unknown.into_iter(), ask::WITHIN)
            .is_ok();
    }

    /// The Pod of an interface.
    fn pod_at(&self, ifindex: u32) -> Option<String> {
        self.names.pod(self.address(ifindex)?).cloned()
    }

    /// An address of the Pod behind an interface.
    fn address(&self, ifindex: u32) -> Option<IpAddr> {
        self.bound.get(&ifindex).copied()
    }

    fn device(&self, ifindex: u32) -> String {
        device_name(&self.devices, ifindex)
    }

    /// Why an end is closed. An agent that is older does not say.
    fn closed(&mut self, of: &str) -> Option<String> {
        if let Some(known) = self.closed.get(of) {
            return known.clone();
        }
        let ask = || ask::value(self.socket, &format!("/closed?{of}")).ok();
        let closed: Option<String> = self.is_there.then(ask).flatten().flatten();
        self.closed.insert(of.to_owned(), closed.clone());
        closed
    }

    fn policies(&mut self, of: String) -> Vec<String> {
        if let Some(known) = self.policies.get(&of) {
            return known.clone();
        }
        let names: Vec<String> = if self.is_there {
            ask::value(self.socket, &format!("/policy-names?{of}")).unwrap_or_default()
        } else {
            Vec::new()
        };
        self.policies.insert(of, names.clone());
        names
    }
}

/// Where it goes.
enum Out {
    Text,
    Json,
    Pcapng(Capture<io::Stdout>),
}

impl Out {
    fn new(format: Format) -> anyhow::Result<Self> {
        Ok(match format {
            Format::Text => Out::Text,
            Format::Json => Out::Json,
            Format::Pcapng => {
                use io::IsTerminal as _;
                anyhow::ensure!(
                    !io::stdout().is_terminal(),
                    "packets are nothing for a terminal: `monitor -o pcapng | wireshark -k -i -`"
                );
                Out::Pcapng(Capture::begin(io::stdout())?)
            }
        })
    }

    fn print(&mut self, seen: &Seen, event: Option<&Event>) -> anyhow::Result<()> {
        let mut stdout = io::stdout();
        let printed = match (self, event) {
            (Out::Text, _) => writeln!(stdout, "{seen}"),
            (Out::Json, _) => writeln!(stdout, "{}", serde_json::to_string(seen)?),
            (Out::Pcapng(capture), Some(event)) => {
                let written = capture.write(seen, event);
                return written.map_err(|error| unprinted(error, "failed to print"));
            }
            // A verdict without its packet.
            (Out::Pcapng(_), None) => Ok(()),
        };
        printed
            .and_then(|()| stdout.flush())
            .map_err(|error| unprinted(error, "failed to print"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaint(verdict: &[Word], reasons: &[Reason]) -> Option<String> {
        let filter = Filter {
            verdict: verdict.to_vec(),
            reason: reasons.to_vec(),
            ..Filter::default()
        };
        filter.check().err().map(|error| error.to_string())
    }

    #[test]
    fn a_filter_that_nothing_can_pass_is_refused() {
        assert_eq!(complaint(&[], &[]), None);
        assert_eq!(complaint(&[], &[Reason::NoEndpoints, Reason::PolicyDenied]), None);
        assert_eq!(
            complaint(&[Word::Refuse, Word::Drop], &[Reason::NoEndpoints]),
            None
        );
        assert_eq!(complaint(&[Word::Allow], &[Reason::PolicyAllowed]), None);
        let wrong = complaint(&[Word::Drop], &[Reason::NoEndpoints]).unwrap();
        assert_eq!(wrong, "what is shown for no-endpoints has the verdict refuse");
        let wrong = complaint(&[Word::Translate], &[Reason::PolicyDenied]).unwrap();
        assert!(wrong.ends_with("has the verdict drop"), "{wrong}");
        assert!(
            complaint(&[], &[Reason::Malformed]).is_some(),
            "passed, and counted alone"
        );

        let from_service = Filter {
            from: Some("svc/shop/web".parse().unwrap()),
            ..Filter::default()
        };
        assert!(from_service.check().is_err());
    }

    #[test]
    fn every_reason_but_those_of_what_goes_on_has_a_word() {
        let without = Reason::ALL.iter().filter(|reason| words_of(**reason).is_empty());
        for reason in without {
            let (outcome, meaning) = outcome(*reason);
            assert!(
                ["passed", "held", "released", "untold"].contains(&outcome),
                "{outcome}: {meaning}"
            );
        }
    }
}
