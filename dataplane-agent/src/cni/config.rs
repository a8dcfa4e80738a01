//! What the plugin is configured with, and what the plugins before it have done.

use std::{net::IpAddr, path::PathBuf, time::Duration};

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use super::{
    VERSIONS,
    error::{CniError, Code},
};

/// How long the agent may take, in seconds.
const TIMEOUT_S: u32 = 10;

/// The configuration on stdin. Keys that the runtime adds are listed, so that one that is written wrongly is told.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetworkConfig {
    cni_version: String,
    #[expect(dead_code, reason = "a key of every configuration")]
    name: Option<String>,
    #[expect(dead_code, reason = "a key of every configuration")]
    r#type: Option<String>,
    /// The agent's `--socket`.
    #[serde(default = "agent_socket")]
    pub agent_socket: PathBuf,
    /// How long the agent may take until the pod's policies are programmed.
    #[serde(default = "timeout_seconds")]
    timeout_seconds: u32,
    /// What becomes of a pod while no agent runs.
    #[serde(default)]
    pub when_agent_down: WhenAgentDown,
    prev_result: Option<Value>,
    #[expect(dead_code, reason = "what capabilities bring; none is asked for")]
    capabilities: Option<Value>,
    #[expect(dead_code, reason = "what capabilities bring; none is asked for")]
    runtime_config: Option<Value>,
    #[expect(dead_code, reason = "for GC, which has nothing to do")]
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Value>,
    #[expect(dead_code, reason = "of older runtimes")]
    args: Option<Value>,
    #[expect(dead_code, reason = "a key of every configuration")]
    dns: Option<Value>,
    #[expect(dead_code, reason = "a key of every configuration")]
    ipam: Option<Value>,
}

/// `whenAgentDown`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenAgentDown {
    /// The runtime tries again later.
    #[default]
    Fail,
    /// It begins without policies, which come with the agent.
    Allow,
}

impl WhenAgentDown {
    pub fn as_str(self) -> &'static str {
        match self {
            WhenAgentDown::Fail => "fail",
            WhenAgentDown::Allow => "allow",
        }
    }
}

pub fn agent_socket() -> PathBuf {
    "/run/dataplane/agent.sock".into()
}

pub fn timeout_seconds() -> u32 {
    TIMEOUT_S
}

/// A result, as far as it is looked at.
#[derive(Deserialize)]
struct Previous {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Address>,
}

#[derive(Deserialize)]
struct Interface {
    name: String,
    /// The namespace that it is in; none for the host's.
    #[serde(default)]
    sandbox: String,
}

#[derive(Deserialize)]
struct Address {
    address: String,
}

impl NetworkConfig {
    pub fn parse(input: &str) -> Result<Self, CniError> {
        let value: Value = serde_json::from_str(input).map_err(|error| {
            CniError::new(Code::Decode, "failed to parse the configuration").because(error)
        })?;
        let version = value.get("cniVersion").and_then(Value::as_str).unwrap_or("0.1.0");
        if !VERSIONS.contains(&version) {
            return Err(CniError::new(
                Code::Version,
                format!("cniVersion {version} is none of {}", VERSIONS.join(", ")),
            ));
        }
        serde_json::from_value(value)
            .map_err(|error| CniError::new(Code::Config, "invalid configuration").because(error))
    }

    fn previous(&self) -> Result<&Value, CniError> {
        let previous = self.prev_result.as_ref().filter(|result| !result.is_null());
        previous.ok_or_else(|| {
            CniError::new(
                Code::Config,
                "no prevResult: this plugin is chained behind one that makes the pod's interface",
            )
        })
    }

    /// The result of the plugins before, which is ours.
    pub fn result(&self) -> Result<String, CniError> {
        let mut result = self.previous()?.clone();
        if let Some(result) = result.as_object_mut() {
            result.insert("cniVersion".to_owned(), self.cni_version.clone().into());
        }
        Ok(result.to_string())
    }

    fn parsed(&self) -> Result<Previous, CniError> {
        let previous = self.previous()?.clone();
        serde_json::from_value(previous)
            .map_err(|error| CniError::new(Code::Decode, "failed to read prevResult").because(error))
    }

    /// The devices that the plugins before have made in the host's namespace.
    pub fn host_interfaces(&self) -> Vec<String> {
        let interfaces = self
            .parsed()
            .map_or_else(|_| Vec::new(), |previous| previous.interfaces);
        let of_host = interfaces
            .into_iter()
            .filter(|interface| interface.sandbox.is_empty());
        of_host.map(|interface| interface.name).collect()
    }

    /// The pod's addresses.
    pub fn addresses(&self) -> Result<Vec<IpAddr>, CniError> {
        let ips = self.parsed()?.ips.into_iter();
        ips.map(|Address { address }| {
            let net = address.parse::<IpNet>().map(|net| net.addr());
            net.or_else(|_| address.parse()).map_err(|_| {
                CniError::new(
                    Code::Decode,
                    format!("prevResult has `{address}`, which is no address"),
                )
            })
        })
        .collect()
    }

    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout_seconds.into())
    }
}

/// What `CNI_ARGS` says of the Pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodArgs {
    /// `namespace/name`.
    pub name: String,
    /// Empty when unknown.
    pub uid: String,
}

impl PodArgs {
    /// `None`: the container is no Pod.
    pub fn parse(args: &str) -> Result<Option<Self>, CniError> {
        let find = |wanted: &str| {
            let mut pairs = args.split(';').filter_map(|pair| pair.split_once('='));
            pairs.find(|(key, _)| *key == wanted).map(|(_, value)| value)
        };
        let (Some(namespace), Some(name)) = (find("K8S_POD_NAMESPACE"), find("K8S_POD_NAME")) else {
            return Ok(None);
        };
        let uid = find("K8S_POD_UID").unwrap_or_default();
        let is_plain = |text: &str| {
            text.chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
        };
        if namespace.is_empty() || name.is_empty() || ![namespace, name, uid].into_iter().all(is_plain) {
            return Err(CniError::new(
                Code::Environment,
                "CNI_ARGS names a Pod that cannot be",
            ));
        }
        Ok(Some(Self {
            name: format!("{namespace}/{name}"),
            uid: uid.to_owned(),
        }))
    }
}
