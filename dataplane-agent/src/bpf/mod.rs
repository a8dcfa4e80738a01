//! Everything that talks to the kernel's BPF: the object and its names, the loader, pins, links and system calls.
//! Nothing else in the agent makes a BPF system call.

pub mod constants;
pub mod counters;
pub mod debug_log;
pub mod events;
pub mod kernel;
pub mod links;
pub mod loader;
pub mod maps;
pub mod pins;
pub mod purposes;
pub mod sys;
pub mod upgrade;
pub mod verdicts;
pub mod world;

/// The BPF object, or nothing when the agent was built without it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("DATAPLANE_OBJECT"));

/// Where a program is attached, as the kernel numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hook {
    Xdp,
    TcIngress,
    TcEgress,
    Cgroup(u32),
}

impl Hook {
    /// `enum bpf_attach_type`; for TC that of TCX.
    pub fn attach_type(self) -> u32 {
        match self {
            Hook::Xdp => 37,
            Hook::TcIngress => 46,
            Hook::TcEgress => 47,
            Hook::Cgroup(attach_type) => attach_type,
        }
    }
}

macro_rules! programs {
    ($($name:ident = $symbol:literal at $hook:expr,)+) => {
        /// The programs of the object.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Program { $($name,)+ }

        impl Program {
            pub const ALL: &[Program] = &[$(Program::$name,)+];

            /// The symbol in the object (of XDP there are two, see `loader`), and the first part of the names of its pinned links.
            pub const fn symbol(self) -> &'static str {
                match self { $(Program::$name => $symbol,)+ }
            }

            pub const fn hook(self) -> Hook {
                match self { $(Program::$name => $hook,)+ }
            }
        }
    };
}

programs! {
    Xdp = "xdp" at Hook::Xdp,
    FromNetdev = "from_netdev" at Hook::TcIngress,
    ToNetdev = "to_netdev" at Hook::TcEgress,
    FromL3dev = "from_l3dev" at Hook::TcIngress,
    ToL3dev = "to_l3dev" at Hook::TcEgress,
    ToLo = "to_lo" at Hook::TcEgress,
    FromPod = "from_pod" at Hook::TcIngress,
    ToPod = "to_pod" at Hook::TcEgress,
    Connect4 = "connect4" at Hook::Cgroup(10),
    Connect6 = "connect6" at Hook::Cgroup(11),
    Sendmsg4 = "sendmsg4" at Hook::Cgroup(14),
    Sendmsg6 = "sendmsg6" at Hook::Cgroup(15),
    Recvmsg4 = "recvmsg4" at Hook::Cgroup(19),
    Recvmsg6 = "recvmsg6" at Hook::Cgroup(20),
    Getpeername4 = "getpeername4" at Hook::Cgroup(29),
    Getpeername6 = "getpeername6" at Hook::Cgroup(30),
}

impl Program {
    pub fn by_symbol(symbol: &str) -> Option<Program> {
        Program::ALL
            .iter()
            .copied()
            .find(|program| program.symbol() == symbol)
    }

    pub fn is_cgroup(self) -> bool {
        matches!(self.hook(), Hook::Cgroup(_))
    }

    /// For devices without link layer, which most nodes don't have: loaded when the first is seen.
    pub fn is_late(self) -> bool {
        matches!(self, Program::FromL3dev | Program::ToL3dev)
    }
}

/// The maps of the object that the agent opens by name.
pub mod map_names {
    pub const VERDICTS: &str = "VERDICTS";
    pub const FRONTENDS_V4: &str = "FRONTENDS_V4";
    pub const FRONTENDS_V6: &str = "FRONTENDS_V6";
    pub const SERVICES: &str = "SERVICES";
    pub const BACKENDS: &str = "BACKENDS";
    pub const MAGLEV: &str = "MAGLEV";
    pub const AFFINITY_V4: &str = "AFFINITY_V4";
    pub const AFFINITY_V6: &str = "AFFINITY_V6";
    pub const RANGES_V4: &str = "RANGES_V4";
    pub const RANGES_V6: &str = "RANGES_V6";
    pub const FLOWS_V4: &str = "FLOWS_V4";
    pub const FLOWS_V6: &str = "FLOWS_V6";
    pub const HALF_OPEN_V4: &str = "HALF_OPEN_V4";
    pub const HALF_OPEN_V6: &str = "HALF_OPEN_V6";
    pub const DATAGRAMS_V4: &str = "DATAGRAMS_V4";
    pub const DATAGRAMS_V6: &str = "DATAGRAMS_V6";
    pub const HELD: &str = "HELD";
    pub const FRAGMENT_SOURCES: &str = "FRAGMENT_SOURCES";
    pub const OWN_ADDRS_V4: &str = "OWN_ADDRS_V4";
    pub const OWN_ADDRS_V6: &str = "OWN_ADDRS_V6";
    pub const PORTS: &str = "PORTS";
    pub const DEVICES: &str = "DEVICES";
    pub const POLICY_REVISION: &str = "POLICY_REVISION";
    pub const POD_RANGES: &str = "POD_RANGES";
    pub const BOUND_V4: &str = "BOUND_V4";
    pub const BOUND_V6: &str = "BOUND_V6";
    pub const SOURCES_V4: &str = "SOURCES_V4";
    pub const SOURCES_V6: &str = "SOURCES_V6";
    pub const SOURCE_CHECKED: &str = "SOURCE_CHECKED";
    pub const POD_POLICY: &str = "POD_POLICY";
    pub const PEERS_V4: &str = "PEERS_V4";
    pub const PEERS_V6: &str = "PEERS_V6";
    pub const CIDRS_V4: &str = "CIDRS_V4";
    pub const CIDRS_V6: &str = "CIDRS_V6";
    pub const POLICY_SETS: &str = "POLICY_SETS";
    pub const PEER_RULES: &str = "PEER_RULES";
    pub const PORT_RULES: &str = "PORT_RULES";
    pub const RULE_BITS: &str = "RULE_BITS";
    pub const RULES: &str = "RULES";
    pub const RULE_HITS: &str = "RULE_HITS";
    pub const SET_HITS: &str = "SET_HITS";
    pub const POLICY_FLOWS_V4: &str = "POLICY_FLOWS_V4";
    pub const POLICY_FLOWS_V6: &str = "POLICY_FLOWS_V6";
    pub const SOCK_CHOSEN: &str = "SOCK_CHOSEN";
    pub const SOCK_REVERSE_V4: &str = "SOCK_REVERSE_V4";
    pub const SOCK_REVERSE_V6: &str = "SOCK_REVERSE_V6";
    pub const SERVICE_TRAFFIC: &str = "SERVICE_TRAFFIC";
    pub const BACKEND_TRAFFIC: &str = "BACKEND_TRAFFIC";
    pub const VERDICTS_TOLD: &str = "VERDICTS_TOLD";
    pub const EVENTS: &str = "EVENTS";
    pub const MONITOR: &str = "MONITOR";
    pub const COUNTERS: &str = "COUNTERS";
    pub const FLOW_EVENTS: &str = "FLOW_EVENTS";
    pub const MIDSTREAM: &str = "MIDSTREAM";
}
