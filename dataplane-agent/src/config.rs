//! The agent's configuration, resolved: flags over environment over file over defaults (see [`crate::args`]).

use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use ipnet::IpNet;

use crate::{
    source::kube::Address,
    store::{Limits, policy::PolicyLimits},
};

/// Everything that `run` is told.
#[expect(clippy::struct_excessive_bools, reason = "as many independent settings")]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The name of this node's Node object.
    pub node_name: String,
    pub source: SourceConfig,
    /// Patterns of uplinks, first match first, each element a comma list as typed; empty: found by default route
    /// and node address.
    pub devices: Vec<String>,
    /// The bpffs folder under which maps and links are pinned.
    pub bpffs: PathBuf,
    /// The cgroup v2 folder for socket hooks; `None`: the root of the hierarchy found in /proc/mounts.
    pub cgroup: Option<PathBuf>,
    /// Where probes are answered; `None`: nowhere.
    pub health_addr: Option<SocketAddr>,
    /// Where `/metrics` is served; `None`: nowhere.
    pub metrics_addr: Option<SocketAddr>,
    /// So many Services have metrics of their own.
    pub service_metrics: u32,
    /// The unix socket of `wait`.
    pub socket: PathBuf,
    pub socket_lb: SocketLb,
    pub datapath: DatapathMode,
    pub fast_path: FastPath,
    /// Source ports for translation.
    pub snat_ports: PortRange,
    /// The cluster's node port range.
    pub node_ports: PortRange,
    pub node_port_addresses: NodePortAddresses,
    /// Node ports answer this host's own processes at 127.0.0.1 too.
    pub localhost_node_ports: bool,
    pub service_echo: ServiceEcho,
    /// Serve `spec.externalIPs`.
    pub external_ips: bool,
    pub source_ranges_for: SourceRangesFor,
    pub policy_changes: PolicyChanges,
    /// What a Pod sends has an address of the Pod as its source.
    pub source_check: bool,
    pub policy_mode: PolicyMode,
    pub verdicts: Verdicts,
    pub sizes: Sizes,
    /// Log what the datapath does with packets.
    pub debug_log: bool,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// A folder of manifests.
    Folder(PathBuf),
    /// The API server.
    Kube(Address),
}

/// Entries of each table that can be sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// What the agent's own tables hold.
    pub limits: Limits,
    /// Each of `AFFINITY_V4` and `AFFINITY_V6`.
    pub affinity: u32,
    /// Each of `FLOWS_V4` and `FLOWS_V6`.
    pub flows: u32,
    /// Each of `POLICY_FLOWS_V4` and `POLICY_FLOWS_V6`.
    pub policy_flows: u32,
    /// Each of `HALF_OPEN_V4` and `HALF_OPEN_V6`.
    pub half_open: u32,
    /// Each of `DATAGRAMS_V4` and `DATAGRAMS_V6`.
    pub datagrams: u32,
    /// `HELD`.
    pub held: u32,
    /// Each of `SOCK_CHOSEN`, `SOCK_REVERSE_V4` and `SOCK_REVERSE_V6`.
    pub sockets: u32,
    /// Each of `OWN_ADDRS_V4` and `OWN_ADDRS_V6`.
    pub own_addresses: u32,
    /// `DEVICES`.
    pub devices: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        let object = dataplane_common::config::Config::DEFAULT;
        Self {
            limits: Limits {
                frontends: 131_072,
                services: object.services,
                backends: object.backends,
                maglev: object.maglev,
                source_ranges: 65_536,
                policy: PolicyLimits::new(131_072, 16_384, 32_768),
            },
            affinity: 65_536,
            flows: 262_144,
            policy_flows: 131_072,
            half_open: 65_536,
            datagrams: 16_384,
            held: object.held,
            sockets: 131_072,
            own_addresses: 4096,
            devices: 1024,
        }
    }
}

/// `--socket-lb`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SocketLb {
    /// As `host-only`.
    Auto,
    Off,
    /// Processes in the host's network namespace.
    HostOnly,
    /// Pods too.
    All,
}

/// `--datapath`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DatapathMode {
    /// XDP where the device's driver has it, TC on the others, and on veths, whose other end may take nothing from XDP.
    Auto,
    Xdp,
    Tc,
}

/// `--fast-path`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FastPath {
    /// Off where FORWARD holds another policy engine's rules.
    Auto,
    On,
    Off,
}

/// `--source-ranges-for`: which addresses of a Service its `loadBalancerSourceRanges` guard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceRangesFor {
    /// Those of its load balancer.
    #[default]
    Lb,
    /// Its node ports and external addresses too.
    All,
}

/// `--service-echo`: what becomes of ICMP echo requests (ping) to Service addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ServiceEcho {
    /// They are none of our business, as they are none of kube-proxy's by iptables: nobody takes an answer for a sign
    /// that there are endpoints.
    #[default]
    Ignore,
    /// The node answers, whether there are endpoints or not.
    Answer,
}

/// `--policy-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyMode {
    #[default]
    Enforce,
    /// Every policy reports what it would do, and does nothing: as if each were annotated so.
    DryRun,
}

/// `--policy-changes`: which flows a change of policies is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicyChanges {
    /// All: one that is under way is judged again at its next packet, and ends where it is denied now.
    #[default]
    All,
    /// Those that begin later: one that was allowed goes on.
    NewFlows,
}

/// `--verdicts`: which verdicts of policies are told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdicts {
    /// What is denied, and what dry runs would change.
    #[default]
    Denied,
    /// Flows that policies allow too, once each.
    All,
}

/// An inclusive range of ports, written `A-B`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct PortRange {
    pub min: u16,
    pub max: u16,
}

impl PortRange {
    /// The ports that two ranges share.
    pub fn shared(self, other: Self) -> Option<Self> {
        let (min, max) = (self.min.max(other.min), self.max.min(other.max));
        (min <= max).then_some(Self { min, max })
    }
}

impl std::fmt::Display for PortRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}-{}", self.min, self.max)
    }
}

impl std::str::FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no port range such as 30000-32767");
        let (min, max) = text.split_once('-').ok_or_else(wrong)?;
        let min: u16 = min.trim().parse().map_err(|_| wrong())?;
        let max: u16 = max.trim().parse().map_err(|_| wrong())?;
        if min == 0 {
            return Err(format!("port range `{text}` begins with 0, which is no port"));
        }
        if min > max {
            return Err(format!("port range `{text}` ends before it begins"));
        }
        Ok(Self { min, max })
    }
}

impl TryFrom<String> for PortRange {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// `--node-port-addresses`: the own addresses at which node ports answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every own address except loopback, IPv6 link-local and Service addresses.
    All,
    /// The first `InternalIP` of each family of this node's Node object.
    Primary,
    /// Own addresses inside one of these. A family of which there is none is not restricted, as in kube-proxy.
    Within(Vec<IpNet>),
}

impl NodePortAddresses {
    /// Whether node ports answer at one of the node's own addresses, which is no Service's.
    pub fn answers_at(&self, addr: IpAddr, is_primary: bool) -> bool {
        // Answers to `fe80::/10` would need to know the link.
        let is_link_local = matches!(addr, IpAddr::V6(addr) if addr.is_unicast_link_local());
        if addr.is_loopback() || is_link_local {
            return false;
        }
        match self {
            NodePortAddresses::All => true,
            NodePortAddresses::Primary => is_primary,
            NodePortAddresses::Within(cidrs) => {
                let mut of_family = cidrs
                    .iter()
                    .filter(|cidr| cidr.addr().is_ipv4() == addr.is_ipv4());
                of_family.clone().next().is_none() || of_family.any(|cidr| cidr.contains(&addr))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_ports_answer_at_the_addresses_that_were_asked_for() {
        use NodePortAddresses::{All, Primary, Within};
        let within = |cidrs: &[&str]| Within(cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect());
        for (setting, expected) in [
            (All, "10.0.0.1 169.254.1.1 192.0.2.1 2001:db8::1"),
            (Primary, "10.0.0.1"),
            (within(&["192.0.2.0/24"]), "192.0.2.1 2001:db8::1"),
            (within(&["192.0.2.0/24", "2001:db8:1::/48"]), "192.0.2.1"),
            (within(&["10.9.9.9/8", "::/0"]), "10.0.0.1 2001:db8::1"),
            (within(&["127.0.0.0/8", "fe80::/10"]), ""),
        ] {
            let own = [
                "10.0.0.1",
                "127.0.0.1",
                "169.254.1.1",
                "192.0.2.1",
                "2001:db8::1",
                "::1",
                "fe80::1",
            ];
            let answering = own
                .into_iter()
                .filter(|addr| setting.answers_at(addr.parse().unwrap(), *addr == "10.0.0.1"));
            assert_eq!(answering.collect::<Vec<_>>().join(" "), expected, "{setting:?}");
        }
    }
}
