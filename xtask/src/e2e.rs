//! `cargo xtask e2e`: upstream's own network tests in a real cluster of three nodes (`tests/cluster`), with our chart in place of
//! kube-proxy. Half an hour, so it is no part of `.ci/run`.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{chart, image, kube, paths, process, progress};

const SCRIPTS: &str = "tests/cluster";
/// Tests that have to pass.
const EXPECTED: &str = "expected.txt";
/// Those of them that prove something: they fail where nobody serves Services, or nobody enforces policies.
const PROVING: &str = "proving.txt";
/// Every test of these groups is run unless `--focus` says otherwise.
const FOCUS: [&str; 2] = [r"\[sig-network\]", "NetworkPolicy between"];
/// What needs a cloud, the Internet, kernel modules or kube-proxy itself.
const SKIPPED: [&str; 2] = [
    r"\[Disruptive\]|\[Flaky\]|Loadbalancing|\[Feature:(NetworkPolicy|Ingress|NEG|kubemci|Networking|NoSNAT|SCTP|Example)|\[Experimental\]|check kube-proxy urls|set TCP CLOSE_WAIT",
    r"\[Disruptive\]|SCTP",
];
/// Stops at an index error of its own where nodes have addresses of both families, with any proxy.
const SINGLE_STACK_ONLY: &str = "ESIPP [Slow] should only target nodes with endpoints";
/// As in `up.sh`.
const NODES: u32 = 3;
const SERVICES: [&str; 2] = ["10.96.0.0/16", "fd00:10:96::/112"];
/// In the names of tests that need both families.
const DUAL_STACK_ONLY: &str = "DualStack";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only tests whose names match, as a regular expression
    #[arg(long)]
    focus: Option<String>,
    /// Who serves Services: `none` says which tests prove something
    #[arg(long, value_enum, default_value = "dataplane")]
    proxy: Serving,
    /// The plugin that makes pods' interfaces
    #[arg(long, value_enum, default_value = "ptp")]
    cni: Cni,
    /// IPv4 alone, instead of both families
    #[arg(long)]
    single_stack: bool,
    /// Tests at a time
    #[arg(long, default_value_t = 4)]
    jobs: usize,
    /// An archive of the image that is there already, instead of one made now
    #[arg(long, value_name = "ARCHIVE")]
    image: Option<PathBuf>,
    /// More of the chart's values, as for `helm --set`
    #[arg(long)]
    set: Vec<String>,
    /// Leave the cluster up
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Serving {
    Dataplane,
    KubeProxy,
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Cni {
    Ptp,
    Bridge,
}

impl Cni {
    fn name(self) -> &'static str {
        match self {
            Cni::Ptp => "ptp",
            Cni::Bridge => "bridge",
        }
    }
}

/// The command.
pub fn run(args: &Args) -> Result<()> {
    if !process::is_root() {
        bail!("a cluster of namespaces needs root: sudo -E env PATH=\"$PATH\" cargo xtask e2e");
    }
    let helm = match chart::helm() {
        Ok(helm) => helm,
        // The recipe brings it.
        Err(_) => kube::run().and_then(|()| chart::helm())?,
    };
    let archive = match (args.proxy, &args.image) {
        (Serving::Dataplane, Some(archive)) => Some(archive.clone()),
        (Serving::Dataplane, None) => Some(image::of_this_machine()?),
        (Serving::KubeProxy | Serving::None, _) => None,
    };
    let cluster = Cluster {
        programs: paths::tools().join("cluster"),
        files: paths::root().join("target/cluster"),
        dual: !args.single_stack,
        cni: args.cni,
        kube_proxy: args.proxy == Serving::KubeProxy,
    };
    cluster.build()?;
    // What an interrupted run has left.
    cluster.down()?;
    let done = cluster.test(args, &helm, archive.as_deref());
    if args.keep {
        progress::note(&format!(
            "the cluster stays: RUN={} {SCRIPTS}/node.sh 1; {SCRIPTS}/down.sh",
            cluster.files.display()
        ));
    } else {
        cluster.down()?;
    }
    let seen = done?;
    judge(&seen, args)
}

struct Cluster {
    /// What `build.sh` makes.
    programs: PathBuf,
    /// What runs keeps its files here.
    files: PathBuf,
    dual: bool,
    cni: Cni,
    kube_proxy: bool,
}

impl Cluster {
    fn script(&self, name: &str) -> Command {
        let mut command = Command::new("bash");
        command
            .arg(paths::root().join(SCRIPTS).join(name))
            .env("W", &self.programs)
            .env("RUN", &self.files)
            .env("CNI", self.cni.name())
            .env("PROXY", if self.kube_proxy { "kube-proxy" } else { "none" })
            .env("DUAL", if self.dual { "1" } else { "0" });
        command
    }

    /// A program beside the API server, where the nodes' addresses lead somewhere.
    fn beside_server(&self, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg("--net=/run/netns/kc-cp")
            .arg(program)
            .arg("--kubeconfig")
            .arg(self.files.join("cp/kubeconfig"));
        command
    }

    fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = self.beside_server(&self.programs.join("bin/kubectl"));
        command.args(["--namespace", "kube-system"]).args(arguments);
        command
    }

    fn build(&self) -> Result<()> {
        let built = [
            "bin/e2e.test",
            "images/agnhost.tar",
            "images/kubedns.tar",
            "kube-proxy.tar",
        ];
        if built.iter().all(|name| self.programs.join(name).is_file()) {
            return Ok(());
        }
        progress::step("building a Kubernetes cluster, 5 to 20 minutes", || {
            process::run_captured(self.script("build.sh").arg(&self.programs))?;
            // Go's cache is larger than what was made of it.
            let cache = self.programs.join("gocache");
            if cache.exists() {
                fs::remove_dir_all(&cache)
                    .with_context(|| format!("failed to remove {}", cache.display()))?;
            }
            Ok(())
        })
    }

    fn down(&self) -> Result<()> {
        if !self.files.join("state").exists() {
            return Ok(());
        }
        progress::step("taking the cluster down", || {
            process::run_captured(&mut self.script("down.sh"))
        })
    }

    fn test(&self, args: &Args, helm: &Path, archive: Option<&Path>) -> Result<Seen> {
        progress::step("bringing the cluster up", || {
            process::run_captured(&mut self.script("up.sh"))
        })?;
        if let Some(archive) = archive {
            progress::step("installing the chart", || self.install(helm, archive, &args.set))?;
        } else if !self.kube_proxy {
            // It waits for the API server's Service, and the tests for it.
            process::run_captured(&mut self.kubectl(&["delete", "deployment", "coredns"]))?;
            refuse_services()?;
        }
        let mut seen = Seen::default();
        let cannot_pass = if self.dual {
            String::new()
        } else {
            format!("|{DUAL_STACK_ONLY}")
        };
        let mut test = |focus: &str, skipped| {
            self.run_tests(focus, &format!("{skipped}{cannot_pass}"), args.jobs, &mut seen)
        };
        match &args.focus {
            Some(focus) => test(focus, SKIPPED[1])?,
            None => {
                for (focus, skipped) in FOCUS.into_iter().zip(SKIPPED) {
                    test(focus, skipped)?;
                }
            }
        }
        Ok(seen)
    }

    fn install(&self, helm: &Path, archive: &Path, more: &[String]) -> Result<()> {
        process::run_captured(self.script("load-image.sh").arg(archive))?;
        let mut install = self.beside_server(helm);
        install
            .args(["install", "dataplane"])
            .arg(paths::root().join(chart::CHART))
            .args(["--namespace", chart::NAMESPACE])
            .args(["--set", "apiServer.addresses={https://172.18.0.2:6443}"])
            .args(["--set", "host.cgroup2=/sys/fs/cgroup/unified"]);
        for value in more {
            install.args(["--set", value]);
        }
        process::run_captured(&mut install)?;
        for object in ["daemonset/dataplane-agent", "deployment/coredns"] {
            process::run_captured(&mut self.kubectl(&["rollout", "status", object, "--timeout=180s"]))?;
        }
        let mut test = self.beside_server(helm);
        process::run_captured(test.args(["test", "dataplane", "--namespace", chart::NAMESPACE]))
    }

    /// Runs tests and shows what comes of each.
    fn run_tests(&self, focus: &str, skipped: &str, jobs: usize, seen: &mut Seen) -> Result<()> {
        let out = self.files.with_extension("logs");
        fs::create_dir_all(&out).with_context(|| format!("failed to create {}", out.display()))?;
        for old in fs::read_dir(&out).into_iter().flatten().flatten() {
            // A report of an earlier run would be read again.
            let _gone = fs::remove_file(old.path());
        }
        progress::note(&format!(
            "tests of {focus}: their output is {}",
            out.join("log").display()
        ));
        let mut child = self
            .script("e2e.sh")
            .args([focus, skipped])
            .env("E2EPROCS", jobs.to_string())
            .env("OUT", &out)
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start e2e.sh")?;
        let stdout = child.stdout.take().context("e2e.sh has no output")?;
        for line in BufReader::new(stdout).lines() {
            let line = line.context("failed to read the output of e2e.sh")?;
            println!("{line}");
            seen.take(&line);
        }
        child.wait().context("failed to wait for e2e.sh")?;
        Ok(())
    }
}

/// What came of the tests, by their names.
#[derive(Debug, Default)]
struct Seen {
    passed: BTreeSet<String>,
    failed: BTreeSet<String>,
}

impl Seen {
    /// `PASS   28s NAME`, as e2e.sh says it.
    fn take(&mut self, line: &str) {
        let Some((outcome, rest)) = line.split_once(char::is_whitespace) else {
            return;
        };
        let Some((_, name)) = rest.trim_start().split_once("s ") else {
            return;
        };
        match outcome {
            "PASS" => self.passed.insert(name.trim().to_owned()),
            "FAIL" => self.failed.insert(name.trim().to_owned()),
            _ => false,
        };
    }
}

/// Compares with what passes elsewhere. Without a proxy nothing is wrong with a failure: it says that the test proves something.
fn judge(seen: &Seen, args: &Args) -> Result<()> {
    let text = names_in(EXPECTED)?;
    let expected: BTreeSet<&str> = names(&text)
        .into_iter()
        .filter(|name| can_pass(name, !args.single_stack))
        .collect();
    let wrong: Vec<&str> = seen
        .failed
        .iter()
        .map(String::as_str)
        .filter(|name| expected.contains(name))
        .collect();
    let not_run: Vec<&str> = expected
        .iter()
        .copied()
        .filter(|name| !seen.passed.contains(*name) && !seen.failed.contains(*name))
        .collect();
    println!(
        "{} passed, {} failed, {} skipped",
        seen.passed.len(),
        seen.failed.len(),
        not_run.len()
    );
    if args.proxy == Serving::None {
        println!("these fail without a proxy ({SCRIPTS}/{PROVING}):");
        for name in &seen.failed {
            println!("{name}");
        }
        return Ok(());
    }
    if seen.passed.is_empty() {
        bail!("no test passed");
    }
    let text = names_in(PROVING)?;
    let proving = names(&text)
        .into_iter()
        .filter(|name| seen.passed.contains(*name));
    println!(
        "{} of those that passed fail without us ({SCRIPTS}/{PROVING})",
        proving.count()
    );
    if !wrong.is_empty() {
        bail!("these have to pass, and failed:\n{}", wrong.join("\n"));
    }
    if args.focus.is_none() && !not_run.is_empty() {
        bail!("these have to pass, and were not run:\n{}", not_run.join("\n"));
    }
    Ok(())
}

/// Lets nodes answer for cluster IPs that nobody serves: some tests ask hundreds of times, and the system waits two minutes
/// for each silence.
fn refuse_services() -> Result<()> {
    for node in 1..=NODES {
        for range in SERVICES {
            let mut command = Command::new("ip");
            command.args(["-n", &format!("kc-n{node}"), "route", "add", "unreachable", range]);
            process::run_captured(&mut command)?;
        }
    }
    Ok(())
}

/// Whether a test can pass in a cluster of one family or of two.
fn can_pass(name: &str, dual: bool) -> bool {
    !name.contains(if dual { SINGLE_STACK_ONLY } else { DUAL_STACK_ONLY })
}

/// A list of tests beside the scripts.
fn names_in(file: &str) -> Result<String> {
    let place = paths::root().join(SCRIPTS).join(file);
    fs::read_to_string(&place).with_context(|| format!("failed to read {}", place.display()))
}

fn names(text: &str) -> BTreeSet<&str> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_are_read_by_their_tests_names() {
        let mut seen = Seen::default();
        for line in [
            "PASS   28s [sig-network] Services should serve a basic endpoint from pods  [Conformance]",
            "FAIL  138s [sig-network] Services should be able to create a functioning NodePort service",
            "       Nov 21: Unexpected error: | PASS 1s nothing",
            "passed 1 failed 1",
        ] {
            seen.take(line);
        }
        let passed: Vec<&String> = seen.passed.iter().collect();
        assert_eq!(
            passed,
            ["[sig-network] Services should serve a basic endpoint from pods  [Conformance]"]
        );
        assert_eq!(seen.failed.len(), 1);
    }

    #[test]
    fn every_test_that_has_to_pass_is_of_a_group_that_is_run() {
        let text = names_in(EXPECTED).unwrap();
        let expected = names(&text);
        let proving = names_in(PROVING).unwrap();
        assert!(!proving.is_empty() && names(&proving).is_subset(&expected));
        assert!(expected.len() > 100, "{}", expected.len());
        assert_eq!(
            expected
                .iter()
                .filter(|name| name.contains("NetworkPolicy between"))
                .count(),
            28
        );
        assert!(expected.iter().all(|name| name.contains("[sig-network]")));
        for (dual, kept) in [(true, SINGLE_STACK_ONLY), (false, DUAL_STACK_ONLY)] {
            let cannot = expected.iter().filter(|name| !can_pass(name, dual));
            assert!(cannot.clone().count() >= 1);
            assert!(cannot.clone().all(|name| name.contains(kept)));
        }
    }
}
