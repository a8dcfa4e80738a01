//! Pods that a CNI plugin has told of: their interfaces are taken as told, and the plugin is answered when their policies are
//! programmed.

use std::collections::BTreeMap;

use tokio::sync::watch;

use super::Agent;
use crate::{
    health::Binding,
    host::{Claim, HostState},
    model::{Name, Pod},
};

/// What is known of them.
#[derive(Debug, Default)]
pub struct Claims {
    by_pod: BTreeMap<Name, Claim>,
    /// Plugins that wait.
    waiting: Vec<(Name, watch::Sender<Binding>)>,
    /// The look at the machine that knows all of them.
    known_by: u64,
}

impl Claims {
    /// Takes over what an earlier process was told.
    pub fn new(told: BTreeMap<String, Claim>) -> Self {
        let by_pod = told
            .into_iter()
            .filter_map(|(pod, claim)| Some((pod.parse().ok()?, claim)));
        Self {
            by_pod: by_pod.collect(),
            ..Self::default()
        }
    }

    pub fn get(&self, pod: &Name) -> Option<&Claim> {
        self.by_pod.get(pod)
    }

    /// By `namespace/name`.
    pub fn by_name(&self) -> BTreeMap<String, Claim> {
        let claims = self.by_pod.iter();
        claims
            .map(|(pod, claim)| (pod.to_string(), claim.clone()))
            .collect()
    }

    /// Forgets those whose interface is gone.
    fn forget_gone(&mut self, host: &HostState) {
        if host.wanted_revision >= self.known_by {
            self.by_pod
                .retain(|_, claim| host.bound_pods.contains_key(&claim.ifindex));
        }
    }
}

impl Agent {
    /// Takes what a plugin tells, and answers when it is in force.
    pub(super) fn take_claim(&mut self, pod: Name, claim: Claim, binding: watch::Sender<Binding>) {
        let news = self.claims.by_pod.insert(pod.clone(), claim.clone()) != Some(claim);
        self.claims.waiting.push((pod, binding));
        if news {
            self.publish_wanted(true);
            self.claims.known_by = self.wanted.borrow().revision;
        }
        self.answer_claims();
    }

    /// Answers the plugins whose pods' policies are in force, and notes what the others wait for.
    pub(super) fn answer_claims(&mut self) {
        if let Some(host) = &self.host {
            self.claims.forget_gone(host);
        }
        let waiting = std::mem::take(&mut self.claims.waiting);
        for (pod, binding) in waiting {
            let state = self.binding(&pod);
            let is_bound = state == Binding::Bound;
            binding.send_replace(state);
            if !is_bound && !binding.is_closed() {
                self.claims.waiting.push((pod, binding));
            }
        }
    }

    fn binding(&self, pod: &Name) -> Binding {
        let Some(claim) = self.claims.get(pod) else {
            return Binding::Waits("its interface is gone");
        };
        let Some(host) = self.host.as_ref().filter(|_| self.complete) else {
            return Binding::Waits("the agent has not read all objects yet");
        };
        let Some(object) = self.index.pod(pod) else {
            return Binding::Waits("the Pod is not known yet");
        };
        if !is_same(object, claim) {
            return Binding::Waits("another Pod of this name is known");
        }
        if host.bound_pods.get(&claim.ifindex) != Some(&pod.to_string()) {
            return Binding::Waits("its interface has no programs yet");
        }
        if !self.bound_syncer.has(&claim.addrs) || !self.policy_syncer.is_in_force(claim.ifindex) {
            return Binding::Waits("its policies are not programmed yet");
        }
        Binding::Bound
    }
}

/// Whether a claim is about this Pod and not about another of its name.
pub fn is_same(pod: &Pod, claim: &Claim) -> bool {
    claim.uid.is_empty() || pod.uid == 0 || pod.uid == Pod::uid_of(&claim.uid)
}
