//! `cargo xtask test --kernel SERIES`: the programs and the links tests on another kernel, in an emulated machine.
//!
//! The kernel is Debian's ([`crate::packages`]). The machine has its modules for networks, a shell, and our programs at the
//! paths that they were built to; what it prints ends with a line that says how it went. [`SERIES`] is the one list of
//! kernels.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::guest::{self, Guest};
use crate::{packages, paths, process, progress};

/// A kernel series that is tested.
#[derive(Debug)]
struct Series {
    name: &'static str,
    /// The release of Debian that has it.
    release: &'static str,
    /// What the agents of scenarios may do, for `dataplane-scenarios --as`.
    rights: &'static str,
}

impl Series {
    /// What its versions begin with.
    fn versions(&self) -> String {
        format!("{}.", self.name.trim_end_matches(".x"))
    }
}

const SERIES: [Series; 4] = [
    Series {
        name: "5.10",
        release: "bullseye",
        // Before 5.11 tables count against the memory that may be locked.
        rights: "container --extra-capabilities SYS_RESOURCE",
    },
    Series {
        name: "6.1",
        release: "bookworm",
        rights: "container",
    },
    Series {
        name: "6.12",
        release: "trixie",
        rights: "container",
    },
    Series {
        name: "7.x",
        release: "sid",
        rights: "container",
    },
];

/// How long an emulated machine may take; tens of times as long as a real one does.
const TIMEOUT: Duration = Duration::from_mins(40);

/// Tests on one series, or on `all`.
pub fn run(wanted: &str, filters: &[String]) -> Result<()> {
    let chosen: Vec<&Series> = SERIES
        .iter()
        .filter(|series| wanted == "all" || wanted == series.name)
        .collect();
    if chosen.is_empty() {
        let known: Vec<&str> = SERIES.iter().map(|series| series.name).collect();
        bail!(
            "no kernel series {wanted}: there are {} and all",
            known.join(", ")
        );
    }
    if let Some(lack) = guest::lacking()? {
        println!("skipped: {lack}");
        return Ok(());
    }
    let programs = programs()?;
    let mut failed = Vec::new();
    for series in chosen {
        let Some(kernel) = packages::kernel(series.release, &series.versions())? else {
            println!(
                "skipped: kernel {}: no package of it in Debian's {}",
                series.name, series.release
            );
            continue;
        };
        let passed = test(series, &kernel, &programs, filters)?;
        println!(
            "kernel {}: {}",
            series.name,
            if passed { "passed" } else { "failed" }
        );
        if !passed {
            failed.push(series.name);
        }
    }
    ensure!(failed.is_empty(), "failed on kernel {}", failed.join(", "));
    Ok(())
}

/// What is run there.
#[derive(Debug)]
struct Programs {
    agent: PathBuf,
    helper: PathBuf,
    tests: Vec<PathBuf>,
}

/// Builds the programs; the tests' paths are in what cargo says.
fn programs() -> Result<Programs> {
    crate::ebpf::run(&crate::ebpf::Args::default())?;
    let mut build = process::cargo("build");
    build.args(["--quiet", "--package", "dataplane-agent"]);
    progress::step("building the agent", || process::run(&mut build))?;
    let mut command = process::cargo("test");
    command.args(["--no-run", "--message-format", "json", "--quiet"]);
    command.args([
        "--package",
        "dataplane-tests",
        "--test",
        "links",
        "--test",
        "equivalence",
    ]);
    let text = progress::step("building the tests", || process::stdout_of(&mut command))?;
    let tests: Vec<PathBuf> = text.lines().filter_map(executable).collect();
    ensure!(
        tests.len() == 2,
        "cargo named {} test programs instead of 2",
        tests.len()
    );
    let debug = |name| paths::target().join("debug").join(name);
    Ok(Programs {
        agent: debug("dataplane-agent"),
        helper: debug("dataplane-scenarios"),
        tests,
    })
}

/// The test program that a line of cargo's names: one whose name has a hash, unlike that of a plain program.
fn executable(line: &str) -> Option<PathBuf> {
    let (_, rest) = line.split_once("\"executable\":\"")?;
    let path = PathBuf::from(rest.split('"').next()?);
    (path.parent()?.file_name()? == "deps").then_some(path)
}

fn test(series: &Series, kernel: &Path, programs: &Programs, filters: &[String]) -> Result<bool> {
    let work = paths::root()
        .join("target/kernels")
        .join(format!("{}.root", series.name));
    let guest = Guest::create(kernel, &work)?;
    guest.add_program(&programs.agent)?;
    guest.add_program(&programs.helper)?;
    guest.add_file(&paths::ebpf_object())?;
    let mut script = format!(
        "export DATAPLANE_AGENT={} DATAPLANE_EBPF_OBJECT={}\n\
         export DATAPLANE_TEST_PATIENCE=20 DATAPLANE_TRANSFER_BYTES=1000000\n\
         export DATAPLANE_EQUIVALENCE_PACKETS=20000 RUST_BACKTRACE=0\n",
        programs.agent.display(),
        paths::ebpf_object().display()
    );
    let (scenarios, filters): (Vec<&str>, Vec<&str>) = filters
        .iter()
        .map(String::as_str)
        .partition(|filter| *filter == OF_SCENARIOS);
    let (is_all, only_scenarios) = (
        scenarios.is_empty() && filters.is_empty(),
        !scenarios.is_empty() && filters.is_empty(),
    );
    for program in programs.tests.iter().filter(|_| !only_scenarios) {
        guest.add_program(program)?;
        let filters = if is_all {
            DEFAULT_TESTS.join(" ")
        } else {
            filters.join(" ")
        };
        writeln!(
            script,
            "run {} {filters} --nocapture --test-threads=1",
            program.display()
        )?;
    }
    if is_all || !scenarios.is_empty() {
        let scenarios = SCENARIOS.map(|scenario| paths::root().join("tests/scenarios").join(scenario));
        for (hooks, datapath) in [("all", "xdp"), ("off", "tc")] {
            write!(
                script,
                "run {} --agent $DATAPLANE_AGENT --jobs 1 --socket-lb {hooks} --datapath {datapath} --as {}",
                programs.helper.display(),
                series.rights
            )?;
            for scenario in &scenarios {
                write!(script, " {}", scenario.display())?;
            }
            writeln!(script)?;
        }
        for scenario in &scenarios {
            guest.add_file(scenario)?;
        }
    }
    let image = guest.pack(&script)?;
    let log = paths::root()
        .join("target/kernels")
        .join(format!("{}.log", series.name));
    progress::note(&format!(
        "kernel {}: all output in {}",
        series.name,
        log.display()
    ));
    let output = File::create(&log).with_context(|| format!("failed to create {}", log.display()))?;
    let mut machine = guest::machine(kernel, &image)?;
    machine
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output);
    progress::step(&format!("running tests on kernel {}", series.name), || {
        guest::run_bounded(&mut machine, TIMEOUT)
    })?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    for line in text.lines().map(str::trim_end).filter(|line| is_told(line)) {
        println!("  {line}");
    }
    // The machine has what these tests need: one that is left out is a failure. So is a reference that keeps a device alive.
    let is_spoiled = ["skipped:", "lacks", KEPT].iter().any(|what| text.contains(what));
    Ok(!is_spoiled && text.lines().any(|line| line.trim_end() == guest::PASSED))
}

/// What runs without filters: every program through the verifier and over random packets, and uplinks that few machines
/// have modules for, and packets that wait for a neighbour, about which kernels differ.
const DEFAULT_TESTS: [&str; 4] = [
    "host_and_kernel_build_agree",
    "uplinks",
    "super_packets",
    "first_datagrams_arrive_tc",
];

/// In place of a test's name: [`SCENARIOS`].
const OF_SCENARIOS: &str = "scenarios";

/// Run there by agents with the rights of the chart, with and without socket hooks: cluster IPs of both families and protocols, what
/// has no endpoint, and policies for TCP and SCTP.
const SCENARIOS: [&str; 3] = [
    "services/m004-clusterip-both-families-and-protocols.json",
    "services/s010-no-endpoints-empty-slice.json",
    "netpol/n026.json",
];

/// What the kernel says of a device that something refers to after its end.
const KEPT: &str = "unregister_netdevice: waiting for";

fn is_told(line: &str) -> bool {
    line.contains("skipped:")
        || line.contains(KEPT)
        || [
            "test ",
            "FAILED",
            "Error:",
            "Linux version",
            "lacks the module",
            "pass ",
            "FAIL",
            "fail ",
        ]
        .iter()
        .any(|start| line.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_programs_are_found_in_what_cargo_says() {
        let line =
            r#"{"reason":"compiler-artifact","executable":"/x/target/debug/deps/links-0a1b","fresh":true}"#;
        assert_eq!(executable(line), Some("/x/target/debug/deps/links-0a1b".into()));
        assert_eq!(
            executable(r#"{"executable":"/x/target/debug/dataplane-agent"}"#),
            None
        );
        assert_eq!(executable(r#"{"executable":null}"#), None);
    }
}
