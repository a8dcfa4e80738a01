//! The node that the tests run on: namespaces, an uplink to a router, a routed pod, and an agent's kernel side.

use std::{
    fs,
    net::IpAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dataplane_agent::{
    attach::{
        cleanup,
        start::{prepare, start},
        state::State,
    },
    bpf::{Hook, pins::Pins, sys},
    config::{
        Config, DatapathMode, FastPath, NodePortAddresses, PolicyChanges, PolicyMode, PortRange, ServiceEcho,
        Sizes, SocketLb, SourceConfig, SourceRangesFor, Verdicts,
    },
    host::{HostState, Kernel, WantedPods},
    netlink::{socket::RequestSocket, tables},
    store::{Limits, policy::PolicyLimits},
};
use dataplane_tests::{
    links::{Links, Route, everywhere, host},
    netns::NetNs,
    places::{self, Places},
};
use tokio::sync::watch;

/// Small tables, which are made quickly.
pub const SIZES: Sizes = Sizes {
    limits: Limits {
        frontends: 1024,
        services: 1024,
        backends: 1024,
        maglev: 65536,
        source_ranges: 1024,
        policy: PolicyLimits::new(1024, 1024, 1024),
    },
    affinity: 1024,
    flows: 4096,
    policy_flows: 1024,
    half_open: 1024,
    datagrams: 1024,
    held: 64,
    sockets: 1024,
    own_addresses: 1024,
    devices: 1024,
};

/// A node with an uplink to a router, and a routed pod.
pub struct Node {
    pub places: Places,
    pub netns: NetNs,
    pod: NetNs,
    pub links: Links,
    _router: NetNs,
}

impl Drop for Node {
    fn drop(&mut self) {
        // After a failed test its agent may take a moment to end.
        let cleaned = || {
            self.netns
                .enter(|| cleanup::cleanup(&self.places.bpffs).map_err(Into::into))
                .is_ok()
        };
        let _ = (0..50).any(|_| {
            cleaned() || {
                sleep(Duration::from_millis(20));
                false
            }
        });
        self.places.remove();
    }
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl Node {
    pub fn build(name: &str) -> Result<Self> {
        places::sweep();
        let places = Places::create(name)?;
        let netns = NetNs::create(&places.netns("node"))?;
        let router = NetNs::create(&places.netns("router"))?;
        let pod = NetNs::create(&places.netns("pod"))?;
        let mut links = Links::open(&netns)?;
        links.set_up("lo")?;
        links.add_veth("eth0", "node", router.fd(), None)?;
        links.set_up("eth0")?;
        Links::open(&router)?.set_up("node")?;
        links.add_address("eth0", (ip("192.0.2.10"), 24))?;
        links.add_route(
            everywhere(ip("0.0.0.0")),
            Route {
                via: Some(ip("192.0.2.1")),
                ..Route::default()
            },
        )?;
        Ok(Self {
            places,
            netns,
            pod,
            links,
            _router: router,
        })
    }

    pub fn add_pod(&mut self) -> Result<()> {
        self.links.add_veth("veth1", "eth0", self.pod.fd(), None)?;
        self.links.set_up("veth1")?;
        let mut inside = Links::open(&self.pod)?;
        inside.set_up("eth0")?;
        self.links.add_route(
            host(ip("10.0.1.5")),
            Route {
                device: Some("veth1"),
                ..Route::default()
            },
        )?;
        // As CNI plugins may do it: last, so that nothing changes in the node's namespace after it.
        sleep(Duration::from_millis(300));
        inside.add_address("eth0", (ip("10.0.1.5"), 24))
    }

    pub fn config(&self) -> Config {
        Config {
            node_name: "node".into(),
            source: SourceConfig::Folder("/".into()),
            devices: Vec::new(),
            bpffs: self.places.bpffs.clone(),
            cgroup: Some(self.places.cgroup.clone()),
            health_addr: None,
            metrics_addr: None,
            service_metrics: 0,
            socket: self.places.work.join("wait.sock"),
            socket_lb: SocketLb::Auto,
            datapath: DatapathMode::Xdp,
            fast_path: FastPath::Auto,
            snat_ports: PortRange {
                min: 61000,
                max: 65535,
            },
            node_ports: PortRange {
                min: 30000,
                max: 32767,
            },
            node_port_addresses: NodePortAddresses::All,
            localhost_node_ports: false,
            service_echo: ServiceEcho::Ignore,
            external_ips: true,
            source_ranges_for: SourceRangesFor::Lb,
            source_check: true,
            policy_changes: PolicyChanges::All,
            policy_mode: PolicyMode::Enforce,
            verdicts: Verdicts::Denied,
            sizes: SIZES,
            debug_log: false,
        }
    }

    pub fn wanted() -> WantedPods {
        WantedPods {
            revision: 1,
            pods: [(ip("10.0.1.5"), "default/a".to_owned())].into(),
            ..WantedPods::default()
        }
    }

    pub fn start(&self, config: &Config) -> Result<Agent> {
        let (wanted, receiver) = watch::channel(Self::wanted());
        let kernel = self.netns.enter(|| start(prepare(config)?, config, receiver))?;
        Ok(Agent { kernel, wanted })
    }

    /// The namespace behind a veth, as the node numbers it.
    pub fn namespace_of(&self, ifindex: u32) -> Result<i32> {
        let links = self
            .netns
            .enter(|| Ok(tables::dump_links(&mut RequestSocket::open()?)?))?;
        let link = links.iter().find(|link| link.ifindex == ifindex);
        link.and_then(|link| link.peer_namespace)
            .context("no veth to another namespace")
    }

    pub fn hooks(&self, ifindex: u32) -> Result<Vec<usize>> {
        let count = |hook: &Hook| Ok(sys::prog_query(ifindex, hook.attach_type())?.len());
        self.netns
            .enter(|| [Hook::TcIngress, Hook::TcEgress].iter().map(count).collect())
    }

    pub fn clean_up(&self) -> Result<()> {
        self.netns
            .enter(|| cleanup::cleanup(&self.places.bpffs).map_err(Into::into))?;
        assert!(!self.pins().exists());
        let accept = self
            .netns
            .enter(|| Ok(fs::read_to_string("/proc/sys/net/ipv4/conf/lo/accept_local")?))?;
        assert_eq!(accept.trim(), "0");
        Ok(())
    }

    pub fn pins(&self) -> Pins {
        Pins::new(&self.places.bpffs)
    }
}

pub struct Agent {
    pub kernel: Kernel,
    pub wanted: watch::Sender<WantedPods>,
}

impl Agent {
    pub fn wait(&self, what: &str, until: impl Fn(&HostState) -> bool) -> Result<HostState> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(state) = self.kernel.host.borrow().as_ref().filter(|state| until(state)) {
                return Ok(state.clone());
            }
            if Instant::now() > deadline {
                bail!(
                    "not within 5 s: {what}; last {:?}",
                    self.kernel.host.borrow().as_ref()
                );
            }
            sleep(Duration::from_millis(5));
        }
    }

    /// As a crash leaves it: everything stays attached.
    pub fn stop(self, node: &Node) -> Result<()> {
        drop(self);
        let deadline = Instant::now() + Duration::from_secs(5);
        while State::lock(&node.places.bpffs).is_err() {
            ensure!(Instant::now() < deadline, "the agent did not end");
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

pub fn delete_link(ifindex: u32) -> Result<()> {
    const RTM_DELLINK: u16 = 17;
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&ifindex.to_ne_bytes());
    Ok(RequestSocket::open()?.change(RTM_DELLINK, 0, &body)?)
}
