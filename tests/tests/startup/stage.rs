//! A node with an agent, those who flood, and pods that come and go.

use std::fmt;
use std::io::Write;
use std::net::{IpAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use dataplane_tests::agent::{AgentOptions, Agents, patient};
use dataplane_tests::cluster::Cluster;
use dataplane_tests::links::{Links, Route};
use dataplane_tests::manifests::{Manifests, PodObject, pod};
use dataplane_tests::netns::NetNs;
use dataplane_tests::pod_network;
use dataplane_tests::process::Helper;
use dataplane_tests::shape::{ExternalShape, Network, NodeShape, PodShape, Shape, parse_prefix};
use serde_json::{Value, json};

use crate::flood::{Targets, arrived, socket};

const NODE: &str = "node1";
const NAMESPACE: &str = "ns1";
/// Ports by who sends there.
const FROM_OUTSIDE: u16 = 7001;
const FROM_POD: u16 = 7002;
const FROM_STRANGER: u16 = 7003;
/// Where new pods send to.
const SINK: u16 = 7004;
const SINK_ADDRESS: [u8; 4] = [10, 244, 1, 11];
/// After its begin a pod lives so long before its status is known, and then again.
const HALF_A_LIFE: Duration = Duration::from_millis(60);
/// The first number of the devices of pods that come and go.
const FIRST_DEVICE: usize = 0x1000;

/// Datagrams that arrived although policies forbid them, and what shows that the floods were there.
#[derive(Debug, Default)]
pub struct Totals {
    pub created: u64,
    pub outside: u64,
    pub pods: u64,
    pub stranger: u64,
    /// Of these, since the pod's processes have begun.
    pub stranger_since_begin: u64,
    pub sent: u64,
    /// Pods without policies, and those of them that everybody has reached.
    pub controls: u64,
    pub controls_reached: u64,
    /// How long the plugin took.
    added: Vec<Duration>,
}

impl Totals {
    pub fn add(&mut self, other: Totals) {
        self.created += other.created;
        self.outside += other.outside;
        self.pods += other.pods;
        self.stranger += other.stranger;
        self.stranger_since_begin += other.stranger_since_begin;
        self.sent += other.sent;
        self.controls += other.controls;
        self.controls_reached += other.controls_reached;
        self.added.extend(other.added);
    }
}

impl fmt::Display for Totals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} pods; forbidden datagrams from outside {}, from another pod {}, from a container that is no pod {} \
             ({} since the pod's processes began), sent by the pods {}; {} of {} pods without policies were reached",
            self.created,
            self.outside,
            self.pods,
            self.stranger,
            self.stranger_since_begin,
            self.sent,
            self.controls_reached,
            self.controls
        )?;
        let mut added = self.added.clone();
        added.sort_unstable();
        if let (Some(slowest), Some(median)) = (added.last(), added.get(added.len() / 2)) {
            write!(f, "; ADD took {median:?}, {slowest:?} at the most")?;
        }
        Ok(())
    }
}

/// What a pod has got.
struct Counts {
    is_control: bool,
    outside: u64,
    pods: u64,
    stranger: u64,
    stranger_since_begin: u64,
    added: Option<Duration>,
}

pub struct Stage {
    agents: Agents,
    cluster: Cluster,
    folder: Manifests,
    plugin: PathBuf,
    network: Network,
    targets: Arc<Targets>,
    floods: Vec<JoinHandle<()>>,
    sink: UdpSocket,
    /// Not a pod, and on this node.
    _stranger: NetNs,
}

fn ips(addresses: &[[u8; 4]]) -> Vec<IpAddr> {
    addresses.iter().map(|address| (*address).into()).collect()
}

impl Stage {
    pub fn set(name: &str, network: Network, agent: PathBuf) -> Result<Self> {
        let known = |name: &str, address| PodShape {
            name: name.to_owned(),
            node: NODE.to_owned(),
            addresses: ips(&[address]),
            host_network: false,
        };
        let shape = Shape {
            nodes: vec![NodeShape {
                name: NODE.to_owned(),
                addresses: ips(&[[192, 168, 77, 11]]),
                extra_addresses: Vec::new(),
                pod_cidrs: vec![parse_prefix("10.244.1.0/24")?],
            }],
            pods: vec![
                known("client", [10, 244, 1, 10]),
                known("sink", SINK_ADDRESS),
                known("resident", [10, 244, 1, 12]),
            ],
            externals: vec![ExternalShape {
                name: "ext1".to_owned(),
                addresses: ips(&[[203, 0, 113, 10]]),
            }],
            network,
        };
        let helper = Helper::new(env!("CARGO_BIN_EXE_dataplane-scenarios"));
        let cluster = Cluster::build(name, shape, &helper)?;
        let stranger = add_stranger(&cluster)?;
        let folder = Manifests::create(&cluster.places().work)?;
        let node_ips = cluster.shape().nodes[0].addresses.clone();
        folder.apply(&json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}, "spec": {"podCIDRs": ["10.244.1.0/24"]},
            "status": {"addresses": [{"type": "InternalIP", "address": node_ips[0]}]},
        }))?;
        for one in &cluster.shape().pods {
            let mut object = pod(one, NAMESPACE, &node_ips);
            // Policies are in force at this node before the first pod comes, whose object the agent may have later than we.
            if one.name == "resident" {
                object["metadata"]["labels"] = json!({"app": "closed"});
            }
            folder.apply(&object)?;
        }
        folder.apply(&json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "closed", "namespace": NAMESPACE},
            "spec": {"podSelector": {"matchLabels": {"app": "closed"}}, "policyTypes": ["Ingress", "Egress"]},
        }))?;
        let plugin = agent.with_file_name("dataplane-cni");
        let options = AgentOptions {
            program: agent,
            flags: ["--socket-lb", "off"].map(str::to_owned).to_vec(),
        };
        let mut agents = Agents::start(&cluster, folder.dir(), options)?;
        settle(&mut agents)?;
        // What was there when no pod was expected is left alone from the next start on.
        agents.kill_all();
        agents.start_all()?;
        settle(&mut agents)?;
        let targets = Arc::new(Targets::default());
        let mut floods = Vec::new();
        for (netns, port) in [
            (&cluster.member_netns("ext1")?, FROM_OUTSIDE),
            (&cluster.member_netns("client")?, FROM_POD),
            (&stranger, FROM_STRANGER),
        ] {
            let (socket, targets) = (socket(netns, 0)?, targets.clone());
            floods.push(thread::spawn(move || targets.flood(&socket, port)));
        }
        let sink = socket(&cluster.member_netns("sink")?, SINK)?;
        Ok(Self {
            agents,
            cluster,
            folder,
            plugin,
            network,
            targets,
            floods,
            sink,
            _stranger: stranger,
        })
    }

    /// Pods that come, live and go side by side.
    pub fn wave(&mut self, numbers: &[usize], with_plugin: bool) -> Result<Totals> {
        // Not one that another has just had: neighbours remember for a second whose it was.
        let address = |number: usize| IpAddr::from([10, 244, 1, 20 + (number % 200) as u8]);
        self.targets.set(numbers.iter().copied().map(address));
        let stage = &*self;
        let counts: Vec<Result<Counts>> = thread::scope(|scope| {
            let lives: Vec<_> = numbers
                .iter()
                .enumerate()
                .map(|(place, number)| {
                    scope.spawn(move || stage.live(*number, address(*number), place == 0, with_plugin))
                })
                .collect();
            let lives = lives.into_iter().map(thread::ScopedJoinHandle::join);
            lives
                .map(|life| life.map_err(|_| anyhow!("a pod panicked"))?)
                .collect()
        });
        let mut totals = Totals {
            sent: arrived(&self.sink),
            ..Totals::default()
        };
        for counts in counts {
            let Counts {
                is_control,
                outside,
                pods,
                stranger,
                stranger_since_begin,
                added,
            } = counts?;
            totals.added.extend(added);
            if is_control {
                totals.controls += 1;
                totals.controls_reached += u64::from(outside > 0 && pods > 0 && stranger > 0);
            } else {
                totals.created += 1;
                totals.outside += outside;
                totals.pods += pods;
                totals.stranger += stranger;
                totals.stranger_since_begin += stranger_since_begin;
            }
        }
        ensure!(self.agents.ended().is_empty(), "{:?}", self.agents.ended());
        Ok(totals)
    }

    /// One pod from its object to its end.
    fn live(&self, number: usize, address: IpAddr, is_control: bool, with_plugin: bool) -> Result<Counts> {
        let name = format!("p{number}");
        let labels = json!({"app": if is_control { "open" } else { "closed" }});
        let object = |addresses: &[IpAddr]| {
            let object = PodObject {
                namespace: NAMESPACE,
                name: &name,
                labels: labels.clone(),
                ports: Vec::new(),
                node: NODE,
                node_ips: &self.cluster.shape().nodes[0].addresses,
                addresses,
                host_network: false,
            };
            object.manifest()
        };
        // As kubelet, which has it from the API server as the agent has.
        let mut pending = object(&[]);
        pending["status"] = json!({"phase": "Pending"});
        self.folder.apply(&pending)?;

        let netns = NetNs::create(&self.cluster.places().netns(&name))?;
        let sockets = [FROM_OUTSIDE, FROM_POD, FROM_STRANGER];
        let sockets = sockets.map(|port| socket(&netns, port));
        let [outside, pods, stranger] = sockets;
        let (outside, pods, stranger) = (outside?, pods?, stranger?);
        let shape = PodShape {
            name: name.clone(),
            node: NODE.to_owned(),
            addresses: vec![address],
            host_network: false,
        };
        let node = self.cluster.node_netns(NODE)?;
        let mut links = Links::open(node)?;
        let device = FIRST_DEVICE + number;
        pod_network::connect_pod(self.cluster.shape(), device, &shape, &mut links, &netns)?;

        let added = with_plugin
            .then(|| self.add(&name, address, device, &netns))
            .transpose()?;
        let before_begin = arrived(&stranger);
        // Its process, whose first packets are no answers.
        if !is_control {
            let sender = socket(&netns, 0)?;
            for _ in 0..20 {
                let _ = sender.send_to(b"out", (IpAddr::from(SINK_ADDRESS), SINK));
                sleep(Duration::from_millis(1));
            }
        }
        sleep(HALF_A_LIFE);
        self.folder.apply(&object(&[address]))?;
        if is_control {
            let end = Instant::now() + patient(Duration::from_secs(15));
            let mut counts = [
                arrived(&outside),
                arrived(&pods),
                before_begin + arrived(&stranger),
            ];
            while counts.contains(&0) && Instant::now() < end {
                sleep(Duration::from_millis(10));
                for (count, socket) in counts.iter_mut().zip([&outside, &pods, &stranger]) {
                    *count += arrived(socket);
                }
            }
            self.end_pod(&pending, &name, address, device, netns, with_plugin)?;
            return Ok(Counts {
                is_control,
                outside: counts[0],
                pods: counts[1],
                stranger: counts[2],
                stranger_since_begin: 0,
                added,
            });
        }
        sleep(HALF_A_LIFE);
        let since_begin = arrived(&stranger);
        let counts = Counts {
            is_control,
            outside: arrived(&outside),
            pods: arrived(&pods),
            stranger: before_begin + since_begin,
            stranger_since_begin: since_begin,
            added,
        };
        self.end_pod(&pending, &name, address, device, netns, with_plugin)?;
        Ok(counts)
    }

    fn end_pod(
        &self,
        object: &Value,
        name: &str,
        address: IpAddr,
        device: usize,
        netns: NetNs,
        with_plugin: bool,
    ) -> Result<()> {
        if with_plugin {
            self.call("DEL", name, address, device, &netns)?;
        }
        Links::open(self.cluster.node_netns(NODE)?)?.delete(&pod_network::port(device))?;
        netns.remove();
        self.folder.delete(object)
    }

    /// As a runtime does it: what is to be tried again later (code 11 of the CNI specification) is tried again.
    fn add(&self, name: &str, address: IpAddr, device: usize, netns: &NetNs) -> Result<Duration> {
        const AGAIN: usize = 2;
        for _ in 0..AGAIN {
            match self.call("ADD", name, address, device, netns) {
                Err(error) if error.to_string().contains("\"code\":11") => println!("{name}: {error:#}"),
                result => return result,
            }
        }
        self.call("ADD", name, address, device, netns)
    }

    /// Calls the plugin as a runtime does, behind one that has made the interface.
    fn call(
        &self,
        command: &str,
        name: &str,
        address: IpAddr,
        device: usize,
        netns: &NetNs,
    ) -> Result<Duration> {
        let previous = json!({
            "cniVersion": "1.0.0",
            "interfaces": [{"name": pod_network::port(device)}, {"name": "eth0", "sandbox": netns.path()}],
            "ips": [{"address": format!("{address}/24"), "interface": 1}],
        });
        let config = json!({
            "cniVersion": "1.0.0", "name": "pods", "type": "dataplane-cni",
            "agentSocket": self.cluster.places().work.join(format!("{NODE}.sock")),
            "timeoutSeconds": patient(Duration::from_secs(10)).as_secs(), "prevResult": previous,
        });
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID=uid-{NAMESPACE}-{name}"
        );
        let started = Instant::now();
        let output = run_plugin(
            &self.plugin,
            self.cluster.node_netns(NODE)?,
            command,
            &args,
            netns.path(),
            &config,
        )?;
        if command == "ADD" {
            let result: Value = serde_json::from_slice(&output)?;
            ensure!(result == previous, "the result of ADD is {result}");
        }
        Ok(started.elapsed())
    }

    pub fn end(&mut self) -> Result<()> {
        self.targets.end();
        for flood in self.floods.drain(..) {
            flood.join().map_err(|_| anyhow!("a sender panicked"))?;
        }
        let status = self.agents.status(NODE)?;
        let drops = status["counters"]
            .as_array()
            .context("`status` has no counters")?;
        let unknown = drops.iter().find(|one| one["reason"] == "policy-unknown-pod");
        let unknown = unknown.context("no packet was refused because its pod was unknown")?;
        println!("{:?}: {unknown}", self.network);
        Ok(())
    }
}

fn run_plugin(
    plugin: &Path,
    node: &NetNs,
    command: &str,
    args: &str,
    netns: &Path,
    config: &Value,
) -> Result<Vec<u8>> {
    let mut child = node.enter(|| {
        let child = Command::new(plugin)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", "test")
            .env("CNI_NETNS", netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", args)
            .env("CNI_PATH", "/nonexistent")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        child.with_context(|| format!("failed to run {}", plugin.display()))
    })?;
    let input = child.stdin.take().context("the plugin has no input")?;
    { input }.write_all(config.to_string().as_bytes())?;
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(output.stdout)
}

fn settle(agents: &mut Agents) -> Result<()> {
    agents.settled()
}

/// A container of this node that no Pod is about.
fn add_stranger(cluster: &Cluster) -> Result<NetNs> {
    let netns = NetNs::create(&cluster.places().netns("stranger"))?;
    let mut links = Links::open(cluster.node_netns(NODE)?)?;
    let [own, gateway] = ips(&[[172, 30, 0, 2], [172, 30, 0, 1]])[..] else {
        return Err(anyhow!("two addresses"));
    };
    links.add_veth("stranger", "eth0", netns.fd(), None)?;
    links.set_up("stranger")?;
    links.add_address("stranger", (gateway, 30))?;
    let mut inside = Links::open(&netns)?;
    inside.set_up("eth0")?;
    inside.add_address("eth0", (own, 30))?;
    inside.add_route(
        parse_prefix("0.0.0.0/0")?,
        Route {
            via: Some(gateway),
            ..Route::default()
        },
    )?;
    Ok(netns)
}
