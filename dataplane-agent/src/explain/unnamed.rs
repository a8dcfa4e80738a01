//! What the tables alone say of verdicts: addresses, and policies by the numbers that `RULES` has of them.

use std::net::SocketAddr;

use dataplane_common::{
    policy::{NO_RULE_INDEX, SET_NONE, VerdictEvent},
    reason::Reason,
};

use super::{
    Decision, Elsewhere, Step,
    ends::Found,
    known::{Decided, Known, Told, allows, unknown},
    place, reasons,
};
use crate::{
    bpf::world::World,
    model::{Name, ObjectRef, Protocol, policy::Direction},
    store::enforced::{policy_called, tier_of},
    sync::policy::SET_CLOSED,
};

/// Nobody knows names.
#[derive(Clone, Copy, Debug)]
pub struct Unnamed;

impl Known for Unnamed {
    fn interface(&self, world: &World, (addr, _): Found<'_>) -> Option<u32> {
        world.interface_of(addr)
    }

    fn holder(&self, _at: SocketAddr, _proto: Protocol) -> Option<ObjectRef> {
        None
    }

    fn problems(&self, _service: &Name, _asked: Option<(SocketAddr, Protocol)>) -> Vec<String> {
        Vec::new()
    }

    fn unwritten(&self, _at: SocketAddr, _proto: Protocol) -> Option<String> {
        None
    }

    fn decided(
        &self,
        world: &World,
        direction: Direction,
        (own, peer): (Found<'_>, Found<'_>),
        told: Told<'_>,
    ) -> Decided {
        let Some(ifindex) = world.interface_of(own.0) else {
            if world.is_own(own.0) {
                return Decided::Nowhere;
            }
            let what = format!("{} of {}", direction.as_str(), own.0);
            return Decided::Elsewhere(Elsewhere {
                direction: direction.as_str().into(),
                node: None,
                reason: format!(
                    "{what}: no Pod of this node has the address; if one of another node has it, that node decides"
                ),
            });
        };
        let at = place(own);
        if world.interface_of(peer.0) == Some(ifindex) {
            return Decided::here(Step::exempt(direction, at, reasons::ITSELF));
        }
        if direction == Direction::Ingress && world.is_own(peer.0) {
            return Decided::here(Step::exempt(direction, at, reasons::OWN_NODE));
        }
        let of = |allowed, rule: Option<Decision>, reason, dry_run| {
            Decided::here(Step {
                direction: direction.as_str().into(),
                at: at.clone(),
                allowed,
                rule,
                reason,
                dry_run,
                selected_by: Vec::new(),
            })
        };
        let Some([set, audit]) = world.sets_of(ifindex, direction) else {
            return of(false, None, unknown(), None);
        };
        let Some(event) = told.verdict(ifindex, direction) else {
            return of(true, None, reason(SET_NONE, None, None), None);
        };
        let dry_run = told.dry_run(ifindex, direction).map(|event| {
            let verdict = if allows(event) { "allowed" } else { "denied" };
            let rule = decision(world, audit, direction, event);
            format!("{verdict}: {}", reason(audit, rule.as_ref(), Some(event)))
        });
        let rule = decision(world, set, direction, event);
        let text = reason(set, rule.as_ref(), Some(event));
        of(allows(event), rule, text, dry_run)
    }
}

/// The rule that has decided.
fn decision(world: &World, set: u32, direction: Direction, event: &VerdictEvent) -> Option<Decision> {
    let rule = world.rule(event.rule).filter(|_| event.rule != NO_RULE_INDEX)?;
    let set = world.set(set)?;
    let action = rule.action()?;
    Some(Decision {
        policy: policy_called(rule.policy),
        tier: tier_of(&set, event.rule.wrapping_sub(set.rules)).to_string(),
        field: reasons::field(direction, rule.place),
        name: String::new(),
        action: action.label().into(),
    })
}

fn reason(set: u32, rule: Option<&Decision>, event: Option<&VerdictEvent>) -> String {
    let is_broken = event.is_some_and(|event| event.reason == Reason::PolicyBroken as u32);
    match (rule, set) {
        (Some(rule), _) => rule.reason(),
        (None, SET_NONE) => reasons::NOT_SELECTED.to_owned(),
        (None, SET_CLOSED) => reasons::CLOSED.to_owned(),
        (None, _) if is_broken => Reason::PolicyBroken.text().trim().to_owned(),
        (None, _) if event.is_some_and(allows) => reasons::NO_RULE.to_owned(),
        (None, _) => reasons::ISOLATED.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_rule_decides_is_said_by_the_set() {
        let told = |reason: Reason| VerdictEvent {
            reason: reason as u32,
            ..VerdictEvent::default()
        };
        let [allowed, denied] = [Reason::PolicyAllowed, Reason::PolicyDenied].map(told);
        assert_eq!(reason(7, None, Some(&allowed)), reasons::NO_RULE);
        assert_eq!(reason(7, None, Some(&denied)), reasons::ISOLATED);
        assert_eq!(reason(SET_CLOSED, None, Some(&denied)), reasons::CLOSED);
        assert_eq!(reason(SET_NONE, None, None), reasons::NOT_SELECTED);
        let rule = Decision {
            policy: policy_called(7),
            tier: "admin".to_owned(),
            field: "spec.ingress[2]".to_owned(),
            name: String::new(),
            action: "deny".into(),
        };
        assert_eq!(
            reason(7, Some(&rule), Some(&denied)),
            "admin spec.ingress[2] of policy number 7: deny"
        );
    }
}
