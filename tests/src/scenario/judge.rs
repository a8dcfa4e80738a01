//! What was seen against what was expected. Pure: no packet is sent here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::IpAddr;

use serde::Serialize;
use serde_json::Value;

use super::file::{Expect, Outcome};
use crate::links::Prefix;
use crate::shape::contains;
use crate::worker::protocol::Attempt;

/// Fewer connections for each expected backend may miss one by chance.
const CONNECTIONS_FOR_EACH: usize = 4;

/// What one probe saw.
#[derive(Debug, Clone)]
pub enum Observation {
    Attempts(Vec<Attempt>),
    Http { status: u16, body: String },
}

/// What the expectation does not say itself.
#[derive(Debug, Default)]
pub struct Context {
    /// The client's name: a backend of that name is the client itself.
    pub client: String,
    /// The addresses that count as the client's own.
    pub client_ips: Vec<IpAddr>,
    /// The pod network masquerades what this client sends elsewhere than to these networks.
    pub masqueraded_outside: Option<Vec<Prefix>>,
    pub min_share: Option<f64>,
    /// The backends that are allowed because an earlier probe saw them.
    pub must_equal: Option<Vec<String>>,
    /// The backend must become another than this one (or than the first seen).
    pub must_change: Option<Option<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Passed,
    Failed,
    Skipped,
    Undefined,
}

/// The verdict on one probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    pub status: Status,
    pub seen: String,
    /// What was accepted although it is not literally what was expected.
    pub note: Option<String>,
}

/// The expectation in words.
pub fn expected(expect: &Expect, context: &Context) -> String {
    let mut text = match expect.outcome {
        Outcome::Reach if expect.backends.is_empty() => {
            let pods = if expect.backends_pods_any_of.is_empty() {
                &expect.backend_pods
            } else {
                &expect.backends_pods_any_of
            };
            format!("reach one of {}", pods.join(", "))
        }
        Outcome::Reach => format!("reach {}", expect.backends.join(", ")),
        Outcome::Reject => "reject".to_owned(),
        Outcome::Drop => "drop".to_owned(),
        Outcome::Fail => "fail".to_owned(),
        Outcome::Http => format!("http {}", expect.status.unwrap_or_default()),
        Outcome::Undefined => "undefined".to_owned(),
    };
    let mut add = |condition: bool, words: &str| {
        if condition {
            let _ = write!(text, ", {words}");
        }
    };
    add(expect.strict_kind, "strictly");
    add(expect.client_ip_preserved == Some(true), "source kept");
    add(expect.sticky == Some(true), "sticky");
    add(expect.sticky == Some(false), "not sticky");
    if let Some(count) = expect.local_endpoints {
        add(true, &format!("localEndpoints {count}"));
    }
    if let Some(share) = context.min_share {
        add(true, &format!("each at least {share}"));
    }
    if let Some(backends) = &context.must_equal {
        add(true, &format!("same as before ({})", backends.join(", ")));
    }
    add(context.must_change.is_some(), "changing");
    text
}

/// Judges an observation.
pub fn judge(expect: &Expect, context: &Context, observation: &Observation) -> Judgement {
    let seen = describe(observation);
    let (mut status, note) = match verdict(expect, context, observation) {
        Verdict::Passed => (Status::Passed, None),
        Verdict::Accepted(note) => (Status::Passed, Some(note)),
        Verdict::Failed(why) => (Status::Failed, Some(why)),
        Verdict::Unsupported => (Status::Skipped, Some("the kernel lacks the protocol".to_owned())),
    };
    if status != Status::Skipped && (expect.undefined.is_some() || expect.outcome == Outcome::Undefined) {
        status = Status::Undefined;
    }
    Judgement { status, seen, note }
}

enum Verdict {
    Passed,
    Accepted(String),
    Failed(String),
    Unsupported,
}

fn verdict(expect: &Expect, context: &Context, observation: &Observation) -> Verdict {
    let attempts = match observation {
        Observation::Http { status, body } => return http(expect, *status, body),
        Observation::Attempts(attempts) => attempts,
    };
    if attempts.is_empty() {
        return Verdict::Failed("nothing was tried".to_owned());
    }
    if attempts.contains(&Attempt::Unsupported) {
        return Verdict::Unsupported;
    }
    let refused = attempts
        .iter()
        .all(|attempt| matches!(attempt, Attempt::Refused { .. }));
    let silent = attempts.iter().all(|attempt| *attempt == Attempt::Silent);
    let answered = attempts.iter().any(|attempt| attempt.backend().is_some());
    match expect.outcome {
        Outcome::Reach => reach(expect, context, attempts).map_or_else(Verdict::Failed, |()| Verdict::Passed),
        Outcome::Http => Verdict::Failed("no page was fetched".to_owned()),
        Outcome::Undefined => Verdict::Passed,
        _ if answered => Verdict::Failed("a backend answered".to_owned()),
        Outcome::Reject if refused => Verdict::Passed,
        Outcome::Drop if silent => Verdict::Passed,
        Outcome::Fail => Verdict::Passed,
        Outcome::Reject | Outcome::Drop if expect.strict_kind => {
            Verdict::Failed("it failed in another way".to_owned())
        }
        Outcome::Reject => Verdict::Accepted("accepted in place of reject".to_owned()),
        Outcome::Drop => Verdict::Accepted("accepted in place of drop".to_owned()),
    }
}

fn http(expect: &Expect, status: u16, body: &str) -> Verdict {
    if expect.outcome != Outcome::Http {
        return Verdict::Failed("the port is open".to_owned());
    }
    if expect.status != Some(status) {
        return Verdict::Failed("another status".to_owned());
    }
    let count = serde_json::from_str::<Value>(body)
        .ok()
        .and_then(|body| body["localEndpoints"].as_u64());
    if expect.local_endpoints.is_some() && expect.local_endpoints != count {
        return Verdict::Failed("another localEndpoints".to_owned());
    }
    Verdict::Passed
}

fn reach(expect: &Expect, context: &Context, attempts: &[Attempt]) -> Result<(), String> {
    let mut count: BTreeMap<String, usize> = BTreeMap::new();
    let mut names = BTreeSet::new();
    for attempt in attempts {
        let Attempt::Answered { by, .. } = attempt else {
            return Err("a connection was not answered".to_owned());
        };
        *count.entry(by.backend()).or_default() += 1;
        names.insert(by.name.as_str());
        let hairpin = by.name == context.client;
        let network_masquerades = context
            .masqueraded_outside
            .as_ref()
            .is_some_and(|networks| !networks.iter().any(|network| contains(*network, by.at.ip())));
        let kept = network_masquerades || context.client_ips.contains(&by.client.ip());
        if expect.client_ip_preserved == Some(true) && !hairpin && !kept {
            return Err(format!("the source was not kept: {}", by.client.ip()));
        }
    }
    let complete = is_complete(expect, context, attempts.len());
    let backends = count.keys().map(String::as_str);
    check_set(&expect.backends, backends, complete, "backend")?;
    check_set(&expect.backend_pods, names.iter().copied(), complete, "pod")?;
    check_set(&expect.backends_pods_any_of, names.iter().copied(), false, "pod")?;
    match expect.sticky {
        Some(true) if count.len() > 1 => return Err("the backend changed".to_owned()),
        Some(false) if count.len() < 2 => return Err("the backend never changed".to_owned()),
        _ => {}
    }
    if let Some(share) = context.min_share {
        let least = expect
            .backends
            .iter()
            .map(|backend| count.get(backend).copied().unwrap_or_default())
            .min();
        #[expect(clippy::cast_precision_loss, reason = "counts of connections are small")]
        if (least.unwrap_or_default() as f64) < share * attempts.len() as f64 {
            return Err("a backend has too small a share".to_owned());
        }
    }
    if let Some(before) = &context.must_equal
        && count.keys().any(|backend| !before.contains(backend))
        && names.iter().any(|name| !before.iter().any(|other| other == name))
    {
        return Err("another backend than before".to_owned());
    }
    match &context.must_change {
        Some(Some(before)) if count.keys().all(|backend| backend == before) => {
            Err("the backend never changed".to_owned())
        }
        Some(None) if count.len() < 2 => Err("the backend never changed".to_owned()),
        _ => Ok(()),
    }
}

/// Whether every expected backend must have answered: not where the probe is to stay on one of them or ends with the
/// first change, nor where it makes too few connections to meet them all.
fn is_complete(expect: &Expect, context: &Context, connections: usize) -> bool {
    expect.exact_set
        && expect.sticky != Some(true)
        && context.must_equal.is_none()
        && context.must_change.is_none()
        && connections >= CONNECTIONS_FOR_EACH * expect.backends.len()
}

/// No one else may have answered; where the set is complete, all must have.
fn check_set<'a>(
    wanted: &[String],
    seen: impl Iterator<Item = &'a str>,
    complete: bool,
    what: &str,
) -> Result<(), String> {
    if wanted.is_empty() {
        return Ok(());
    }
    let seen: BTreeSet<&str> = seen.collect();
    let wanted: BTreeSet<&str> = wanted.iter().map(String::as_str).collect();
    if let Some(stranger) = seen.difference(&wanted).next() {
        return Err(format!("{what} {stranger} answered"));
    }
    if complete && let Some(missing) = wanted.difference(&seen).next() {
        return Err(format!("{what} {missing} never answered"));
    }
    Ok(())
}

/// The observation in words: equal attempts are counted.
fn describe(observation: &Observation) -> String {
    let attempts = match observation {
        Observation::Http { status, body } => return format!("http {status} {}", body.trim()),
        Observation::Attempts(attempts) => attempts,
    };
    let mut lines: BTreeMap<String, usize> = BTreeMap::new();
    let mut slowest = 0;
    for attempt in attempts {
        let text = match attempt {
            Attempt::Answered { by, ms } => {
                slowest = slowest.max(*ms);
                format!("{} ({}) from {}", by.backend(), by.name, by.client.ip())
            }
            Attempt::Refused { how, .. } => format!("refused ({how})"),
            Attempt::Silent => "no answer".to_owned(),
            Attempt::Broken { how } => format!("broken ({how})"),
            Attempt::Unsupported => "not supported by the kernel".to_owned(),
        };
        *lines.entry(text).or_default() += 1;
    }
    let mut text = lines
        .iter()
        .map(|(text, count)| format!("{count}x {text}"))
        .collect::<Vec<_>>()
        .join("; ");
    if slowest >= 900 {
        let _ = write!(text, "; slowest {slowest} ms");
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::worker::protocol::Identity;

    fn answered(name: &str, at: &str, client: &str) -> Attempt {
        let by = Identity {
            name: name.to_owned(),
            at: at.parse().expect("an address"),
            client: format!("{client}:40000").parse().expect("an address"),
        };
        Attempt::Answered { by, ms: 1 }
    }

    fn status(expect: Value, context: &Context, observation: &Observation) -> Status {
        judge(
            &serde_json::from_value(expect).expect("an expectation"),
            context,
            observation,
        )
        .status
    }

    fn client() -> Context {
        Context {
            client: "client1".to_owned(),
            client_ips: vec!["10.244.1.10".parse().expect("an address")],
            ..Context::default()
        }
    }

    fn mixed() -> Observation {
        let one = answered("be1", "10.244.1.21:80", "10.244.1.10");
        let two = answered("be2", "10.244.2.21:80", "10.244.1.10");
        Observation::Attempts(vec![one.clone(), one.clone(), one, two])
    }

    #[test]
    fn shares_stickiness_and_change_are_counted() {
        let both =
            json!({"outcome": "reach", "backends": ["10.244.1.21:80", "10.244.2.21:80"], "exact_set": true});
        let with = |key: &str, value: Value| {
            let mut expect = both.clone();
            expect[key] = value;
            expect
        };
        let in_context = |context: Context| status(both.clone(), &context, &mixed());
        assert_eq!(in_context(client()), Status::Passed);
        assert_eq!(
            status(with("sticky", json!(false)), &client(), &mixed()),
            Status::Passed
        );
        assert_eq!(
            status(with("sticky", json!(true)), &client(), &mixed()),
            Status::Failed
        );
        assert_eq!(
            status(with("undefined", json!("differs")), &client(), &mixed()),
            Status::Undefined
        );
        assert_eq!(
            in_context(Context {
                min_share: Some(0.25),
                ..client()
            }),
            Status::Passed
        );
        assert_eq!(
            in_context(Context {
                min_share: Some(0.3),
                ..client()
            }),
            Status::Failed
        );
        let before = |backends: &[&str]| Some(backends.iter().map(|backend| (*backend).to_owned()).collect());
        assert_eq!(
            in_context(Context {
                must_equal: before(&["10.244.1.21:80"]),
                ..client()
            }),
            Status::Failed
        );
        let all = before(&["10.244.1.21:80", "10.244.2.21:80"]);
        assert_eq!(
            in_context(Context {
                must_equal: all,
                ..client()
            }),
            Status::Passed
        );
        assert_eq!(
            in_context(Context {
                must_change: Some(None),
                ..client()
            }),
            Status::Passed
        );
    }

    #[test]
    fn every_backend_must_answer_where_enough_connections_are_free_to_choose() {
        let with = |more: &Value, context: Context, connections: usize| {
            let mut expect = json!({"outcome": "reach", "backends": ["10.244.1.21:80", "10.244.2.21:80"], "exact_set": true});
            if let (Some(expect), Some(more)) = (expect.as_object_mut(), more.as_object()) {
                expect.extend(more.clone());
            }
            let one = answered("be1", "10.244.1.21:80", "10.244.1.10");
            status(expect, &context, &Observation::Attempts(vec![one; connections]))
        };
        assert_eq!(with(&json!({}), client(), 8), Status::Failed);
        assert_eq!(
            with(
                &json!({"backends": [], "backend_pods": ["be1", "be2"]}),
                client(),
                8
            ),
            Status::Failed
        );
        assert_eq!(with(&json!({}), client(), 7), Status::Passed, "too few to tell");
        assert_eq!(with(&json!({"exact_set": false}), client(), 8), Status::Passed);
        assert_eq!(with(&json!({"sticky": true}), client(), 8), Status::Passed);
        let before = Context {
            must_equal: Some(vec!["10.244.1.21:80".to_owned()]),
            ..client()
        };
        assert_eq!(with(&json!({}), before, 8), Status::Passed);
        let changed = Context {
            must_change: Some(Some("10.244.2.21:80".to_owned())),
            ..client()
        };
        assert_eq!(with(&json!({}), changed, 8), Status::Passed);
    }

    #[test]
    fn a_source_counts_as_kept_where_it_can_be() {
        let expect =
            json!({"outcome": "reach", "backends": ["192.168.77.12:80"], "client_ip_preserved": true});
        let seen =
            |name: &str| Observation::Attempts(vec![answered(name, "192.168.77.12:80", "192.168.77.11")]);
        assert_eq!(status(expect.clone(), &client(), &seen("host2")), Status::Failed);
        assert_eq!(
            status(expect.clone(), &client(), &seen("client1")),
            Status::Passed,
            "hairpin"
        );
        let pods = vec![("10.244.0.0".parse().expect("an address"), 16)];
        let overlay = Context {
            masqueraded_outside: Some(pods),
            ..client()
        };
        assert_eq!(
            status(expect, &overlay, &seen("host2")),
            Status::Passed,
            "masqueraded by the network"
        );
    }

    #[test]
    fn pages_are_compared_by_status_and_count() {
        let expect = json!({"outcome": "http", "status": 200, "localEndpoints": 1});
        let page = |status, count| Observation::Http {
            status,
            body: format!("{{\"localEndpoints\": {count}}}"),
        };
        assert_eq!(status(expect.clone(), &client(), &page(200, 1)), Status::Passed);
        assert_eq!(status(expect.clone(), &client(), &page(200, 2)), Status::Failed);
        assert_eq!(status(expect.clone(), &client(), &page(503, 1)), Status::Failed);
        assert_eq!(
            status(expect, &client(), &Observation::Attempts(vec![Attempt::Silent])),
            Status::Failed
        );
        assert_eq!(
            status(json!({"outcome": "fail"}), &client(), &page(200, 1)),
            Status::Failed
        );
    }
}
