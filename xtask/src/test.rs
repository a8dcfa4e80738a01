//! `cargo xtask test`: every test of the workspace, with the programs they run built first.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result};

use crate::{build, kernels, kube, packages, process, progress, setup};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Test on another kernel, in an emulated machine: a series such as 6.1, or `all`; what follows are names of tests, or `scenarios`
    #[arg(long, value_name = "SERIES")]
    kernel: Option<String>,
    /// Passed to `cargo test`: a name filter, `--package NAME`, or after `--` the test binary's own options
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    args: Vec<String>,
}

/// Counts of one run, as cargo's test runner prints them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub passed: u64,
    pub failed: u64,
    pub skipped: u64,
}

impl Counts {
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// The command. Its last line on stdout counts all tests of all packages.
pub fn run(args: &Args) -> Result<()> {
    if let Some(series) = &args.kernel {
        return kernels::run(series, &args.args);
    }
    setup::programs()?;
    build::run()?;
    if !process::is_root() {
        progress::note("not root: tests on real packets need it, and skip themselves saying so");
        progress::note("to run them too: sudo -E env PATH=\"$PATH\" cargo xtask test");
    }
    let mut command = process::cargo("test");
    match packages::promtool() {
        Ok(Some(promtool)) => drop(command.env("PROMTOOL", promtool)),
        Ok(None) => progress::note("there is no promtool: its test of metrics and alerts is left out"),
        Err(error) => progress::note(&format!("there is no promtool, its test is left out: {error:#}")),
    }
    if let Err(error) = kube::provide() {
        progress::note(&format!(
            "there is no real API server, the tests against one are left out: {error:#}"
        ));
    }
    command.args(["--workspace", "--no-fail-fast"]).args(&args.args);
    if !args.args.iter().any(|arg| arg == "--") {
        command.arg("--");
    }
    command.arg("--show-output").stdout(Stdio::piped());
    progress::note("cargo test --workspace …");
    let mut child = command.spawn().context("failed to start cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut seen = Seen::default();
    for line in BufReader::new(stdout).lines() {
        let line = line.context("failed to read the output of cargo test")?;
        if seen.is_told(&line) {
            println!("{line}");
        }
    }
    let counts = seen.counts();
    let status = child.wait().context("failed to wait for cargo test")?;
    println!("{counts}");
    process::finish_with(status)
}

/// What the test runner says. Tests that need what a machine lacks say so and end well: they are skipped ones.
#[derive(Debug, Default)]
struct Seen {
    counts: Counts,
    /// In the outputs of tests that passed.
    is_passed: bool,
    /// The test whose output this is has said that it is skipped.
    is_skipped: bool,
    skipped: u64,
}

impl Seen {
    /// Takes a line; whether it is of interest. What tests that passed have to say is not, unless they are skipped.
    fn is_told(&mut self, line: &str) -> bool {
        let counts = result_line(line);
        if counts.is_some() || line == "failures:" {
            self.is_passed = false;
        } else if line == "successes:" {
            self.is_passed = true;
        }
        self.counts.add(counts.unwrap_or_default());
        if !self.is_passed {
            return true;
        }
        if line.starts_with("---- ") {
            self.is_skipped = false;
        }
        let is_first = line.starts_with("skipped: ") && !std::mem::replace(&mut self.is_skipped, true);
        self.skipped += u64::from(is_first);
        is_first
    }

    fn counts(&self) -> Counts {
        Counts {
            passed: self.counts.passed.saturating_sub(self.skipped),
            skipped: self.counts.skipped + self.skipped,
            ..self.counts
        }
    }
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; …`
fn result_line(line: &str) -> Option<Counts> {
    let rest = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        rest.split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
    };
    Some(Counts {
        passed: number("passed")?,
        failed: number("failed")?,
        skipped: number("ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_skip_themselves_are_skipped_ones() {
        let output = "
running 3 tests
test a ... ok
successes:
---- a stdout ----
skipped: not root
skipped: once more
---- b stdout ----
12 packets
successes:
    a
    b
failures:
---- c stdout ----
skipped: is what it says here
test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out
";
        let mut seen = Seen::default();
        let told: Vec<&str> = output.lines().filter(|line| seen.is_told(line)).collect();
        assert!(told.contains(&"skipped: not root") && !told.contains(&"12 packets"));
        assert!(!told.contains(&"skipped: once more") && told.contains(&"---- c stdout ----"));
        let counts = Counts {
            passed: 1,
            failed: 1,
            skipped: 2,
        };
        assert_eq!(seen.counts(), counts);
    }

    #[test]
    fn result_lines_are_counted_and_others_are_not() {
        let line = "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        assert_eq!(
            result_line(line),
            Some(Counts {
                passed: 3,
                failed: 2,
                skipped: 1
            })
        );
        assert_eq!(result_line("test pipeline::tests::passes ... ok"), None);
    }
}
