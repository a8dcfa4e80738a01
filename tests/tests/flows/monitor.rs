//! What `monitor` shows of packets as things happen to them, and what is counted of Services and endpoints; with an agent and without.

use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::flood;
use serde_json::Value;

use crate::stage::{Mode, Stage};

const NODE: &str = "node1";
const AT: &str = "10.96.0.41:80";
const CONNECTIONS: u64 = 20;
/// SYNs at a time, which fill the ring many times over.
const FLOOD: u32 = 20_000;
/// Long enough for a machine that is busy.
const WITHIN: &str = "120";

#[test]
fn what_happens_to_packets_is_shown_and_counted() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode::without_sockets("tc");
    let mut stage = Stage::set("monitor", mode, &[("be1", 1), ("be2", 2)], &["be1", "be2"], agent)?;
    stage.open("client1", "counted", AT, CONNECTIONS as u32)?;
    counted(&stage.agents.ask(NODE, "/load")?)?;
    let top = stage
        .agents
        .asking(NODE, &["top", "--once", "--interval", "1s"])?;
    let said = String::from_utf8_lossy(&top.stdout);
    ensure!(
        top.status.success() && said.contains("ns1/svc1") && said.contains("ns1/be2"),
        "{said}"
    );

    let begun = watched(
        &stage,
        &["--verdict", "translate", "--to", "svc/ns1/svc1", "--count", "3"],
    )?;
    let begun = lines(&begun)?;
    ensure!(begun.len() == 3, "{begun:?}");
    for one in &begun {
        let is_endpoint = ["ns1/be1", "ns1/be2"]
            .iter()
            .any(|pod| one["endpoint_pod"] == *pod);
        ensure!(
            one["from_pod"] == "ns1/client1"
                && one["to"] == "10.96.0.41"
                && one["to_port"] == 80
                && one["service"] == "svc/ns1/svc1"
                && one["protocol"] == "TCP"
                && one["hook"] == "from_pod"
                && is_endpoint,
            "{one}"
        );
    }

    missed(&stage)?;
    stage.put(&[("be1", None), ("be2", None)])?;
    stage.settle()?;
    let refused = watched(
        &stage,
        &[
            "--from",
            "ns1/client1",
            "--reason",
            "no-endpoints",
            "--count",
            "2",
        ],
    )?;
    for one in lines(&refused)? {
        ensure!(
            one["verdict"] == "refuse" && one["reason"] == "no-endpoints",
            "{one}"
        );
    }
    let packets = captured(&stage)?;
    ensure!(packets.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]), "{packets:?}");
    ensure!(
        String::from_utf8_lossy(&packets).contains("no-endpoints"),
        "the packet's comment is missing"
    );
    tcpdump_reads(&packets)?;
    let unknown = run(&stage, "json", &["--reason", "none-such"])?;
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    ensure!(
        !unknown.status.success() && text.contains("no reason is called so"),
        "{text}"
    );

    let cannot = run(&stage, "json", &["--verdict", "drop", "--reason", "no-endpoints"])?;
    let text = String::from_utf8_lossy(&cannot.stderr).into_owned();
    ensure!(
        !cannot.status.success() && text.contains("has the verdict refuse"),
        "{text}"
    );

    without_an_agent(&mut stage)
}

/// Who cannot keep up says so as it goes.
fn missed(stage: &Stage) -> Result<()> {
    let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
    let arguments = ["monitor", "--bpffs", &bpffs, "--seconds", WITHIN, "-o", "json"];
    let mut monitor = stage.agents.going_on(NODE, &arguments)?;
    let told = BufReader::new(monitor.stderr.take().context("no stderr")?).lines();
    let mut shown = BufReader::new(monitor.stdout.take().context("no stdout")?).lines();
    let (netns, target) = (stage.cluster.member_netns("client1")?, AT.parse()?);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        // A pipe that nobody reads would hold it up.
        scope.spawn(|| shown.by_ref().count());
        let floods = scope.spawn(|| -> Result<()> {
            for from in 0..u32::MAX {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                netns.enter(|| flood::syns(target, from * FLOOD, FLOOD))?;
            }
            Ok(())
        });
        let found = told
            .map_while(Result::ok)
            .any(|line| line.starts_with("missed ") && line.contains("more than can be told"));
        is_over.store(true, Ordering::Relaxed);
        monitor.kill()?;
        monitor.wait()?;
        ensure!(found, "it says nothing of what it missed");
        floods.join().ok().context("the flood has panicked")?
    })
}

/// Everything is shown by addresses, and why.
fn without_an_agent(stage: &mut Stage) -> Result<()> {
    stage.agents.kill_all();
    let unnamed = run(stage, "json", &["--from", "ns1/client1"])?;
    let text = String::from_utf8_lossy(&unnamed.stderr).into_owned();
    ensure!(
        !unnamed.status.success() && text.contains("names are known to a running agent alone"),
        "{text}"
    );
    let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
    let top = ["top", "--once", "--interval", "1s", "--bpffs", &bpffs];
    let top = stage.agents.asking(NODE, &top)?;
    let said = String::from_utf8_lossy(&top.stdout);
    ensure!(
        top.status.success() && said.contains("10.96.0.41:80/TCP"),
        "{said}{}",
        String::from_utf8_lossy(&top.stderr)
    );
    let watched_alone = watched(
        stage,
        &["--from", "10.244.1.10", "--verdict", "refuse", "--count", "1"],
    )?;
    let alone = lines(&watched_alone)?;
    ensure!(
        alone.len() == 1 && alone[0]["from_pod"].is_null() && alone[0]["to"] == "10.96.0.41",
        "{alone:?}"
    );
    let text = String::from_utf8_lossy(&watched_alone.stderr).into_owned();
    ensure!(text.contains("no names: failed to reach an agent"), "{text}");
    Ok(())
}

/// Each connection is counted at the Service and at one of its endpoints.
fn counted(load: &Value) -> Result<()> {
    let services = load["services"].as_array().context("no services")?;
    let service = services
        .iter()
        .find(|service| service["object"] == "Service ns1/svc1");
    let service = service.with_context(|| format!("no svc1 in {load}"))?;
    let endpoints = service["endpoints"].as_array().context("no endpoints")?;
    let of_endpoints: u64 = endpoints
        .iter()
        .filter_map(|one| one["connections"].as_u64())
        .sum();
    ensure!(
        service["connections"] == CONNECTIONS && of_endpoints == CONNECTIONS,
        "{service}"
    );
    Ok(())
}

/// What `monitor` prints while a client connects again and again.
fn watched(stage: &Stage, arguments: &[&str]) -> Result<Output> {
    while_connecting(stage, ("client1", AT), || run(stage, "json", arguments))
}

fn captured(stage: &Stage) -> Result<Vec<u8>> {
    let arguments = ["--verdict", "refuse", "--count", "1"];
    Ok(while_connecting(stage, ("client1", AT), || run(stage, "pcapng", &arguments))?.stdout)
}

/// By what did not write it: `client1` asks `AT`.
fn tcpdump_reads(packets: &[u8]) -> Result<()> {
    let started = Command::new("tcpdump")
        .args(["-n", "-r", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut tcpdump = match started {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("skipped: there is no tcpdump to read the capture");
            return Ok(());
        }
        started => started.context("failed to start tcpdump")?,
    };
    // Less than a pipe holds; it ends where nobody can write any longer.
    tcpdump
        .stdin
        .take()
        .context("tcpdump has no stdin")?
        .write_all(packets)?;
    let output = tcpdump.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success()
            && said.lines().count() == 1
            && said.contains("IP 10.244.1.10.")
            && said.contains(" > 10.96.0.41.80: Flags [S]"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// What a command prints while a client connects again and again.
pub fn while_connecting(
    stage: &Stage,
    (client, to): (&str, &str),
    watch: impl Fn() -> Result<Output> + Send,
) -> Result<Output> {
    let mut herd = 0;
    let connect = || {
        // Those that are refused are no less of interest.
        let _refused = stage.begin(client, &format!("herd{herd}"), to);
        herd += 1;
    };
    while_doing(connect, watch)
}

/// Does something again and again until a command has ended well.
pub fn while_doing(mut what: impl FnMut(), watch: impl Fn() -> Result<Output> + Send) -> Result<Output> {
    thread::scope(|scope| {
        let watching = scope.spawn(watch);
        while !watching.is_finished() {
            what();
        }
        let output = watching
            .join()
            .ok()
            .context("the thread of `monitor` has panicked")??;
        let text = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{text}");
        Ok(output)
    })
}

/// Runs `monitor` at the first node.
pub fn run(stage: &Stage, format: &str, arguments: &[&str]) -> Result<Output> {
    let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
    let fixed = ["monitor", "--bpffs", &bpffs, "-o", format, "--seconds", WITHIN];
    stage.agents.asking(NODE, &[&fixed, arguments].concat())
}

pub fn lines(output: &Output) -> Result<Vec<Value>> {
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("no JSON: {line}")))
        .collect()
}
