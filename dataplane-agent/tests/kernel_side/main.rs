//! The kernel side on a node made of network namespaces: what is attached, found and taken over, and that nothing of
//! it stays. Needs root and the BPF object; without them the tests say so and do nothing.

mod cleaning;
#[path = "../needs/mod.rs"]
mod needs;
mod node;
mod preflight;
mod starting;
mod unknown;
mod upgrading;

use std::{collections::BTreeSet, fs, process::Command, time::Duration};

use anyhow::{Context, Result};
use dataplane_agent::{
    attach::{Attacher, cleanup, inspect, state::State},
    bpf::{
        Hook, Program,
        links::Links as PinnedLinks,
        loader::{self, LoadOptions},
        pins::{LinkName, Pins},
        sys,
    },
    config::{Config, DatapathMode, SocketLb},
    host::{HostState, Unknown},
    netlink::{filters, firewall, socket::RequestSocket, tables},
    store::FrontendKey,
};
use dataplane_common::{
    device::device_flags,
    service::{Frontend, FrontendKey4, Service, ServiceHead},
};

use needs::ready;
use node::{Node, delete_link, ip};

#[test]
fn attaches_and_finds_pods() -> Result<()> {
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
    let state = agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
    let interface = &state.pod_interfaces[&ip("10.0.1.5")];
    let veth = node.links.index("veth1")?;
    assert_eq!((interface.ifindex, interface.name.as_str()), (veth, "veth1"));
    assert!(interface.fast_path);
    assert_ne!(interface.pod_mac, interface.host_mac);
    assert_eq!(node.hooks(eth0)?, [1, 1]);
    assert_eq!(node.hooks(veth)?, [1, 1]);
    assert_eq!(node.hooks(1)?, [0, 1]);

    let status = node.netns.enter(|| Ok(inspect::inspect(&config.bpffs)?))?;
    assert!(status.agent_running && status.installed, "{status:?}");
    assert_eq!(status.warnings, Vec::<String>::new());
    let ours: Vec<_> = status.attachments.iter().filter(|one| one.ours).collect();
    assert_eq!(ours.len(), ALL_LINKS, "{status:?}");
    let eth0: Vec<_> = ours.iter().filter(|one| one.target == "eth0").collect();
    assert_eq!((&*eth0[0].program, &*eth0[0].mode), ("xdp", "driver"));
    assert_eq!((&*eth0[1].program, &*eth0[1].mode), ("from_netdev", "tcx"));

    // A device that disappears takes its pins with it.
    node.netns.enter(|| delete_link(veth))?;
    agent.wait("the interface's end", |state| state.pod_interfaces.is_empty())?;
    assert!(node.pins().list_links()?.iter().all(|link| link.ifindex != veth));
    agent.stop(&node)?;
    node.clean_up()
}

/// XDP and two TC programs at the uplink, two at the pod, one at `lo`, eight socket hooks.
const ALL_LINKS: usize = 3 + 2 + 1 + 8;

#[test]
fn a_veth_is_left_to_tc_unless_xdp_is_asked_for() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("veth")?;
    let eth0 = node.links.index("eth0")?;
    for (datapath, flags) in [
        (DatapathMode::Xdp, device_flags::ETHERNET | device_flags::XDP),
        (DatapathMode::Auto, device_flags::ETHERNET),
    ] {
        let config = Config {
            datapath,
            ..node.config()
        };
        let agent = node.start(&config)?;
        let is_so = |state: &HostState| {
            let device = state.devices.get(&eth0);
            device.is_some_and(|device| device.entry.flags == flags)
        };
        agent.wait(&format!("{datapath:?}"), is_so)?;
        assert_eq!(node.hooks(eth0)?, [1, 1]);
        let status = node.netns.enter(|| Ok(inspect::inspect(&config.bpffs)?))?;
        let reasons = status
            .xdp_fallbacks
            .iter()
            .map(|fallback| fallback.reason.as_str());
        let of_veths = reasons.filter(|reason| reason.contains("veth")).count();
        assert_eq!(
            of_veths,
            usize::from(datapath == DatapathMode::Auto),
            "{status:?}"
        );
        let xdp = status
            .attachments
            .iter()
            .filter(|one| one.ours && one.program == "xdp");
        assert_eq!(
            xdp.count(),
            usize::from(datapath == DatapathMode::Xdp),
            "{status:?}"
        );
        agent.stop(&node)?;
    }
    node.clean_up()
}

#[test]
fn the_next_start_takes_over() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("again")?;
    node.add_pod()?;
    let config = node.config();
    let agent = node.start(&config)?;
    agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
    let (eth0, veth) = (node.links.index("eth0")?, node.links.index("veth1")?);

    // A killed agent leaves all of it; the next replaces the programs in place.
    let links = PinnedLinks::new(&node.pins());
    let before = node
        .pins()
        .list_links()?
        .into_iter()
        .map(|link| (link, links.program_id(link)));
    let before: Vec<_> = before.collect();
    assert_eq!(before.len(), ALL_LINKS, "{before:?}");
    agent.stop(&node)?;
    assert_eq!(node.hooks(eth0)?, [1, 1]);
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
    assert_eq!(node.hooks(eth0)?, [1, 1]);
    assert_eq!(node.hooks(veth)?, [1, 1]);

    // A pod that is not wanted any more.
    agent.wanted.send_modify(|wanted| {
        wanted.revision = 2;
        wanted.pods.clear();
        wanted.unknown = Unknown::Leave;
    });
    agent.wait("the answer", |state| state.wanted_revision == 2)?;
    assert_eq!(node.hooks(veth)?, [0, 0]);
    agent.stop(&node)?;
    node.clean_up()?;
    assert_eq!(node.hooks(eth0)?, [0, 0]);
    Ok(())
}

#[test]
fn what_is_switched_off_is_detached() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("off")?;
    let config = node.config();
    let eth0 = node.links.index("eth0")?;
    let agent = node.start(&config)?;
    agent.wait("the uplink", |state| !state.devices.is_empty())?;
    agent.stop(&node)?;
    let off = Config {
        socket_lb: SocketLb::Off,
        datapath: DatapathMode::Tc,
        ..config.clone()
    };
    let agent = node.start(&off)?;
    let flags = |state: &HostState| state.devices.get(&eth0).map(|device| device.entry.flags);
    agent.wait("no XDP", |state| flags(state) == Some(device_flags::ETHERNET))?;
    for link in node.pins().list_links()? {
        assert!(
            !link.program.is_cgroup() && link.program != Program::Xdp,
            "{link}"
        );
    }
    agent.stop(&node)?;
    node.clean_up()
}

#[test]
fn others_programs_stay_and_are_shown() -> Result<()> {
    const FIRST: u32 = 1 << 3;
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("others")?;
    let config = node.config();
    let eth0 = node.links.index("eth0")?;
    let other = Pins::new(&node.places.bpffs.join("other"));
    let foreign = node.netns.enter(|| Ok(loader::load(other, &small(&config))?))?;
    let attach = |program, hook: Hook, flags| {
        let program = foreign.program(program).context("not loaded")?;
        node.netns
            .enter(|| Ok(sys::link_create(program, eth0, hook.attach_type(), flags)?))
    };
    let _xdp = attach(Program::Xdp, Hook::Xdp, 1 << 2)?;
    let _behind = attach(Program::FromPod, Hook::TcIngress, 0)?;

    let agent = node.start(&config)?;
    let state = agent.wait("the uplink", |state| !state.devices.is_empty())?;
    assert_eq!(state.devices[&eth0].entry.flags, device_flags::ETHERNET);
    let status = node.netns.enter(|| Ok(inspect::inspect(&config.bpffs)?))?;
    assert_eq!(status.xdp_fallbacks[0].device, "eth0");
    assert_eq!(status.xdp_fallbacks[0].reason, "another XDP program is attached");
    let order = |status: &inspect::Status| -> Vec<(String, bool)> {
        let ingress = status
            .attachments
            .iter()
            .filter(|one| one.target == "eth0" && one.hook == "tc ingress");
        ingress.map(|one| (one.program.clone(), one.ours)).collect()
    };
    assert_eq!(
        order(&status),
        [("from_netdev".to_owned(), true), ("from_pod".to_owned(), false)]
    );
    assert_eq!(status.warnings, Vec::<String>::new());

    let _before = attach(Program::ToPod, Hook::TcIngress, FIRST)?;
    let status = node.netns.enter(|| Ok(inspect::inspect(&config.bpffs)?))?;
    assert_eq!(order(&status)[0], ("to_pod".to_owned(), false));
    assert_eq!(
        status.warnings,
        ["eth0 tc ingress: to_pod runs before from_netdev and may take packets from it"]
    );

    agent.stop(&node)?;
    node.clean_up()?;
    assert_eq!(node.hooks(eth0)?, [2, 0]);
    Ok(())
}

fn small(config: &Config) -> LoadOptions {
    LoadOptions {
        sizes: config.sizes,
        config: dataplane_common::config::Config::default(),
        xdp: true,
        socket_hooks: false,
        debug_log: false,
    }
}

#[test]
fn clsact_filters_replace_themselves_and_go() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("clsact")?;
    let config = node.config();
    let eth0 = node.links.index("eth0")?;
    let wanted = BTreeSet::from([Program::FromNetdev, Program::ToNetdev].map(|program| LinkName {
        program,
        ifindex: eth0,
    }));
    let run = |adopted: usize| {
        node.netns.enter(|| {
            let loaded = loader::load(node.pins(), &small(&config))?;
            let mut attacher = Attacher::new(loaded, State::lock(&config.bpffs)?, None, false);
            let mut socket = RequestSocket::open()?;
            let devices = tables::dump_links(&mut socket)?;
            attacher.adopt(&mut socket, &devices)?;
            let found = wanted
                .iter()
                .filter(|link| attacher.is_attached(link.program, link.ifindex))
                .count();
            assert_eq!(found, adopted);
            let errors = attacher.reconcile(&mut socket, &devices, &wanted, |_| false);
            assert!(errors.is_empty(), "{errors:?}");
            attacher.verify(&mut socket);
            assert!(attacher.is_attached(Program::FromNetdev, eth0));
            let found = filters::list(&mut socket, eth0, Hook::TcIngress)?;
            assert_eq!(found.len(), 1, "{found:?}");
            assert_eq!(found[0].program(), Some(Program::FromNetdev));
            Ok(found[0].prog_id)
        })
    };
    let first = run(0)?;
    let second = run(2)?;
    assert_ne!(first, second, "the second start kept the old program");
    node.clean_up()?;
    node.netns.enter(|| {
        assert!(!filters::has_clsact(&mut RequestSocket::open()?, eth0)?);
        Ok(())
    })
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
    let value = |port: u16| Frontend {
        service: u32::from(port),
        owner: 7,
    };
    for port in 0..1024 {
        store.put_frontend(key(port), value(port))?;
    }
    let full = store.put_frontend(key(2000), value(1)).unwrap_err();
    assert_eq!(
        full.to_string(),
        "table FRONTENDS_V4 is full (1024 entries, --max-frontends)"
    );
    let all = store.frontends()?;
    assert_eq!(all.len(), 1024);
    assert!((0..1024).all(|port| all.contains(&(key(port), value(port)))));
    store.delete_frontend(key(7))?;
    store.delete_frontend(key(7))?;
    assert_eq!(store.frontends()?.len(), 1023);

    for range in ["203.0.113.0/24", "0.0.0.0/0", "2001:db8::/48", "::1/128"] {
        store.put_range(7, range.parse()?)?;
        store.put_range(8, range.parse()?)?;
        store.delete_range(8, range.parse()?)?;
        store.delete_range(8, range.parse()?)?;
    }
    let mut ranges = store.ranges()?;
    ranges.sort_unstable();
    let ranges: Vec<String> = ranges
        .iter()
        .map(|(service, range)| format!("{service} {range}"))
        .collect();
    assert_eq!(
        ranges,
        ["7 0.0.0.0/0", "7 203.0.113.0/24", "7 ::1/128", "7 2001:db8::/48"]
    );
    for service in 0..1022 {
        store.put_range(100 + service, "10.0.0.0/8".parse()?)?;
    }
    let full = store.put_range(5000, "10.0.0.0/8".parse()?).unwrap_err();
    assert_eq!(
        full.to_string(),
        "table RANGES_V4 is full (1024 entries, --max-source-ranges)"
    );

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
        affinity: 9,
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
    // The way of kernels without membarrier.
    sys::map_in_map_update()?;

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
fn a_folder_of_another_filesystem_is_refused() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("refuse")?;
    let config = node.config();
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
    assert!(!State::is_running(&node.places.bpffs));
    Ok(())
}

/// Runs `nft` with one command in the node's namespace.
fn nft(node: &Node, command: &str) -> Result<()> {
    let status = node
        .netns
        .enter(|| Ok(Command::new("nft").arg(command).status()?))?;
    anyhow::ensure!(status.success(), "nft {command}: {status}");
    Ok(())
}

#[test]
fn the_fast_path_follows_policy_engines() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("fast")?;
    if let Err(error) = nft(&node, "list ruleset") {
        println!("skipped: {error}");
        return Ok(());
    }
    node.add_pod()?;
    let agent = node.start(&node.config())?;
    let fast = |on: bool| {
        move |state: &HostState| {
            let interface = state.pod_interfaces.get(&ip("10.0.1.5"));
            interface.is_some_and(|interface| interface.fast_path == on)
        }
    };
    agent.wait("the fast path", fast(true))?;
    nft(&node, "add table inet t; add chain inet t somebody")?;
    std::thread::sleep(Duration::from_millis(100));
    agent.wait("the fast path still", fast(true))?;
    // Within seconds: looking now and then alone would take half a minute.
    nft(&node, "add chain inet t cali-FORWARD")?;
    agent.wait("no fast path", fast(false))?;
    nft(&node, "delete chain inet t cali-FORWARD")?;
    agent.wait("the fast path again", fast(true))?;
    agent.stop(&node)?;

    // iptables-legacy brings no notices: it is looked at now and then.
    let legacy = |program: &str, arguments: &str| {
        let run = || Ok(Command::new(program).args(arguments.split(' ')).status());
        node.netns.enter(run)
    };
    for program in ["iptables-legacy", "ip6tables-legacy"] {
        if !legacy(program, "-N cali-FORWARD")?.is_ok_and(|status| status.success()) {
            println!("skipped: no {program}");
            continue;
        }
        let engine = node.netns.enter(|| Ok(firewall::policy_engine()?))?;
        assert_eq!(engine.as_deref(), Some("iptables-legacy filter/cali-FORWARD"));
        legacy(program, "-X cali-FORWARD")??;
        let engine = node.netns.enter(|| Ok(firewall::policy_engine()?))?;
        assert_eq!(engine, None);
    }
    node.clean_up()
}
