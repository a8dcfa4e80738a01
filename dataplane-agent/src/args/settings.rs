//! What `run` takes. Every flag is also a key of the configuration file and an environment variable; the flag counts
//! before the variable, the variable before the file, the file before the default.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
};

use anyhow::Context;
use clap::Args;
use serde::Deserialize;

use super::{BPFFS, SOCKET};
use crate::{
    config::{
        Config, DatapathMode, FastPath, NodePortAddresses, PolicyChanges, PolicyMode, PortRange, ServiceEcho,
        Sizes, SocketLb, SourceConfig, SourceRangesFor, Verdicts,
    },
    source::kube::Address,
    store::{Limits, policy::PolicyLimits},
};

#[derive(Debug, Args)]
pub struct Run {
    /// A YAML file with any of the flags below, by their names without dashes in front.
    #[arg(long, env = "DATAPLANE_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

/// Flags, variables and keys of the file are this one type, so that none can be forgotten.
#[derive(Clone, Debug, Default, Args, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Settings {
    /// The name of this node's Node object.
    #[arg(long, env = "DATAPLANE_NODE_NAME")]
    node_name: Option<String>,
    /// Where Services, policies and all else come from [default: folder if --manifests is given].
    #[arg(long, env = "DATAPLANE_SOURCE", value_enum)]
    source: Option<SourceKind>,
    /// The folder of manifests to serve.
    #[arg(long, env = "DATAPLANE_MANIFESTS")]
    manifests: Option<PathBuf>,
    /// For `--source kube`: the kubeconfig [default: the service account of the pod that the agent runs in].
    #[arg(long, env = "DATAPLANE_KUBECONFIG")]
    kubeconfig: Option<PathBuf>,
    /// For `--source kube`: addresses of the API server such as `https://192.0.2.1:6443`, of which the next is used when one
    /// fails [default: the kubeconfig's, else `KUBERNETES_SERVICE_HOST`, which on a node without another proxy leads nowhere].
    #[arg(long, env = "DATAPLANE_APISERVER", value_delimiter = ',')]
    apiserver: Option<Vec<String>>,
    /// Uplinks: names or patterns, of which the first that matches a device counts (`wg0,eth*`). Default: the
    /// devices of the default route and of the node's addresses.
    #[arg(long, env = "DATAPLANE_DEVICE")]
    device: Option<Vec<String>>,
    /// The BPF file system in which maps and links are pinned [default: /sys/fs/bpf].
    #[arg(long, env = "DATAPLANE_BPFFS")]
    bpffs: Option<PathBuf>,
    /// The cgroup v2 folder whose processes get socket hooks [default: the hierarchy's root].
    #[arg(long, env = "DATAPLANE_CGROUP")]
    cgroup: Option<PathBuf>,
    /// Where /healthz, /livez and /readyz are served, or `off` [default: [::]:10256, which means IPv4 too].
    #[arg(long, env = "DATAPLANE_HEALTH_ADDR")]
    health_addr: Option<ListenAddr>,
    /// Where /metrics is served, or `off` [default: 127.0.0.1:10249].
    #[arg(long, env = "DATAPLANE_METRICS_BIND_ADDRESS")]
    metrics_bind_address: Option<ListenAddr>,
    /// Give so many Services metrics of their own, those to which most connections are tried first; each keeps them until it is gone, and
    /// all others are counted together. 0 to 10000; seven series each [default: 0, which means no metrics of Services].
    #[arg(long, env = "DATAPLANE_SERVICE_METRICS", value_name = "SERVICES")]
    service_metrics: Option<u32>,
    /// The unix socket of `wait` [default: /run/dataplane/agent.sock].
    #[arg(long, env = "DATAPLANE_SOCKET")]
    socket: Option<PathBuf>,
    /// Whose sockets are translated at connect [default: auto, which means host-only].
    #[arg(long, env = "DATAPLANE_SOCKET_LB", value_enum)]
    socket_lb: Option<SocketLb>,
    /// Where packets from outside are handled [default: auto, which means XDP with TC as fall back].
    #[arg(long, env = "DATAPLANE_DATAPATH", value_enum)]
    datapath: Option<DatapathMode>,
    /// Hand packets between pods of this node directly [default: auto].
    #[arg(long, env = "DATAPLANE_FAST_PATH", value_enum)]
    fast_path: Option<FastPath>,
    /// Source ports for translation [default: 61000-65535].
    #[arg(long, env = "DATAPLANE_SNAT_PORTS")]
    snat_ports: Option<PortRange>,
    /// The cluster's node ports [default: 30000-32767].
    #[arg(long, env = "DATAPLANE_NODE_PORTS")]
    node_ports: Option<PortRange>,
    /// At which of the node's addresses node ports answer: CIDRs, which leave a family alone that they do not name, or
    /// `primary` for the Node's first `InternalIP`s [default: all but loopback, IPv6 link-local and Service addresses].
    #[arg(long, env = "DATAPLANE_NODE_PORT_ADDRESSES", value_delimiter = ',')]
    node_port_addresses: Option<Vec<String>>,
    /// Node ports, and host ports of Pods, answer processes of this node at 127.0.0.1 too: kube-proxy's
    /// --iptables-localhost-nodeports. Sets `net.ipv4.conf.lo.route_localnet` [default: false].
    #[arg(long, env = "DATAPLANE_LOCALHOST_NODE_PORTS", num_args = 0..=1, default_missing_value = "true")]
    localhost_node_ports: Option<bool>,
    /// Whether pings (ICMP echo requests) to addresses of Services that are not the node's own are answered
    /// [default: ignore, which is what kube-proxy does].
    #[arg(long, env = "DATAPLANE_SERVICE_ECHO", value_enum)]
    service_echo: Option<ServiceEcho>,
    /// Whether `spec.externalIPs` of Services are served [default: true].
    #[arg(long, env = "DATAPLANE_EXTERNAL_IPS")]
    external_ips: Option<bool>,
    /// Which addresses of a Service its `loadBalancerSourceRanges` guard [default: lb, which is what kube-proxy does].
    #[arg(long, env = "DATAPLANE_SOURCE_RANGES_FOR", value_enum)]
    source_ranges_for: Option<SourceRangesFor>,
    /// Which flows a change of policies is about [default: all].
    #[arg(long, env = "DATAPLANE_POLICY_CHANGES", value_enum)]
    policy_changes: Option<PolicyChanges>,
    /// Whether policies are enforced, or all only report what they would deny and allow, as one that is annotated
    /// `dataplane/dry-run: "true"` [default: enforce].
    #[arg(long, env = "DATAPLANE_POLICY_MODE", value_enum)]
    policy_mode: Option<PolicyMode>,
    /// Whether what a Pod sends is dropped that has no address of the Pod as its source (`source-not-own`); Pods with the annotation
    /// `dataplane/any-source: "true"` are left out [default: true].
    #[arg(long, env = "DATAPLANE_SOURCE_CHECK")]
    source_check: Option<bool>,
    /// Which verdicts of policies are told, for `verdicts` [default: denied].
    #[arg(long, env = "DATAPLANE_VERDICTS", value_enum)]
    verdicts: Option<Verdicts>,
    /// Addresses and ports of Services, by family and scope; 176 bytes each [default: 131072].
    #[arg(long, env = "DATAPLANE_MAX_FRONTENDS")]
    max_frontends: Option<u32>,
    /// Service entries: one for each address and port; 32 bytes each [default: 65536].
    #[arg(long, env = "DATAPLANE_MAX_SERVICES")]
    max_services: Option<u32>,
    /// Endpoints, by port; 40 bytes each [default: 65536].
    #[arg(long, env = "DATAPLANE_MAX_BACKENDS")]
    max_backends: Option<u32>,
    /// 8-byte elements of all Maglev tables together, 26 to 50 for each endpoint of a Service entry [default: 4194304].
    #[arg(long, env = "DATAPLANE_MAX_MAGLEV")]
    max_maglev: Option<u32>,
    /// Source ranges of all Services, by family and address and port that they guard; memory for those in use alone
    /// [default: 65536].
    #[arg(long, env = "DATAPLANE_MAX_SOURCE_RANGES")]
    max_source_ranges: Option<u32>,
    /// Clients that Services with affinity remember, by family and Service entry; 200 bytes each [default: 65536].
    #[arg(long, env = "DATAPLANE_MAX_AFFINITY")]
    max_affinity: Option<u32>,
    /// Established flows, by family and direction; 320 bytes each [default: 262144].
    #[arg(long, env = "DATAPLANE_MAX_FLOWS")]
    max_flows: Option<u32>,
    /// Flows that nobody has answered yet, by family; 320 bytes each [default: 65536].
    #[arg(long, env = "DATAPLANE_MAX_HALF_OPEN")]
    max_half_open: Option<u32>,
    /// Datagrams whose fragments are on their way, by family and hook [default: 16384].
    #[arg(long, env = "DATAPLANE_MAX_DATAGRAMS")]
    max_datagrams: Option<u32>,
    /// Fragments that are held until their datagram's first one comes, 2 KiB each [default: 2048].
    #[arg(long, env = "DATAPLANE_MAX_HELD_FRAGMENTS")]
    max_held_fragments: Option<u32>,
    /// Connected or recently used sockets that are translated, by family; 296 bytes each [default: 131072].
    #[arg(long, env = "DATAPLANE_MAX_SOCKETS")]
    max_sockets: Option<u32>,
    /// Addresses of this node, by family; 168 bytes each [default: 4096].
    #[arg(long, env = "DATAPLANE_MAX_ADDRESSES")]
    max_addresses: Option<u32>,
    /// Uplinks and tunnel devices [default: 1024].
    #[arg(long, env = "DATAPLANE_MAX_DEVICES")]
    max_devices: Option<u32>,
    /// Addresses of Pods and Nodes that policies tell apart, by family; memory for those in use alone [default: 131072].
    #[arg(long, env = "DATAPLANE_MAX_POLICY_PEERS")]
    max_policy_peers: Option<u32>,
    /// Ranges of addresses that policies name, by family; memory for those in use alone [default: 16384].
    #[arg(long, env = "DATAPLANE_MAX_POLICY_RANGES")]
    max_policy_ranges: Option<u32>,
    /// Rules of the policies that select Pods of this node, once for Pods that share all their policies; 100 bytes each and 18 for each CPU,
    /// with what is sized after it [default: 32768].
    #[arg(long, env = "DATAPLANE_MAX_POLICY_RULES")]
    max_policy_rules: Option<u32>,
    /// Flows that policies have allowed and Services do not translate, by family; 100 bytes each [default: 131072].
    #[arg(long, env = "DATAPLANE_MAX_POLICY_FLOWS")]
    max_policy_flows: Option<u32>,
    /// Log a line for every packet that the datapath rewrites, redirects or drops. Slow: for looking into one case.
    #[arg(long, env = "DATAPLANE_DEBUG_LOG", num_args = 0..=1, default_missing_value = "true")]
    debug_log: Option<bool>,
}

/// `--source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum SourceKind {
    /// A folder of manifests.
    Folder,
    /// The Kubernetes API server.
    Kube,
}

/// An address and port, or `off`.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "String")]
struct ListenAddr(Option<SocketAddr>);

/// Where load balancers ask kube-proxy.
const HEALTH_ADDR: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 10256);
/// Where kube-proxy serves its metrics.
const METRICS_ADDR: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

impl ListenAddr {
    fn of(setting: Option<Self>, default: SocketAddr) -> Option<SocketAddr> {
        setting.map_or(Some(default), |ListenAddr(addr)| addr)
    }
}

impl FromStr for ListenAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self(None));
        }
        let addr = text.parse();
        addr.map(|addr| Self(Some(addr)))
            .map_err(|_| format!("`{text}` is neither `off` nor an address and port such as 127.0.0.1:10256"))
    }
}

impl TryFrom<String> for ListenAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// The first of two settings that is set.
macro_rules! first_set {
    ($first:ident, $second:ident: $($field:ident),+ $(,)?) => {
        Settings { $($field: $first.$field.or($second.$field),)+ }
    };
}

impl Settings {
    fn or(self, other: Settings) -> Settings {
        first_set!(self, other:
            node_name, source, manifests, kubeconfig, apiserver, device, bpffs, cgroup, health_addr, metrics_bind_address, service_metrics, socket, socket_lb, datapath, fast_path, snat_ports, node_ports, node_port_addresses, localhost_node_ports, service_echo, external_ips, source_ranges_for, policy_changes, policy_mode, source_check, verdicts, max_frontends, max_services, max_backends, max_maglev,
            max_source_ranges, max_affinity, max_flows, max_half_open, max_datagrams, max_held_fragments, max_sockets, max_addresses, max_devices,
            max_policy_peers, max_policy_ranges, max_policy_rules, max_policy_flows, debug_log,
        )
    }

    fn read(path: &Path) -> anyhow::Result<Settings> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        if text.trim().is_empty() {
            return Ok(Settings::default());
        }
        serde_path_to_error::deserialize(serde_norway::Deserializer::from_str(&text))
            .map_err(|error| {
                let key = error.path().to_string();
                let error = error.into_inner();
                // The parser names the key of a wrong type itself, and says nothing of where a wrong value is.
                if key == "." || error.to_string().starts_with(&key) {
                    error.into()
                } else {
                    anyhow::Error::from(error).context(key)
                }
            })
            .with_context(|| format!("failed to parse {}", path.display()))
    }

    #[expect(clippy::too_many_lines, reason = "one line for each setting")]
    fn resolve(self) -> anyhow::Result<Config> {
        let Settings {
            node_name,
            source,
            manifests,
            kubeconfig,
            apiserver,
            device,
            bpffs,
            cgroup,
            health_addr,
            metrics_bind_address,
            service_metrics,
            socket,
            socket_lb,
            datapath,
            fast_path,
            snat_ports,
            node_ports,
            node_port_addresses,
            localhost_node_ports,
            service_echo,
            external_ips,
            source_ranges_for,
            policy_changes,
            policy_mode,
            source_check,
            verdicts,
            max_frontends,
            max_services,
            max_backends,
            max_maglev,
            max_source_ranges,
            max_affinity,
            max_flows,
            max_half_open,
            max_datagrams,
            max_held_fragments,
            max_sockets,
            max_addresses,
            max_devices,
            max_policy_peers,
            max_policy_ranges,
            max_policy_rules,
            max_policy_flows,
            debug_log,
        } = self;
        let sizes = Sizes::default();
        let limits = sizes.limits;
        let policy = limits.policy;
        let config = Config {
            node_name: node_name
                .filter(|name| !name.is_empty())
                .context("the node has no name: give --node-name")?,
            source: resolve_source(source, manifests, kubeconfig, apiserver)?,
            devices: device.unwrap_or_default(),
            bpffs: bpffs.unwrap_or_else(|| BPFFS.into()),
            cgroup,
            health_addr: ListenAddr::of(health_addr, HEALTH_ADDR),
            metrics_addr: ListenAddr::of(metrics_bind_address, METRICS_ADDR),
            service_metrics: bounded("service-metrics", service_metrics.unwrap_or(0), METRICS_AT_MOST)?,
            socket: socket.unwrap_or_else(|| SOCKET.into()),
            socket_lb: socket_lb.unwrap_or(SocketLb::Auto),
            datapath: datapath.unwrap_or(DatapathMode::Auto),
            fast_path: fast_path.unwrap_or(FastPath::Auto),
            snat_ports: snat_ports.unwrap_or(PortRange {
                min: 61000,
                max: 65535,
            }),
            node_ports: node_ports.unwrap_or(PortRange {
                min: 30000,
                max: 32767,
            }),
            node_port_addresses: parse_node_port_addresses(&node_port_addresses.unwrap_or_default())?,
            localhost_node_ports: localhost_node_ports.unwrap_or(false),
            service_echo: service_echo.unwrap_or_default(),
            external_ips: external_ips.unwrap_or(true),
            source_ranges_for: source_ranges_for.unwrap_or_default(),
            policy_changes: policy_changes.unwrap_or_default(),
            source_check: source_check.unwrap_or(true),
            policy_mode: policy_mode.unwrap_or_default(),
            verdicts: verdicts.unwrap_or_default(),
            sizes: Sizes {
                limits: Limits {
                    frontends: size("max-frontends", max_frontends, limits.frontends, ROWS_AT_MOST)?,
                    services: size("max-services", max_services, limits.services, ROWS_AT_MOST)?,
                    backends: size("max-backends", max_backends, limits.backends, ROWS_AT_MOST)?,
                    maglev: size("max-maglev", max_maglev, limits.maglev, ELEMENTS_AT_MOST)?,
                    source_ranges: size(
                        "max-source-ranges",
                        max_source_ranges,
                        limits.source_ranges,
                        ROWS_AT_MOST,
                    )?,
                    policy: PolicyLimits::new(
                        size("max-policy-peers", max_policy_peers, policy.peers, ROWS_AT_MOST)?,
                        size(
                            "max-policy-ranges",
                            max_policy_ranges,
                            policy.ranges,
                            ROWS_AT_MOST,
                        )?,
                        size("max-policy-rules", max_policy_rules, policy.rules, RULES_AT_MOST)?,
                    ),
                },
                affinity: size("max-affinity", max_affinity, sizes.affinity, FLOWS_AT_MOST)?,
                flows: size("max-flows", max_flows, sizes.flows, FLOWS_AT_MOST)?,
                policy_flows: size(
                    "max-policy-flows",
                    max_policy_flows,
                    sizes.policy_flows,
                    FLOWS_AT_MOST,
                )?,
                half_open: size("max-half-open", max_half_open, sizes.half_open, FLOWS_AT_MOST)?,
                datagrams: size("max-datagrams", max_datagrams, sizes.datagrams, FLOWS_AT_MOST)?,
                held: size("max-held-fragments", max_held_fragments, sizes.held, HELD_AT_MOST)?,
                sockets: size("max-sockets", max_sockets, sizes.sockets, FLOWS_AT_MOST)?,
                own_addresses: size("max-addresses", max_addresses, sizes.own_addresses, ROWS_AT_MOST)?,
                devices: size("max-devices", max_devices, sizes.devices, ROWS_AT_MOST)?,
            },
            debug_log: debug_log.unwrap_or(false),
        };
        let (snat, node) = (config.snat_ports, config.node_ports);
        anyhow::ensure!(
            snat.shared(node).is_none(),
            "--snat-ports {snat} and --node-ports {node} overlap"
        );
        anyhow::ensure!(
            snat.min >= 1024,
            "--snat-ports {snat} begins below 1024, among the ports of this node's own services"
        );
        Ok(config)
    }
}

impl Run {
    /// Puts flags, environment, file and defaults together.
    pub fn resolve(self) -> anyhow::Result<Config> {
        let file = self.config.as_deref().map(Settings::read).transpose()?;
        self.settings.or(file.unwrap_or_default()).resolve()
    }

    /// The configuration as far as it is about the machine: what to serve may be left out.
    pub fn resolve_machine(self) -> anyhow::Result<Config> {
        let file = self.config.as_deref().map(Settings::read).transpose()?;
        let mut settings = self.settings.or(file.unwrap_or_default());
        settings.node_name.get_or_insert_with(|| "this".to_owned());
        if settings.source.is_none() && settings.manifests.is_none() {
            settings.source = Some(SourceKind::Kube);
        }
        settings.resolve()
    }
}

fn resolve_source(
    source: Option<SourceKind>,
    manifests: Option<PathBuf>,
    kubeconfig: Option<PathBuf>,
    apiserver: Option<Vec<String>>,
) -> anyhow::Result<SourceConfig> {
    let folder = match (source, manifests) {
        (Some(SourceKind::Folder) | None, Some(folder)) => folder,
        (Some(SourceKind::Folder), None) => anyhow::bail!("--source folder needs --manifests"),
        (None, None) => anyhow::bail!("there is no source: give --manifests or --source kube"),
        (Some(SourceKind::Kube), Some(_)) => {
            anyhow::bail!("--source kube reads no folder: leave --manifests out")
        }
        (Some(SourceKind::Kube), None) => {
            let servers = apiserver.unwrap_or_default();
            let servers = servers.into_iter().filter(|server| !server.is_empty()).collect();
            return Ok(SourceConfig::Kube(Address { kubeconfig, servers }));
        }
    };
    anyhow::ensure!(
        kubeconfig.is_none() && apiserver.is_none(),
        "--kubeconfig and --apiserver are for --source kube"
    );
    Ok(SourceConfig::Folder(folder))
}

fn parse_node_port_addresses(texts: &[String]) -> anyhow::Result<NodePortAddresses> {
    let texts: Vec<&str> = texts
        .iter()
        .map(|text| text.trim())
        .filter(|text| !text.is_empty())
        .collect();
    if texts.is_empty() {
        return Ok(NodePortAddresses::All);
    }
    if texts == ["primary"] {
        return Ok(NodePortAddresses::Primary);
    }
    let parse = |text: &&str| {
        text.parse()
            .map_err(|_| anyhow::anyhow!("--node-port-addresses: `{text}` is no CIDR such as 192.0.2.0/24"))
    };
    let cidrs: anyhow::Result<Vec<_>> = texts.iter().map(parse).collect();
    cidrs.map(NodePortAddresses::Within)
}

/// A page of 60,000 series is as much as a scrape should carry.
const METRICS_AT_MOST: u32 = 10_000;
/// What fits into the kernel's arithmetic and into memory that a node may have: 2^24 rows that the agent keeps, 2^28
/// elements (2 GiB) of Maglev tables, 2^26 flows (8 GiB and more), 2^22 rules (some 400 MiB).
const ROWS_AT_MOST: u32 = 1 << 24;
const ELEMENTS_AT_MOST: u32 = 1 << 28;
const FLOWS_AT_MOST: u32 = 1 << 26;
const RULES_AT_MOST: u32 = 1 << 22;
const HELD_AT_MOST: u32 = 1 << 20;

/// A size of a table, or its default.
fn size(flag: &str, value: Option<u32>, default: u32, at_most: u32) -> anyhow::Result<u32> {
    let value = value.unwrap_or(default);
    anyhow::ensure!(value > 1, "--{flag} {value} is too small: 2 at the least");
    bounded(flag, value, at_most)
}

fn bounded(flag: &str, value: u32, at_most: u32) -> anyhow::Result<u32> {
    anyhow::ensure!(
        value <= at_most,
        "--{flag} {value} is too large: {at_most} at the most"
    );
    Ok(value)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;
    use crate::args::Cli;

    fn run(arguments: &[&str]) -> anyhow::Result<Config> {
        Cli::config_of(["dataplane-agent", "run"].iter().chain(arguments).copied())
    }

    #[test]
    fn the_chart_takes_every_setting_that_is_not_its_own() {
        let schema = include_str!("../../../deploy/helm/dataplane/values.schema.json");
        let schema: serde_json::Value = serde_json::from_str(schema).unwrap();
        let taken = schema["properties"]["config"]["properties"].as_object().unwrap();
        let taken: BTreeSet<&str> = taken.keys().map(String::as_str).collect();
        let of_chart = [
            "config",
            "node-name",
            "source",
            "manifests",
            "kubeconfig",
            "apiserver",
            "bpffs",
            "cgroup",
            "health-addr",
            "metrics-bind-address",
            "socket",
        ];
        let command = Cli::command();
        let run = command.find_subcommand("run").unwrap();
        let flags = run.get_arguments().filter_map(clap::Arg::get_long);
        let flags: BTreeSet<&str> = flags.filter(|flag| !of_chart.contains(flag)).collect();
        assert_eq!(taken, flags);
    }

    #[test]
    fn a_flag_counts_before_the_file_and_the_file_before_the_default() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text =
            "node-name: a\nmanifests: /m\nmax-flows: 5\nsnat-ports: 50000-50999\nsocket-lb: host-only\n";
        std::fs::write(&file, text).unwrap();
        let config = run(&["--config", file.path().to_str().unwrap(), "--max-flows", "7"]).unwrap();
        assert_eq!(config.sizes.flows, 7);
        assert_eq!(config.snat_ports.min, 50000);
        assert_eq!(config.socket_lb, SocketLb::HostOnly);
        assert_eq!(config.sizes.half_open, 65_536);
        assert_eq!(config.health_addr, Some("[::]:10256".parse().unwrap()));
        assert!(config.external_ips);
        std::fs::write(
            &file,
            format!("{text}health-addr: 127.0.0.1:1\nexternal-ips: false\n"),
        )
        .unwrap();
        let config = run(&["--config", file.path().to_str().unwrap(), "--health-addr", "off"]).unwrap();
        assert_eq!(config.health_addr, None);
        assert_eq!(config.metrics_addr, Some("127.0.0.1:10249".parse().unwrap()));
        assert!(!config.external_ips);
    }

    #[test]
    fn a_mistake_in_the_file_is_named_with_its_key() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (text, expected) in [
            (
                "snat-ports: 9-5\n",
                "snat-ports: port range `9-5` ends before it begins",
            ),
            (
                "max-flows: many\n",
                "max-flows: invalid type: string \"many\", expected u32",
            ),
            ("flows: 5\n", "flows: unknown field `flows`, expected one of"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = run(&["--config", file.path().to_str().unwrap()]).unwrap_err();
            let expected = format!("failed to parse {}: {expected}", file.path().display());
            assert!(
                format!("{error:#}").starts_with(&expected),
                "{error:#}\n{expected}"
            );
        }
    }

    #[test]
    fn what_cannot_work_is_refused_by_name() {
        let refused = |arguments: &[&str]| run(arguments).unwrap_err().to_string();
        assert!(refused(&["--manifests", "/m"]).contains("--node-name"));
        assert!(refused(&["--node-name", "a"]).contains("--manifests"));
        assert!(run(&["--node-name", "a", "--source", "kube"]).is_ok());
        let folder = ["--node-name", "a", "--source", "folder"];
        assert!(refused(&folder).contains("--source folder needs --manifests"));
        let both = ["--node-name", "a", "--source", "kube", "--manifests", "/m"];
        assert!(refused(&both).contains("leave --manifests out"));
        let folder = [
            "--node-name",
            "a",
            "--manifests",
            "/m",
            "--apiserver",
            "https://a",
        ];
        assert!(refused(&folder).contains("are for --source kube"));
        let base = ["--node-name", "a", "--manifests", "/m"];
        for (arguments, expected) in [
            (["--snat-ports", "32000-33000"], "overlap"),
            (["--snat-ports", "80-1000"], "begins below 1024"),
            (["--snat-ports", "0-1000"], "begins with 0"),
            (["--node-ports", "32767-30000"], "ends before it begins"),
            (["--node-ports", "30000"], "is no port range"),
            (["--node-ports", "30000-99999"], "is no port range"),
            (["--node-port-addresses", "10.0.0.0/33"], "CIDR"),
            (["--max-flows", "1"], "--max-flows 1 is too small"),
            (
                ["--max-sockets", "100000000"],
                "--max-sockets 100000000 is too large: 67108864",
            ),
            (["--max-maglev", "4294967296"], "--max-maglev"),
            (
                ["--service-metrics", "10001"],
                "--service-metrics 10001 is too large: 10000",
            ),
        ] {
            let error = refused(&[&base[..], &arguments].concat());
            assert!(error.contains(expected), "{arguments:?}: {error}");
        }
    }
}
