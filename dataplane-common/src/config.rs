//! `CONFIG`: constants that the agent sets in the object's read-only data before it is loaded. The verifier knows
//! their values, so a branch that they rule out is not even verified.

use bytemuck::{Pod, Zeroable};

/// The symbol of the constant in the object.
pub const SYMBOL: &str = "CONFIG";

/// Bits of [`Config::flags`].
pub mod config_flags {
    /// `bpf_l4_csum_replace` knows `BPF_F_IPV6` (6.16).
    pub const CSUM_IPV6: u32 = 1;
    /// Pods of this node reach each other by `bpf_redirect_peer`.
    pub const FAST_PATH: u32 = 4;
    /// Socket hooks translate for host processes only.
    pub const SOCKET_HOST_ONLY: u32 = 8;
    /// Socket hooks translate for pods too: what a pod sends may be a datagram of a socket that was given a backend.
    pub const SOCKET_PODS: u32 = 16;
    /// A change of policies is for new flows: one that was allowed is not judged again.
    pub const POLICY_NEW_FLOWS_ONLY: u32 = 32;
    /// Verdicts that allow are told too.
    pub const TELL_ALLOWED: u32 = 64;
    /// XDP knows frames in several buffers, and `bpf_xdp_get_buff_len` (5.18).
    pub const XDP_FRAGS: u32 = 128;
    /// Socket hooks can say why they refuse, by `bpf_set_retval` (5.18).
    pub const SET_RETVAL: u32 = 256;
    /// `bpf_fib_lookup` tells the MTU that a packet exceeds (5.12).
    pub const FIB_MTU: u32 = 512;
    /// What a pod sends has an address of the pod as its source.
    pub const SOURCE_CHECK: u32 = 1024;
}

/// Constants for one load of the object.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Config {
    /// `SO_NETNS_COOKIE` of the host's network namespace.
    pub host_netns_cookie: u64,
    /// [`config_flags`].
    pub flags: u32,
    /// First source port used for translation, host byte order.
    pub snat_port_min: u16,
    /// Last source port used for translation, host byte order.
    pub snat_port_max: u16,
    /// Idle timeouts in ticks of 2^30 ns.
    pub tcp_ticks: u32,
    pub tcp_closing_ticks: u32,
    pub udp_ticks: u32,
    pub half_open_ticks: u32,
    /// Elements of `SERVICES`, `BACKENDS` and `MAGLEV`.
    pub services: u32,
    pub backends: u32,
    pub maglev: u32,
    /// Refusals (RST, ICMP unreachable) that one CPU sends in a tick at the most.
    pub refusals_per_tick: u32,
    /// How long a datagram is remembered whose fragments are on their way, in ticks.
    pub fragment_ticks: u32,
    /// Elements of `HELD`.
    pub held: u32,
    /// Verdicts of policies about one pod that are told in a tick at the most; 0: none.
    pub verdicts_per_tick: u32,
    pub jiffies: Jiffies,
    pub unused: u32,
}

const _: () = assert!(size_of::<Config>() == 72);

/// The counter that the datapath tells the time by. `bpf_jiffies64` is a load, where each of the kernel's clocks costs a
/// call; it follows `CLOCK_MONOTONIC`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Jiffies {
    /// What it began with at boot: so that it comes round after 300 s (`INITIAL_JIFFIES`, linux/jiffies.h).
    pub initial: u32,
    /// Between two jiffies, in nanoseconds.
    pub length_ns: u32,
}

impl Jiffies {
    /// By what `clock_getres` says of `CLOCK_MONOTONIC_COARSE`.
    pub const fn of(length_ns: u32) -> Self {
        let hz = (1_000_000_000 + length_ns / 2) / length_ns;
        Self {
            initial: (hz * 300).wrapping_neg(),
            length_ns,
        }
    }

    /// Nanoseconds since boot.
    #[inline(always)]
    pub const fn to_ns(self, count: u64) -> u64 {
        count
            .wrapping_sub(self.initial as u64)
            .wrapping_mul(self.length_ns as u64)
    }
}

/// Whether more time has passed than `limit`, all in the same unit, `then` by an entry. A time that is yet to come has just
/// been: another CPU has seen the next tick, or the agent has written the entry, whose clock (`CLOCK_MONOTONIC`) is ahead by
/// what passed at boot before there were jiffies.
#[inline(always)]
pub(crate) const fn is_over(now: u32, then: u32, limit: u32) -> bool {
    now.wrapping_sub(then).cast_signed() > limit.cast_signed()
}

impl Config {
    /// What holds where nothing else is configured.
    pub const DEFAULT: Self = Self {
        host_netns_cookie: 0,
        flags: config_flags::FAST_PATH
            | config_flags::SOCKET_HOST_ONLY
            | config_flags::XDP_FRAGS
            | config_flags::SET_RETVAL
            | config_flags::FIB_MTU,
        // Above the default of ip_local_port_range (32768-60999), beside the node ports (30000-32767).
        snat_port_min: 61000,
        snat_port_max: 65535,
        // What kube-proxy sets for conntrack, and conntrack's own for the rest.
        tcp_ticks: Self::ticks(86_400),
        tcp_closing_ticks: Self::ticks(120),
        udp_ticks: Self::ticks(180),
        half_open_ticks: Self::ticks(60),
        services: 65_536,
        backends: 65_536,
        maglev: 4_194_304,
        refusals_per_tick: 1000,
        // Longer than hosts wait (Linux: 30 s for IPv4, 60 s for IPv6) would be of no use to most.
        fragment_ticks: Self::ticks(30),
        held: 2048,
        verdicts_per_tick: 100,
        // CONFIG_HZ=250, as most distributions have it.
        jiffies: Jiffies::of(4_000_000),
        unused: 0,
    };

    /// Ticks for a duration in seconds.
    pub const fn ticks(seconds: u32) -> u32 {
        ((seconds as u64 * 1_000_000_000) >> 30) as u32 + 1
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::DEFAULT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_that_is_yet_to_come_has_just_been() {
        for (now, then, over) in [
            (100, 90, false),
            (100, 89, true),
            (100, 101, false),
            (100, 5000, false),
        ] {
            assert_eq!(is_over(now, then, 10), over, "{then}");
        }
        // Also where the count comes round.
        assert!(!is_over(3, u32::MAX - 3, 10));
        assert!(is_over(8, u32::MAX - 3, 10));
        assert!(!is_over(u32::MAX, 2, 10));
    }

    #[test]
    fn jiffies_count_from_boot() {
        for (hz, length_ns) in [
            (100, 10_000_000),
            (250, 4_000_000),
            (300, 3_333_333),
            (1000, 1_000_000),
        ] {
            let jiffies = Jiffies::of(length_ns);
            let at_boot = u64::from((-300i32 * hz).cast_unsigned());
            assert_eq!(jiffies.to_ns(at_boot), 0, "{hz}");
            // Also behind the end of 32 bits.
            let hour = jiffies.to_ns(at_boot + 3600 * u64::from(hz.cast_unsigned()));
            assert!(hour.abs_diff(3_600_000_000_000) < 1_000_000, "{hz} {hour}");
        }
    }
}
