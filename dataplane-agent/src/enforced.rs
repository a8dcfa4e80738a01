//! What policies do on a node, as the agent tells its commands and `/metrics`.

use serde::{Deserialize, Serialize};

use crate::served::Problem;

/// The whole picture.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enforced {
    /// Those that select Pods of this node, by kind and name.
    pub policies: Vec<EnforcedPolicy>,
    /// What of policies is not honoured.
    pub problems: Vec<Problem>,
}

/// A policy.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnforcedPolicy {
    /// `kind namespace/name`.
    pub policy: String,
    pub tier: String,
    /// It reports, and does nothing.
    pub dry_run: bool,
    /// Pods of this node that it selects.
    pub pods: usize,
    pub rules: Vec<EnforcedRule>,
}

/// A rule, or what no rule decides for the Pods that the policy isolates.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnforcedRule {
    pub direction: String,
    /// Its place in the policy's list for the direction, from 0; `None`: no rule. Of several policies that isolate a Pod each counts
    /// what no rule decides.
    pub rule: Option<u32>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    pub action: String,
    /// The other ends that it is about, in words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub peers: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub ports: String,
    /// Flows that it has allowed, and packets that it has denied, at Pods of this node. A flow counts again when it is judged
    /// again, because policies have changed.
    pub verdicts: u64,
    /// The same, of what a dry run would change.
    pub dry_run: u64,
}

/// What policies say about one Pod, in the order in which they are asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfPod {
    /// `namespace/name`.
    pub pod: String,
    pub ingress: OfDirection,
    pub egress: OfDirection,
    /// Why it is closed, where its policies are more than a set or the tables hold.
    pub problems: Vec<Problem>,
}

/// In one direction: the first rule that fits decides, and `pass` leaves what fits to the tiers behind its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfDirection {
    /// A NetworkPolicy selects the Pod: what no rule allows is denied, and the baseline tier is not asked.
    pub isolated: bool,
    /// Why nothing is allowed whatever the rules say, if something of them cannot be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
    /// Each with its rules for the direction. How often they have decided counts all Pods of the node.
    pub policies: Vec<EnforcedPolicy>,
}
