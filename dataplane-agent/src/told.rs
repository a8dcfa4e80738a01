//! Verdicts of policies, as the agent tells its commands.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::bpf::sys;

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
    /// The policy whose rule decided; where none did, those that select the pod in this direction.
    pub policy: Option<String>,
    /// The rule's place in the policy's list for the direction, from 0.
    pub rule: Option<u32>,
    pub action: Option<String>,
    /// Verdicts about the pod that were not told before this one, because there were too many.
    pub untold: u32,
}

/// The time of day of a moment on the monotonic clock.
pub fn wall_clock(at_ns: u64) -> Timestamp {
    let age = sys::monotonic().saturating_sub(Duration::from_nanos(at_ns));
    Timestamp::now().checked_sub(age).unwrap_or(Timestamp::UNIX_EPOCH)
}
