//! What policies have decided: events of the kernel side, with the names of pods, policies and rules.

use std::{collections::VecDeque, net::IpAddr};

use dataplane_common::{policy::VerdictEvent, reason::Reason};

use super::Agent;
use crate::{
    bpf::verdicts::Verdicts,
    health::Policies,
    model::policy::Direction,
    store::enforced::policy_called,
    sync::policy,
    told::{Told, address, direction},
};

/// As many are kept for those who ask.
const KEPT: usize = 4096;

/// What was told, the oldest first.
#[derive(Debug, Default)]
pub struct Kept {
    told: VecDeque<Told>,
    next: u64,
}

impl Kept {
    fn push(&mut self, told: Told) {
        if self.told.len() == KEPT {
            self.told.pop_front();
        }
        self.next += 1;
        self.told.push_back(Told {
            number: self.next,
            ..told
        });
    }

    /// Those with a higher number.
    pub fn after(&self, number: u64) -> Vec<Told> {
        let later = self.told.iter().filter(|told| told.number > number);
        later.cloned().collect()
    }
}

impl Agent {
    /// Takes what the kernel side has told.
    pub fn take_verdicts(&mut self, verdicts: &mut Verdicts) {
        while let Some(event) = verdicts.take() {
            let rule = verdicts.rule(&event);
            let mut told = Told::of(&event, rule, |addr| self.name_of(addr));
            if let Some(pod) = self.sender_of(&event) {
                told.from = format!("{pod} as {}", told.from);
            }
            if let Some(rule) = rule {
                let policy = self.policy_syncer.policy(rule.policy);
                told.policy = Some(policy.map_or_else(|| policy_called(rule.policy), ToString::to_string));
            } else if event.reason != Reason::SourceNotOwn as u32 {
                let (own, direction) = own_end(&event);
                let audit = event.reason == Reason::DryRunDenied as u32;
                let names = self.isolating(own, direction, audit);
                told.policy = (!names.is_empty()).then(|| names.join(", "));
                told.closed = self.closed(own, direction).filter(|_| told.is_denial());
            }
            tracing::debug!(
                target: "dataplane_agent::verdicts",
                verdict = told.verdict.as_str(),
                direction = told.direction,
                from = told.from,
                to = told.to,
                port = told.port,
                policy = told.policy,
                rule = told.rule,
                "policy verdict"
            );
            self.verdicts.push(told);
        }
    }

    /// The pod that sends what is not from one of its addresses.
    fn sender_of(&self, event: &VerdictEvent) -> Option<&str> {
        let pods = &self.host.as_ref()?.bound_pods;
        (event.reason == Reason::SourceNotOwn as u32)
            .then(|| pods.get(&event.ifindex))
            .flatten()
            .map(String::as_str)
    }

    /// `namespace/pod (address)`, or the address of who is no pod.
    fn name_of(&self, addr: IpAddr) -> String {
        match self.policies.pod_at(addr) {
            Some(pod) => format!("{pod} ({addr})"),
            None => addr.to_string(),
        }
    }

    /// Why the pod with an address is closed in a direction, if something of its policies cannot be written.
    pub(super) fn closed(&self, addr: IpAddr, direction: Direction) -> Option<String> {
        let pod = self.policies.pod_at(addr)?;
        policy::closed(&self.failed, pod, direction).map(str::to_owned)
    }

    /// The policies that isolate the pod with an address; `audit`: where a dry run would, with these.
    fn isolating(&self, addr: IpAddr, direction: Direction, audit: bool) -> Vec<String> {
        let pod = self.policies.pod_at(addr);
        let policies = pod.map_or(&[][..], |pod| self.policies.isolating(pod, direction, audit));
        policies.iter().map(ToString::to_string).collect()
    }

    pub(super) fn policy_names(&self, of: Policies) -> Vec<String> {
        match of {
            Policies::Numbered(number) => {
                let policy = self.policy_syncer.policy(number);
                policy.map(ToString::to_string).into_iter().collect()
            }
            Policies::Isolating(addr, direction) => self.isolating(addr, direction, false),
        }
    }
}

/// The address of the pod whose policies have decided, and in which direction.
fn own_end(event: &VerdictEvent) -> (IpAddr, Direction) {
    let direction = direction(event);
    let own = match direction {
        Direction::Egress => event.src_be,
        Direction::Ingress => event.dst_be,
    };
    (address(event, own), direction)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_numbered_and_the_oldest_are_forgotten() {
        let mut kept = Kept::default();
        for _ in 0..KEPT + 10 {
            kept.push(Told::default());
        }
        let numbers: Vec<u64> = kept.after(0).iter().map(|told| told.number).collect();
        assert_eq!(numbers.first(), Some(&11));
        assert_eq!(numbers.len(), KEPT);
        assert_eq!(kept.after(KEPT as u64 + 8).len(), 2);
    }
}
