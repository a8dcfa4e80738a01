//! The one list of programs that tests, benchmarks and the demo run, and why. Compilers are in [`crate::toolchain`].

use crate::paths;

/// A program, the Debian package that brings it, and what it is for.
#[derive(Debug)]
pub struct Need {
    pub program: &'static str,
    pub package: &'static str,
    pub why: &'static str,
}

impl Need {
    pub fn is_met(&self) -> bool {
        paths::program(self.program).is_some()
    }
}

/// What is run beside our own programs. Everything else goes through libraries.
pub const PROGRAMS: &[Need] = &[
    Need {
        program: "cc",
        package: "gcc",
        why: "links the user side",
    },
    Need {
        program: "ip",
        package: "iproute2",
        why: "the demo's `ip netns exec` examples",
    },
    Need {
        program: "bpftool",
        package: "bpftool",
        why: "tests that maps can be read by other tools; the demo's examples; bench datapath: the tables of an older object",
    },
    Need {
        program: "curl",
        package: "curl",
        why: "the demo's examples",
    },
    Need {
        program: "tcpdump",
        package: "tcpdump",
        why: "tests that captures of `monitor` can be read by other tools",
    },
    Need {
        program: "nft",
        package: "nftables",
        why: "bench net: kube-proxy's nftables rules as a peer",
    },
    Need {
        program: "iptables-nft-restore",
        package: "iptables",
        why: "bench net: kube-proxy's iptables rules as a peer",
    },
];

/// The packages of all programs that are missing here.
pub fn missing() -> Vec<&'static Need> {
    PROGRAMS.iter().filter(|need| !need.is_met()).collect()
}
