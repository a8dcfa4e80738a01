//! What happens to objects that somebody may want to know of: one place, from which it is logged and counted, and from
//! which Kubernetes Events can be sent.

use tokio::sync::mpsc;

use crate::{metrics::Metrics, model::ObjectRef};

/// Of many events at once so many are logged one by one; `services --problems` always lists all.
const LOGGED_AT_MOST: usize = 20;

/// The types of Kubernetes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    Normal,
    Warning,
}

impl EventKind {
    pub const fn as_str(self) -> &'static str {
        match self {
            EventKind::Normal => "Normal",
            EventKind::Warning => "Warning",
        }
    }
}

/// Why there is an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    NotServed,
    SourceNotFollowed,
    NoProblemAnyMore,
    TableFull,
    WriteRefused,
    OtherProxy,
}

impl Reason {
    pub const ALL: [Reason; 6] = [
        Reason::NotServed,
        Reason::SourceNotFollowed,
        Reason::NoProblemAnyMore,
        Reason::TableFull,
        Reason::WriteRefused,
        Reason::OtherProxy,
    ];

    /// As Kubernetes spells reasons.
    pub const fn as_str(self) -> &'static str {
        match self {
            Reason::NotServed => "NotServed",
            Reason::SourceNotFollowed => "SourceNotFollowed",
            Reason::NoProblemAnyMore => "NoProblemAnyMore",
            Reason::TableFull => "TableFull",
            Reason::WriteRefused => "WriteRefused",
            Reason::OtherProxy => "OtherProxy",
        }
    }

    pub const fn kind(self) -> EventKind {
        match self {
            Reason::NoProblemAnyMore => EventKind::Normal,
            Reason::NotServed
            | Reason::SourceNotFollowed
            | Reason::TableFull
            | Reason::WriteRefused
            | Reason::OtherProxy => EventKind::Warning,
        }
    }

    /// What it means, for people.
    pub const fn text(self) -> &'static str {
        match self {
            Reason::NotServed => "an object, or a part of it, is not served because of what it says",
            Reason::SourceNotFollowed => {
                "what the API server says is not known; what it said last stays in force"
            }
            Reason::NoProblemAnyMore => "what an event told of is in order again",
            Reason::TableFull => "an object, or a part of it, is not served because a table has no room",
            Reason::WriteRefused => {
                "an object, or a part of it, is not served because the kernel refused a write"
            }
            Reason::OtherProxy => "kube-proxy's rules are on this node too",
        }
    }
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub reason: Reason,
    /// The object concerned; `None` for what belongs to none, or to one that could not be read.
    pub regarding: Option<ObjectRef>,
    /// For people, with the object's name where it is known.
    pub note: String,
}

/// Where events go.
#[derive(Clone, Debug, Default)]
pub struct Recorder {
    metrics: Metrics,
    /// Who sends them to Kubernetes.
    kubernetes: Option<mpsc::Sender<Event>>,
}

impl Recorder {
    pub fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            kubernetes: None,
        }
    }

    /// Sends what happens from now on to Kubernetes too.
    pub fn send_to(&mut self, kubernetes: mpsc::Sender<Event>) {
        self.kubernetes = Some(kubernetes);
    }

    /// Records what happened at once.
    pub fn record(&self, events: &[Event]) {
        if let Some(kubernetes) = &self.kubernetes {
            for event in events {
                if kubernetes.try_send(event.clone()).is_err() {
                    // More than wait are more than would be sent.
                    self.metrics.source.events_dropped.inc();
                }
            }
        }
        for reason in Reason::ALL {
            let of_reason: Vec<&Event> = events.iter().filter(|event| event.reason == reason).collect();
            self.metrics.event(reason, of_reason.len());
            for event in of_reason.iter().take(LOGGED_AT_MOST) {
                log(reason, &event.note);
            }
            if of_reason.len() > LOGGED_AT_MOST {
                let more = of_reason.len() - LOGGED_AT_MOST;
                log(
                    reason,
                    &format!("and {more} more: `services --problems` lists what is not served"),
                );
            }
        }
    }
}

fn log(reason: Reason, note: &str) {
    let text = reason.as_str();
    match reason.kind() {
        EventKind::Normal => tracing::info!(reason = text, "{note}"),
        EventKind::Warning => tracing::warn!(reason = text, "{note}"),
    }
}
