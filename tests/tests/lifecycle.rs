//! What a run makes is removed, also when the run is interrupted or killed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PLACES: [&str; 5] = [
    "/run/netns",
    "/run",
    "/sys/fs/bpf",
    "/sys/fs/cgroup",
    "/sys/fs/cgroup/unified",
];

/// Everything that carries the name of process `pid`.
fn made_by(pid: u32) -> Vec<PathBuf> {
    let prefix = format!("dpt-{pid}-");
    let entries = PLACES
        .iter()
        .filter_map(|place| Path::new(place).read_dir().ok())
        .flatten()
        .flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .map(|entry| entry.path())
        .collect()
}

/// Starts a run with an agent that ends at once, so that its probes take seconds, and waits until its cluster is up.
fn start() -> Result<Child> {
    let scenarios = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios/services");
    let child = Command::new(env!("CARGO_BIN_EXE_dataplane-scenarios"))
        .arg(scenarios)
        .args(["--agent", "/bin/true", "--jobs", "2"])
        .stdout(Stdio::null())
        .spawn()?;
    let end = Instant::now() + Duration::from_secs(20);
    while made_by(child.id()).len() < 10 {
        ensure!(Instant::now() < end, "the run never built its cluster");
        sleep(Duration::from_millis(20));
    }
    Ok(child)
}

fn send(child: &Child, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(child.id().cast_signed()), signal).context("failed to send a signal")
}

#[test]
fn an_interrupted_run_leaves_nothing() -> Result<()> {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut child = start()?;
        send(&child, signal)?;
        let status = child.wait()?;
        ensure!(status.code() == Some(128 + signal as i32), "{status}");
        let left = made_by(child.id());
        ensure!(left.is_empty(), "{signal} left {left:?}");
    }
    Ok(())
}

#[test]
fn a_killed_run_is_removed_by_the_next() -> Result<()> {
    let mut child = start()?;
    send(&child, Signal::SIGKILL)?;
    child.wait()?;
    ensure!(!made_by(child.id()).is_empty(), "there was nothing to remove");
    dataplane_tests::places::sweep();
    let left = made_by(child.id());
    ensure!(left.is_empty(), "the sweep left {left:?}");
    Ok(())
}
