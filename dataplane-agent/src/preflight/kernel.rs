//! What the kernel does for this process: version, capabilities, and whether it takes the programs.

use std::{fs, path::Path};

use anyhow::Context;
use dataplane_common::config as datapath;

use super::{Rows, Verdict};
use crate::{
    bpf::{
        Program,
        kernel::{self, CAPABILITIES},
        loader::{self, LoadOptions},
    },
    config::{Config, DatapathMode, Sizes, SocketLb},
    netlink::{socket::RequestSocket, sockets},
};

/// Returns whether programs can be loaded at all.
pub(super) fn look(rows: &mut Rows<'_>, config: &Config) -> bool {
    match kernel::check_version() {
        Ok(()) => rows.ok("version", kernel::release()),
        Err(error) => rows.problem("version", error),
    }
    capabilities(rows);
    let may_load = match kernel::check() {
        Ok(()) => {
            rows.ok("bpf system call", "allowed");
            true
        }
        Err(error) => {
            rows.problem("bpf system call", error);
            false
        }
    };
    switches(rows);
    if may_load {
        programs(rows, config);
        if kernel::has_tcx() {
            rows.ok("TC programs", "attached by TCX");
        } else {
            rows.add(
                Verdict::Ok,
                "TC programs",
                "attached by clsact",
                "TCX is of 6.6; needs the modules sch_ingress and cls_bpf",
            );
        }
    }
    sockets_of_host(rows, config);
    may_load
}

fn capabilities(rows: &mut Rows<'_>) {
    let held = kernel::effective_capabilities().unwrap_or(0);
    let names = |wanted: bool| {
        let found = CAPABILITIES
            .iter()
            .filter(|(number, _)| (held >> number & 1 == 1) == wanted);
        found.map(|(_, name)| *name).collect::<Vec<_>>().join(", ")
    };
    match kernel::check_capabilities() {
        Err(error) => rows.problem("capabilities", error),
        Ok(()) if kernel::has_sys_admin() => rows.ok("capabilities", names(true)),
        Ok(()) => rows.note(
            "capabilities",
            names(true),
            format!(
                "enough; without {} programs of others have no names in status, and clean-up cannot wait for the kernel",
                names(false)
            ),
        ),
    }
}

/// Kernel parameters about BPF.
fn switches(rows: &mut Rows<'_>) {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        rows.ok("BTF of the kernel", "there");
    } else {
        rows.note(
            "BTF of the kernel",
            "missing",
            "not needed: no program looks into the kernel's own types",
        );
    }
    match read("/proc/sys/net/core/bpf_jit_enable").as_deref() {
        Some("0") => rows.note(
            "BPF JIT",
            "off",
            "programs are interpreted, several times slower: set net.core.bpf_jit_enable=1",
        ),
        Some(value) => rows.ok("BPF JIT", format!("net.core.bpf_jit_enable={value}")),
        None => rows.note("BPF JIT", "unknown", "failed to read net.core.bpf_jit_enable"),
    }
    match read("/proc/sys/kernel/unprivileged_bpf_disabled").as_deref() {
        Some("0") => rows.note(
            "unprivileged BPF",
            "allowed",
            "anybody may load programs; nothing here needs that: set kernel.unprivileged_bpf_disabled=1",
        ),
        Some(value) => rows.ok(
            "unprivileged BPF",
            format!("kernel.unprivileged_bpf_disabled={value}"),
        ),
        None => rows.ok("unprivileged BPF", "not there"),
    }
}

/// Whether the verifier takes the programs, by asking it: maps and programs that are gone when this returns.
fn programs(rows: &mut Rows<'_>, config: &Config) {
    if let Err(error) = loader::check_object() {
        rows.problem("programs", error);
        return;
    }
    let constants = match constants() {
        Ok(constants) => constants,
        Err(error) => {
            rows.problem("programs", error);
            return;
        }
    };
    let options = LoadOptions {
        sizes: Sizes::default(),
        config: constants,
        xdp: true,
        socket_hooks: true,
        debug_log: false,
    };
    let outcome = match loader::rehearse(&options) {
        Ok(outcome) => outcome,
        Err(error) => {
            rows.problem("programs", error);
            return;
        }
    };
    for (subject, is_of, is_needed) in [
        (
            "programs of TC",
            (|program| !is_xdp(program) && !program.is_cgroup() && !program.is_late()) as fn(Program) -> bool,
            true,
        ),
        ("program of XDP", is_xdp, config.datapath != DatapathMode::Tc),
        (
            "programs of socket hooks",
            Program::is_cgroup,
            config.socket_lb != SocketLb::Off,
        ),
        ("programs of devices without link layer", Program::is_late, false),
    ] {
        let of_group = outcome.iter().filter(|(program, _)| is_of(**program));
        let (mut number, mut failed) = (0, None);
        for (_, result) in of_group {
            number += 1;
            failed = failed.or(result.as_ref().err());
        }
        match failed {
            None => rows.ok(subject, format!("{number} pass the verifier")),
            Some(error) => rows.add(
                if is_needed {
                    Verdict::Problem
                } else {
                    Verdict::Note
                },
                subject,
                "refused",
                error.clone(),
            ),
        }
    }
}

/// As far as they follow from the kernel.
fn constants() -> anyhow::Result<datapath::Config> {
    let flags = kernel::config_flags(kernel::version()?).context("failed to try what this kernel has")?;
    Ok(datapath::Config {
        jiffies: kernel::jiffies().context("failed to read the resolution of the kernel's coarse clock")?,
        flags: datapath::Config::DEFAULT.flags | flags,
        ..datapath::Config::default()
    })
}

fn is_xdp(program: Program) -> bool {
    program == Program::Xdp
}

/// What socket hooks ask of the kernel besides programs.
fn sockets_of_host(rows: &mut Rows<'_>, config: &Config) {
    if config.socket_lb == SocketLb::Off {
        rows.ok("socket hooks", "off (--socket-lb)");
        return;
    }
    match kernel::netns_cookie() {
        Ok(_) => rows.ok("SO_NETNS_COOKIE", "there"),
        Err(error) => rows.note(
            "SO_NETNS_COOKIE",
            error.to_string(),
            "of 5.14: without it host processes cannot be told from pods, and socket hooks stay off unless --socket-lb is `all`; the packet path does their work",
        ),
    }
    match RequestSocket::open_sock_diag().and_then(|mut socket| sockets::probe(&mut socket)) {
        Ok(()) => rows.ok("end of sockets (SOCK_DESTROY)", "there"),
        Err(error) => rows.note(
            "end of sockets (SOCK_DESTROY)",
            "missing",
            sockets::unable(&error),
        ),
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned())
}
