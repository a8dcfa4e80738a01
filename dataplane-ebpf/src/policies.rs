//! The tables of policies, and what judges by them.

use core::ptr;

use aya_ebpf::btf_maps::{LpmTrie, lpm_trie::Key};
use bytemuck::Pod;
use dataplane_common::{
    addr::{AnyAddr, V4, V6},
    policy::{
        self, Judgement, PeerRulesKey, PeerTables, PolicyRule, PolicySet, PolicyTables, PortRulesKey,
        RuleBits, port_prefix,
    },
};

use crate::{
    maps::*,
    world::{Aligned, World, value},
};

/// The value of the longest prefix of `words`, which are the key's. Stored one by one: the compiler would join two of them,
/// behind the prefix length, where a word of 64 bits is not aligned.
#[inline(always)]
fn longest<K: Pod, const WORDS: usize, const M: usize, const F: usize>(
    map: &LpmTrie<K, u32, M, F>,
    words: [u32; WORDS],
    bits: u32,
) -> Option<u32> {
    const { assert!(size_of::<K>() == size_of::<[u32; WORDS]>()) };
    let mut key = Aligned(Key::new(bits, K::zeroed()));
    let first = (&raw mut key.0.data).cast::<u32>();
    for (index, word) in words.into_iter().enumerate() {
        // SAFETY: the key's data has as many words, and is aligned as one.
        unsafe { ptr::write_volatile(first.add(index), word) };
    }
    map.get(key.in_place()).copied()
}

macro_rules! peers {
    ($family:ty, $addr:ty, $peers:ident, $cidrs:ident, $words:expr) => {
        impl<C> PeerTables<$family> for World<C> {
            #[inline(always)]
            fn peer(&self, addr: &$addr) -> Option<u32> {
                value(&$peers, addr)
            }
            #[inline(always)]
            fn cidr(&self, addr: &$addr) -> Option<u32> {
                longest(&$cidrs, $words(addr), 8 * size_of::<$addr>() as u32)
            }
        }
    };
}

peers!(V4, u32, PEERS_V4, CIDRS_V4, |addr: &u32| [*addr]);
peers!(V6, AnyAddr, PEERS_V6, CIDRS_V6, |addr: &AnyAddr| *addr);

/// The maps that a verdict needs.
struct Maps;

impl PolicyTables for Maps {
    #[inline(always)]
    fn set(&self, id: u32) -> Option<&PolicySet> {
        POLICY_SETS.get(id)
    }
    #[inline(always)]
    fn peer_rules(&self, key: PeerRulesKey) -> Option<u32> {
        value(&PEER_RULES, &key)
    }
    #[inline(always)]
    fn port_rules(&self, key: PortRulesKey) -> Option<u32> {
        longest(&PORT_RULES, bytemuck::cast::<_, [u32; 2]>(key), port_prefix::PORT)
    }
    #[inline(always)]
    fn bits(&self, id: u32) -> Option<&RuleBits> {
        RULE_BITS.get(id)
    }
    #[inline(always)]
    fn rule(&self, index: u32) -> Option<&PolicyRule> {
        RULES.get(index)
    }
    #[inline(always)]
    fn lowest(&self, by_peer: u32, by_port: u32, words: u8, from: u32) -> u32 {
        let bits = u64::from(by_peer) << 32 | u64::from(by_port);
        lowest_rule(bits, u64::from(from) << 8 | u64::from(words)) as u32
    }
}

/// Judges apart, and looks for the lowest rule apart: whoever asks does not have it verified once more.
#[inline(always)]
pub fn judge(set: u32, class: u32, proto: u8, port_be: u16) -> Judgement {
    let peer = u64::from(set) << 32 | u64::from(class);
    let port = u64::from(proto) << 16 | u64::from(port_be);
    Judgement::from_raw(judge_peer(peer, port) as u32)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_peer(peer: u64, port: u64) -> u64 {
    let (set, class) = ((peer >> 32) as u32, peer as u32);
    let judgement = policy::judge(&Maps, set, class, (port >> 16) as u8, port as u16);
    judgement.to_raw().into()
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lowest_rule(bits: u64, range: u64) -> u64 {
    let (by_peer, by_port) = ((bits >> 32) as u32, bits as u32);
    policy::lowest_of(&Maps, by_peer, by_port, range as u8, (range >> 8) as u32).into()
}
