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
    /// Each constant is its own name.
    macro_rules! names {
        ($($name:ident)+) => {
            $(pub const $name: &str = stringify!($name);)+

            pub const ALL: &[&str] = &[$($name,)+];
        };
    }

    names! {
        VERDICTS
        FRONTENDS_V4
        FRONTENDS_V6
        SERVICES
        BACKENDS
        MAGLEV
        AFFINITY_V4
        AFFINITY_V6
        RANGES_V4
        RANGES_V6
        FLOWS_V4
        FLOWS_V6
        HALF_OPEN_V4
        HALF_OPEN_V6
        DATAGRAMS_V4
        DATAGRAMS_V6
        HELD
        FRAGMENT_SOURCES
        OWN_ADDRS_V4
        OWN_ADDRS_V6
        PORTS
        DEVICES
        POLICY_REVISION
        POD_RANGES
        BOUND_V4
        BOUND_V6
        SOURCES_V4
        SOURCES_V6
        SOURCE_CHECKED
        POD_POLICY
        PEERS_V4
        PEERS_V6
        CIDRS_V4
        CIDRS_V6
        POLICY_SETS
        PEER_RULES
        PORT_RULES
        RULE_BITS
        RULES
        RULE_HITS
        SET_HITS
        POLICY_FLOWS_V4
        POLICY_FLOWS_V6
        SOCK_CHOSEN
        SOCK_REVERSE_V4
        SOCK_REVERSE_V6
        SERVICE_TRAFFIC
        BACKEND_TRAFFIC
        VERDICTS_TOLD
        EVENTS
        MONITOR
        COUNTERS
        FLOW_EVENTS
        MIDSTREAM
    }
}
