//! Kubernetes Events on the objects concerned: few, and each once.
//!
//! What is wrong with an object is wrong for every node, so all of them give its Event one name, and the server takes it
//! from the first. What concerns this node alone bears its name. An Event is an aid: it is dropped, and counted, where
//! there are too many.

use std::{collections::HashMap, hash::Hasher, sync::Arc, time::Duration};

use hyper::Method;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::json;
use siphasher::sip::SipHasher13;
use tokio::{
    sync::mpsc,
    time::{self, Instant},
};

use super::{
    api::{Api, ApiError, JSON, MERGE_PATCH, NAMES},
    follow::jittered,
    resources,
};
use crate::{
    events::{Event, Reason},
    model::{Kind, Name, ObjectRef},
};

/// So many at once, and then one in [`EVERY`].
const BURST: u32 = 25;
const EVERY: Duration = Duration::from_secs(10);
/// Nodes that have the same to tell do it one after the other, and most find it told.
const SPREAD: Duration = Duration::from_secs(2);
/// After a refusal, which will not end by itself.
const REFUSED: Duration = Duration::from_mins(10);
/// Of those that were sent, so many are remembered.
const REMEMBERED: usize = 1000;
/// The API's limit, in bytes.
const NOTE_AT_MOST: usize = 1024;

/// Sends Events.
#[derive(Debug)]
pub struct Teller {
    api: Arc<Api>,
    node: Arc<str>,
    budget: Budget,
    /// How often each was sent.
    sent: HashMap<String, u32>,
}

#[derive(Debug)]
struct Budget {
    left: u32,
    filled: Instant,
}

impl Budget {
    fn take(&mut self) -> bool {
        while self.left < BURST && self.filled.elapsed() >= EVERY {
            self.left += 1;
            self.filled += EVERY;
        }
        if self.left == BURST {
            self.filled = Instant::now();
        }
        let has = self.left > 0;
        self.left = self.left.saturating_sub(1);
        has
    }
}

impl Teller {
    pub fn new(api: Arc<Api>, node: Arc<str>) -> Self {
        let filled = Instant::now();
        Self {
            api,
            node,
            budget: Budget { left: BURST, filled },
            sent: HashMap::new(),
        }
    }

    /// Sends what comes, until nobody has anything to tell any more.
    pub async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut refused: Option<Instant> = None;
        let mut is_told = false;
        while let Some(event) = events.recv().await {
            if refused.is_some_and(|at| at.elapsed() < REFUSED) || !self.budget.take() {
                self.api.state().event_dropped();
                continue;
            }
            time::sleep(jittered(SPREAD) / 2).await;
            match self.send(&event).await {
                Ok(()) => refused = None,
                Err(error @ (ApiError::Forbidden { .. } | ApiError::Unauthorized { .. })) => {
                    refused = Some(Instant::now());
                    self.api.state().event_dropped();
                    if !std::mem::replace(&mut is_told, true) {
                        tracing::info!("Kubernetes Events are not sent: {error}");
                    }
                }
                Err(error) => {
                    self.api.state().event_dropped();
                    tracing::debug!(%error, "failed to send an event");
                }
            }
        }
    }

    async fn send(&mut self, event: &Event) -> Result<(), ApiError> {
        // What belongs to no object is told of the node.
        let own = ObjectRef {
            kind: Kind::Node,
            name: Name::new("", &self.node),
        };
        let object = event.regarding.as_ref().unwrap_or(&own);
        let ObjectRef { kind, name } = object;
        let Some(uid) = self.uid(object).await? else {
            return Ok(());
        };
        let is_of_node =
            event.regarding.is_none() || matches!(event.reason, Reason::TableFull | Reason::WriteRefused);
        let event_name = event_name(event, name, &uid, is_of_node.then_some(&*self.node));
        let namespace = match name.namespace() {
            "" => "default",
            namespace => namespace,
        };
        let collection = format!("/api/v1/namespaces/{}/events", resources::encoded(namespace));
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        if let Some(times) = self.sent.get_mut(&event_name) {
            *times += 1;
            let again = json!({"count": times, "lastTimestamp": now});
            let path = format!("{collection}/{}", resources::encoded(&event_name));
            match self.api.send(Method::PATCH, &path, MERGE_PATCH, &again).await {
                // The server forgets them after an hour.
                Err(ApiError::NotFound { .. }) => {}
                other => return other,
            }
        }
        let document = json!({
            "apiVersion": "v1", "kind": "Event",
            "metadata": {"name": event_name, "namespace": namespace},
            "involvedObject": {
                "apiVersion": kind.api_version(), "kind": kind.as_str(), "name": name.name(),
                "namespace": name.namespace(), "uid": uid,
            },
            "type": event.reason.kind().as_str(), "reason": event.reason.as_str(), "message": shortened(&event.note),
            "count": 1, "firstTimestamp": now, "lastTimestamp": now,
            "source": {"component": "dataplane-agent", "host": &*self.node},
            "reportingComponent": "dataplane-agent", "reportingInstance": &*self.node,
        });
        match self.api.send(Method::POST, &collection, JSON, &document).await {
            Ok(()) => self.api.state().event_sent(),
            // Another node was first.
            Err(ApiError::Status { code: 409, .. }) => {}
            Err(error) => return Err(error),
        }
        if self.sent.len() >= REMEMBERED {
            self.sent.clear();
        }
        self.sent.insert(event_name, 1);
        Ok(())
    }

    /// The unique id of an object; `None`: it is gone.
    async fn uid(&self, object: &ObjectRef) -> Result<Option<String>, ApiError> {
        #[derive(Deserialize)]
        struct List {
            #[serde(default)]
            items: Option<Vec<One>>,
        }
        #[derive(Deserialize)]
        struct One {
            metadata: Metadata,
        }
        #[derive(Deserialize)]
        struct Metadata {
            uid: String,
        }
        let path = resources::by_name(object.kind, object.name.namespace(), object.name.name());
        let text = self.api.get(&path, NAMES).await?;
        let list: List = serde_json::from_slice(&text).map_err(|error| ApiError::unreadable(&error))?;
        Ok(list
            .items
            .into_iter()
            .flatten()
            .next()
            .map(|one| one.metadata.uid))
    }
}

/// The same on all nodes for what is the same.
fn event_name(event: &Event, object: &Name, uid: &str, node: Option<&str>) -> String {
    let mut hasher = SipHasher13::new();
    for part in [uid, event.reason.as_str(), &event.note, node.unwrap_or_default()] {
        hasher.write(part.as_bytes());
        hasher.write_u8(0);
    }
    // Names of events are DNS subdomains of 253 characters at the most; an object's may be as long.
    let name: String = object.name().chars().take(230).collect();
    format!("{name}.{:016x}", hasher.finish())
}

fn shortened(note: &str) -> &str {
    let mut end = note.len().min(NOTE_AT_MOST);
    while !note.is_char_boundary(end) {
        end -= 1;
    }
    &note[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(reason: Reason, note: &str) -> Event {
        Event {
            reason,
            regarding: None,
            note: note.to_owned(),
        }
    }

    #[test]
    fn nodes_agree_on_the_name_of_what_is_the_same() {
        let object = Name::new("ns", "web");
        let name = |note, uid, node| event_name(&event(Reason::NotServed, note), &object, uid, node);
        assert_eq!(name("a", "1", None), name("a", "1", None));
        let others = [
            name("b", "1", None),
            name("a", "2", None),
            name("a", "1", Some("node1")),
        ];
        assert!(!others.contains(&name("a", "1", None)), "{others:?}");
        assert!(name("a", "1", None).starts_with("web."));
    }

    #[test]
    fn a_note_is_cut_between_characters() {
        let long = "ä".repeat(600);
        assert_eq!(shortened(&long).len(), 1024);
        let odd = format!("a{long}");
        assert_eq!(shortened(&odd).len(), 1023);
        assert_eq!(shortened("short"), "short");
    }

    #[test]
    fn a_burst_is_sent_and_then_few() {
        let ago = |age| Instant::now().checked_sub(age).unwrap();
        let mut budget = Budget {
            left: BURST,
            filled: ago(EVERY * 1000),
        };
        let take = |budget: &mut Budget| (0..100).filter(|_| budget.take()).count();
        assert_eq!(take(&mut budget), 25);
        budget.filled = ago(EVERY * 3);
        assert_eq!(take(&mut budget), 3);
        budget.filled = ago(EVERY * 1000);
        assert_eq!(take(&mut budget), 25);
    }
}
