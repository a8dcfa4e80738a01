//! What the tables of policies say about the Pods of this node: interface → sets → rules. For commands: no agent has to run. Pods
//! are addresses here, and policies the numbers that `RULES` has of them.

#[cfg(test)]
mod tests;
mod words;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::IpAddr,
};

use dataplane_common::policy::{
    Counted, Hits, PeerRulesKey, PodPolicy, PolicyRule, PolicySet, PortRulesKey, REVISION_NONE, RuleAction,
    RuleBits, SET_NONE, set_flags,
};
use serde::Serialize;

use super::{Store, StoreError, policy::PolicyRows};
use crate::{
    enforced::{EnforcedPolicy, EnforcedRule, OfDirection, OfPod},
    model::policy::{Direction, Tier},
    sync::policy::SET_CLOSED,
};

/// What a direction of a pod is judged by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TableDirection {
    /// What no rule allows is denied.
    pub isolated: bool,
    /// Rules in force.
    pub rules: usize,
    /// Of these rules, and of none of them, at all Pods of the node that have the same.
    pub verdicts: u64,
    /// Verdicts that dry runs would change.
    pub dry_run: u64,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TablePod {
    /// Of its interface on the node's side.
    pub ifindex: u32,
    pub addresses: Vec<IpAddr>,
    /// What it sends is dropped unless it is from one of these.
    pub source_checked: bool,
    pub ingress: TableDirection,
    pub egress: TableDirection,
}

/// What a policy is called whose name nobody knows.
pub fn policy_called(number: u32) -> String {
    format!("policy number {number}")
}

/// The tier of a rule of a set, by its place in the set. Where a NetworkPolicy isolates the pod, there are none of the baseline tier;
/// where none does, there are no others behind the admin tier.
pub fn tier_of(set: &PolicySet, place: u32) -> Tier {
    if place < u32::from(set.admin_rules) {
        Tier::Admin
    } else if set.flags & set_flags::ALLOW_BY_DEFAULT == 0 {
        Tier::Namespace
    } else {
        Tier::Baseline
    }
}

/// The tables, read.
pub struct EnforcedTables<'a> {
    store: &'a dyn Store,
    pods: BTreeMap<u32, PodPolicy>,
    /// The interface of each address.
    bound: BTreeMap<IpAddr, u32>,
    checked: BTreeSet<u32>,
    sets: HashMap<u32, PolicySet>,
    rules: HashMap<u32, PolicyRule>,
    bits: HashMap<u32, RuleBits>,
    peer_rules: Vec<(PeerRulesKey, u32)>,
    /// With the length of the prefix.
    port_rules: Vec<(u32, PortRulesKey, u32)>,
    /// The ranges and addresses of each class.
    classes: HashMap<u32, Vec<String>>,
    /// How many pods have rules of a policy.
    selected: HashMap<u32, usize>,
}

impl fmt::Debug for EnforcedTables<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnforcedTables").finish_non_exhaustive()
    }
}

/// A rule of a set.
#[derive(Clone, Copy, Debug)]
struct Row {
    /// In the set.
    place: u32,
    rule: PolicyRule,
    hits: Hits,
}

impl<'a> EnforcedTables<'a> {
    pub fn read(store: &'a dyn Store) -> Result<Self, StoreError> {
        let PolicyRows {
            mut peers,
            mut cidrs,
            sets,
            peer_rules,
            port_rules,
            bits,
            rules,
            pods,
            revision,
        } = store.policy_rows()?;
        let bound = store.bound_rows()?;
        let mut classes: HashMap<u32, Vec<String>> = HashMap::new();
        cidrs.sort_unstable();
        peers.sort_unstable();
        let cidrs = cidrs.iter().map(|(range, class)| (range.to_string(), *class));
        let peers = peers.iter().map(|(addr, class)| (addr.to_string(), *class));
        for (text, class) in cidrs.chain(peers) {
            classes.entry(class).or_default().push(text);
        }
        let mut pods: BTreeMap<u32, PodPolicy> = pods.into_iter().collect();
        for ifindex in bound.addrs.values() {
            // Nobody knows whose it is.
            pods.entry(*ifindex).or_insert(CLOSED);
        }
        if revision == REVISION_NONE {
            // No hook asks for what is left of rows.
            for pod in pods.values_mut() {
                *pod = PodPolicy::default();
            }
        }
        let mut tables = Self {
            store,
            pods,
            bound: bound.addrs,
            checked: bound.checked,
            sets: sets.into_iter().collect(),
            rules: rules.into_iter().collect(),
            bits: bits.into_iter().collect(),
            peer_rules,
            port_rules,
            classes,
            selected: HashMap::new(),
        };
        tables.count_selected();
        Ok(tables)
    }

    fn count_selected(&mut self) {
        let mut selected: HashMap<u32, usize> = HashMap::new();
        for pod in self.pods.values() {
            let sets = BTreeSet::from([pod.ingress, pod.egress, pod.audit_ingress, pod.audit_egress]);
            let rules = sets.into_iter().flat_map(|set| self.rules_of(set));
            let policies: BTreeSet<u32> = rules.map(|(_, rule)| rule.policy).collect();
            for policy in policies {
                *selected.entry(policy).or_default() += 1;
            }
        }
        self.selected = selected;
    }

    /// Every pod, by interface.
    pub fn pods(&self) -> Result<Vec<TablePod>, StoreError> {
        let mut known: BTreeMap<[u32; 2], TableDirection> = BTreeMap::new();
        let mut pods = Vec::new();
        for (ifindex, pod) in &self.pods {
            let mut of = |sets: [u32; 2]| -> Result<TableDirection, StoreError> {
                if let Some(direction) = known.get(&sets) {
                    return Ok(*direction);
                }
                let direction = self.summary(sets)?;
                known.insert(sets, direction);
                Ok(direction)
            };
            let addresses = self.bound.iter().filter(|(_, other)| *other == ifindex);
            pods.push(TablePod {
                ifindex: *ifindex,
                addresses: addresses.map(|(addr, _)| *addr).collect(),
                source_checked: self.checked.contains(ifindex),
                ingress: of([pod.ingress, pod.audit_ingress])?,
                egress: of([pod.egress, pod.audit_egress])?,
            });
        }
        Ok(pods)
    }

    fn summary(&self, [set, audit]: [u32; 2]) -> Result<TableDirection, StoreError> {
        let rows = self.rows(set)?;
        let mut direction = TableDirection {
            isolated: self.is_isolated(set),
            rules: rows.len(),
            ..TableDirection::default()
        };
        for hits in rows.iter().map(|row| row.hits).chain([self.undecided(set)?]) {
            direction.verdicts += hits.decided;
            direction.dry_run += hits.dry_run;
        }
        if audit != set {
            let rows = self.rows(audit)?;
            let hits = rows.iter().map(|row| row.hits).chain([self.undecided(audit)?]);
            direction.dry_run += hits.map(|hits| hits.dry_run).sum::<u64>();
        }
        Ok(direction)
    }

    /// The rules about the pod that has an address, in the order in which they are asked; `None`: no pod of this node has it.
    pub fn of(&self, addr: IpAddr) -> Result<Option<OfPod>, StoreError> {
        let Some(pod) = self.bound.get(&addr).and_then(|ifindex| self.pods.get(ifindex)) else {
            return Ok(None);
        };
        Ok(Some(OfPod {
            pod: addr.to_string(),
            ingress: self.direction(Direction::Ingress, [pod.ingress, pod.audit_ingress])?,
            egress: self.direction(Direction::Egress, [pod.egress, pod.audit_egress])?,
            problems: Vec::new(),
        }))
    }

    fn direction(&self, direction: Direction, [set, audit]: [u32; 2]) -> Result<OfDirection, StoreError> {
        let in_force = self.rows(set)?;
        let all = if audit == set {
            Vec::new()
        } else {
            self.rows(audit)?
        };
        let mut policies = Vec::new();
        for row in &in_force {
            let same = all.iter().filter(|other| other.rule == row.rule);
            let dry_run = row.hits.dry_run + same.map(|other| other.hits.dry_run).sum::<u64>();
            let hits = Hits { dry_run, ..row.hits };
            self.push(&mut policies, direction, (set, false), &Row { hits, ..*row });
        }
        let is_known = |row: &&Row| in_force.iter().any(|other| other.rule.policy == row.rule.policy);
        for row in all.iter().filter(|row| !is_known(row)) {
            self.push(&mut policies, direction, (audit, true), row);
        }
        if self.is_isolated(set) {
            let hits = self.undecided(set)?;
            policies.push(undecided(direction, set, false, hits));
        }
        if audit != set && self.is_isolated(audit) {
            let hits = self.undecided(audit)?;
            policies.push(undecided(direction, audit, true, hits));
        }
        Ok(OfDirection {
            isolated: self.is_isolated(set),
            // The set says it where all is denied, and not why.
            closed: None,
            policies,
        })
    }

    /// Adds a rule to its policy, which is the last one if it is there already.
    fn push(
        &self,
        policies: &mut Vec<EnforcedPolicy>,
        direction: Direction,
        (set, dry_run): (u32, bool),
        row: &Row,
    ) {
        let Row { place, rule, hits } = row;
        let policy = policy_called(rule.policy);
        let shown = EnforcedRule {
            direction: direction.as_str().to_owned(),
            rule: Some(rule.place),
            name: String::new(),
            action: rule
                .action()
                .map_or("unknown", |action| action.label())
                .to_owned(),
            peers: self.peers(set, *place),
            ports: self.ports(set, *place),
            verdicts: if dry_run { 0 } else { hits.decided },
            dry_run: hits.dry_run,
        };
        if let Some(last) = policies.last_mut()
            && last.policy == policy
            && last.dry_run == dry_run
        {
            last.rules.push(shown);
            return;
        }
        let header = self.header(set);
        policies.push(EnforcedPolicy {
            policy,
            tier: tier_of(&header, *place).to_string(),
            dry_run,
            pods: self.selected.get(&rule.policy).copied().unwrap_or_default(),
            rules: vec![shown],
        });
    }

    fn header(&self, set: u32) -> PolicySet {
        self.sets.get(&set).copied().unwrap_or_default()
    }

    fn is_isolated(&self, set: u32) -> bool {
        set != SET_NONE && self.header(set).flags & set_flags::ALLOW_BY_DEFAULT == 0
    }

    /// The rules of a set. Each has a port, so the last that a port has is the last of all.
    fn rules_of(&self, set: u32) -> impl Iterator<Item = (u32, PolicyRule)> {
        let of_set = self.port_rules.iter().filter(move |(_, key, _)| key.set == set);
        let last = of_set
            .filter_map(|(_, _, bits)| self.bits.get(bits)?.last())
            .max();
        let first = self.header(set).rules;
        let places = 0..last.map_or(0, |last| last + 1);
        places.map(move |place| {
            let rule = self.rules.get(&first.wrapping_add(place)).copied();
            (place, rule.unwrap_or_default())
        })
    }

    fn rows(&self, set: u32) -> Result<Vec<Row>, StoreError> {
        let first = self.header(set).rules;
        let limit = self.store.limits().policy.rules;
        let rules = self.rules_of(set);
        let rules = rules.filter(|(place, _)| first.saturating_add(*place) < limit);
        let rows = rules.map(|(place, rule)| {
            let hits = self.store.hits(Counted::Rule(first + place))?;
            Ok(Row { place, rule, hits })
        });
        rows.collect()
    }

    /// How often no rule of a set has decided.
    fn undecided(&self, set: u32) -> Result<Hits, StoreError> {
        if set == SET_NONE || set >= self.store.limits().policy.sets {
            return Ok(Hits::default());
        }
        self.store.hits(Counted::Set(set))
    }
}

/// What no rule of a set that isolates decides.
fn undecided(direction: Direction, set: u32, dry_run: bool, hits: Hits) -> EnforcedPolicy {
    let policy = match set {
        SET_CLOSED => "none can be honoured",
        _ => "those that isolate it",
    };
    EnforcedPolicy {
        policy: policy.to_owned(),
        tier: Tier::Namespace.to_string(),
        dry_run,
        pods: 0,
        rules: vec![EnforcedRule {
            direction: direction.as_str().to_owned(),
            action: RuleAction::Deny.label().to_owned(),
            verdicts: if dry_run { 0 } else { hits.decided },
            dry_run: if dry_run { hits.dry_run } else { 0 },
            ..EnforcedRule::default()
        }],
    }
}

const CLOSED: PodPolicy = PodPolicy {
    ingress: SET_CLOSED,
    egress: SET_CLOSED,
    audit_ingress: SET_CLOSED,
    audit_egress: SET_CLOSED,
};
