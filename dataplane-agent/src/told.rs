//! Verdicts of policies, as the agent tells its commands: events of the kernel side, in words.

use std::{net::IpAddr, time::Duration};

use dataplane_common::{
    addr::{AnyAddr, proto},
    policy::{PolicyRule, VerdictEvent},
    reason::Reason,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{bpf::sys, model::policy::Direction, sync::encode};

/// What was decided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToldVerdict {
    #[default]
    Denied,
    Allowed,
    /// A policy that is a dry run would deny what was allowed.
    WouldDeny,
    /// A policy that is a dry run would allow what was denied.
    WouldAllow,
}

impl ToldVerdict {
    pub const fn as_str(self) -> &'static str {
        match self {
            ToldVerdict::Denied => "denied",
            ToldVerdict::Allowed => "allowed",
            ToldVerdict::WouldDeny => "would deny",
            ToldVerdict::WouldAllow => "would allow",
        }
    }
}

/// One verdict.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Told {
    /// Grows by one with each.
    pub number: u64,
    pub time: Timestamp,
    pub verdict: ToldVerdict,
    /// As in `dataplane_packets_total`.
    pub reason: String,
    /// Of the pod whose policies these are.
    pub direction: String,
    /// `namespace/pod (address)`, or an address.
    pub from: String,
    pub to: String,
    /// The destination's.
    pub port: String,
    /// The policy whose rule decided; where none did, those that isolate the pod in this direction.
    pub policy: Option<String>,
    /// The rule's place in the policy's list for the direction, from 0.
    pub rule: Option<u32>,
    pub action: Option<String>,
    /// Why nothing is allowed there, if something of the pod's policies cannot be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
    /// Verdicts about the pod that were not told before this one, because there were too many.
    pub untold: u32,
}

impl Told {
    /// Whether it is about what has come to pass, and that is a no.
    pub fn is_denial(&self) -> bool {
        self.verdict == ToldVerdict::Denied
    }

    /// An event. `name_of`: what to call an address; whose policy has decided, the caller may know.
    pub fn of(event: &VerdictEvent, rule: Option<PolicyRule>, name_of: impl Fn(IpAddr) -> String) -> Self {
        let reason = Reason::from_number(event.reason);
        let [from, to] = [event.src_be, event.dst_be].map(|addr| name_of(address(event, addr)));
        let port = u16::from_be(event.dport_be);
        let action = rule.and_then(|rule| rule.action());
        Self {
            number: 0,
            time: wall_clock(event.at_ns),
            verdict: match reason {
                Some(Reason::PolicyAllowed) => ToldVerdict::Allowed,
                Some(Reason::DryRunDenied) => ToldVerdict::WouldDeny,
                Some(Reason::DryRunAllowed) => ToldVerdict::WouldAllow,
                _ => ToldVerdict::Denied,
            },
            reason: reason.map_or("unknown", Reason::label).to_owned(),
            direction: direction(event).as_str().to_owned(),
            from,
            to,
            port: match (encode::protocol_name(event.proto), event.proto) {
                (Some(name), proto::ICMP | proto::ICMPV6) => name.to_owned(),
                (Some(name), _) => format!("{port}/{name}"),
                (None, other) => format!("protocol {other}"),
            },
            policy: None,
            rule: rule.map(|rule| rule.place),
            action: action.map(|action| action.label().to_owned()),
            closed: None,
            untold: event.untold,
        }
    }
}

/// Of the pod whose policies these are.
pub fn direction(event: &VerdictEvent) -> Direction {
    if event.outward != 0 {
        Direction::Egress
    } else {
        Direction::Ingress
    }
}

/// An address of the event's family.
pub fn address(event: &VerdictEvent, addr: AnyAddr) -> IpAddr {
    encode::ip(addr, event.family == 6)
}

/// The time of day of a moment on the monotonic clock.
pub fn wall_clock(at_ns: u64) -> Timestamp {
    let age = sys::monotonic().saturating_sub(Duration::from_nanos(at_ns));
    Timestamp::now().checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH)
}
