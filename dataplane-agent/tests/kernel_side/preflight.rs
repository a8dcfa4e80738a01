//! That `preflight` says what is there, changes nothing, and tells apart what keeps the agent from starting.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result};
use dataplane_agent::{
    config::{Config, SourceConfig},
    preflight::{self, Report, Row, Verdict},
    source::kube::Address,
};

use super::{cleaning::Found, needs::ready, node::Node};

fn row<'a>(report: &'a Report, subject: &str) -> Result<&'a Row> {
    let found = report.rows.iter().find(|row| row.subject == subject);
    found.with_context(|| format!("no row about {subject}: {report:?}"))
}

#[test]
fn preflight_says_what_is_there_and_changes_nothing() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("preflight")?;
    let look = |config: &Config| {
        node.netns
            .enter(|| Ok(preflight::look(config, &PathBuf::from("/nowhere"))))
    };
    let config = node.config();
    let before = Found::look(&node)?;
    let report = look(&config)?;
    assert_eq!(Found::look(&node)?, before);
    assert!(report.can_start, "{report:?}");
    let device = row(&report, "eth0")?;
    assert!(device.found.contains("MTU 1500, XDP"), "{device:?}");
    for subject in [
        "programs of TC",
        "program of XDP",
        "BPF file system",
        "cgroup v2",
        "kube-proxy's rules",
    ] {
        assert_eq!(row(&report, subject)?.verdict, Verdict::Ok, "{subject}");
    }

    // Not there, and not in a BPF file system: each keeps the agent from starting, in its own words.
    for (broken, subject, way_out) in [
        (
            Config {
                bpffs: "/tmp/no-bpffs".into(),
                ..node.config()
            },
            "BPF file system",
            "mount -t bpf",
        ),
        (
            Config {
                cgroup: Some("/tmp".into()),
                ..node.config()
            },
            "cgroup v2",
            "--socket-lb off",
        ),
        (
            Config {
                source: SourceConfig::Folder("/nowhere".into()),
                ..node.config()
            },
            "/nowhere",
            "No such file",
        ),
        (
            Config {
                source: SourceConfig::Kube(Address {
                    kubeconfig: Some("/nowhere".into()),
                    servers: Vec::new(),
                }),
                ..node.config()
            },
            "API server",
            "failed to read the kubeconfig /nowhere",
        ),
    ] {
        let report = look(&broken)?;
        assert!(!report.can_start);
        let problems = report.rows.iter().filter(|row| row.verdict == Verdict::Problem);
        let problems: Vec<&Row> = problems.collect();
        assert!(
            problems.len() == 1 && problems[0].subject == subject && problems[0].meaning.contains(way_out),
            "{problems:?}"
        );
    }

    let nft = |arguments: &'static str| {
        let arguments = arguments.split(' ');
        node.netns
            .enter(|| Ok(Command::new("nft").args(arguments).output()?))
    };
    if nft("add table ip6 kube-proxy { chain services { counter ; } ; }")
        .is_ok_and(|done| done.status.success())
    {
        let report = look(&config)?;
        let rules = row(&report, "kube-proxy's rules")?;
        assert_eq!(rules.verdict, Verdict::Note);
        assert!(rules.found.contains("nftables mode"), "{rules:?}");
        assert!(report.can_start, "it starts beside kube-proxy");
    }
    Ok(())
}
