//! What each pinned table is for, in words for whoever looks at it with `dataplane-agent maps` or bpftool.

use super::{map_names as names, upgrade::LAYOUTS};

/// What a table is for; `None`: this version has no such table.
#[must_use]
pub fn purpose(table: &str) -> Option<&'static str> {
    Some(match table {
        names::FRONTENDS_V4 | names::FRONTENDS_V6 => {
            "address and port → service; address 0: any of this node's"
        }
        names::SERVICES => "service → its slice of MAGLEV and its flags",
        names::MAGLEV => "slices: a flow's hash → backend",
        names::BACKENDS => "backend → address, port, state, interface",
        names::PORTS => "which ports have a frontend",
        names::RANGES_V4 | names::RANGES_V6 => "source ranges of services",
        names::AFFINITY_V4 | names::AFFINITY_V6 => "client of a service with affinity → backend",
        names::FLOWS_V4 | names::FLOWS_V6 => "established flow, each direction → its translation",
        names::HALF_OPEN_V4 | names::HALF_OPEN_V6 => "flow that only one end has spoken in → its translation",
        names::DATAGRAMS_V4 | names::DATAGRAMS_V6 => "fragmented datagram → what its first fragment met",
        names::HELD => "fragments that came before their datagram's first one",
        names::FRAGMENT_SOURCES => "source → how many of its fragments are held",
        names::OWN_ADDRS_V4 | names::OWN_ADDRS_V6 => "this node's addresses",
        names::DEVICES => "devices of this node: addresses and what they can do",
        names::POLICY_REVISION => "number of the policies' last change; 0: no policy is in force",
        names::POD_RANGES => "addresses that this node gives to its pods",
        names::BOUND_V4 | names::BOUND_V6 => "address of a pod of this node → its interface",
        names::SOURCES_V4 | names::SOURCES_V6 => "interface of a pod → the address that it sends from",
        names::SOURCE_CHECKED => "interfaces of pods that send from their own addresses alone",
        names::POD_POLICY => "interface of a pod → its sets of rules",
        names::PEERS_V4 | names::PEERS_V6 => "address of a pod or node → its class as a peer",
        names::CIDRS_V4 | names::CIDRS_V6 => "range of addresses → its class as a peer",
        names::POLICY_SETS => "set of rules → where its bits are, and what holds without a rule",
        names::PEER_RULES => "set and class of a peer → rules that it satisfies",
        names::PORT_RULES => "set, protocol and port → rules that they satisfy",
        names::RULE_BITS => "bit sets of rules",
        names::RULES => "rule of a set → what it does, and its name for user space",
        names::RULE_HITS => "how often each rule has decided",
        names::SET_HITS => "how often no rule of a set has decided",
        names::POLICY_FLOWS_V4 | names::POLICY_FLOWS_V6 => "untranslated flow of a pod that policies allow",
        names::VERDICTS => "ring buffer of verdicts for user space",
        names::VERDICTS_TOLD => {
            "interface of a pod → how many verdicts were told of it just now, and its packets that were dropped"
        }
        names::SOCK_CHOSEN => "socket and service → the backend it was given",
        names::SOCK_REVERSE_V4 | names::SOCK_REVERSE_V6 => {
            "socket and backend → the address that its process asked for"
        }
        names::SERVICE_TRAFFIC => {
            "service → connections, packets and bytes that went over it, and what begins nothing"
        }
        names::BACKEND_TRAFFIC => {
            "backend → connections, packets and bytes that went over it, and what begins nothing"
        }
        names::EVENTS => "ring buffer of single packets for `monitor`",
        names::MONITOR => "whether anybody watches",
        names::COUNTERS => "packets by reason, for each CPU",
        names::FLOW_EVENTS => "what happened to flows, for each CPU",
        names::MIDSTREAM => "when a TCP flow was last begun in mid-stream",
        LAYOUTS => "layouts of these tables, for other versions",
        _ => return None,
    })
}
