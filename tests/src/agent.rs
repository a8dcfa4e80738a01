//! Agent processes: one a node, in its namespace and cgroup.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::api::account;
use crate::api::relay::Relay;
use crate::api::served::Served;
use crate::cluster::Cluster;
use crate::manifests::Manifests;

/// How long an agent may take to open its socket.
const START: Duration = Duration::from_mins(1);
/// How long the agent may take to program what was written. Its socket is there before its programs are loaded, which
/// takes seconds on a busy machine.
const SETTLE: Duration = Duration::from_mins(2);
/// How long the agent may take to answer.
const ANSWER: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(20);

/// A time that a machine of ordinary speed needs at most, made longer as `DATAPLANE_TEST_PATIENCE` says: emulated machines
/// need many times as long.
#[must_use]
pub fn patient(time: Duration) -> Duration {
    let factor = std::env::var("DATAPLANE_TEST_PATIENCE").ok();
    time * factor.and_then(|factor| factor.parse().ok()).unwrap_or(1)
}

/// The agent that tests run: what `DATAPLANE_AGENT` names, else the release build. Without it, or without being root,
/// nothing, with a word why.
#[must_use]
pub fn built() -> Option<PathBuf> {
    if !nix::unistd::Uid::effective().is_root() {
        println!("skipped: not root");
        return None;
    }
    let path = std::env::var_os("DATAPLANE_AGENT").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/dataplane-agent"),
        PathBuf::from,
    );
    if !path.exists() {
        println!("skipped: no {}, run `cargo xtask build`", path.display());
        return None;
    }
    Some(path)
}

/// How agents are started.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    pub program: PathBuf,
    /// Flags the same for all nodes (`--socket-lb off`).
    pub flags: Vec<String>,
}

/// The agents of a cluster. Dropping them kills them and removes what they attached.
#[derive(Debug)]
pub struct Agents {
    nodes: Vec<Agent>,
    options: AgentOptions,
}

#[derive(Debug)]
struct Agent {
    node: String,
    child: Option<Child>,
    /// Everything that goes before the program's own arguments.
    enter: (PathBuf, PathBuf),
    helper: crate::process::Helper,
    /// The flags that say where objects come from.
    source: Vec<OsString>,
    /// The way to the server, if there is one.
    relay: Option<Relay>,
    bpffs: PathBuf,
    socket: PathBuf,
    log: PathBuf,
}

impl Agents {
    /// Starts an agent on every node.
    pub fn start(cluster: &Cluster, manifests: &Path, options: AgentOptions) -> Result<Self> {
        Self::start_with(cluster, options, |_| Ok((folder_flags(manifests), None)))
    }

    /// Starts an agent on every node, which reads a folder, or a server through a relay of its node.
    pub fn reading(cluster: &Cluster, manifests: &Manifests, options: AgentOptions) -> Result<Self> {
        let Some(served) = manifests.served() else {
            return Self::start(cluster, manifests.dir(), options);
        };
        let Served { server, client } = &**served;
        Self::start_with(cluster, options, |node| {
            let relay = Relay::start(Some(cluster.node_netns(node)?.path()), server.port())?;
            let kubeconfig = account::kubeconfig(server, client, node, relay.port())?;
            let flags = [
                "--source".into(),
                "kube".into(),
                "--kubeconfig".into(),
                kubeconfig.into(),
            ];
            Ok((flags.into(), Some(relay)))
        })
    }

    fn start_with(
        cluster: &Cluster,
        options: AgentOptions,
        source: impl Fn(&str) -> Result<(Vec<OsString>, Option<Relay>)>,
    ) -> Result<Self> {
        let places = cluster.places();
        let mut agents = Self {
            nodes: Vec::new(),
            options,
        };
        for node in &cluster.shape().nodes {
            let name = &node.name;
            let bpffs = places.bpffs.join(name);
            fs::create_dir_all(&bpffs).with_context(|| format!("failed to create {}", bpffs.display()))?;
            let (source, relay) = source(name)?;
            agents.nodes.push(Agent {
                node: name.clone(),
                child: None,
                enter: (
                    cluster.node_netns(name)?.path().to_path_buf(),
                    cluster.node_cgroup(name)?.clone(),
                ),
                helper: cluster.helper().clone().writing(&places.work),
                source,
                relay,
                bpffs,
                socket: places.work.join(format!("{name}.sock")),
                log: places.work.join(format!("{name}.log")),
            });
        }
        agents.start_all()?;
        Ok(agents)
    }

    /// Starts every agent that does not run and waits until their sockets are there.
    pub fn start_all(&mut self) -> Result<()> {
        for agent in &mut self.nodes {
            agent.start(&self.options)?;
        }
        let end = Instant::now() + patient(START);
        for agent in &mut self.nodes {
            while !agent.socket.exists() && agent.exit().is_none() && Instant::now() < end {
                sleep(STEP);
            }
        }
        Ok(())
    }

    /// More flags, from each agent's next start on.
    pub fn set_flags(&mut self, flags: &[&str]) {
        self.options.flags.extend(flags.iter().map(ToString::to_string));
    }

    /// Where a node's agent reads objects from its next start on.
    pub fn set_source(&mut self, node: &str, flags: &[&str]) -> Result<()> {
        self.of_mut(node)?.source = flags.iter().map(Into::into).collect();
        Ok(())
    }

    /// Kills every agent at once, as a crash would.
    pub fn kill_all(&mut self) {
        for agent in &mut self.nodes {
            agent.kill();
        }
    }

    /// Kills the agent of one node.
    pub fn kill(&mut self, node: &str) -> Result<()> {
        self.of_mut(node)?.kill();
        Ok(())
    }

    /// The process of a node's agent, if it runs.
    pub fn pid(&self, node: &str) -> Result<Option<u32>> {
        Ok(self.of(node)?.child.as_ref().map(Child::id))
    }

    /// Waits until every agent has programmed what the folder holds now. Returns what went wrong: a run goes on with it,
    /// and its probes show the effect.
    pub fn settle(&mut self) -> Vec<String> {
        let waits: Vec<_> = self
            .nodes
            .iter()
            .map(|agent| agent.wait_command(&self.options).spawn())
            .collect();
        let end = Instant::now() + patient(SETTLE) + Duration::from_secs(2);
        let mut problems = Vec::new();
        for (agent, wait) in self.nodes.iter_mut().zip(waits) {
            let reason = match wait {
                Ok(mut wait) => outcome(&mut wait, end),
                Err(error) => Some(error.to_string()),
            };
            if let Some(exit) = agent.exit() {
                problems.push(format!(
                    "the agent of {} has ended ({exit}){}",
                    agent.node,
                    agent.last_words()
                ));
            } else if let Some(reason) = reason {
                problems.push(format!(
                    "waiting for the agent of {} failed: {reason}{}",
                    agent.node,
                    agent.last_words()
                ));
            }
        }
        problems
    }

    /// The same, where what went wrong is an error.
    pub fn settled(&mut self) -> Result<()> {
        let problems = self.settle();
        ensure!(problems.is_empty(), "{}", problems.join("; "));
        Ok(())
    }

    /// What `status` says of a node.
    pub fn status(&self, node: &str) -> Result<serde_json::Value> {
        let agent = self.of(node)?;
        let (netns, cgroup) = &agent.enter;
        let mut command = agent
            .helper
            .enter(netns, &cgroup.join("host"), &self.options.program);
        let output = command
            .args(["status", "--output", "json", "--bpffs"])
            .arg(&agent.bpffs)
            .stderr(Stdio::inherit())
            .output()
            .context("failed to run `status`")?;
        serde_json::from_slice(&output.stdout).context("`status` printed no JSON")
    }

    /// [`Self::asking`], for JSON.
    pub fn command(&self, node: &str, arguments: &[&str]) -> Result<Output> {
        self.asking(node, &[arguments, &["--output", "json"]].concat())
    }

    /// Runs a command that asks the agent of a node.
    pub fn asking(&self, node: &str, arguments: &[&str]) -> Result<Output> {
        let socket = self.of(node)?.socket.display().to_string();
        self.run(node, &[arguments, &["--socket", &socket]].concat())
    }

    /// The same for one that goes on until it is told to stop; its output is for the caller to read.
    pub fn going_on(&self, node: &str, arguments: &[&str]) -> Result<Child> {
        let socket = self.of(node)?.socket.display().to_string();
        let mut command = self.program(node, &[arguments, &["--socket", &socket]].concat())?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
            .spawn()
            .with_context(|| format!("failed to start {arguments:?}"))
    }

    /// Runs a command of the agent's program on a node.
    pub fn run(&self, node: &str, arguments: &[&str]) -> Result<Output> {
        self.program(node, arguments)?
            .output()
            .with_context(|| format!("failed to run {arguments:?}"))
    }

    fn program(&self, node: &str, arguments: &[&str]) -> Result<Command> {
        let agent = self.of(node)?;
        let (netns, cgroup) = &agent.enter;
        let mut command = agent
            .helper
            .enter(netns, &cgroup.join("host"), &self.options.program);
        command.args(arguments);
        Ok(command)
    }

    /// What the agent of a node answers on its socket.
    pub fn ask(&self, node: &str, path: &str) -> Result<serde_json::Value> {
        let mut socket = UnixStream::connect(&self.of(node)?.socket)?;
        socket.set_read_timeout(Some(patient(ANSWER)))?;
        write!(
            socket,
            "GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        serde_json::from_str(body).with_context(|| format!("{path}: {answer}"))
    }

    /// The BPF file system of a node's agent.
    pub fn bpffs(&self, node: &str) -> Result<&Path> {
        Ok(&self.of(node)?.bpffs)
    }

    fn of(&self, node: &str) -> Result<&Agent> {
        let agent = self.nodes.iter().find(|agent| agent.node == node);
        agent.with_context(|| format!("there is no agent of {node}"))
    }

    fn of_mut(&mut self, node: &str) -> Result<&mut Agent> {
        let agent = self.nodes.iter_mut().find(|agent| agent.node == node);
        agent.with_context(|| format!("there is no agent of {node}"))
    }

    /// The ways of the agents to their server.
    pub fn relays(&self) -> impl Iterator<Item = &Relay> {
        self.nodes.iter().filter_map(|agent| agent.relay.as_ref())
    }

    /// Agents that ended without being asked to.
    pub fn ended(&mut self) -> Vec<String> {
        let ended = |agent: &mut Agent| {
            let exit = agent.exit()?;
            Some(format!(
                "the agent of {} has ended ({exit}){}",
                agent.node,
                agent.last_words()
            ))
        };
        self.nodes.iter_mut().filter_map(ended).collect()
    }

    /// The nodes' names.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(|agent| agent.node.as_str())
    }

    /// Log files by node.
    pub fn logs(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.nodes
            .iter()
            .map(|agent| (agent.node.as_str(), agent.log.as_path()))
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        self.kill_all();
        for agent in &self.nodes {
            // Pins keep programs attached; the namespaces go, but cgroups and bpffs are the machine's.
            let _ = fs::remove_dir_all(&agent.bpffs);
        }
    }
}

impl Agent {
    fn start(&mut self, options: &AgentOptions) -> Result<()> {
        if self.child.is_some() {
            return Ok(());
        }
        // The socket of an agent that was killed would look like that of the new one.
        let _ = fs::remove_file(&self.socket);
        let log = File::options().create(true).append(true).open(&self.log)?;
        let (netns, cgroup) = &self.enter;
        let mut command = self.helper.enter(netns, &cgroup.join("host"), &options.program);
        command.arg("run").args(&self.source);
        command.args(["--node-name", &self.node]);
        command
            .arg("--bpffs")
            .arg(&self.bpffs)
            .arg("--cgroup")
            .arg(cgroup);
        command.arg("--socket").arg(&self.socket);
        command.args(&options.flags);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.child = Some(
            command
                .spawn()
                .with_context(|| format!("failed to start the agent of {}", self.node))?,
        );
        Ok(())
    }

    fn wait_command(&self, options: &AgentOptions) -> Command {
        let (netns, cgroup) = &self.enter;
        let mut command = self.helper.enter(netns, &cgroup.join("host"), &options.program);
        command.arg("wait").arg("--socket").arg(&self.socket);
        command.args(["--timeout", &format!("{}s", patient(SETTLE).as_secs())]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        command
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// How the agent ended, if it did so by itself.
    fn exit(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        Some(status.to_string())
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        log.lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .map_or_else(String::new, |line| format!(": {line}"))
    }
}

fn folder_flags(manifests: &Path) -> Vec<OsString> {
    vec!["--manifests".into(), manifests.into()]
}

/// Waits for a child until `end`; the reason if it failed.
fn outcome(child: &mut Child, end: Instant) -> Option<String> {
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return None,
            Ok(Some(status)) => {
                let text = child
                    .stderr
                    .take()
                    .and_then(|pipe| std::io::read_to_string(pipe).ok())
                    .unwrap_or_default();
                return Some(format!("{status} {}", text.trim()));
            }
            Ok(None) if Instant::now() < end => sleep(Duration::from_millis(5)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return Some("it did not end".to_owned());
            }
            Err(error) => return Some(error.to_string()),
        }
    }
}
