//! Where objects come from. Every source delivers the same [`Batch`]es; only this folder knows how they are found.

pub mod kube;
pub mod manifests;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    events::Event,
    model::{Object, ObjectRef, Origin, Rejected},
};

/// One change of one object.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Apply {
        key: ObjectRef,
        object: Object,
        /// The document it is in, if it is in one.
        origin: Option<Origin>,
    },
    Delete(ObjectRef),
}

/// What has changed since the batch before, together.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Grows with every batch.
    pub revision: u64,
    /// Everything has been read at least once. Until then nothing may be deleted from the tables.
    pub complete: bool,
    pub changes: Vec<Change>,
    /// All that is rejected now, not only what is new.
    pub rejected: Vec<Rejected>,
    /// Documents of kinds that are not read, by kind.
    pub ignored: BTreeMap<String, usize>,
}

/// A running source.
#[derive(Debug)]
pub struct Source {
    pub batches: mpsc::UnboundedReceiver<Batch>,
    pub rescan: Rescan,
    /// What it has read and when.
    pub state: State,
    /// Where it reads from, by TCP.
    pub servers: Vec<SocketAddr>,
    /// Takes Kubernetes Events; `None` where there is nobody to send them to.
    pub events: Option<mpsc::Sender<Event>>,
    /// Takes what this node's Node object should say; `None` where there is nobody to say it to.
    pub node_status: Option<watch::Sender<Option<String>>>,
}

/// What a source has read, and when. Clones are the same one.
#[derive(Clone, Debug)]
pub enum State {
    Api(kube::state::State),
    Folder(Arc<Mutex<manifests::Report>>),
}

/// What `status` shows of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Report {
    Api(kube::state::Report),
    Folder(manifests::Report),
}

impl State {
    pub fn report(&self) -> Report {
        match self {
            State::Api(state) => Report::Api(state.report()),
            State::Folder(report) => {
                Report::Folder(report.lock().unwrap_or_else(PoisonError::into_inner).clone())
            }
        }
    }
}

/// Asks a source to look again.
#[derive(Clone, Debug)]
pub enum Rescan {
    Folder(std::sync::mpsc::Sender<manifests::Request>),
    Api(mpsc::UnboundedSender<oneshot::Sender<u64>>),
}

impl Rescan {
    /// Makes sure that all that the source holds at this moment has been read, and returns the revision that holds it;
    /// `None` when the source has ended or cannot be read.
    pub async fn now(&self) -> Option<u64> {
        let (reply, answer) = oneshot::channel();
        match self {
            Rescan::Folder(requests) => requests.send(manifests::Request::Rescan(reply)).ok()?,
            Rescan::Api(requests) => requests.send(reply).ok()?,
        }
        answer.await.ok()
    }
}
