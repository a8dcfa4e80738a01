//! Histories of random changes, with writes that fail and restarts in between, end where a fresh start would.

mod full;
mod grace;

use std::{net::IpAddr, sync::Arc};

use dataplane_common::{
    backend::backend_state,
    service::{Frontend, TABLE_SIZES, service_flags},
};
use ipnet::IpNet;
use proptest::{prelude::*, strategy::ValueTree};

use super::{HostTables, Syncer};
use crate::{
    compile::Compiler,
    model::{
        Dirty, Endpoint, EndpointSlice, Endpoints, Index, Kind, Labels, Name, Object, ObjectRef, Placement,
        Protocol, Proxied, Service, ServicePort, SliceFamily, SlicePort, TargetPort,
    },
    store::{Limits, faulty::Faulty, memory::Memory, policy::PolicyLimits},
};

const LIMITS: Limits = Limits {
    frontends: 1000,
    services: 200,
    backends: 200,
    maglev: 20_000,
    source_ranges: 100,
    policy: PolicyLimits::new(100, 100, 100),
};

#[derive(Clone, Debug)]
enum Step {
    Apply(Object),
    Delete(ObjectRef),
    /// The agent is killed and starts again.
    Restart,
    /// So many writes succeed, then so many fail.
    Fail(usize, usize),
}

fn name(number: u8) -> Name {
    Name::new("ns", &format!("s{number}"))
}

/// A Service with one port and one address.
fn plain(number: u8, last: u8) -> Service {
    Service {
        name: name(number),
        proxied: Proxied::Here,
        cluster_ips: [IpAddr::from([10, 96, 0, last])].into(),
        external_ips: Box::default(),
        ingress_ips: Box::default(),
        ipv4: true,
        ipv6: false,
        ports: [ServicePort {
            place: 0,
            name: "".into(),
            proto: Protocol::Tcp,
            port: 80,
            node_port: None,
            target: TargetPort::Number(80),
        }]
        .into(),
        selector: Labels::default(),
        internal_local: false,
        external_local: false,
        health_check_node_port: None,
        source_ranges: Box::default(),
        affinity_s: None,
        publish_not_ready: false,
        created_ns: 0,
    }
}

/// A source range, by its length.
fn range(length: u8) -> IpNet {
    IpNet::new(IpAddr::from([203, 0, 113, 0]), length).unwrap()
}

fn service() -> impl Strategy<Value = Object> {
    // Few addresses and node ports, so that Services are often in each other's way.
    (
        0..4u8,
        0..5u8,
        proptest::option::of(0..3u16),
        any::<bool>(),
        any::<bool>(),
        proptest::option::of(1..3u32),
        proptest::collection::btree_set(24..28u8, 0..3),
    )
        .prop_map(
            |(number, last, node_port, internal_local, external_local, affinity_s, ranges)| {
                let plain = plain(number, last);
                let port = ServicePort {
                    node_port: node_port.map(|port| 30000 + port),
                    ..plain.ports[0].clone()
                };
                Object::from(Service {
                    proxied: if last == 4 {
                        Proxied::Headless
                    } else {
                        Proxied::Here
                    },
                    ports: [port].into(),
                    internal_local,
                    external_local: external_local && node_port.is_some(),
                    ingress_ips: [IpAddr::from([198, 18, 0, last])].into(),
                    source_ranges: ranges.into_iter().map(range).collect(),
                    affinity_s,
                    ..plain
                })
            },
        )
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    (0..6u8, any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>()).prop_map(
        |(last, ready, serving, terminating, local)| Endpoint {
            addr: IpAddr::from([10, 244, 0, last]),
            ready,
            serving,
            terminating,
            placement: Arc::new(Placement {
                node: local.then(|| "n1".into()),
                ..Placement::default()
            }),
        },
    )
}

fn slice() -> impl Strategy<Value = Object> {
    (0..4u8, 0..2u8, proptest::collection::vec(endpoint(), 0..5)).prop_map(|(number, part, endpoints)| {
        Object::EndpointSlice(Arc::new(EndpointSlice {
            name: Name::new("ns", &format!("s{number}-{part}")),
            service: Some(name(number)),
            family: SliceFamily::V4,
            ports: [SlicePort {
                name: "".into(),
                proto: Protocol::Tcp,
                port: 8080,
            }]
            .into(),
            endpoints: endpoints.into_iter().collect(),
            changed_ns: None,
        }))
    })
}

fn step() -> impl Strategy<Value = Step> {
    let delete = |kind| {
        (0..4u8, 0..2u8).prop_map(move |(number, part)| {
            let name = if kind == Kind::Service {
                name(number)
            } else {
                Name::new("ns", &format!("s{number}-{part}"))
            };
            Step::Delete(ObjectRef { kind, name })
        })
    };
    prop_oneof![
        6 => service().prop_map(Step::Apply),
        6 => slice().prop_map(Step::Apply),
        2 => delete(Kind::Service),
        2 => delete(Kind::EndpointSlice),
        1 => Just(Step::Restart),
        2 => (0..12usize, 1..6usize).prop_map(|(good, bad)| Step::Fail(good, bad)),
    ]
}

fn host() -> HostTables {
    HostTables {
        own_addresses: [(IpAddr::from([192, 0, 2, 1]), 1)].into(),
        ..HostTables::default()
    }
}

/// The agent, its tables, and the objects that it has been told of.
struct Agent {
    index: Index,
    compiler: Compiler,
    syncer: Syncer,
}

impl Agent {
    fn new(memory: &Memory) -> Self {
        let mut syncer = Syncer::restore(memory).unwrap();
        syncer.set_host(memory, host());
        Self {
            index: Index::new("n1"),
            compiler: Compiler::default(),
            syncer,
        }
    }

    fn take(&mut self, objects: impl IntoIterator<Item = Object>) {
        let mut dirty = Dirty::default();
        for object in objects {
            dirty.merge(self.index.apply(object));
        }
        self.update(&dirty);
    }

    fn update(&mut self, dirty: &Dirty) {
        self.syncer.update(self.compiler.update(&self.index, dirty));
    }
}

fn key(object: &Object) -> ObjectRef {
    match object {
        Object::Service(name, _) => ObjectRef {
            kind: Kind::Service,
            name: name.clone(),
        },
        Object::EndpointSlice(slice) => ObjectRef {
            kind: Kind::EndpointSlice,
            name: slice.name.clone(),
        },
        other => panic!("not generated: {other:?}"),
    }
}

/// At no moment, whatever failed, may a packet meet an entry that was not meant for it. Names what is wrong.
fn inconsistency(memory: &Memory) -> Option<String> {
    let never = [
        "no service",
        "no backend",
        "deleted",
        "gone",
        "draining",
        "serving",
    ];
    memory
        .frontend_lines()
        .find(|line| never.iter().any(|never| line.contains(never)))
        .or_else(|| (!memory.has_port_of_every_frontend()).then(|| "a frontend without its port".to_owned()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_history_ends_as_a_fresh_start(steps in proptest::collection::vec(step(), 1..40)) {
        let mut objects: Vec<(ObjectRef, Object)> = Vec::new();
        let mut memory = Memory::new(LIMITS);
        let mut agent = Agent::new(&memory);
        let mut failing = 0..0;
        for step in steps {
            match step {
                Step::Apply(object) => {
                    let key = key(&object);
                    objects.retain(|(known, _)| *known != key);
                    objects.push((key, object.clone()));
                    agent.take([object]);
                }
                Step::Delete(key) => {
                    objects.retain(|(known, _)| *known != key);
                    let dirty = agent.index.delete(&key);
                    agent.update(&dirty);
                }
                Step::Restart => {
                    agent = Agent::new(&memory);
                    agent.take(objects.iter().map(|(_, object)| object.clone()));
                }
                Step::Fail(good, bad) => {
                    // Those of the next run, which has something to write.
                    failing = good + 1..good + bad + 1;
                    continue;
                }
            }
            let mut wrong = None;
            let mut store = Faulty::new(memory, |attempt, memory: &Memory| {
                wrong = wrong.take().or_else(|| inconsistency(memory));
                failing.contains(&attempt)
            });
            let report = agent.syncer.run(&mut store);
            prop_assert!(failing.start > 0 || report.failed.is_empty(), "{:?}", report.failed);
            // Garbage that waits for a grace period may fail too, and is collected later.
            let _failed = agent.syncer.reclaim(&mut store);
            memory = store.memory;
            prop_assert_eq!(wrong.or_else(|| inconsistency(&memory)), None);
            failing = 0..0;
        }
        let report = agent.syncer.run(&mut memory);
        prop_assert!(report.failed.is_empty(), "{:?}", report.failed);
        prop_assert!(agent.syncer.is_settled());
        agent.syncer.reclaim(&mut memory).unwrap();

        let mut fresh_memory = Memory::new(LIMITS);
        let mut fresh = Agent::new(&fresh_memory);
        fresh.take(objects.into_iter().map(|(_, object)| object));
        fresh.syncer.run(&mut fresh_memory);
        fresh.syncer.reclaim(&mut fresh_memory).unwrap();
        prop_assert_eq!(memory.dump(), fresh_memory.dump());
        prop_assert_eq!(agent.syncer.usage(), fresh.syncer.usage());
    }
}

/// Runs several changes, each with the failures of one write, so that faults meet changes in flight.
#[test]
fn each_single_failure_is_made_good() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..20 {
        let objects: Vec<Object> = proptest::collection::vec(prop_oneof![service(), slice()], 1..12)
            .new_tree(&mut runner)
            .unwrap()
            .current();
        for failing in 1..60 {
            let mut store = Faulty::new(Memory::new(LIMITS), |attempt, _: &Memory| attempt == failing);
            let mut agent = Agent::new(&store.memory);
            for object in &objects {
                agent.take([object.clone()]);
                agent.syncer.run(&mut store);
                assert_eq!(inconsistency(&store.memory), None);
            }
            let report = agent.syncer.run(&mut store);
            assert!(report.failed.is_empty(), "{:?}", report.failed);
            let mut fresh_memory = Memory::new(LIMITS);
            let mut fresh = Agent::new(&fresh_memory);
            fresh.take(objects.clone());
            fresh.syncer.run(&mut fresh_memory);
            assert_eq!(store.memory.dump(), fresh_memory.dump());
        }
    }
}

/// What somebody else removed from the tables is found and put back.
#[test]
fn an_audit_finds_foreign_changes() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut memory = Memory::new(LIMITS);
    let mut agent = Agent::new(&memory);
    let objects = proptest::collection::vec(service(), 5..10).new_tree(&mut runner);
    agent.take(objects.unwrap().current());
    agent.syncer.run(&mut memory);
    let before = memory.dump();
    assert_eq!(agent.syncer.audit(&memory).unwrap(), 0);
    let (key, _) = memory.frontends.pop_first().unwrap();
    memory.frontends.insert(
        *memory.frontends.keys().next().unwrap(),
        Frontend {
            service: 150,
            owner: 0,
        },
    );
    memory.own_addresses.clear();
    assert_eq!(agent.syncer.audit(&memory).unwrap(), 3);
    agent.syncer.run(&mut memory);
    assert!(memory.frontends.contains_key(&key));
    assert_eq!(memory.dump(), before);
}

/// A Service and its slice.
/// Endpoints as a slice's first, at other addresses.
fn endpoints_at(slice: &EndpointSlice, lasts: &[u8]) -> Endpoints {
    let first = slice.endpoints.iter().next().unwrap();
    let addrs = lasts.iter().map(|last| IpAddr::from([10, 244, 0, *last]));
    addrs.map(|addr| first.at(addr)).collect()
}

fn object(number: u8, last: u8) -> [Object; 2] {
    let slice = EndpointSlice {
        name: name(number),
        service: Some(name(number)),
        family: SliceFamily::V4,
        ports: [SlicePort {
            name: "".into(),
            proto: Protocol::Tcp,
            port: 80,
        }]
        .into(),
        endpoints: [Endpoint {
            addr: IpAddr::from([10, 244, 0, number]),
            ready: true,
            serving: true,
            terminating: false,
            placement: Arc::default(),
        }]
        .into_iter()
        .collect(),
        changed_ns: None,
    };
    [plain(number, last).into(), Object::EndpointSlice(slice.into())]
}

/// After a restart a Service keeps its number and generation, so that its flows go on; another one at its address
/// gets a number of its own, so that they do not reach it.
#[test]
fn a_restart_tells_whose_an_address_is() {
    let mut memory = Memory::new(LIMITS);
    let mut agent = Agent::new(&memory);
    agent.take(object(1, 1));
    agent.syncer.run(&mut memory);
    let number = |memory: &Memory| memory.frontends.values().next().unwrap().service;
    let first = number(&memory);
    let entry = memory.services[&first];

    let mut same = memory.clone();
    let mut agent = Agent::new(&same);
    agent.take(object(1, 1));
    agent.syncer.run(&mut same);
    assert_eq!(number(&same), first);
    assert_eq!(same.services[&first], entry);

    let mut agent = Agent::new(&memory);
    agent.take(object(2, 1));
    agent.syncer.run(&mut memory);
    assert_ne!(number(&memory), first);
    assert_eq!(memory.services[&first].head.flags, service_flags::DELETED);
    agent.syncer.reclaim(&mut memory).unwrap();
    assert!(agent.syncer.is_settled());
}

/// An endpoint that one of two Services loses: its flows there have to move, and those of the other stay.
#[test]
fn an_endpoint_leaves_each_service_by_itself() {
    let states = |memory: &Memory| {
        let mut states: Vec<u8> = memory
            .backends
            .values()
            .map(|backend| backend.head.state)
            .collect();
        states.sort_unstable();
        states
    };
    let shared = |number| {
        let mut objects = object(number, number);
        if let Object::EndpointSlice(slice) = &mut objects[1] {
            let endpoints = endpoints_at(slice, &[9]);
            std::sync::Arc::make_mut(slice).endpoints = endpoints;
        }
        objects
    };
    let mut memory = Memory::new(LIMITS);
    let mut agent = Agent::new(&memory);
    agent.take(shared(1).into_iter().chain(shared(2)));
    agent.syncer.run(&mut memory);
    assert_eq!(states(&memory), [backend_state::ACTIVE; 2]);
    let before = memory.backends.clone();
    let dirty = agent.index.delete(&key(&shared(1)[1]));
    agent.update(&dirty);
    agent.syncer.run(&mut memory);
    assert_eq!(states(&memory), [backend_state::ACTIVE, backend_state::DRAINING]);

    // It comes back, across a restart: both go on under their own numbers.
    agent.syncer.reclaim(&mut memory).unwrap();
    let mut agent = Agent::new(&memory);
    agent.take(shared(1).into_iter().chain(shared(2)));
    agent.syncer.run(&mut memory);
    assert_eq!(memory.backends, before);
}

/// Traffic policies come and go, and agents with them; the flows that a service began stay its own until it is gone.
#[test]
fn a_policy_that_changes_ends_no_flow() {
    let with = |external_local, internal_local| {
        let mut service = plain(1, 1);
        service.ports[0].node_port = Some(30000);
        service.external_local = external_local;
        service.internal_local = internal_local;
        [service.into(), object(1, 1)[1].clone()]
    };
    let entries = |memory: &Memory| {
        let mut entries: Vec<(u32, u16, bool)> = memory
            .services
            .iter()
            .map(|(index, service)| {
                let head = service.head;
                (*index, head.generation, head.flags & service_flags::DELETED != 0)
            })
            .collect();
        entries.sort_unstable();
        entries
    };
    let mut memory = Memory::new(LIMITS);
    let mut agent = Agent::new(&memory);
    agent.take(with(true, false));
    agent.syncer.run(&mut memory);
    let first = entries(&memory);
    assert_eq!(first.len(), 3, "the cluster IP's, and two of the node port");
    for (external_local, internal_local) in [(false, true), (true, true), (false, false), (true, false)] {
        agent.take(with(external_local, internal_local));
        agent.syncer.run(&mut memory);
        agent.syncer.reclaim(&mut memory).unwrap();
        assert_eq!(entries(&memory), first);
        let usage = agent.syncer.usage().0;
        assert_eq!(usage, if external_local { 3 } else { 2 });
        // A restart finds everything as it should be,
        agent = Agent::new(&memory);
        agent.take(with(external_local, internal_local));
        assert_eq!(
            agent.syncer.run(&mut memory).writes,
            0,
            "{external_local} {internal_local}"
        );
        assert_eq!(entries(&memory), first);
        // and one that finds another policy ends no flow either.
        let mut other = memory.clone();
        let mut meanwhile = Agent::new(&other);
        meanwhile.take(with(!external_local, internal_local));
        meanwhile.syncer.run(&mut other);
        assert_eq!(entries(&other), first);
        assert!(meanwhile.syncer.is_settled());
    }
    agent.take(with(false, false));
    agent.syncer.run(&mut memory);
    let dirty = agent.index.delete(&key(&with(false, false)[0]));
    agent.update(&dirty);
    agent.syncer.run(&mut memory);
    agent.syncer.reclaim(&mut memory).unwrap();
    assert!(entries(&memory).iter().all(|(.., deleted)| *deleted));
    assert_eq!(agent.syncer.usage().0, 0);
    assert!(agent.syncer.is_settled());
}

/// The backend of each slot of the only service's table.
fn spread(memory: &Memory) -> Vec<u32> {
    let service = memory.frontends.values().next().unwrap().service;
    let head = memory.services[&service].head;
    let first = head.slots_offset as usize;
    let slots = TABLE_SIZES[usize::from(head.size_class)] as usize;
    (0..slots)
        .map(|slot| {
            let number = (memory.maglev[first + slot / 4] >> (slot % 4 * 16)) as u16;
            let id = (memory.maglev[first - 2 - usize::from(number) / 2] >> (number % 2 * 32)) as u32;
            memory.backends[&id].addr_be[0]
        })
        .collect()
}

/// A flow that another node takes over, or that comes back after a restart, meets the same backend: whatever the order in
/// which a node has heard of the endpoints, and whichever numbers it has given them.
#[test]
fn every_node_spreads_flows_alike() {
    let slice_of = |part: usize, lasts: &[u8]| {
        let [_, Object::EndpointSlice(slice)] = object(1, 1) else {
            panic!("a Service and its slice")
        };
        Object::EndpointSlice(Arc::new(EndpointSlice {
            name: Name::new("ns", &format!("s1-{part}")),
            endpoints: endpoints_at(&slice, lasts),
            ..(*slice).clone()
        }))
    };
    let lasts: Vec<u8> = (10..27).collect();
    let mut spreads = Vec::new();
    for order in 0..4 {
        let mut lasts = lasts.clone();
        match order {
            0 => {}
            1 => lasts.reverse(),
            _ => lasts.sort_by_key(|last| last.wrapping_mul(order * 74 + 1)),
        }
        let mut memory = Memory::new(LIMITS);
        let mut agent = Agent::new(&memory);
        let [service, _] = object(1, 1);
        agent.take([service]);
        for (part, lasts) in lasts.chunks(usize::from(order) * 2 + 3).enumerate() {
            agent.take([slice_of(part, lasts)]);
            agent.syncer.run(&mut memory);
        }
        if order == 3 {
            // One goes, another takes its number, and it comes back.
            for with in [&[99][..], &[99, lasts[0]]] {
                let first: Vec<u8> = with.iter().chain(&lasts[1..9]).copied().collect();
                agent.take([slice_of(0, &first)]);
                agent.syncer.run(&mut memory);
            }
            agent.take([slice_of(0, &lasts[..9])]);
            agent.syncer.run(&mut memory);
        }
        spreads.push(spread(&memory));
    }
    assert_eq!(spreads[0].len(), 2003);
    assert!(spreads.iter().all(|spread| *spread == spreads[0]));
}
