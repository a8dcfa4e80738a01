//! Debug lines, from the programs to the agent's log: there when asked for, and free when not. Needs root and the BPF
//! object; without them the tests say so and do nothing.

mod needs;

use std::{
    fs::{self, File},
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use aya::programs::loaded_programs;
use dataplane_agent::{
    attach::cleanup,
    bpf::{
        Program,
        loader::{self, LoadOptions},
        pins::Pins,
        sys,
    },
    config::Sizes,
};
use dataplane_tests::{
    links::{Links, Route, everywhere, host},
    netns::{NetNs, set_sysctls},
    places::{self, Places},
};

use needs::ready;

const MANIFESTS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: node}
status: {addresses: [{type: InternalIP, address: 192.0.2.10}]}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default}
spec: {nodeName: node, containers: [{name: main, image: none}]}
status: {phase: Running, podIP: 10.0.1.5, podIPs: [{ip: 10.0.1.5}, {ip: "fd00:1::5"}]}
---
apiVersion: v1
kind: Service
metadata: {name: names, namespace: default}
spec:
  clusterIP: 10.96.0.53
  clusterIPs: [10.96.0.53, "fd00:96::53"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  ports: [{port: 53, protocol: UDP, targetPort: 5353}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: names, namespace: default, labels: {kubernetes.io/service-name: names}}
addressType: IPv4
ports: [{port: 5353, protocol: UDP}]
endpoints: [{addresses: [192.0.2.1], conditions: {ready: true}}]
"#;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A node with an uplink, a pod of both families, and a place for the agent's log.
struct Node {
    places: Places,
    netns: NetNs,
    pod: NetNs,
    _router: NetNs,
    agent: Option<Child>,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
        let _ = self
            .netns
            .enter(|| cleanup::cleanup(&self.places.bpffs).map_err(Into::into));
        self.places.remove();
    }
}

impl Node {
    fn build() -> Result<Self> {
        places::sweep();
        let places = Places::create("debuglog")?;
        let [node, pod, router] = ["node", "pod", "router"].map(|name| NetNs::create(&places.netns(name)));
        let (netns, pod, router) = (node?, pod?, router?);
        let mut links = Links::open(&netns)?;
        links.set_up("lo")?;
        links.add_veth("eth0", "node", router.fd(), None)?;
        links.set_up("eth0")?;
        Links::open(&router)?.set_up("node")?;
        links.add_address("eth0", (ip("192.0.2.10"), 24))?;
        let default = Route {
            via: Some(ip("192.0.2.1")),
            ..Route::default()
        };
        links.add_route(everywhere(ip("0.0.0.0")), default)?;
        pod.enter(|| set_sysctls(&[("net/ipv6/conf/default/accept_dad", "0")]))?;
        links.add_veth("veth1", "eth0", pod.fd(), None)?;
        links.set_up("veth1")?;
        let mut inside = Links::open(&pod)?;
        inside.set_up("eth0")?;
        for (own, gateway) in [("10.0.1.5", "169.254.1.1"), ("fd00:1::5", "fe80::1")] {
            let (own, gateway) = (ip(own), ip(gateway));
            let to_pod = Route {
                device: Some("veth1"),
                ..Route::default()
            };
            links.add_route(host(own), to_pod)?;
            inside.add_address("eth0", host(own))?;
            // Nobody has this address: packets are only looked at.
            inside.add_neighbour("eth0", gateway, [2, 0, 0, 0, 0, 1])?;
            let default = Route {
                via: Some(gateway),
                device: Some("eth0"),
                onlink: true,
                ..Route::default()
            };
            inside.add_route(everywhere(own), default)?;
        }
        let node = Self {
            places,
            netns,
            pod,
            _router: router,
            agent: None,
        };
        fs::create_dir(node.manifests())?;
        fs::write(node.manifests().join("all.yaml"), MANIFESTS)?;
        Ok(node)
    }

    fn manifests(&self) -> PathBuf {
        self.places.work.join("manifests")
    }

    fn log_file(&self) -> PathBuf {
        self.places.work.join("agent.log")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dataplane-agent"));
        command
            .args(arguments)
            .arg("--socket")
            .arg(self.places.work.join("agent.sock"));
        command
    }

    /// Starts an agent beside what the last one left, with an empty log, and waits until all is programmed.
    fn start(&mut self, debug_log: Option<&str>) -> Result<()> {
        let log = File::create(self.log_file())?;
        let mut run = self.command(&["run", "--node-name", "node"]);
        run.arg("--manifests").arg(self.manifests());
        run.arg("--bpffs").arg(&self.places.bpffs);
        run.arg("--cgroup").arg(&self.places.cgroup);
        run.args(debug_log).stdin(Stdio::null()).stderr(log);
        self.agent = Some(
            self.netns
                .enter(|| run.spawn().context("failed to start the agent"))?,
        );
        let done = self.command(&["wait", "--timeout", "30s"]).status()?;
        ensure!(done.success(), "not ready: {}", self.log()?);
        Ok(())
    }

    /// As a crash does: everything stays attached.
    fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.log_file())?)
    }

    /// The debug lines, single-spaced and from the hook's name on.
    fn lines(&self) -> Result<Vec<String>> {
        let log = self.log()?;
        let lines = log
            .lines()
            .filter_map(|line| line.split_once(" dataplane_ebpf: "))
            .map(|(_, line)| line.split_whitespace().collect::<Vec<_>>().join(" "));
        Ok(lines.collect())
    }

    fn wait_for(&self, line: &str) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !self.lines()?.iter().any(|seen| seen == line) {
            ensure!(Instant::now() < deadline, "no line {line:?} in\n{}", self.log()?);
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    fn send(&self, from: &str, to: &str, bytes: usize) -> Result<()> {
        let (from, to): (SocketAddr, SocketAddr) = (from.parse()?, to.parse()?);
        self.pod.enter(|| {
            UdpSocket::bind(from)?.send_to(&vec![0; bytes], to)?;
            Ok(())
        })
    }

    fn veth1(&self) -> Result<u32> {
        Links::open(&self.netns)?.index("veth1")
    }
}

#[test]
fn a_packet_that_is_touched_is_a_line_if_lines_are_asked_for() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build()?;
    let veth1 = node.veth1()?;
    for on in [Some("--debug-log"), None, Some("--debug-log=true")] {
        node.start(on)?;
        // Rewritten, refused, dropped, and none of our business.
        node.send("10.0.1.5:4001", "10.96.0.53:53", 10)?;
        node.send("[fd00:1::5]:4002", "[fd00:96::53]:53", 10)?;
        node.send("10.0.1.5:4003", "10.96.0.53:53", 3000)?;
        node.send("[fd00:1::5]:4003", "[fd00:96::53]:53", 3000)?;
        node.send("10.0.1.5:4004", "192.0.2.1:53", 10)?;
        node.send("10.0.1.5:4005", "10.96.0.53:53", 10)?;
        if on.is_some() {
            for line in [
                "pass 0 udp 10.0.1.5 4001 > 10.96.0.53 53 as 10.0.1.5 4001 > 192.0.2.1 5353",
                "pass 0 udp 10.0.1.5 4003 > 10.96.0.53 53 as 10.0.1.5 4003 > 192.0.2.1 5353",
                "pass 0 udp 10.0.1.5 0 > 10.96.0.53 0 as 10.0.1.5 0 > 192.0.2.1 0",
                "drop udp fd00:1::5 0 > fd00:96::53 0: fragment-dropped",
                "pass 0 udp 10.0.1.5 4005 > 10.96.0.53 53 as 10.0.1.5 4005 > 192.0.2.1 5353",
            ] {
                node.wait_for(&format!("from_pod {veth1}: {line}"))?;
            }
            let lines = node.lines()?;
            ensure!(
                lines.iter().any(|line| line.starts_with(&format!(
                    "from_pod {veth1}: answer 0 udp fd00:1::5 4002 > fd00:96::53 53 as fd00:96::53 0 > fd00:1::5 0"
                ))),
                "{lines:#?}"
            );
            ensure!(!lines.iter().any(|line| line.contains("4004")), "{lines:#?}");
        } else {
            // Lines take a few milliseconds.
            sleep(Duration::from_millis(200));
            let lines = node.lines()?;
            ensure!(lines.is_empty(), "{lines:#?}");
        }
        node.kill();
    }
    Ok(())
}

#[test]
fn without_lines_the_programs_lack_the_instructions_for_them() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let places = Places::create("debugfree")?;
    let instructions = |debug_log: bool| -> Result<Vec<(Program, u32)>> {
        let pins = Pins::new(&places.bpffs.join(debug_log.to_string()));
        let options = LoadOptions {
            sizes: Sizes::default(),
            config: dataplane_common::config::Config::default(),
            xdp: true,
            socket_hooks: false,
            debug_log,
        };
        let loaded = loader::load(pins, &options)?;
        ensure!(loaded.debug_log.is_some() == debug_log);
        let programs = Program::ALL
            .iter()
            .filter(|program| !program.is_cgroup() && !program.is_late());
        programs
            .map(|&program| {
                let fd = loaded.program(program).context("not loaded")?;
                let id = sys::prog_info(fd)?.id;
                let info = loaded_programs().flatten().find(|info| info.id() == id);
                let bytes = info.and_then(|info| info.size_translated()).context("no size")?;
                Ok((program, bytes / 8))
            })
            .collect()
    };
    let counted = (instructions(false), instructions(true));
    places.remove();
    for ((program, off), (_, on)) in counted.0?.into_iter().zip(counted.1?) {
        println!("{}: {off} instructions, {on} with debug lines", program.symbol());
        assert!(off + 1000 < on, "{program:?}: {off} and {on}");
    }
    Ok(())
}
