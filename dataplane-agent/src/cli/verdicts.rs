//! `verdicts`: what policies have denied lately, what dry runs would have changed, and where the agent was told so, what
//! was allowed.

use std::{collections::BTreeMap, net::IpAddr, path::Path, time::Duration};

use anyhow::Context;
use dataplane_common::{
    policy::{PolicyRule, VerdictEvent},
    reason::Reason,
};
use jiff::Timestamp;
use tokio::{
    signal::unix::{SignalKind, signal},
    time,
};

use super::{
    alone::{self, Places, Said},
    ask,
    output::{Output, note, print, table},
    pinned,
};
use crate::{bpf::verdicts::Untaken, store::enforced::policy_called, told::Told};

/// Between two questions of `--follow`.
const PAUSE: Duration = Duration::from_millis(200);
/// By so much two readings of the time of one event may differ.
const JITTER: Duration = Duration::from_millis(5);

/// Prints what the agent has kept, or where none answers what none has taken yet; and with `follow` what comes, until it is told to
/// stop.
pub fn run(places: Places<'_>, follow: bool, output: Output) -> anyhow::Result<()> {
    if !follow {
        let said = after(0, places, ask::WITHIN)?;
        note_unnamed(&said, places.socket);
        let told = said.noted();
        if told.is_empty() && output == Output::Table {
            note(
                "no verdict was told lately: policies have denied nothing since the agent began, or nothing waits for one",
            );
        }
        return show(&told, output);
    }
    let mut teller = Teller::agent(Timestamp::UNIX_EPOCH);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("failed to start the runtime")?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        loop {
            show(&teller.next(places)?, output)?;
            tokio::select! {
                () = time::sleep(PAUSE) => {}
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
            }
        }
    })
}

/// An agent that has waited for names long enough tells without: says why.
fn note_unnamed(said: &Said<Vec<Told>>, socket: &Path) {
    let names = || ask::value::<BTreeMap<IpAddr, String>>(socket, "/names?of=");
    if said.alone.is_none()
        && let Err(error) = names()
    {
        alone::unnamed(&error);
    }
}

fn show(told: &[Told], output: Output) -> anyhow::Result<()> {
    print(&match output {
        Output::Json => lines(told)?,
        Output::Table => render(told),
    })
}

/// What was decided after the verdict with a number, by what the agent has kept, or by what waits for one; each has numbers of its own.
/// `within`: how long the agent may be silent.
pub fn after(number: u64, places: Places<'_>, within: Duration) -> anyhow::Result<Said<Vec<Told>>> {
    match of_agent(number, places.socket, within) {
        Ok(told) => Ok(Said::by_agent(told)),
        Err(error) => alone::instead(error, || {
            let mut told = Waiting::open(places.bpffs)?.next();
            told.retain(|told| told.number > number);
            Ok(told)
        }),
    }
}

fn of_agent(after: u64, socket: &Path, within: Duration) -> anyhow::Result<Vec<Told>> {
    ask::value_within(socket, &format!("/verdicts?after={after}"), within)
}

/// What no agent has taken yet. It is numbered from the oldest on, which stays where it is.
#[derive(Debug)]
struct Waiting {
    events: Untaken,
    /// Of what was told last.
    number: u64,
}

impl Waiting {
    fn open(bpffs: &Path) -> anyhow::Result<Self> {
        Ok(Self {
            events: Untaken::open(&pinned(bpffs)?).context("failed to open the ring of verdicts")?,
            number: 0,
        })
    }

    /// What has not been told yet.
    fn next(&mut self) -> Vec<Told> {
        let told = self.events.read().into_iter().map(|(event, rule)| {
            self.number += 1;
            Told {
                number: self.number,
                policy: rule.map(|rule| policy_called(rule.policy)),
                ..by_addresses(&event, rule)
            }
        });
        told.collect()
    }
}

/// Who tells. Agents come and go while verdicts are followed.
#[derive(Debug)]
struct Teller {
    /// What was before that has been told, by an earlier teller.
    since: Timestamp,
    /// When what was told last was.
    last: Timestamp,
    by: By,
}

#[derive(Debug)]
enum By {
    /// With the number of what it told last.
    Agent(u64),
    Ring(Waiting),
}

impl Teller {
    fn agent(since: Timestamp) -> Self {
        Self {
            since,
            last: since,
            by: By::Agent(0),
        }
    }

    /// What has not been told yet.
    fn next(&mut self, places: Places<'_>) -> anyhow::Result<Vec<Told>> {
        let by_then = self.last.checked_add(JITTER).unwrap_or(self.last);
        if let By::Ring(waiting) = &self.by
            && waiting.events.is_taken()
        {
            // An agent has come: it has what was not seen here, and names.
            *self = Self::agent(by_then);
        }
        let mut told = match &mut self.by {
            By::Ring(waiting) => waiting.next(),
            By::Agent(number) => match of_agent(*number, places.socket, ask::WITHIN) {
                Ok(told) => {
                    *number = told.last().map_or(*number, |told| told.number);
                    told
                }
                Err(error) => {
                    let mut waiting = alone::instead(error, || Waiting::open(places.bpffs))?.noted();
                    let told = waiting.next();
                    self.since = by_then;
                    self.by = By::Ring(waiting);
                    told
                }
            },
        };
        told.retain(|told| told.time > self.since);
        self.last = told.last().map_or(self.last, |told| told.time);
        Ok(told)
    }
}

/// Who sends from an address that is not its own is its interface.
fn by_addresses(event: &VerdictEvent, rule: Option<PolicyRule>) -> Told {
    let told = Told::of(event, rule, |addr| addr.to_string());
    if event.reason != Reason::SourceNotOwn as u32 {
        return told;
    }
    Told {
        from: format!("interface {} as {}", event.ifindex, told.from),
        ..told
    }
}

/// A JSON object a line.
fn lines(told: &[Told]) -> anyhow::Result<String> {
    let lines = told.iter().map(|told| Ok(serde_json::to_string(told)? + "\n"));
    lines.collect()
}

fn render(told: &[Told]) -> String {
    let rows = told.iter().map(|told| {
        vec![
            told.time.strftime("%H:%M:%S%.3f").to_string(),
            told.verdict.as_str().to_owned(),
            told.direction.clone(),
            told.from.clone(),
            told.to.clone(),
            told.port.clone(),
            by(told),
        ]
    });
    let header = ["TIME", "VERDICT", "DIRECTION", "FROM", "TO", "PORT", "BY"];
    table(&header, rows).trim_start_matches('\n').to_owned()
}

/// What gave the verdict.
fn by(told: &Told) -> String {
    let text = match (&told.policy, told.rule, &told.closed) {
        (Some(policy), Some(rule), _) => format!("{policy}, rule {rule}"),
        (Some(policies), None, Some(closed)) => format!("{policies} cannot be honoured: {closed}"),
        (Some(policies), None, None) => format!("no rule of {policies}"),
        (None, ..) => told.reason.clone(),
    };
    match told.untold {
        0 => text,
        untold => format!("{text} ({untold} more before this were not told)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_agent_a_verdict_is_addresses_and_numbers() {
        let event = VerdictEvent {
            src_be: [u32::from_ne_bytes([10, 0, 0, 1]), 0, 0, 0],
            dst_be: [u32::from_ne_bytes([10, 0, 0, 2]), 0, 0, 0],
            dport_be: 80_u16.to_be(),
            ifindex: 12,
            reason: Reason::PolicyDenied as u32,
            family: 4,
            proto: 6,
            ..VerdictEvent::default()
        };
        let rule = PolicyRule {
            place: 3,
            action: 2,
            ..PolicyRule::default()
        };
        let told = by_addresses(&event, Some(rule));
        assert_eq!((told.from.as_str(), told.to.as_str()), ("10.0.0.1", "10.0.0.2"));
        assert_eq!(
            (told.port.as_str(), told.direction.as_str()),
            ("80/TCP", "ingress")
        );
        assert_eq!((told.rule, told.action.as_deref()), (Some(3), Some("deny")));
        let forged = VerdictEvent {
            reason: Reason::SourceNotOwn as u32,
            outward: 1,
            ..event
        };
        assert_eq!(by_addresses(&forged, None).from, "interface 12 as 10.0.0.1");
    }

    #[test]
    fn a_verdict_names_its_rule_or_the_policies_that_have_none() {
        let mut told = Told {
            policy: Some("NetworkPolicy shop/db".to_owned()),
            reason: "policy-denied".to_owned(),
            ..Told::default()
        };
        assert_eq!(by(&told), "no rule of NetworkPolicy shop/db");
        told.rule = Some(2);
        told.untold = 7;
        assert_eq!(
            by(&told),
            "NetworkPolicy shop/db, rule 2 (7 more before this were not told)"
        );
        told.rule = None;
        told.untold = 0;
        told.closed =
            Some("table RULES is full (2 entries, --max-policy-rules): nothing is allowed".to_owned());
        assert_eq!(
            by(&told),
            "NetworkPolicy shop/db cannot be honoured: table RULES is full (2 entries, --max-policy-rules): nothing is allowed"
        );
        told.policy = None;
        assert_eq!(by(&told), "policy-denied");
    }
}
