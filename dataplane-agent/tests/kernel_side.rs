//! The kernel side on a node made of network namespaces: what is attached, found and taken over, and that nothing of
//! it stays. Needs root and the BPF object; without them the tests say so and do nothing.

use std::{
    fs,
    net::IpAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use dataplane_agent::{
    attach::{cleanup, start::start},
    bpf::{self, Hook, Program, kernel, links::Links as PinnedLinks, pins::LinkName, pins::Pins, sys},
    config::{Config, DatapathMode, FastPath, NodePortAddresses, PortRange, SocketLb},
    host::{HostState, Kernel, WantedPods},
    store::{FrontendKey, Limits},
};
use dataplane_common::{
    device::device_flags,
    service::{FrontendKey4, Service, ServiceHead},
};
use dataplane_tests::{
    links::{Links, Route, everywhere, host},
    netns::NetNs,
    places::{self, Places},
};
use tokio::sync::watch;

/// A node with an uplink to a router, and a routed pod.
struct Node {
    places: Places,
    netns: NetNs,
    pod: NetNs,
    links: Links,
    _router: NetNs,
}

impl Drop for Node {
    fn drop(&mut self) {
        self.places.remove();
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl Node {
    fn build(name: &str) -> Result<Self> {
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

    fn add_pod(&mut self) -> Result<()> {
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

    fn config(&self) -> Config {
        Config {
            node_name: "node".into(),
            manifests: "/nonexistent".into(),
            devices: Vec::new(),
            bpffs: self.places.bpffs.clone(),
            cgroup: Some(self.places.cgroup.clone()),
            health_addr: None,
            socket: self.places.work.join("wait.sock"),
            socket_lb: SocketLb::Auto,
            datapath: DatapathMode::Auto,
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
            limits: Limits {
                frontends: 1024,
                services: 1024,
                backends: 1024,
                maglev: 65536,
            },
            max_flows: 4096,
            max_half_open: 1024,
            debug_log: false,
        }
    }

    fn start(&self, config: &Config) -> Result<Agent> {
        let (wanted, receiver) = watch::channel(WantedPods {
            revision: 1,
            pods: [(ip("10.0.1.5"), "default/a".to_owned())].into(),
            ..WantedPods::default()
        });
        let kernel = self.netns.enter(|| start(config, receiver))?;
        Ok(Agent { kernel, wanted })
    }

    fn pins(&self) -> Pins {
        Pins::new(&self.places.bpffs)
    }
}

struct Agent {
    kernel: Kernel,
    wanted: watch::Sender<WantedPods>,
}

impl Agent {
    fn wait(&self, what: &str, until: impl Fn(&HostState) -> bool) -> Result<HostState> {
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
    fn stop(self, node: &Node) -> Result<()> {
        drop(self);
        let deadline = Instant::now() + Duration::from_secs(5);
        while dataplane_agent::attach::state::State::lock(&node.places.bpffs).is_err() {
            ensure!(Instant::now() < deadline, "the agent did not end");
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

fn ready() -> bool {
    let missing = if bpf::OBJECT.is_empty() {
        "the BPF object (cargo xtask build-ebpf)".to_owned()
    } else if let Err(error) = kernel::check() {
        error.to_string()
    } else {
        return true;
    };
    println!("SKIPPED: needs {missing}");
    false
}

#[test]
fn attaches_finds_pods_and_takes_over() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("attach")?;
    let config = node.config();
    let agent = node.start(&config)?;
    let state = agent.wait("the uplink", |state| !state.devices.is_empty())?;
    let eth0 = node.links.index("eth0")?;
    let device = &state.devices[&eth0];
    assert_eq!(device.name, "eth0");
    assert_eq!(device.entry.snat4_be.to_ne_bytes(), [192, 0, 2, 10]);
    assert_eq!(device.entry.flags, device_flags::ETHERNET | device_flags::XDP);
    assert!(state.own_addresses.contains_key(&ip("192.0.2.10")) && state.pod_interfaces.is_empty());

    node.add_pod()?;
    let asked = Instant::now();
    let state = agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
    assert!(
        asked.elapsed() < Duration::from_millis(150),
        "found after {:?}",
        asked.elapsed()
    );
    let interface = &state.pod_interfaces[&ip("10.0.1.5")];
    let veth = node.links.index("veth1")?;
    assert_eq!(
        (interface.ifindex, interface.name.as_str(), interface.fast_path),
        (veth, "veth1", true)
    );
    assert_ne!(interface.pod_mac, interface.host_mac);
    let hooks = |ifindex| -> Result<Vec<usize>> {
        node.netns.enter(|| {
            [Hook::TcIngress, Hook::TcEgress]
                .iter()
                .map(|hook| Ok(sys::prog_query(ifindex, hook.attach_type())?.len()))
                .collect()
        })
    };
    assert_eq!(hooks(eth0)?, [1, 1]);
    assert_eq!(hooks(veth)?, [1, 1]);
    assert_eq!(hooks(1)?, [0, 1]);

    // A killed agent leaves all of it; the next replaces the programs in place.
    let links = PinnedLinks::new(&node.pins());
    let before: Vec<_> = node
        .pins()
        .list_links()?
        .into_iter()
        .map(|link| (link, links.program_id(link)))
        .collect();
    assert_eq!(before.len(), 3 + 2 + 1 + 8, "{before:?}");
    agent.stop(&node)?;
    assert_eq!(hooks(eth0)?, [1, 1]);
    let agent = node.start(&config)?;
    agent.wait("the pod's interface again", |state| {
        !state.pod_interfaces.is_empty()
    })?;
    for (link, program) in before {
        let now = links
            .program_id(link)
            .with_context(|| format!("{link} is gone"))?;
        assert_ne!(Some(now), program, "{link} runs the old program");
    }
    assert_eq!(hooks(eth0)?, [1, 1]);

    // Removing the pod, and then the pod's end of the wish, drops its links.
    agent.wanted.send_modify(|wanted| {
        wanted.revision = 2;
        wanted.pods.clear();
    });
    agent.wait("the answer", |state| {
        state.wanted_revision == 2 && state.pod_interfaces.is_empty()
    })?;
    assert_eq!(hooks(veth)?, [0, 0]);
    agent.stop(&node)?;

    // Socket hooks switched off are detached.
    let agent = node.start(&Config {
        socket_lb: SocketLb::Off,
        datapath: DatapathMode::Tc,
        ..config.clone()
    })?;
    agent.wait("the uplink without XDP", |state| {
        state
            .devices
            .get(&eth0)
            .is_some_and(|device| device.entry.flags == device_flags::ETHERNET)
    })?;
    let left: Vec<Program> = node
        .pins()
        .list_links()?
        .into_iter()
        .map(|link| link.program)
        .collect();
    assert!(
        left.iter()
            .all(|program| !program.is_cgroup() && *program != Program::Xdp),
        "{left:?}"
    );
    agent.stop(&node)?;

    // Other limits are refused by name.
    let error = node
        .start(&Config {
            max_flows: 8192,
            ..config.clone()
        })
        .err()
        .context("accepted")?;
    assert!(
        error
            .to_string()
            .contains("FLOWS_V4 has entries 4096, this agent wants 8192"),
        "{error}"
    );

    node.netns
        .enter(|| cleanup::cleanup(&config.bpffs).map_err(Into::into))?;
    assert_eq!(hooks(eth0)?, [0, 0]);
    assert!(!node.pins().exists());
    let accept = node
        .netns
        .enter(|| Ok(fs::read_to_string("/proc/sys/net/ipv4/conf/lo/accept_local")?))?;
    assert_eq!(accept.trim(), "0");
    Ok(())
}

#[test]
fn tables_hold_what_is_written() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("store")?;
    let config = node.config();
    let mut agent = node.start(&config)?;
    let store = &mut agent.kernel.store;
    let key = |port: u16| {
        FrontendKey::V4(FrontendKey4 {
            addr_be: 0x0a00_000a,
            port_be: port.to_be(),
            proto: 6,
            scope: 0,
        })
    };
    for port in 0..1024 {
        store.put_frontend(key(port), u32::from(port))?;
    }
    let full = store.put_frontend(key(2000), 1).unwrap_err();
    assert_eq!(full.to_string(), "table FRONTENDS_V4 is full (1024 entries)");
    let mut all = store.frontends()?;
    all.sort();
    assert_eq!(all.len(), 1024);
    assert!((0..1024).all(|port| all.contains(&(key(port), u32::from(port)))));
    store.delete_frontend(key(7))?;
    store.delete_frontend(key(7))?;
    assert_eq!(store.frontends()?.len(), 1023);

    let service = Service {
        head: ServiceHead {
            slots_offset: 5,
            generation: 2,
            size_class: 1,
            flags: 0,
        },
        addr_be: [1, 2, 3, 4],
        port_be: 80,
        proto: 6,
        family: 4,
        affinity_timeout_s: 9,
    };
    store.write_service(1023, &service)?;
    assert_eq!(store.read_service(1023)?, service);
    assert!(store.write_service(1024, &service).is_err());
    store.write_maglev(65533, &[1, 2, 3])?;
    let mut words = [0; 3];
    store.read_maglev(65533, &mut words)?;
    assert_eq!(words, [1, 2, 3]);
    assert!(store.write_maglev(65534, &[1, 2, 3]).is_err());
    store.put_own_address(ip("2001:db8::1"), 1)?;
    store.put_own_address(ip("192.0.2.10"), 0)?;
    assert_eq!(
        store.own_addresses()?,
        [(ip("192.0.2.10"), 0), (ip("2001:db8::1"), 1)]
    );
    store.grace_period()?;

    // The next start finds it all.
    agent.stop(&node)?;
    let agent = node.start(&config)?;
    assert_eq!(agent.kernel.store.frontends()?.len(), 1023);
    assert_eq!(agent.kernel.store.read_service(1023)?, service);
    agent.stop(&node)?;
    node.netns
        .enter(|| cleanup::cleanup(&config.bpffs).map_err(Into::into))
}

#[test]
fn clean_up_copes_with_half_of_the_pins_and_refuses_beside_a_running_agent() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("half")?;
    let config = node.config();
    let agent = node.start(&config)?;
    agent.wait("the uplink", |state| !state.devices.is_empty())?;
    let error = node
        .netns
        .enter(|| Ok(cleanup::cleanup(&config.bpffs).err()))?
        .context("did not refuse")?;
    assert!(error.to_string().contains("stop it first"), "{error}");
    agent.stop(&node)?;
    let pins = node.pins();
    fs::remove_dir_all(pins.maps())?;
    fs::remove_file(pins.link(LinkName {
        program: Program::ToLo,
        ifindex: 1,
    }))?;
    node.netns
        .enter(|| cleanup::cleanup(&config.bpffs).map_err(Into::into))?;
    assert!(!pins.exists());
    // Nothing to do is success.
    node.netns
        .enter(|| cleanup::cleanup(&config.bpffs).map_err(Into::into))
}

#[test]
fn a_folder_of_another_version_or_filesystem_is_refused() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("refuse")?;
    let config = node.config();
    let other = config.bpffs.join("dataplane-v999");
    fs::create_dir(&other)?;
    let error = node.start(&config).err().context("accepted")?.to_string();
    assert!(
        error.contains("dataplane-v999 was made by another version"),
        "{error}"
    );
    fs::remove_dir(&other)?;

    let error = node.start(&Config {
        bpffs: node.places.work.join("bpf"),
        ..config.clone()
    });
    let error = error.err().context("accepted")?.to_string();
    assert!(error.contains("mount -t bpf bpf"), "{error}");
    let error = node.start(&Config {
        cgroup: Some(node.places.work.clone()),
        ..config
    });
    let error = error.err().context("accepted")?.to_string();
    assert!(error.contains("is not in a cgroup v2 hierarchy"), "{error}");
    Ok(())
}
