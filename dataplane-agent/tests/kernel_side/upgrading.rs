//! Another version's folder: its tables, links and what packets have entered come along, forward and back, from wherever a
//! start was killed. The other version is an object with other layouts (`tests/assets`), loaded and attached as its agent would.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result, ensure};
use dataplane_agent::{
    attach::start::{load_and_leave, prepare},
    bpf::{
        loader::Release,
        map_names as names,
        pins::{Pins, SCHEMA_VERSION},
        sys::{self, MapFd, RawMap},
        upgrade::{LAYOUTS, Step},
    },
    config::{Config, DatapathMode, Sizes, SocketLb},
    store::{FrontendKey, Limits},
};
use dataplane_common::{
    addr::Mac,
    backend::{Backend, BackendHead},
    flow::{Flow4, FlowKey4, FlowMeta},
    service::{Affinity, AffinityKey4, Frontend, FrontendKey4},
};
use dataplane_tests::assets;

use crate::{
    needs::ready,
    node::{Node, SIZES, ip},
};

/// A number that is not this version's.
const OTHER: u32 = SCHEMA_VERSION - 1;

fn flow_key(port: u16) -> FlowKey4 {
    FlowKey4 {
        src_be: 0x0501_000a,
        dst_be: 0x0a00_000a,
        sport_be: port.to_be(),
        dport_be: 80_u16.to_be(),
        proto: 6,
        side: 1,
        unused: [0; 2],
    }
}

fn flow(port: u16) -> Flow4 {
    Flow4 {
        src_be: 1,
        dst_be: 2,
        sport_be: port,
        dport_be: 4,
        meta: FlowMeta {
            backend: 7,
            backend_generation: 3,
            service: 9,
            service_generation: 0xfff0,
            flags: 5,
            exit: 0x13,
            seen_ticks: 1000,
            ifindex: 11,
            state: 1,
            sequence: [1, 2, 3],
            mac_dst: Mac([1, 2, 3, 4, 5, 6]),
            mac_src: Mac([7, 8, 9, 10, 11, 12]),
            // Renamed in the other layout: judged again at the next packet.
            judged: 0,
        },
    }
}

const BACKEND: Backend = Backend {
    head: BackendHead {
        generation: 3,
        port_be: 80,
        state: 1,
        flags: 2,
    },
    addr_be: [1, 2, 3, 4],
    ifindex: 11,
    pod_mac: Mac([1, 2, 3, 4, 5, 6]),
    host_mac: Mac([7, 8, 9, 10, 11, 12]),
    owner: 77,
    unused: 0,
};

fn frontend(port: u16) -> FrontendKey {
    FrontendKey::V4(FrontendKey4 {
        addr_be: 0x0a00_000a,
        port_be: port.to_be(),
        proto: 6,
        scope: 0,
    })
}

const CLIENT: AffinityKey4 = AffinityKey4 {
    service: 9,
    service_generation: 2,
    addr_be: 5,
};
const GIVEN: Affinity = Affinity {
    backend: 7,
    backend_generation: 3,
    seen_eighths: 12,
};

fn open<K: bytemuck::Pod, V: bytemuck::Pod>(pins: &Pins, name: &str) -> Result<MapFd<K, V>> {
    MapFd::new(pins.open_map(name)?).with_context(|| format!("failed to open {name}"))
}

fn entries(pins: &Pins, name: &str) -> Result<usize> {
    sys::count_entries(std::os::fd::AsFd::as_fd(&pins.open_map(name)?)).context("failed to count")
}

/// Packets' entries, as the present version has them.
fn put_flows(pins: &Pins, ports: std::ops::Range<u16>) -> Result<()> {
    let flows = open(pins, names::FLOWS_V4)?;
    for port in ports {
        flows.update(&flow_key(port), &flow(port))?;
    }
    Ok(())
}

fn check_flows(pins: &Pins, ports: std::ops::Range<u16>) -> Result<()> {
    let flows = open(pins, names::FLOWS_V4)?;
    for port in ports.clone() {
        ensure!(flows.lookup(&flow_key(port))? == Some(flow(port)), "flow {port}");
    }
    ensure!(entries(pins, names::FLOWS_V4)? == ports.len());
    Ok(())
}

/// Starts a version's kernel side and leaves it.
fn leave(node: &Node, config: &Config, schema: u32, at: fn(Step)) -> Result<()> {
    let object = if schema == SCHEMA_VERSION {
        Release::CURRENT.object
    } else {
        assets::object(assets::OTHER_LAYOUT)?
    };
    let release = Release { object, at };
    node.netns
        .enter(|| load_and_leave(prepare(config)?, config, release, schema))
}

fn folders(config: &Config) -> Result<Vec<String>> {
    let all = Pins::all(&config.bpffs)?;
    Ok(all.iter().map(|pins| pins.folder().to_owned()).collect())
}

#[test]
fn upgrade_and_rollback_carry_every_table() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("upgrade")?;
    node.add_pod()?;
    let config = node.config();
    let other = Pins::of(&config.bpffs, OTHER);
    let mut agent = node.start(&config)?;
    agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
    let store = &mut agent.kernel.store;
    let value = Frontend {
        service: 9,
        owner: 77,
    };
    for port in 0..100 {
        store.put_frontend(frontend(port), value)?;
    }
    store.write_backend(7, &BACKEND)?;
    store.write_maglev(100, &[1, 2, 3])?;
    store.put_range(7, "203.0.113.0/24".parse()?)?;
    store.put_own_address(ip("192.0.2.10"), 5)?;
    agent.stop(&node)?;
    put_flows(&node.pins(), 0..50)?;
    open(&node.pins(), names::AFFINITY_V4)?.update(&CLIENT, &GIVEN)?;
    let revision = || -> Result<MapFd<u32, u32>> { open(&node.pins(), names::POLICY_REVISION) };
    revision()?.update(&0, &17)?;
    // What loading the object would set to zero, while programs ask for it.
    leave(&node, &config, SCHEMA_VERSION, |_| {})?;
    assert_eq!(revision()?.lookup(&0)?, Some(17));
    let links = node.pins().list_links()?;
    let maglev = id(&node.pins(), names::MAGLEV)?;

    for with_layouts in [true, false] {
        if !with_layouts {
            // Those that the kernel keeps will do.
            std::fs::remove_file(node.pins().map(LAYOUTS))?;
        }
        leave(&node, &config, OTHER, |_| {})?;
        assert_eq!(folders(&config)?, [other.folder()]);
        assert_eq!(other.list_links()?, links);
        // What has no other layout is the same table.
        assert_eq!(id(&other, names::MAGLEV)?, maglev);
        assert_eq!(entries(&other, names::FLOWS_V4)?, 50);
        let its_revision: MapFd<u32, u32> = open(&other, names::POLICY_REVISION)?;
        assert_eq!(its_revision.lookup(&0)?, Some(17), "{with_layouts}");
        let flows = RawMap::new(other.open_map(names::FLOWS_V4)?, 1)?;
        assert_eq!(flows.info().value_size as usize, size_of::<Flow4>() + 4);
        drop(flows);

        if !with_layouts {
            std::fs::remove_file(other.map(LAYOUTS))?;
        }
        let agent = node.start(&config)?;
        assert_eq!(folders(&config)?, [node.pins().folder()]);
        assert_eq!(node.pins().list_links()?, links);
        assert_eq!(id(&node.pins(), names::MAGLEV)?, maglev);
        check_flows(&node.pins(), 0..50)?;
        let affinity: MapFd<_, Affinity> = open(&node.pins(), names::AFFINITY_V4)?;
        assert_eq!(affinity.lookup(&CLIENT)?, Some(GIVEN));
        assert_eq!(revision()?.lookup(&0)?, Some(17), "{with_layouts}");
        let store = &agent.kernel.store;
        assert_eq!(store.read_backend(7)?, BACKEND);
        let found = store.frontends()?;
        assert_eq!(found.len(), 100);
        assert!((0..100).all(|port| found.contains(&(frontend(port), value))));
        assert_eq!(store.ranges()?.len(), 1);
        assert_eq!(store.own_addresses()?, [(ip("192.0.2.10"), 5)]);
        agent.stop(&node)?;
    }
    node.clean_up()
}

fn id(pins: &Pins, name: &str) -> Result<u32> {
    Ok(sys::map_info(std::os::fd::AsFd::as_fd(&pins.open_map(name)?))?.id)
}

/// Ends a start at a step, as a kill would: nothing is undone.
fn end_at<const STEP: usize>(step: Step) {
    assert_ne!(step, Step::ALL[STEP], "killed here");
}

const END_AT: [fn(Step); Step::ALL.len()] = [
    end_at::<0>,
    end_at::<1>,
    end_at::<2>,
    end_at::<3>,
    end_at::<4>,
    end_at::<5>,
    end_at::<6>,
];

#[test]
fn a_start_of_either_version_goes_on_where_one_was_killed() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("killed")?;
    // Two TC programs and no more have to be verified each time.
    let config = Config {
        datapath: DatapathMode::Tc,
        socket_lb: SocketLb::Off,
        ..node.config()
    };
    let agent = node.start(&config)?;
    agent.wait("the uplink", |state| !state.devices.is_empty())?;
    agent.stop(&node)?;
    let links = node.pins().list_links()?;
    assert!(!links.is_empty());
    put_flows(&node.pins(), 0..10)?;
    let mut from = SCHEMA_VERSION;
    for (step, end) in Step::ALL.into_iter().zip(END_AT) {
        let to = if from == SCHEMA_VERSION {
            OTHER
        } else {
            SCHEMA_VERSION
        };
        let killed = catch_unwind(AssertUnwindSafe(|| leave(&node, &config, to, end)));
        ensure!(
            !matches!(killed, Ok(Ok(()))),
            "{step:?} of {from} to {to} did not happen"
        );
        // Once the same version goes on, once the former one comes back.
        let next = if (step as usize).is_multiple_of(2) {
            to
        } else {
            from
        };
        leave(&node, &config, next, |_| {})
            .with_context(|| format!("{next} after {step:?} of {from} to {to}"))?;
        let pins = Pins::of(&config.bpffs, next);
        assert_eq!(folders(&config)?, [pins.folder()], "after {step:?}");
        assert_eq!(pins.list_links()?, links, "after {step:?}");
        assert_eq!(entries(&pins, names::FLOWS_V4)?, 10, "after {step:?}");
        from = next;
    }
    leave(&node, &config, SCHEMA_VERSION, |_| {})?;
    check_flows(&node.pins(), 0..10)?;
    node.clean_up()
}

#[test]
fn what_cannot_be_carried_over_starts_empty_and_keeps_nothing_else() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let node = Node::build("empty")?;
    let config = node.config();
    let other = Pins::of(&config.bpffs, OTHER);
    leave(&node, &config, OTHER, |_| {})?;
    // A table of another type than any version has had, and a folder of nobody.
    std::fs::remove_file(other.map(names::FLOWS_V4))?;
    let bytes = sys::map_of_bytes(&[1; 60])?;
    sys::pin(std::os::fd::AsFd::as_fd(&bytes), &other.map(names::FLOWS_V4))?;
    std::fs::create_dir(config.bpffs.join("dataplane-v999"))?;
    std::fs::create_dir(config.bpffs.join("dataplane-v998-new"))?;
    let agent = node.start(&config)?;
    agent.wait("the uplink", |state| !state.devices.is_empty())?;
    assert_eq!(folders(&config)?, [node.pins().folder()]);
    assert_eq!(entries(&node.pins(), names::FLOWS_V4)?, 0);
    agent.stop(&node)?;
    node.clean_up()
}

#[test]
fn tables_get_other_sizes_and_keep_what_they_hold() -> Result<()> {
    if !ready() {
        return Ok(());
    }
    let mut node = Node::build("sizes")?;
    node.add_pod()?;
    let config = Config {
        datapath: DatapathMode::Tc,
        socket_lb: SocketLb::Off,
        ..node.config()
    };
    let mut agent = node.start(&config)?;
    agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
    agent.kernel.store.write_backend(7, &BACKEND)?;
    agent.stop(&node)?;
    put_flows(&node.pins(), 0..50)?;
    let links = node.pins().list_links()?;
    let maglev = id(&node.pins(), names::MAGLEV)?;
    let of = |flows, backends| Config {
        sizes: Sizes {
            flows,
            limits: Limits {
                backends,
                ..SIZES.limits
            },
            ..SIZES
        },
        ..config.clone()
    };
    let limit = |name| -> Result<u32> {
        Ok(sys::map_info(std::os::fd::AsFd::as_fd(&node.pins().open_map(name)?))?.max_entries)
    };

    // One that fails, larger, smaller, and as it was.
    let error = node.start(&of(u32::MAX, SIZES.limits.backends)).err();
    let text = format!("{:#}", error.context("started")?);
    assert!(text.contains("FLOWS_V"), "{text}");
    assert_eq!(folders(&config)?, [node.pins().folder()]);
    check_flows(&node.pins(), 0..50)?;
    for (flows, backends) in [(16384, 4096), (2048, 8), (SIZES.flows, SIZES.limits.backends)] {
        let agent = node.start(&of(flows, backends))?;
        agent.wait("the pod's interface", |state| !state.pod_interfaces.is_empty())?;
        assert_eq!(folders(&config)?, [node.pins().folder()]);
        assert_eq!(limit(names::FLOWS_V4)?, flows);
        assert_eq!(limit(names::BACKENDS)?, backends);
        check_flows(&node.pins(), 0..50)?;
        assert_eq!(agent.kernel.store.read_backend(7)?, BACKEND);
        assert_eq!(node.pins().list_links()?, links);
        assert_eq!(id(&node.pins(), names::MAGLEV)?, maglev);
        agent.stop(&node)?;
    }

    // Killed on the way to another size, and then started with the former one, or a third.
    for (step, end) in Step::ALL.into_iter().zip(END_AT) {
        let killed = catch_unwind(AssertUnwindSafe(|| {
            leave(&node, &of(16384, SIZES.limits.backends), SCHEMA_VERSION, end)
        }));
        ensure!(!matches!(killed, Ok(Ok(()))), "{step:?} did not happen");
        let flows = if (step as usize).is_multiple_of(2) {
            SIZES.flows
        } else {
            8192
        };
        leave(&node, &of(flows, SIZES.limits.backends), SCHEMA_VERSION, |_| {})
            .with_context(|| format!("{flows} after {step:?}"))?;
        assert_eq!(folders(&config)?, [node.pins().folder()], "after {step:?}");
        assert_eq!(limit(names::FLOWS_V4)?, flows, "after {step:?}");
        check_flows(&node.pins(), 0..50)?;
        assert_eq!(node.pins().list_links()?, links, "after {step:?}");
    }
    node.clean_up()
}
