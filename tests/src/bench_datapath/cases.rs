//! The rows: which program, which floor, which packets, and what the program has to answer.

use dataplane_tests::test_run::NEXT;

/// What is in the tables for the walk's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tables {
    /// Nothing: the packets are not for a service.
    None,
    /// A frontend, and no flow.
    Frontend,
    /// A frontend of a service with `ClientIP` affinity that knows all clients.
    Affinity,
    /// A frontend of a service with source ranges, and a thousand ranges of others.
    Ranges,
    /// A flow for each packet that goes on to the stack.
    Flows,
    /// A flow for each packet that leaves by a route, from this node's address.
    RoutedFlows,
}

/// One case.
#[derive(Debug)]
pub struct Case {
    pub name: &'static str,
    pub program: &'static str,
    pub floor: &'static str,
    pub tables: Tables,
    /// Whether some frontend has the packets' port.
    pub port_in_use: bool,
    /// Whether the source of each packet is compared with the pod's address. An older object does not, if it can't.
    pub checks_sources: bool,
    pub flows: &'static [u32],
    /// What both programs return.
    pub answer: u32,
}

impl Case {
    /// Whether its packets begin flows.
    pub fn begins(&self) -> bool {
        matches!(self.tables, Tables::Frontend | Tables::Affinity | Tables::Ranges)
    }
}

const XDP_PASS: u32 = 2;
const XDP_TX: u32 = 3;
const ALL: &[u32] = &[1, 1 << 16, 1 << 20];

pub const CASES: &[Case] = &[
    Case {
        name: "xdp: not a service",
        program: "xdp",
        floor: "floor_pass_xdp",
        tables: Tables::None,
        port_in_use: false,
        checks_sources: false,
        flows: ALL,
        answer: XDP_PASS,
    },
    Case {
        name: "xdp: not a service, port in use",
        program: "xdp",
        floor: "floor_pass_xdp",
        tables: Tables::None,
        port_in_use: true,
        checks_sources: false,
        flows: ALL,
        answer: XDP_PASS,
    },
    Case {
        name: "from_pod: not a service",
        program: "from_pod",
        floor: "floor_pass_tc",
        tables: Tables::None,
        port_in_use: false,
        checks_sources: false,
        flows: ALL,
        answer: NEXT,
    },
    Case {
        name: "from_pod: not a service, port in use",
        program: "from_pod",
        floor: "floor_pass_tc",
        tables: Tables::None,
        port_in_use: true,
        checks_sources: false,
        flows: ALL,
        answer: NEXT,
    },
    Case {
        name: "from_pod: not a service, source checked",
        program: "from_pod",
        floor: "floor_pass_tc",
        tables: Tables::None,
        port_in_use: false,
        checks_sources: true,
        flows: &[1],
        answer: NEXT,
    },
    Case {
        name: "from_pod: established, source checked",
        program: "from_pod",
        floor: "floor_established_tc",
        tables: Tables::Flows,
        port_in_use: true,
        checks_sources: true,
        flows: &[1],
        answer: NEXT,
    },
    Case {
        name: "from_pod: established, remote backend",
        program: "from_pod",
        floor: "floor_established_tc",
        tables: Tables::Flows,
        port_in_use: true,
        checks_sources: false,
        flows: ALL,
        answer: NEXT,
    },
    Case {
        name: "from_pod: new flow, all inserts",
        program: "from_pod",
        floor: "floor_new_tc",
        tables: Tables::Frontend,
        port_in_use: true,
        checks_sources: false,
        flows: &[1 << 22],
        answer: NEXT,
    },
    Case {
        name: "from_pod: new flow, session affinity",
        program: "from_pod",
        floor: "floor_affinity_tc",
        tables: Tables::Affinity,
        port_in_use: true,
        checks_sources: false,
        flows: &[1 << 22],
        answer: NEXT,
    },
    Case {
        name: "from_pod: new flow, source ranges",
        program: "from_pod",
        floor: "floor_ranges_tc",
        tables: Tables::Ranges,
        port_in_use: true,
        checks_sources: false,
        flows: &[1 << 22],
        answer: NEXT,
    },
    Case {
        name: "xdp: NodePort, SNAT, remote backend",
        program: "xdp",
        floor: "floor_nodeport_xdp",
        tables: Tables::RoutedFlows,
        port_in_use: true,
        checks_sources: false,
        flows: ALL,
        answer: XDP_TX,
    },
    Case {
        name: "from_netdev: NodePort, local backend",
        program: "from_netdev",
        floor: "floor_established_tc",
        tables: Tables::Flows,
        port_in_use: true,
        checks_sources: false,
        flows: ALL,
        answer: NEXT,
    },
];

/// What floods run through.
pub const FLOOD: Case = Case {
    name: "flood",
    program: "from_pod",
    floor: "floor_new_tc",
    tables: Tables::Frontend,
    port_in_use: true,
    checks_sources: false,
    flows: &[],
    answer: NEXT,
};
