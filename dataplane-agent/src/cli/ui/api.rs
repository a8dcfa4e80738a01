//! What the page asks for, as the commands answer it: what the agent tells, else what the pinned tables say.

use std::{net::IpAddr, time::Duration};

use hyper::{StatusCode, Uri};
use serde::Serialize;
use serde_json::{Value, json};

use super::Places;
use crate::cli::{
    alone::Said,
    flows,
    policies::{self, NoPod},
    services::{self, Asked, Listing},
    top, verdicts,
};

/// A page that is asked for each second does not wait longer for the agent.
const WITHIN: Duration = Duration::from_secs(2);
/// Flows of one answer, those that were used last.
const FLOWS: usize = 500;

/// An answer to the page.
#[derive(Debug, PartialEq)]
pub struct Reply {
    pub status: StatusCode,
    pub json: String,
    /// Why the tables say this, and no agent does.
    pub alone: Option<String>,
}

/// The answer at a path below `/api`; `None`: there is no such path.
pub fn answer(places: &Places, uri: &Uri) -> Option<Reply> {
    let places = places.borrowed();
    let bad = |reason| Some(refused(StatusCode::BAD_REQUEST, reason));
    Some(match uri.path().strip_prefix("/api/")? {
        "load" => reply(top::load(places, WITHIN)),
        "services" => {
            let asked = Asked {
                service: None,
                places,
                problems: false,
            };
            reply(services::answer(&asked, Listing::Table, WITHIN))
        }
        "verdicts" => {
            let Ok(after) = parameter(uri, "after").unwrap_or("0").parse() else {
                return bad("`after` is no number");
            };
            reply(verdicts::after(after, places, WITHIN))
        }
        "policies" => match parameter(uri, "pod") {
            None => reply(policies::of_node(places, WITHIN)),
            Some(pod) if is_pod(pod) => reply(policies::of_pod(pod, places, WITHIN)),
            Some(_) => return bad(&NoPod::Misnamed.to_string()),
        },
        "flows" => reply(flows::latest(places, FLOWS, WITHIN)),
        _ => return None,
    })
}

fn reply<T: Serialize>(said: anyhow::Result<Said<T>>) -> Reply {
    let in_json = |said: Said<T>| -> anyhow::Result<Reply> {
        Ok(Reply {
            status: StatusCode::OK,
            json: serde_json::to_string(&said.value)?,
            alone: said.alone.map(|error| format!("{error:#}")),
        })
    };
    said.and_then(in_json).unwrap_or_else(|error| {
        let no_pod = error.chain().find_map(|cause| cause.downcast_ref());
        let status = match no_pod {
            Some(NoPod::Misnamed) => StatusCode::BAD_REQUEST,
            Some(NoPod::Name(_) | NoPod::Addr(_)) => StatusCode::NOT_FOUND,
            None => StatusCode::SERVICE_UNAVAILABLE,
        };
        refused(status, &format!("{error:#}"))
    })
}

fn refused(status: StatusCode, reason: &str) -> Reply {
    let reason = Value::from(reason);
    Reply {
        status,
        json: json!({ "error": reason }).to_string(),
        alone: None,
    }
}

/// `namespace/name`, or an address.
fn is_pod(text: &str) -> bool {
    let is_name = |name: &str| {
        let fits = |letter: char| letter.is_ascii_alphanumeric() || "-.".contains(letter);
        !name.is_empty() && name.chars().all(fits)
    };
    let names = text.split_once('/');
    names.is_some_and(|(namespace, name)| is_name(namespace) && is_name(name))
        || text.parse::<IpAddr>().is_ok()
}

/// A value in a query. What is asked for has no character that would have to be escaped.
fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let mut pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    Some(pairs.find(|(key, _)| *key == name)?.1)
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn what_is_no_question_is_refused_before_the_agent_is_asked() {
        let places = Places {
            socket: "/nowhere/agent.sock".into(),
            bpffs: "/nowhere/bpf".into(),
        };
        let status = |path: &str| {
            answer(&places, &path.parse().unwrap()).map(|reply| {
                assert!(reply.json.contains("\"error\""), "{path}: {reply:?}");
                assert_eq!(reply.alone, None, "{path}");
                reply.status.as_u16()
            })
        };
        for (path, expected) in [
            ("/api/verdicts?after=x", Some(400)),
            ("/api/verdicts?after=-1", Some(400)),
            ("/api/verdicts?after=7", Some(503)),
            ("/api/policies?pod=shop", Some(400)),
            ("/api/policies?pod=a/b/c", Some(400)),
            ("/api/policies?pod=a/b%0d%0aX:", Some(400)),
            ("/api/policies?pod=shop/db-0", Some(503)),
            ("/api/policies?pod=10.244.1.21", Some(503)),
            ("/api/policies?pod=fd00:10:244::15", Some(503)),
            ("/api/policies?pod=10.244.1.21:80", Some(400)),
            ("/api/policies", Some(503)),
            ("/api/services", Some(503)),
            ("/api/flows", Some(503)),
            ("/api/log", None),
            ("/load", None),
        ] {
            assert_eq!(status(path), expected, "{path}");
        }
    }

    #[test]
    fn the_tables_answer_in_place_of_the_agent_and_say_so() {
        let by_agent = reply(Ok(Said::by_agent(7)));
        assert_eq!((by_agent.status, by_agent.json.as_str()), (StatusCode::OK, "7"));
        assert_eq!(by_agent.alone, None);
        let by_tables = reply(Ok(Said {
            value: 7,
            alone: Some(anyhow!("connection refused").context("failed to reach an agent")),
        }));
        assert_eq!(
            (by_tables.status, by_tables.json),
            (by_agent.status, by_agent.json)
        );
        let why = "failed to reach an agent: connection refused";
        assert_eq!(by_tables.alone.as_deref(), Some(why));
    }

    #[test]
    fn what_neither_can_say_is_refused_with_the_reason() {
        let refused = |error: anyhow::Error| {
            let Reply { status, json, alone } = reply(Err::<Said<u8>, _>(error));
            assert_eq!(alone, None);
            (status.as_u16(), json)
        };
        let neither = anyhow!("no tables").context("failed to reach an agent");
        let reason = r#"{"error":"failed to reach an agent: no tables"}"#.to_owned();
        assert_eq!(refused(neither), (503, reason));
        let nobody = anyhow!(NoPod::Addr([10, 0, 0, 1].into()));
        assert_eq!(refused(nobody.context("failed to reach an agent")).0, 404);
        assert_eq!(refused(NoPod::Misnamed.into()).0, 400);
    }
}
