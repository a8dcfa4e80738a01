//! What the page asks for: the agent's answers as they are, and the flows of the tables.

use std::time::Duration;

use hyper::{StatusCode, Uri};
use serde_json::{Value, json};

use super::Places;
use crate::cli::{ask, flows};

/// A page that is asked for each second does not wait longer for the agent.
const WITHIN: Duration = Duration::from_secs(2);
/// Flows of one answer, those that were used last.
const FLOWS: usize = 500;

/// The status and JSON at a path below `/api`; `None`: there is no such path.
pub fn answer(places: &Places, uri: &Uri) -> Option<(StatusCode, String)> {
    let question = match uri.path().strip_prefix("/api/")? {
        "load" => "/load".to_owned(),
        "services" => "/services".to_owned(),
        "verdicts" => {
            let Ok(after) = parameter(uri, "after").unwrap_or("0").parse::<u64>() else {
                return Some(refused(StatusCode::BAD_REQUEST, "`after` is no number"));
            };
            format!("/verdicts?after={after}")
        }
        "policies" => match parameter(uri, "pod") {
            None => "/policies".to_owned(),
            Some(pod) if is_pod(pod) => format!("/policies?pod={pod}"),
            Some(_) => return Some(refused(StatusCode::BAD_REQUEST, "a Pod is named NAMESPACE/NAME")),
        },
        "flows" => return Some(of_tables(places)),
        _ => return None,
    };
    Some(of_agent(places, &question))
}

fn of_agent(places: &Places, question: &str) -> (StatusCode, String) {
    match ask::reach_within(&places.socket, question, WITHIN) {
        Ok(answer) if answer.status == 200 => (StatusCode::OK, answer.body),
        Ok(answer) if answer.status == 404 && question.contains("pod=") => refused(
            StatusCode::NOT_FOUND,
            "no Pod of this node with an interface of its own has this name",
        ),
        Ok(answer) if answer.status == 404 => refused(
            StatusCode::BAD_GATEWAY,
            "the agent is older than this page, and does not tell this",
        ),
        Ok(answer) => {
            let reason = format!("the agent answered with status {}", answer.status);
            refused(StatusCode::BAD_GATEWAY, &reason)
        }
        Err(error) => refused(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}")),
    }
}

fn of_tables(places: &Places) -> (StatusCode, String) {
    match flows::latest(&places.bpffs, &places.socket, FLOWS, WITHIN) {
        Ok((flows, found)) => (
            StatusCode::OK,
            json!({ "flows": flows, "found": found }).to_string(),
        ),
        Err(error) => refused(StatusCode::SERVICE_UNAVAILABLE, &format!("{error:#}")),
    }
}

fn refused(status: StatusCode, reason: &str) -> (StatusCode, String) {
    let reason = Value::from(reason);
    (status, json!({ "error": reason }).to_string())
}

/// `namespace/name`.
fn is_pod(text: &str) -> bool {
    let is_name = |name: &str| {
        let fits = |letter: char| letter.is_ascii_alphanumeric() || "-.".contains(letter);
        !name.is_empty() && name.chars().all(fits)
    };
    text.split_once('/')
        .is_some_and(|(namespace, name)| is_name(namespace) && is_name(name))
}

/// A value in a query. What is asked for has no character that would have to be escaped.
fn parameter<'a>(uri: &'a Uri, name: &str) -> Option<&'a str> {
    let mut pairs = uri.query()?.split('&').filter_map(|pair| pair.split_once('='));
    Some(pairs.find(|(key, _)| *key == name)?.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_question_is_refused_before_the_agent_is_asked() {
        let places = Places {
            socket: "/nowhere/agent.sock".into(),
            bpffs: "/nowhere/bpf".into(),
        };
        let status = |path: &str| {
            answer(&places, &path.parse().unwrap()).map(|(status, json)| {
                assert!(json.contains("\"error\""), "{path}: {json}");
                status.as_u16()
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
            ("/api/policies", Some(503)),
            ("/api/services", Some(503)),
            ("/api/log", None),
            ("/load", None),
        ] {
            assert_eq!(status(path), expected, "{path}");
        }
    }
}
