//! Full tables: told by name, without harm to what fits, and made good.

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use dataplane_common::service::Scope;
use proptest::prelude::*;

use super::{Agent, LIMITS, Step, endpoints_at, inconsistency, key, name, object, plain, range, step};
use crate::{
    compile::BalancerKey,
    model::{EndpointSlice, Kind, Object, ObjectRef, Service},
    store::{FrontendKey, Limits, faulty::Faulty, memory::Memory},
    sync::{Report, Syncer, encode, services},
};

/// Limits of which at least one is soon reached.
fn tight() -> impl Strategy<Value = Limits> {
    let limits = (1..9u32, 2..9u32, 2..9u32, 27..200u32);
    (limits, 0..4).prop_map(|((frontends, services, backends, maglev), which)| {
        let mut limits = LIMITS;
        match which {
            0 => limits.frontends = frontends,
            1 => limits.services = services,
            2 => limits.backends = backends,
            _ => limits.maglev = maglev,
        }
        limits
    })
}

impl Agent {
    /// Desired services and frontends that are not in force, or with fewer endpoints than desired.
    fn not_served(&self, memory: &Memory) -> BTreeSet<String> {
        let Syncer {
            desired, programmed, ..
        } = &self.syncer;
        let is_whole = |key: &BalancerKey| {
            let ids = |index| programmed.slot(memory, index).ids(memory).unwrap().len();
            let written = programmed.written_service(memory, key).map(ids);
            written == desired.balancer(key).map(|balancer| balancer.backends.len())
        };
        let leads_there = |key: &BalancerKey, frontend: &FrontendKey| {
            let led = programmed
                .frontends
                .get(frontend)
                .map(|frontend| frontend.service);
            led.is_some() && led == programmed.written_service(memory, key)
        };
        let services = desired.balancers().filter(|key| !is_whole(key));
        let scopes = |key: BalancerKey| {
            [Scope::Internal, Scope::External]
                .map(|scope| (encode::frontend_key(&key.frontend, scope), key.clone()))
        };
        let frontends = desired.balancers().flat_map(scopes);
        let frontends = frontends.filter(|(frontend, key)| {
            desired.frontend(frontend).as_ref() == Some(key) && !leads_there(key, frontend)
        });
        let all = services.chain(frontends.map(|(_, key)| key));
        all.map(|key| services::describe(&key).to_string()).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    /// A full table is never silent, stops nothing else, sends nobody to an endpoint that is gone, and heals.
    #[test]
    fn a_full_table_is_told_by_name_and_heals(limits in tight(), steps in proptest::collection::vec(step(), 1..40)) {
        let mut objects: Vec<(ObjectRef, Object)> = Vec::new();
        let mut memory = Memory::new(limits);
        let mut agent = Agent::new(&memory);
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
                Step::Fail(..) => continue,
            }
            let mut wrong = None;
            let mut store = Faulty::new(memory, |_, memory: &Memory| {
                wrong = wrong.take().or_else(|| inconsistency(memory));
                false
            });
            // The second and third are the retries that follow a failure.
            let mut report = Report::default();
            for _ in 0..3 {
                report = agent.syncer.run(&mut store);
                agent.syncer.reclaim(&mut store).unwrap();
            }
            memory = store.memory;
            prop_assert_eq!(wrong.or_else(|| inconsistency(&memory)), None);
            let named: BTreeSet<String> = report.failed.keys().map(ToString::to_string).collect();
            let silent: Vec<String> = agent.not_served(&memory).difference(&named).cloned().collect();
            prop_assert!(silent.is_empty(), "{silent:?} beside {:?}", report.failed);
            prop_assert!(report.failed.values().all(|failure| !failure.refused), "{:?}", report.failed);
            prop_assert_eq!(agent.syncer.is_settled(), report.failed.is_empty());

            let mut fresh_memory = Memory::new(limits);
            let mut fresh = Agent::new(&fresh_memory);
            fresh.take(objects.iter().map(|(_, object)| object.clone()));
            let fits = fresh.syncer.run(&mut fresh_memory).failed.is_empty();
            // The space of MAGLEV may be in pieces.
            if fits && fresh.syncer.usage().2 * 3 <= limits.maglev {
                prop_assert!(report.failed.is_empty(), "{:?}", report.failed);
                prop_assert_eq!(memory.dump(), fresh_memory.dump());
            }
        }
    }
}

/// A full table leaves the rest served, is reported by name, and is made good when there is room.
#[test]
fn a_full_table_is_reported_and_made_good() {
    let limits = Limits { maglev: 40, ..LIMITS };
    let mut memory = Memory::new(limits);
    let mut agent = Agent::new(&memory);
    agent.take(object(1, 1));
    agent.take(object(2, 2));
    let report = agent.syncer.run(&mut memory);
    assert_eq!(report.failed.len(), 1);
    let (what, reason) = report.failed.first_key_value().unwrap();
    assert_eq!(what.to_string(), "Service ns/s2: 10.96.0.2:80/TCP");
    assert!(!reason.refused);
    assert_eq!(
        reason.reason,
        "no room for a table of 28 elements (12 of 40 are free, --max-maglev)"
    );
    assert!(memory.dump().contains("frontend 10.96.0.1 80/TCP"));
    assert!(!memory.dump().contains("frontend 10.96.0.2 80/TCP"));

    let dirty = agent.index.delete(&ObjectRef {
        kind: Kind::Service,
        name: name(1),
    });
    agent.update(&dirty);
    agent.syncer.run(&mut memory);
    let report = agent.syncer.run(&mut memory);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    assert!(memory.dump().contains("frontend 10.96.0.2 80/TCP"));
}

/// Services that wait for room for their frontends have theirs of `MAGLEV` already, so it may be full where few are served.
#[test]
fn who_waits_for_a_frontend_keeps_its_table() {
    let limits = Limits {
        // One address, of clients inside and outside.
        frontends: 2,
        maglev: 60,
        ..LIMITS
    };
    let mut memory = Memory::new(limits);
    let mut agent = Agent::new(&memory);
    for number in 1..4 {
        agent.take(object(number, number));
    }
    let report = agent.syncer.run(&mut memory);
    let texts: Vec<String> = report
        .failed
        .iter()
        .map(|(what, failure)| format!("{what}: {}", failure.reason))
        .collect();
    let expected = [
        "Service ns/s2: 10.96.0.2:80/TCP: table FRONTENDS_V4 is full (2 entries, --max-frontends)",
        "Service ns/s3: 10.96.0.3:80/TCP: no room for a table of 28 elements (4 of 60 are free, --max-maglev)",
    ];
    assert_eq!(texts, expected);
    assert_eq!(agent.syncer.usage().2, 56, "also of the one without a frontend");
    let mut endpoints: Vec<(String, usize)> = Vec::new();
    for (owner, compiled) in agent.syncer.wanted() {
        let written = agent
            .syncer
            .written_endpoints(&memory, &owner, &compiled.balancers[0]);
        endpoints.push((owner.to_string(), written));
    }
    endpoints.sort_unstable();
    let expected = [("Service ns/s1", 1), ("Service ns/s2", 0), ("Service ns/s3", 0)];
    assert_eq!(endpoints, expected.map(|(name, count)| (name.to_owned(), count)));
}

/// A Service's only slice, with these endpoints.
fn with_endpoints(slice: &Object, last: &[u8]) -> Object {
    let Object::EndpointSlice(slice) = slice else {
        panic!("no slice");
    };
    Object::EndpointSlice(Arc::new(EndpointSlice {
        endpoints: endpoints_at(slice, last),
        ..(**slice).clone()
    }))
}

/// The space of a table may be needed by its own successor.
#[test]
fn a_table_makes_room_for_its_successor() {
    let limits = Limits { maglev: 40, ..LIMITS };
    let mut memory = Memory::new(limits);
    let mut agent = Agent::new(&memory);
    let [service, slice] = object(1, 1);
    agent.take([service]);
    for endpoint in [1, 2, 3] {
        agent.take([with_endpoints(&slice, &[endpoint])]);
        let report = agent.syncer.run(&mut memory);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        let expected = format!("internal -> [backend 10.244.0.{endpoint} 80/TCP active x101]");
        assert!(memory.dump().contains(&expected), "{}", memory.dump());
        agent.syncer.reclaim(&mut memory).unwrap();
    }
}

/// Where endpoints find no room, the others get the traffic, and those that leave make room.
#[test]
fn a_service_goes_on_with_the_endpoints_that_fit() {
    let limits = Limits {
        backends: 3,
        ..LIMITS
    };
    let mut memory = Memory::new(limits);
    let mut agent = Agent::new(&memory);
    let [service, slice] = object(1, 1);
    let with = |last: &[u8]| with_endpoints(&slice, last);
    agent.take([service, with(&[1, 2, 3])]);
    let report = agent.syncer.run(&mut memory);
    let texts: Vec<String> = report
        .failed
        .iter()
        .map(|(what, failure)| format!("{what}: {}", failure.reason))
        .collect();
    let expected = [
        "backend 10.244.0.3:80/TCP: no backend id is free (3 backends, --max-backends)",
        "Service ns/s1: 10.96.0.1:80/TCP: 1 of 3 endpoints are not written: no backend id is free (3 backends, --max-backends)",
    ];
    assert_eq!(texts, expected);
    let dump = memory.dump();
    assert!(dump.contains("10.244.0.1") && dump.contains("10.244.0.2") && !dump.contains("10.244.0.3"));

    agent.take([with(&[3, 4])]);
    for _ in 0..2 {
        agent.syncer.run(&mut memory);
        agent.syncer.reclaim(&mut memory).unwrap();
    }
    assert!(agent.syncer.run(&mut memory).failed.is_empty());
    let dump = memory.dump();
    assert!(dump.contains("10.244.0.3") && dump.contains("10.244.0.4") && !dump.contains("10.244.0.1"));
}

/// Where source ranges find no room, who is in these is kept out, nobody else let in.
#[test]
fn ranges_that_do_not_fit_let_nobody_in() {
    let limits = Limits {
        source_ranges: 3,
        ..LIMITS
    };
    let mut memory = Memory::new(limits);
    let mut agent = Agent::new(&memory);
    let guarded = |number: u8, lengths: &[u8]| {
        let [_, slice] = object(number, number);
        let service = Service {
            cluster_ips: Box::default(),
            ingress_ips: [IpAddr::from([198, 18, 0, number])].into(),
            source_ranges: lengths.iter().map(|length| range(*length)).collect(),
            ..plain(number, number)
        };
        [service.into(), slice]
    };
    let shows = |memory: &Memory, number: u8, from: &str| {
        let line = format!("198.18.0.{number} 80/TCP external -> {from}[backend");
        let dump = memory.dump();
        assert!(dump.contains(&line), "{line} in\n{dump}");
    };
    agent.take(guarded(1, &[24, 25]));
    agent.take(guarded(2, &[24, 25]));
    let report = agent.syncer.run(&mut memory);
    let texts: Vec<String> = report
        .failed
        .iter()
        .map(|(what, failure)| format!("{what}: {}", failure.reason))
        .collect();
    assert_eq!(
        texts,
        ["Service ns/s2: 198.18.0.2:80/TCP: table RANGES_V4 is full (3 entries, --max-source-ranges)"]
    );
    assert!(!agent.syncer.is_settled());
    shows(&memory, 1, "from 203.0.113.0/24 203.0.113.0/25: ");
    shows(&memory, 2, "from 203.0.113.0/24: ");
    // What leaves makes room.
    agent.take(guarded(1, &[26]));
    agent.syncer.run(&mut memory);
    let report = agent.syncer.run(&mut memory);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    shows(&memory, 1, "from 203.0.113.0/26: ");
    shows(&memory, 2, "from 203.0.113.0/24 203.0.113.0/25: ");
    agent.take(guarded(1, &[]));
    let dirty = agent.index.delete(&ObjectRef {
        kind: Kind::Service,
        name: name(2),
    });
    agent.update(&dirty);
    agent.syncer.run(&mut memory);
    assert!(agent.syncer.is_settled());
    assert!(memory.ranges.is_empty());
    shows(&memory, 1, "");
}
