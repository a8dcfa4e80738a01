//! A server, the way to it, and a source that follows it: what the source has said so far.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use dataplane_agent::{
    events::Event,
    metrics::Metrics,
    model::Object,
    source::{
        self, Change, Source,
        kube::{
            self, Address, Settings,
            state::{Report, State},
        },
    },
};
use dataplane_tests::{
    agent::patient,
    api::{self, account, client::Client, objects, relay::Relay, server::Server},
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// How long something may take to be seen.
const WITHIN: Duration = Duration::from_mins(1);
/// The node whose agent this is.
pub const NODE: &str = "node1";

/// A server of the test's own with the agent's account, reached through a relay.
pub struct Bed {
    pub server: Server,
    pub client: Client,
    pub relay: Relay,
    // Last: the others write into it.
    _dir: tempfile::TempDir,
}

impl Bed {
    /// `None`: there are no programs for it, which was said.
    pub fn start() -> Option<Self> {
        let binaries = api::binaries()?;
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(&binaries, dir.path()).unwrap();
        let client = server.client().unwrap();
        account::install(&client).unwrap();
        let relay = Relay::start(None, server.port()).unwrap();
        let bed = Self {
            server,
            client,
            relay,
            _dir: dir,
        };
        bed.apply(&json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}));
        Some(bed)
    }

    /// The agent's kubeconfig, with a fresh token.
    pub fn kubeconfig(&self) -> PathBuf {
        account::kubeconfig(&self.server, &self.client, "agent", self.relay.port()).unwrap()
    }

    pub fn follow(&self) -> Seen {
        Seen::start(&self.kubeconfig(), &[], NODE)
    }

    pub fn apply(&self, object: &Value) {
        objects::apply(&self.client, object).unwrap();
    }

    pub fn delete(&self, object: &Value) {
        objects::delete(&self.client, object).unwrap();
    }
}

pub fn service(name: &str, ip: u8) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"},
        "spec": {"clusterIP": format!("10.96.1.{ip}"), "ports": [{"port": 80}]},
    })
}

pub fn policy(name: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "namespace": "ns"},
        "spec": {"podSelector": {"matchLabels": {"app": name}}, "policyTypes": ["Ingress"]},
    })
}

/// What a source has said.
pub struct Seen {
    runtime: Runtime,
    source: Source,
    pub objects: BTreeMap<String, Object>,
    pub deleted: Vec<String>,
    pub rejected: Vec<String>,
    pub is_complete: bool,
    revision: u64,
}

impl Seen {
    pub fn start(kubeconfig: &Path, servers: &[String], node: &str) -> Self {
        Self::try_start(kubeconfig, servers, node).unwrap()
    }

    pub fn try_start(kubeconfig: &Path, servers: &[String], node: &str) -> anyhow::Result<Self> {
        let runtime = Runtime::new()?;
        let settings = Settings {
            address: Address {
                kubeconfig: Some(kubeconfig.to_owned()),
                servers: servers.to_vec(),
            },
            node_name: node.to_owned(),
        };
        let state = State::new(Metrics::new().source);
        let source = runtime.block_on(kube::start(settings, state))?;
        Ok(Self {
            runtime,
            source,
            objects: BTreeMap::new(),
            deleted: Vec::new(),
            rejected: Vec::new(),
            is_complete: false,
            revision: 0,
        })
    }

    /// Takes in what comes until this holds.
    #[track_caller]
    pub fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let end = Instant::now() + patient(WITHIN);
        while !holds(self) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                self.take(left),
                "{what}: not within {WITHIN:?}; problems: {:?}; {:?}",
                self.rejected,
                self.report()
            );
        }
    }

    /// Takes in what comes within a time.
    pub fn for_a_time(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while self.take(end.saturating_duration_since(Instant::now())) {}
    }

    /// Makes sure that all that the server holds has been seen.
    #[track_caller]
    pub fn catch_up(&mut self) {
        let end = Instant::now() + patient(WITHIN);
        let revision = loop {
            let rescan = self.source.rescan.clone();
            let asked = self
                .runtime
                .block_on(async { tokio::time::timeout(patient(WITHIN), rescan.now()).await });
            match asked {
                Ok(Some(revision)) => break revision,
                _ => assert!(Instant::now() < end, "not caught up: {:?}", self.report()),
            }
        };
        self.until("the batch of a look", |seen| seen.revision >= revision);
    }

    /// Has the source send an event.
    pub fn tell(&self, event: &Event) {
        let events = self.source.events.as_ref().unwrap();
        events.try_send(event.clone()).unwrap();
    }

    /// Has the source say something of its Node.
    pub fn say(&self, text: &str) {
        let status = self.source.node_status.as_ref().unwrap();
        status.send_replace(Some(text.to_owned()));
    }

    pub fn has(&self, object: &str) -> bool {
        self.objects.contains_key(object)
    }

    pub fn says(&self, text: &str) -> bool {
        self.rejected.iter().any(|one| one.contains(text))
    }

    pub fn report(&self) -> Report {
        match self.source.state.report() {
            source::Report::Api(report) => report,
            source::Report::Folder(report) => panic!("a folder: {report:?}"),
        }
    }

    fn take(&mut self, within: Duration) -> bool {
        let batches = &mut self.source.batches;
        let batch = self
            .runtime
            .block_on(async { tokio::time::timeout(within, batches.recv()).await });
        let Ok(Some(batch)) = batch else { return false };
        self.revision = batch.revision;
        self.is_complete = batch.complete;
        self.rejected = batch.rejected.iter().map(ToString::to_string).collect();
        for change in batch.changes {
            match change {
                Change::Apply { key, object, .. } => {
                    self.objects.insert(key.to_string(), object);
                }
                Change::Delete(key) => {
                    self.objects.remove(&key.to_string());
                    self.deleted.push(key.to_string());
                }
            }
        }
        true
    }
}
