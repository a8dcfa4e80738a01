//! `verdicts --follow`: it tells each denial once and soon, while the agent runs, while none does and when the next one has come; and it ends
//! when it is told to.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStdout};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::agent::{built, patient};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::policies;
use crate::stage::{Stage, address};

const NODE: &str = "node1";
/// What is denied is told within this time; the agent that is to tell it may have to start.
const TELLS: Duration = Duration::from_secs(30);
const ENDS: Duration = Duration::from_secs(15);
const STEP: Duration = Duration::from_millis(50);

/// The command, and what it has told.
struct Following {
    child: Child,
    lines: Receiver<String>,
    told: Vec<Value>,
}

impl Following {
    fn start(stage: &Stage) -> Result<Self> {
        let bpffs = stage.agents.bpffs(NODE)?.to_str().context("no path")?;
        let arguments = ["verdicts", "--follow", "-o", "json", "--bpffs", bpffs];
        let mut child = stage.agents.going_on(NODE, &arguments)?;
        let stdout = child.stdout.take().context("no output")?;
        Ok(Self {
            child,
            lines: lines_of(stdout),
            told: Vec::new(),
        })
    }

    /// Waits for the denial of a connection to a port.
    fn tells(&mut self, port: u16) -> Result<&Value> {
        let end = Instant::now() + patient(TELLS);
        let port = format!("{port}/TCP");
        loop {
            if let Some(place) = self.told.iter().position(|one| one["port"] == port.as_str()) {
                return Ok(&self.told[place]);
            }
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left);
            let line = line.with_context(|| format!("no denial at {port} in {:#?}", self.told))?;
            self.told.push(serde_json::from_str(&line)?);
        }
    }

    /// Interrupts it, as Ctrl-C does. Returns what it has complained of.
    fn end(mut self) -> Result<(Vec<Value>, String)> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)?;
        let end = Instant::now() + patient(ENDS);
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > end {
                self.child.kill()?;
                bail!("it goes on after SIGINT");
            }
            sleep(STEP);
        };
        let mut complaints = String::new();
        let mut stderr = self.child.stderr.take().context("no stderr")?;
        stderr.read_to_string(&mut complaints)?;
        ensure!(status.success(), "{status}: {complaints}");
        for line in self.lines {
            self.told.push(serde_json::from_str(&line)?);
        }
        Ok((self.told, complaints))
    }
}

fn lines_of(stdout: ChildStdout) -> Receiver<String> {
    let (sender, lines) = channel();
    spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

#[test]
fn denials_are_told_as_they_happen_whether_or_not_an_agent_runs() -> Result<()> {
    let Some(agent) = built() else {
        return Ok(());
    };
    let mut stage = Stage::set("followed", &agent, &[], &policies())?;
    let mut following = Following::start(&stage)?;

    // What comes after the first line was not there yet when the command asked for the first time.
    for port in [1001, 1002] {
        denied(&stage, port)?;
        let told = following.tells(port)?;
        ensure!(
            told["from"] == "shop/other (10.244.1.12)"
                && told["to"] == "shop/back1 (10.244.1.21)"
                && told["policy"] == "NetworkPolicy shop/back"
                && told["verdict"] == "Denied",
            "{told:#}"
        );
    }
    stage.agents.kill_all();
    denied(&stage, 1003)?;
    let told = following.tells(1003)?;
    ensure!(told["from"] == "10.244.1.12", "without an agent: {told:#}");
    stage.agents.start_all()?;
    stage.settle()?;
    denied(&stage, 1004)?;
    let told = following.tells(1004)?;
    ensure!(told["from"] == "shop/other (10.244.1.12)", "{told:#}");

    let (told, complaints) = following.end()?;
    ensure!(
        complaints.contains("this is what the pinned tables say"),
        "{complaints}"
    );
    let ports: Vec<&str> = told.iter().filter_map(|one| one["port"].as_str()).collect();
    ensure!(
        ports == ["1001/TCP", "1002/TCP", "1003/TCP", "1004/TCP"],
        "each once, in order: {told:#?}"
    );
    Ok(())
}

/// Sends one packet that policies deny.
fn denied(stage: &Stage, port: u16) -> Result<()> {
    ensure!(
        !stage.connects("other", address("back1", port)?)?,
        "{port} is open"
    );
    Ok(())
}
