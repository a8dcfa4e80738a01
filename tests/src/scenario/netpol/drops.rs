//! Whether each drop has a cause: what policies have denied is counted at one of their rules, or at the policies that isolate the
//! Pod; all else has a reason with a name. Nothing may be left over.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use crate::agent::Agents;

/// The reason that policies have, as `status` calls it.
const DENIED: &str = "policy-denied";
/// Reasons that would be our mistakes.
const BROKEN: [&str; 4] = [
    "policy-broken",
    "bad-index",
    "rewrite-failed",
    "flow-insert-failed",
];

/// What was dropped while a table was probed, on all nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Drops {
    /// Packets that policies have denied, each counted at a policy.
    pub denied: u64,
    /// The others, by reason.
    pub others: BTreeMap<String, u64>,
}

/// What the nodes have counted so far.
#[derive(Debug, Default)]
pub struct Counted {
    /// By node and reason.
    reasons: BTreeMap<(String, String), u64>,
    /// By node: denials at rules, and at policies that isolate Pods (at each of them).
    at_policies: BTreeMap<String, u64>,
}

impl Drops {
    pub fn add(&mut self, other: Self) {
        self.denied += other.denied;
        for (reason, count) in other.others {
            *self.others.entry(reason).or_default() += count;
        }
    }
}

impl Counted {
    /// Asks all agents: before a table is probed, with the policies that are in force while it is.
    pub fn before(agents: &Agents) -> Result<Self> {
        let mut counted = Self::default();
        for node in agents.nodes() {
            counted.at_policies(agents, node)?;
            counted.reasons(agents, node)?;
        }
        Ok(counted)
    }

    /// What was dropped since; an error names what nothing accounts for.
    pub fn drops(&self, agents: &Agents) -> Result<Drops> {
        let mut now = Self::default();
        let mut drops = Drops::default();
        for node in agents.nodes() {
            // In the other order: a packet in between must not seem to be denied by nobody.
            now.reasons(agents, node)?;
            now.at_policies(agents, node)?;
            let at_policies = grown(&self.at_policies, &now.at_policies, &node.to_owned());
            let key = (node.to_owned(), DENIED.to_owned());
            let denied = grown(&self.reasons, &now.reasons, &key);
            ensure!(
                denied <= at_policies,
                "{node} has dropped {denied} packets by policies, which account for {at_policies}"
            );
            drops.denied += denied;
        }
        for (key, _) in now.reasons.iter().filter(|((_, reason), _)| reason != DENIED) {
            let count = grown(&self.reasons, &now.reasons, key);
            let (node, reason) = key;
            ensure!(
                count == 0 || !BROKEN.contains(&reason.as_str()),
                "{node} has dropped {count} packets: {reason}"
            );
            if count > 0 {
                *drops.others.entry(reason.clone()).or_default() += count;
            }
        }
        Ok(drops)
    }

    fn reasons(&mut self, agents: &Agents, node: &str) -> Result<()> {
        let status = agents.status(node)?;
        for one in status["counters"].as_array().context("no counters")? {
            let text = |field: &str| one[field].as_str().unwrap_or_default();
            if text("meaning").contains("Dropped") {
                let key = (node.to_owned(), text("reason").to_owned());
                self.reasons.insert(key, one["count"].as_u64().unwrap_or(0));
            }
        }
        Ok(())
    }

    fn at_policies(&mut self, agents: &Agents, node: &str) -> Result<()> {
        let output = agents.command(node, &["policies"])?;
        let enforced: Value = serde_json::from_slice(&output.stdout).context("`policies` printed no JSON")?;
        let policies = enforced["policies"].as_array().context("no policies")?;
        let rules = policies
            .iter()
            .filter_map(|policy| policy["rules"].as_array())
            .flatten();
        let denials = rules
            .filter(|rule| rule["action"] == "deny")
            .filter_map(|rule| rule["verdicts"].as_u64());
        self.at_policies.insert(node.to_owned(), denials.sum());
        Ok(())
    }
}

fn grown<K: Ord>(before: &BTreeMap<K, u64>, now: &BTreeMap<K, u64>, key: &K) -> u64 {
    let of = |counts: &BTreeMap<K, u64>| counts.get(key).copied().unwrap_or(0);
    of(now).saturating_sub(of(before))
}
