//! The schema `scenario-services/1`. What it does not name is an error, so that nothing is passed over in silence.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::manifests::check_kind;
use crate::worker::protocol::Proto;

pub const SCHEMA: &str = "scenario-services/1";

/// Flags that the runner sets itself.
const NOT_FOR_FILES: [&str; 8] = [
    "--manifests",
    "--node-name",
    "--bpffs",
    "--cgroup",
    "--socket",
    "--socket-lb",
    "--datapath",
    "--node-port-addresses",
];

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub schema: String,
    pub id: String,
    pub name: String,
    #[serde(default)]
    pub source: Value,
    #[serde(default)]
    pub tags: Vec<String>,
    #[serde(default)]
    pub notes: Value,
    #[serde(default)]
    pub config: Config,
    pub nodes: Vec<Value>,
    #[serde(default)]
    pub pods: Vec<Pod>,
    #[serde(default)]
    pub node_extra_ips: BTreeMap<String, Vec<IpAddr>>,
    #[serde(default)]
    pub externals: Vec<External>,
    #[serde(default)]
    pub objects: Vec<Value>,
    pub steps: Vec<Step>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(rename = "nodePortAddresses")]
    pub node_port_addresses: Option<NodePortAddresses>,
    /// Zone labels in place of the manifests' own; null removes the label.
    #[serde(default)]
    pub node_zone: BTreeMap<String, Option<String>>,
    /// More flags of `dataplane-agent run`, for our own files: the shared schema does not have it.
    #[serde(default)]
    pub agent_args: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum NodePortAddresses {
    Word(Primary),
    Ranges(Vec<String>),
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Primary {
    Primary,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pod {
    pub name: String,
    pub node: String,
    pub ip: Option<IpAddr>,
    pub ip6: Option<IpAddr>,
    #[serde(default, rename = "hostNetwork")]
    pub host_network: bool,
    #[serde(default)]
    pub listen: Vec<Listen>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    pub proto: Proto,
    pub port: u16,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct External {
    pub name: String,
    pub ip: Option<IpAddr>,
    pub ip6: Option<IpAddr>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    #[serde(default)]
    pub note: Value,
    #[serde(default)]
    pub actions: Vec<Action>,
    #[serde(default)]
    pub probes: Vec<Probe>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    pub verb: Verb,
    pub object: Option<Value>,
    pub seconds: Option<f64>,
    #[serde(default)]
    pub note: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verb {
    Create,
    Update,
    Delete,
    Wait,
    AgentStop,
    AgentStart,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Probe {
    #[serde(default)]
    pub id: String,
    pub from: From,
    pub to: Option<To>,
    pub http_get: Option<String>,
    pub flow: Option<String>,
    pub action: Option<FlowAction>,
    pub via_node: Option<String>,
    pub connections: Option<u32>,
    pub min_share: Option<f64>,
    pub interval_seconds: Option<f64>,
    pub must_equal_backend: Option<Reference>,
    /// Every connection has a new source port anyway; the key is known and asks for nothing more.
    pub new_source_port_each: Option<bool>,
    pub repeat_until_backend_changes: Option<Repeat>,
    pub within_seconds: Option<f64>,
    #[serde(default)]
    pub note: Value,
    pub expect: Expect,
}

/// An earlier backend: that of the same client to the same destination, that of a probe, or one by name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Reference {
    Previous(bool),
    Named(String),
}

/// How often to try again: as often as `connections` says, or so many times.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Repeat {
    Asked(bool),
    Times(u32),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct From {
    pub kind: FromKind,
    pub name: String,
    pub ip: Option<IpAddr>,
    pub source_port: Option<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FromKind {
    Pod,
    Node,
    External,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct To {
    pub ip: IpAddr,
    pub port: u16,
    pub proto: Proto,
}

impl To {
    pub fn addr(self) -> SocketAddr {
        SocketAddr::new(self.ip, self.port)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FlowAction {
    Start,
    Continue,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    pub outcome: Outcome,
    #[serde(default)]
    pub backends: Vec<String>,
    #[serde(default)]
    pub exact_set: bool,
    #[serde(default)]
    pub backend_pods: Vec<String>,
    #[serde(default)]
    pub backends_pods_any_of: Vec<String>,
    pub client_ip_preserved: Option<bool>,
    /// Information about kube-proxy only.
    #[serde(default)]
    pub kube_proxy_masq: Value,
    #[serde(default)]
    pub strict_kind: bool,
    pub sticky: Option<bool>,
    pub undefined: Option<String>,
    /// Backends that are the client itself; known by their names anyway.
    #[serde(default)]
    pub hairpin_backend: Value,
    pub status: Option<u16>,
    #[serde(rename = "localEndpoints")]
    pub local_endpoints: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Reach,
    Reject,
    Drop,
    Fail,
    Http,
    Undefined,
}

impl Probe {
    /// Whether the probe decides about its scenario.
    pub fn counts(&self) -> bool {
        self.expect.undefined.is_none() && self.expect.outcome != Outcome::Undefined
    }
}

impl Scenario {
    /// Decodes and validates a file's text.
    pub fn parse(text: &[u8]) -> Result<Self> {
        let mut scenario: Self = serde_json::from_slice(text)?;
        scenario.name_probes();
        scenario.check()?;
        Ok(scenario)
    }

    pub fn probes(&self) -> impl Iterator<Item = &Probe> {
        self.steps.iter().flat_map(|step| &step.probes)
    }

    fn name_probes(&mut self) {
        let probes = self.steps.iter_mut().flat_map(|step| &mut step.probes);
        for (number, probe) in probes.enumerate().filter(|(_, probe)| probe.id.is_empty()) {
            probe.id = format!("p{}", number + 1);
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(self.schema == SCHEMA, "unknown schema {:?}", self.schema);
        for object in &self.nodes {
            ensure!(
                object["kind"] == "Node",
                "unknown kind {} among nodes",
                object["kind"]
            );
        }
        for object in &self.objects {
            check_kind(object)?;
        }
        for arg in &self.config.agent_args {
            let flag = arg.split('=').next().unwrap_or_default();
            ensure!(
                !NOT_FOR_FILES.contains(&flag),
                "agent_args: {flag} is chosen by the run or by a key of its own"
            );
        }
        for action in self.steps.iter().flat_map(|step| &step.actions) {
            action.check()?;
        }
        for probe in self.probes() {
            probe.check().with_context(|| format!("probe {}", probe.id))?;
        }
        ensure!(
            self.probes().next().is_some(),
            "the scenario has no counted probe"
        );
        Ok(())
    }
}

impl Action {
    fn check(&self) -> Result<()> {
        let (object, seconds) = match self.verb {
            Verb::Create | Verb::Update | Verb::Delete => (true, false),
            Verb::Wait => (false, true),
            Verb::AgentStop | Verb::AgentStart => (false, false),
        };
        ensure!(
            self.object.is_some() == object,
            "{:?}: an object belongs to create, update and delete",
            self.verb
        );
        ensure!(
            self.seconds.is_some() == seconds,
            "{:?}: seconds belong to wait",
            self.verb
        );
        if let Some(seconds) = self.seconds {
            ensure!((0.0..=600.0).contains(&seconds), "cannot wait {seconds} seconds");
        }
        self.object.as_ref().map_or(Ok(()), check_kind)
    }
}

impl Probe {
    fn check(&self) -> Result<()> {
        let is_http = self.http_get.is_some();
        ensure!(is_http != self.to.is_some(), "either `to` or `http_get`");
        ensure!(
            self.flow.is_some() == self.action.is_some(),
            "`flow` and `action` belong together"
        );
        ensure!(self.flow.is_none() || !is_http, "a flow has no `http_get`");
        let Expect {
            outcome,
            status,
            sticky,
            ..
        } = &self.expect;
        match outcome {
            Outcome::Http => ensure!(
                is_http && status.is_some(),
                "outcome http needs `http_get` and a status"
            ),
            Outcome::Reach if !self.counts() => {}
            Outcome::Reach if self.flow.is_some() => {
                ensure!(
                    !self.expected_pods().is_empty(),
                    "a flow that reaches names no backend"
                );
            }
            Outcome::Reach => ensure!(
                !is_http && !self.expect.backends.is_empty(),
                "outcome reach names no backend"
            ),
            Outcome::Reject | Outcome::Drop | Outcome::Fail | Outcome::Undefined => {
                ensure!(sticky.is_none(), "only a probe that reaches can be sticky");
            }
        }
        if let Some(seconds) = self.interval_seconds.or(self.within_seconds) {
            ensure!(
                (0.0..=600.0).contains(&seconds),
                "{seconds} seconds are out of range"
            );
        }
        if self.connections == Some(0) {
            bail!("no connections were asked for");
        }
        Ok(())
    }

    /// Pods one of which must answer a flow.
    pub fn expected_pods(&self) -> &[String] {
        let Expect {
            backends_pods_any_of: any_of,
            backend_pods,
            ..
        } = &self.expect;
        if any_of.is_empty() { backend_pods } else { any_of }
    }
}
