//! `dataplane-demo`: two nodes and a client outside in network namespaces, an agent on each node, the manifests of
//! `deploy/examples`, and real traffic; one screen of what was programmed, who answered, and what did not break.

mod acts;
mod api;
mod kernel;
mod stage;

use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use anyhow::Result;
use clap::Parser;
use dataplane_tests::cli::remove_on_signal;
use dataplane_tests::places;

use crate::api::Api;
use crate::stage::Stage;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo", about, version)]
struct Args {
    /// The agent
    #[arg(long, env = "DATAPLANE_DEMO_AGENT")]
    agent: PathBuf,

    /// The folder of manifests
    #[arg(long, default_value = "deploy/examples")]
    manifests: PathBuf,

    /// Serve what a real Kubernetes API server says, in place of the folder
    #[arg(long)]
    api: bool,

    /// Keep everything up at the end, and print what to try
    #[arg(long)]
    hold: bool,

    /// How often the agents are killed
    #[arg(long, default_value_t = 3)]
    kills: u32,

    /// Connections kept on each of the three ways (a `ClusterIP`, a `NodePort` of each node) while something happens
    #[arg(long, default_value_t = 20)]
    connections: u32,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match remove_on_signal().and_then(|()| play(&args)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// All acts. False if something did not hold.
fn play(args: &Args) -> Result<bool> {
    places::sweep();
    let api = if args.api { Some(Api::start()?) } else { None };
    if matches!(api, Some(None)) {
        // What is missing was said.
        return Ok(true);
    }
    eprintln!("demo: two nodes, six pods and a client outside; an agent on each node …");
    let mut stage = Stage::set(&args.manifests, &args.agent, api.flatten())?;
    let addresses = acts::Addresses::of_the_examples()?;

    println!();
    println!("   outside      ┬─ node1  192.168.77.11  fd00:77::11   client-1  web-1  web-2");
    println!("   203.0.113.10 └─ node2  192.168.77.12  fd00:77::12   client-2  web-3  web-4");
    println!();
    let mut doubts = acts::programmed(&stage).unwrap_or_else(|error| vec![format!("{error:#}")]);
    doubts.extend(acts::answered(&stage, &addresses)?);
    let traffic = acts::traffic(&stage, &addresses, args.connections);
    doubts.extend(acts::endpoint_leaves(&mut stage, &traffic)?);
    doubts.extend(acts::agents_die(&mut stage, &traffic, args.kills)?);
    drop(traffic);
    for doubt in &doubts {
        println!("   did not hold: {doubt}");
    }
    if doubts.is_empty() {
        println!("   All of it held.");
    }
    if args.hold {
        hold(&stage, &args.agent)?;
    }
    Ok(doubts.is_empty())
}

/// Prints what to try, and waits for a signal.
fn hold(stage: &Stage, agent: &std::path::Path) -> Result<()> {
    let places = stage.cluster.places();
    let namespace = |name: &str| {
        stage
            .netns(name)
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    };
    let bpffs = places.bpffs.join("node1");
    let (agent, socket) = (agent.display(), places.work.join("node1.sock"));
    let what_to_change = match &stage.api {
        Some(api) => format!(
            "the cluster: change or delete something, the agents follow\n    {} get all,endpointslices -A",
            api.kubectl()
        ),
        None => format!(
            "the manifests: change or delete one, the agents follow\n    ls {}",
            stage.manifests.dir().display()
        ),
    };
    let in_client = format!("ip netns exec {}", namespace("client-1"));
    let in_outside = format!("ip netns exec {}", namespace(stage::OUTSIDE));
    let maps = kernel::maps(&bpffs)?;
    // `ip netns exec` would hide bpffs behind a /sys of its own.
    let node = places.netns("node1");
    println!(
        "
Up until Ctrl-C. Things to try in another terminal, as root:

  a pod asks the ClusterIP, by IPv4 and by IPv6
    {in_client} curl -s http://10.96.0.80/
    {in_client} curl -s 'http://[fd00:10:96::80]/'
  a NodePort, from outside
    {in_outside} curl -s http://192.168.77.12:30080/
  nobody is behind this one: refused at once
    {in_client} curl -sS http://10.96.0.99/
  what the kernel holds on node1
    bpftool map dump pinned {maps}/FRONTENDS_V4
    bpftool map dump pinned {maps}/FLOWS_V4
  what the agent of node1 says
    nsenter --net={node} {agent} status --bpffs {bpffs}
    {agent} wait --socket {socket}
    tail -f {log}
  {what_to_change}",
        maps = maps.display(),
        node = node.display(),
        bpffs = bpffs.display(),
        socket = socket.display(),
        log = places.work.join("node1.log").display(),
    );
    loop {
        thread::park();
    }
}
