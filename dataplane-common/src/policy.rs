//! `POD_POLICY`, `PEERS_V4`, `PEERS_V6`, `CIDRS_V4`, `CIDRS_V6`, `POLICY_SETS`, `PEER_RULES`, `PORT_RULES`, `RULE_BITS` and
//! `RULES`: from a pod's policy set, a peer and a port to a verdict. `POLICY_FLOWS_V4` and `POLICY_FLOWS_V6` remember it.
//!
//! A *set* is what applies to one direction of a pod: its rules in the order of precedence, numbered from 0. A *peer class*
//! is what an address is to all sets of this node: which of their selectors and ranges it satisfies. Two lookups give the
//! rules that the peer satisfies and those that the port satisfies, each as a set of bits, and the lowest bit that both
//! have decides. So a verdict takes the same number of lookups however many policies, rules, peers and ports there are.
//!
//! Ids of sets, classes and bits are never given a new meaning while anything refers to them: rows are written under a new
//! id, then the pod or the address is led there.

use bytemuck::{Pod, Zeroable};

use crate::addr::{AnyAddr, Family};

/// Rules that a set may have.
pub const SET_RULES: u32 = 1024;

/// 64-bit words of [`RuleBits`].
pub const RULE_WORDS: usize = (SET_RULES / 64) as usize;

/// The class of an address that is neither in `PEERS_*` nor in a range of `CIDRS_*`.
pub const CLASS_ANY: u32 = 0;

/// The set of a pod that no policy selects in a direction: everything is allowed, and nothing is looked up.
pub const SET_NONE: u32 = 0;

/// Value of `POD_POLICY`, by the ifindex of the pod's host-side interface: its sets. A pod that no policy selects has an entry
/// too; an interface without one is closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PodPolicy {
    /// The set for what reaches the pod.
    pub ingress: u32,
    /// The set for what the pod sends.
    pub egress: u32,
    /// What [`Self::ingress`] would be if no policy were a dry run; the same where none is.
    pub audit_ingress: u32,
    /// What [`Self::egress`] would be if no policy were a dry run.
    pub audit_egress: u32,
}

/// Key of `POLICY_FLOWS_V4`: a flow as one of its pods sees it, behind the translation of services. Both directions have one entry.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PolicyFlowKey4 {
    pub pod_be: u32,
    pub peer_be: u32,
    /// For ICMP echo, the identifier, in both ports.
    pub pod_port_be: u16,
    pub peer_port_be: u16,
    pub proto: u8,
    pub unused: [u8; 3],
}

/// Key of `POLICY_FLOWS_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PolicyFlowKey6 {
    pub pod_be: [u32; 4],
    pub peer_be: [u32; 4],
    /// For ICMP echo, the identifier, in both ports.
    pub pod_port_be: u16,
    pub peer_port_be: u16,
    pub proto: u8,
    pub unused: [u8; 3],
}

/// Bits of [`PolicyFlow::flags`].
pub mod policy_flow_flags {
    /// The pod began the flow: its egress set is asked, else its ingress set.
    pub const FROM_POD: u32 = 1;
    /// The node itself began the flow, which no policy forbids.
    pub const FROM_NODE: u32 = 2;
}

/// Value of `POLICY_FLOWS_V4` and `POLICY_FLOWS_V6`: a flow that is allowed at a pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PolicyFlow {
    /// The pod's host-side interface.
    pub ifindex: u32,
    /// `POLICY_REVISION` when the flow was judged.
    pub revision: u32,
    /// When a packet last used the entry, in ticks of 2^30 ns since boot.
    pub seen_ticks: u32,
    /// [`policy_flow_flags`].
    pub flags: u32,
}

/// A record of `VERDICTS`, a ring buffer: a verdict and what it was about, behind the translation of services.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VerdictEvent {
    /// When, on the monotonic clock, in nanoseconds.
    pub at_ns: u64,
    /// Who began the flow. IPv4 in the first word.
    pub src_be: AnyAddr,
    pub dst_be: AnyAddr,
    pub sport_be: u16,
    pub dport_be: u16,
    /// The host-side interface of the pod whose policies these are.
    pub ifindex: u32,
    /// Index into `RULES` of the rule that decided, or [`NO_RULE_INDEX`].
    pub rule: u32,
    /// The number of the [`Reason`](crate::reason::Reason).
    pub reason: u32,
    /// `POLICY_REVISION`.
    pub revision: u32,
    /// Verdicts about the pod that were not told since the last one that was.
    pub untold: u32,
    /// 4 or 6.
    pub family: u8,
    pub proto: u8,
    /// 1: about what the pod sends, 0: about what reaches it.
    pub outward: u8,
    pub unused: [u8; 5],
}

/// In [`VerdictEvent::rule`]: none decided.
pub const NO_RULE_INDEX: u32 = u32::MAX;

/// Value of `RULE_HITS`, by index into `RULES`, and of `SET_HITS`, by set, for what no rule of it decides. Each verdict counts
/// once: a flow that begins, or that is judged again because policies have changed, and each packet that is denied.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Hits {
    /// Verdicts in force.
    pub decided: u64,
    /// Verdicts that a dry run would change, counted at what decides them if no policy is one.
    pub dry_run: u64,
}

/// What verdicts are counted at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Counted {
    /// An index into `RULES`.
    Rule(u32),
    /// A set, where none of its rules decides.
    Set(u32),
}

/// A verdict about a pod, until it is known to be the final one; then it is counted and told.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Judged {
    /// The host-side interface of the pod whose policies these are.
    pub ifindex: u32,
    /// 1: about what the pod sends, 0: about what reaches it.
    pub outward: u32,
    /// The set that was asked, and [`Judgement::to_raw`].
    pub set: u32,
    pub judgement: u32,
    /// The set that would be if no policy were a dry run, and what it says.
    pub audit: u32,
    pub would_be: u32,
}

/// Value of `VERDICTS_TOLD`, by ifindex: how many verdicts about a pod are told in a tick, and how many of its packets were dropped.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct VerdictBudget {
    /// Told in the tick.
    pub told: u32,
    /// Not told since the last one that was.
    pub untold: u32,
    /// When one was told last, in ticks.
    pub ticks: u32,
    pub unused: u32,
    /// Packets that were dropped at the interface, each of them.
    pub dropped: u64,
}

/// The map of one element that loaders make of the object's variables. It holds `POLICY_REVISION`, and is pinned under that name.
pub const VARIABLES: &str = ".bss";

/// Value of `POLICY_REVISION` while no pod of this node has a set: hooks ask for nothing. It changes whenever a verdict may
/// have changed: behind every change of the tables, so that a verdict of before is not kept for one of after.
pub const REVISION_NONE: u32 = 0;

/// Value of `RULE_BITS`: the rules of a set that something satisfies. Rule `i` is bit `i % 64` of word `i / 64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct RuleBits {
    pub words: [u64; RULE_WORDS],
}

impl RuleBits {
    /// Adds a rule, which has to be below [`SET_RULES`].
    pub fn insert(&mut self, rule: u32) {
        self.words[rule as usize / 64] |= 1 << (rule % 64);
    }

    pub fn has(&self, rule: u32) -> bool {
        let word = self.words.get(rule as usize / 64);
        word.is_some_and(|word| word >> (rule % 64) & 1 == 1)
    }

    /// The last rule.
    pub fn last(&self) -> Option<u32> {
        (0..SET_RULES).rev().find(|rule| self.has(*rule))
    }

    /// Adds all rules of another.
    pub fn extend(&mut self, other: &RuleBits) {
        for (word, other) in self.words.iter_mut().zip(other.words) {
            *word |= other;
        }
    }
}

/// Value of `POLICY_SETS`: one direction of the pods that share it. Never changed once a pod refers to it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PolicySet {
    /// Index into `RULES` of rule 0.
    pub rules: u32,
    /// Id in `RULE_BITS` of the rules without peers, which every class satisfies.
    pub any_peer: u32,
    /// Rules of the admin tier, which come first: what `pass` leaves out.
    pub admin_rules: u16,
    /// Words of [`RuleBits`] in use.
    pub words: u8,
    /// Bits of [`set_flags`].
    pub flags: u8,
}

/// Bits of [`PolicySet::flags`].
pub mod set_flags {
    /// What no rule decides is allowed: no `NetworkPolicy` isolates the pod. Without it, also in an element that was never
    /// written, it is denied.
    pub const ALLOW_BY_DEFAULT: u8 = 1;
}

/// Key of `PEER_RULES`; the value is an id in `RULE_BITS`. Without an entry it is [`PolicySet::any_peer`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PeerRulesKey {
    pub set: u32,
    pub class: u32,
}

/// What a key of `PORT_RULES`, a longest prefix match, holds behind its prefix length; the value is an id in `RULE_BITS`.
/// An entry has the rules of all entries that cover it, because only the longest match is found.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Pod, Zeroable)]
pub struct PortRulesKey {
    pub set: u32,
    /// The IANA number.
    pub proto_be: u16,
    /// The destination port; 0 for protocols that have none.
    pub port_be: u16,
}

/// Bits of a key of `PORT_RULES` that stand for any protocol, for any port of a protocol, and for one port. A range of
/// ports takes several prefixes between the last two.
pub mod port_prefix {
    pub const ANY: u32 = 32;
    pub const PROTOCOL: u32 = 48;
    pub const PORT: u32 = 64;
}

/// What a rule does with what it matches. 0 is no action: an element that was never written.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleAction {
    Allow = 1,
    Deny = 2,
    /// Leaves the decision to the tiers behind.
    Pass = 3,
}

impl RuleAction {
    pub const ALL: [RuleAction; 3] = [RuleAction::Allow, RuleAction::Deny, RuleAction::Pass];

    /// The word for people.
    pub const fn label(self) -> &'static str {
        match self {
            RuleAction::Allow => "allow",
            RuleAction::Deny => "deny",
            RuleAction::Pass => "pass",
        }
    }
}

/// Value of `RULES`: a rule of a set.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PolicyRule {
    /// The policy's number, which the agent knows by name.
    pub policy: u32,
    /// Its place in the policy's list for the direction.
    pub place: u32,
    /// [`RuleAction`].
    pub action: u8,
    pub pad: [u8; 3],
}

impl PolicyRule {
    /// What the rule does; `None`: the element was never written, or by another version.
    pub fn action(&self) -> Option<RuleAction> {
        RuleAction::ALL
            .into_iter()
            .find(|action| *action as u8 == self.action)
    }
}

const _: () = assert!(size_of::<PodPolicy>() == 16);
const _: () = assert!(size_of::<PolicyFlowKey4>() == 16);
const _: () = assert!(size_of::<PolicyFlowKey6>() == 40);
const _: () = assert!(size_of::<PolicyFlow>() == 16);
const _: () = assert!(size_of::<VerdictEvent>() == 72);
const _: () = assert!(size_of::<VerdictBudget>() == 24);
const _: () = assert!(size_of::<Hits>() == 16);
const _: () = assert!(size_of::<Judged>() == 24);
const _: () = assert!(size_of::<RuleBits>() == 128);
const _: () = assert!(size_of::<PolicySet>() == 12);
const _: () = assert!(size_of::<PeerRulesKey>() == 8);
const _: () = assert!(size_of::<PortRulesKey>() == 8);
const _: () = assert!(size_of::<PolicyRule>() == 12);

/// What the class of a peer is asked of.
pub trait PeerTables<F: Family> {
    /// The class that `PEERS_*` has for an address.
    fn peer(&self, addr: &F::Addr) -> Option<u32>;
    /// The class of the longest range of `CIDRS_*` that holds an address.
    fn cidr(&self, addr: &F::Addr) -> Option<u32>;
}

/// What a verdict about a class is asked of. Sets, classes and rules are of no family.
pub trait PolicyTables: Sized {
    /// `POLICY_SETS`.
    fn set(&self, id: u32) -> Option<&PolicySet>;
    /// `PEER_RULES`.
    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32>;
    /// The longest prefix in `PORT_RULES`.
    fn port_rules(&self, key: PortRulesKey) -> Option<u32>;
    /// `RULE_BITS`.
    fn bits(&self, id: u32) -> Option<&RuleBits>;
    /// `RULES`.
    fn rule(&self, index: u32) -> Option<&PolicyRule>;

    /// The lowest rule from `from` on that two elements of `RULE_BITS` have both; [`NO_RULE`] if there is none, and
    /// [`NO_BITS`] if one of the two is missing.
    #[inline(always)]
    fn lowest(&self, by_peer: u32, by_port: u32, words: u8, from: u32) -> u32 {
        lowest_of(self, by_peer, by_port, words, from)
    }
}

/// Of [`PolicyTables::lowest`].
pub const NO_RULE: u32 = SET_RULES;
/// Of [`PolicyTables::lowest`].
pub const NO_BITS: u32 = u32::MAX;

/// A verdict and what gave it, one word: what a BPF function returns (ARCHITECTURE, decision 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement(u32);

impl Judgement {
    const DENIED: u32 = 1 << 31;
    const BY_DEFAULT: u32 = Self::DENIED - 1;
    /// The tables lack what they must have: closed.
    const BROKEN: Judgement = Judgement(Self::DENIED | (Self::BY_DEFAULT - 1));

    /// Nothing was asked.
    pub(crate) const NONE: Judgement = Judgement::by_default(true);

    #[inline(always)]
    const fn by_default(denied: bool) -> Self {
        Self(Self::BY_DEFAULT | if denied { Self::DENIED } else { 0 })
    }

    #[inline(always)]
    const fn by_rule(denied: bool, index: u32) -> Self {
        Self((index & Self::BY_DEFAULT) | if denied { Self::DENIED } else { 0 })
    }

    #[inline(always)]
    pub const fn to_raw(self) -> u32 {
        self.0
    }

    /// The judgement of [`Self::to_raw`].
    #[inline(always)]
    pub const fn from_raw(raw: u32) -> Self {
        Self(raw)
    }

    #[inline(always)]
    pub const fn is_allowed(self) -> bool {
        self.0 & Self::DENIED == 0
    }

    /// Something was not there that the tables refer to.
    #[inline(always)]
    pub const fn is_broken(self) -> bool {
        self.0 == Self::BROKEN.0
    }

    /// Index into `RULES` of the rule that decided; `None`: none did.
    #[inline(always)]
    pub const fn rule(self) -> Option<u32> {
        match self.0 & Self::BY_DEFAULT {
            index if index < Self::BY_DEFAULT - 1 => Some(index),
            _ => None,
        }
    }

    /// Where this verdict of a set is counted.
    #[inline(always)]
    pub const fn counted_at(self, set: u32) -> Counted {
        match self.rule() {
            Some(rule) => Counted::Rule(rule),
            None => Counted::Set(set),
        }
    }
}

/// The peer class of an address.
#[inline(always)]
pub fn class<F: Family, T: PeerTables<F>>(tables: &T, addr: &F::Addr) -> u32 {
    match tables.peer(addr) {
        Some(class) => class,
        None => tables.cidr(addr).unwrap_or(CLASS_ANY),
    }
}

/// Judges what a pod with a set gets from, or sends to, a peer. `port_be` is the destination's.
#[inline(always)]
pub fn judge<T: PolicyTables>(tables: &T, set: u32, class: u32, proto: u8, port_be: u16) -> Judgement {
    if set == SET_NONE {
        return Judgement::by_default(false);
    }
    let Some(header) = tables.set(set) else {
        return Judgement::BROKEN;
    };
    let denies = header.flags & set_flags::ALLOW_BY_DEFAULT == 0;
    let by_peer = tables
        .peer_rules(PeerRulesKey { set, class })
        .unwrap_or(header.any_peer);
    let Some(by_port) = tables.port_rules(PortRulesKey {
        set,
        proto_be: u16::from(proto).to_be(),
        port_be,
    }) else {
        return Judgement::by_default(denies);
    };
    let first = tables.lowest(by_peer, by_port, header.words, 0);
    if first >= NO_RULE {
        return nothing(first, denies);
    }
    let index = header.rules.wrapping_add(first);
    let Some(rule) = tables.rule(index) else {
        return Judgement::BROKEN;
    };
    if rule.action != RuleAction::Pass as u8 {
        return decided(rule.action, index);
    }
    // Behind the baseline tier there is nothing more to ask.
    if first >= u32::from(header.admin_rules) {
        return Judgement::by_rule(denies, index);
    }
    let second = tables.lowest(by_peer, by_port, header.words, u32::from(header.admin_rules));
    if second >= NO_RULE {
        return nothing(second, denies);
    }
    let index = header.rules.wrapping_add(second);
    match tables.rule(index) {
        Some(rule) if rule.action == RuleAction::Pass as u8 => Judgement::by_rule(denies, index),
        Some(rule) => decided(rule.action, index),
        None => Judgement::BROKEN,
    }
}

/// By a rule that does not pass.
#[inline(always)]
fn decided(action: u8, index: u32) -> Judgement {
    if action == RuleAction::Allow as u8 {
        Judgement::by_rule(false, index)
    } else if action == RuleAction::Deny as u8 {
        Judgement::by_rule(true, index)
    } else {
        Judgement::BROKEN
    }
}

/// Without a rule that decides.
#[inline(always)]
fn nothing(found: u32, denies: bool) -> Judgement {
    if found == NO_BITS {
        Judgement::BROKEN
    } else {
        Judgement::by_default(denies)
    }
}

/// [`PolicyTables::lowest`] of these tables.
#[inline(always)]
pub fn lowest_of<T: PolicyTables>(tables: &T, by_peer: u32, by_port: u32, words: u8, from: u32) -> u32 {
    match (tables.bits(by_peer), tables.bits(by_port)) {
        (Some(by_peer), Some(by_port)) => lowest(by_peer, by_port, words, from),
        _ => NO_BITS,
    }
}

/// The lowest rule from `from` on that both have; [`NO_RULE`] if there is none.
#[inline(always)]
fn lowest(a: &RuleBits, b: &RuleBits, words: u8, from: u32) -> u32 {
    let mut i = 0;
    while i < RULE_WORDS {
        if i >= usize::from(words) {
            break;
        }
        let start = i as u32 * 64;
        let mut both = a.words[i] & b.words[i];
        if from > start {
            both &= u64::MAX.checked_shl(from - start).unwrap_or(0);
        }
        if both != 0 {
            return start + both.trailing_zeros();
        }
        i += 1;
    }
    NO_RULE
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{V4, proto};

    /// One set, number 7, whose rules every peer and port satisfies as far as `bits` says.
    struct One {
        set: PolicySet,
        rules: [PolicyRule; 3],
        bits: RuleBits,
    }

    impl PeerTables<V4> for One {
        fn peer(&self, addr: &u32) -> Option<u32> {
            (*addr == 1).then_some(5)
        }
        fn cidr(&self, addr: &u32) -> Option<u32> {
            (*addr < 3).then_some(6)
        }
    }

    impl PolicyTables for One {
        fn set(&self, id: u32) -> Option<&PolicySet> {
            (id == 7).then_some(&self.set)
        }
        fn peer_rules(&self, _: PeerRulesKey) -> Option<u32> {
            None
        }
        fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
            (key.proto_be == u16::from(proto::TCP).to_be()).then_some(1)
        }
        fn bits(&self, id: u32) -> Option<&RuleBits> {
            (id == 1).then_some(&self.bits)
        }
        fn rule(&self, index: u32) -> Option<&PolicyRule> {
            self.rules.get(index.checked_sub(100)? as usize)
        }
    }

    fn one(actions: [RuleAction; 3], bits: u64, flags: u8) -> One {
        let rule = |action| PolicyRule {
            action: action as u8,
            ..PolicyRule::default()
        };
        let mut words = [0; RULE_WORDS];
        words[0] = bits;
        One {
            set: PolicySet {
                rules: 100,
                any_peer: 1,
                admin_rules: 2,
                words: 1,
                flags,
            },
            rules: actions.map(rule),
            bits: RuleBits { words },
        }
    }

    #[test]
    fn policy_the_first_rule_decides_and_pass_skips_the_admin_tier() {
        use RuleAction::{Allow, Deny, Pass};
        let judged = |tables: &One, proto| {
            let judgement = judge(tables, 7, 0, proto, 80);
            (judgement.is_allowed(), judgement.rule())
        };
        let open = set_flags::ALLOW_BY_DEFAULT;
        assert_eq!(
            judged(&one([Deny, Allow, Allow], 0b111, open), proto::TCP),
            (false, Some(100))
        );
        assert_eq!(
            judged(&one([Deny, Allow, Deny], 0b110, open), proto::TCP),
            (true, Some(101))
        );
        assert_eq!(
            judged(&one([Pass, Deny, Allow], 0b111, 0), proto::TCP),
            (true, Some(102))
        );
        assert_eq!(
            judged(&one([Pass, Deny, Deny], 0b111, open), proto::TCP),
            (false, Some(102))
        );
        assert_eq!(
            judged(&one([Pass, Deny, Allow], 0b011, 0), proto::TCP),
            (false, None)
        );
        assert_eq!(
            judged(&one([Deny, Deny, Pass], 0b100, open), proto::TCP),
            (true, Some(102))
        );
        assert_eq!(judged(&one([Allow; 3], 0b111, 0), proto::UDP), (false, None));
        assert_eq!(judged(&one([Allow; 3], 0, open), proto::TCP), (true, None));
    }

    #[test]
    fn policy_what_is_missing_is_closed_and_no_set_is_open() {
        let tables = one([RuleAction::Allow; 3], 0b1000, 0);
        let allowed = |set| judge(&tables, set, 0, proto::TCP, 80).is_allowed();
        assert!(allowed(SET_NONE));
        assert!(!allowed(8), "a set that is not there");
        assert!(!allowed(7), "a rule that is not there");
        assert_eq!(judge(&tables, 7, 0, proto::TCP, 80).rule(), None);
    }

    #[test]
    fn policy_an_exact_peer_comes_before_ranges() {
        let tables = one([RuleAction::Allow; 3], 0, 0);
        assert_eq!(
            [1, 2, 3].map(|addr| class::<V4, _>(&tables, &addr)),
            [5, 6, CLASS_ANY]
        );
    }

    #[test]
    fn policy_bits_are_found_in_every_word() {
        let mut bits = RuleBits::default();
        for rule in [0, 63, 64, 700, 1023] {
            bits.insert(rule);
        }
        let all = RuleBits {
            words: [u64::MAX; RULE_WORDS],
        };
        assert!(bits.has(700) && !bits.has(701) && !bits.has(SET_RULES));
        assert_eq!((bits.last(), RuleBits::default().last()), (Some(1023), None));
        let from = |from| lowest(&bits, &all, RULE_WORDS as u8, from);
        assert_eq!(
            [0, 1, 63, 64, 65, 128, 701, 1023].map(from),
            [0, 63, 63, 64, 700, 700, 1023, 1023]
        );
        assert_eq!(from(1024), SET_RULES);
        assert_eq!(
            lowest(&bits, &all, 10, 65),
            SET_RULES,
            "words that are not in use"
        );
    }
}
