//! Objects as no controller would write them, with everything an API server of any version might let through and more:
//! whatever they say, every address and port is served or named among the problems, and nobody else loses anything.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use dataplane_agent::{
    compile::{Compiled, Compiler, FrontendAddr, Options},
    decode::{Decoded, decode},
    model::{Dirty, Index, ObjectRef, Problem, Protocol},
};
use proptest::{
    collection::vec, option, prelude::*, sample::select, strategy::ValueTree, test_runner::TestRunner,
};
use serde_json::{Value, json};

/// Anything at all.
fn anything() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,12}".prop_map(Value::from),
        address().prop_map(Value::from),
        Just(Value::from("x".repeat(300))),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec(("[a-zA-Z.-]{0,10}", inner), 0..4)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

/// Addresses in good and bad spellings; few different ones, so that Services often meet.
fn address() -> impl Strategy<Value = String> {
    let spelled = select(vec![
        "10.96.0.1",
        "10.96.0.2",
        "010.096.000.010",
        "10.96.0.8",
        "198.18.0.1",
        "::ffff:10.96.0.1",
        "fd00::1",
        "FD00:0:0::0001",
        "fe80::1%eth0",
        "127.0.0.1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "255.255.255.255",
        "10.96.0.256",
        "10.96.0",
        "0x0a.0.0.1",
        "1e1.0.0.1",
        " 10.96.0.1",
        "10.96.0.1/32",
        "None",
        "",
        "example.org",
    ]);
    prop_oneof![
        12 => spelled.prop_map(str::to_owned),
        1 => any::<u32>().prop_map(|addr| Ipv4Addr::from(addr).to_string()),
        1 => any::<u128>().prop_map(|addr| Ipv6Addr::from(addr).to_string()),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    prop_oneof![
        8 => select(vec![80, 81, 443, 8080, 30080, 30081]).prop_map(Value::from),
        2 => select(vec![0i64, -1, 65_535, 65_536, 4_294_967_376, i64::MIN, i64::MAX]).prop_map(Value::from),
        1 => anything(),
    ]
}

fn text(good: &'static [&'static str]) -> impl Strategy<Value = Value> {
    prop_oneof![
        12 => select(good).prop_map(Value::from),
        1 => anything(),
    ]
}

fn addresses() -> impl Strategy<Value = Value> {
    prop_oneof![
        12 => vec(address(), 0..4).prop_map(Value::from),
        1 => anything(),
    ]
}

/// An object of these fields, each there or not.
fn object(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let fields: Vec<_> = fields
        .into_iter()
        .map(|(name, value)| option::weighted(0.8, value).prop_map(move |value| (name, value)))
        .collect();
    fields
        .prop_map(|fields| {
            let some = fields
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?)));
            Value::Object(some.collect())
        })
        .boxed()
}

fn list(of: BoxedStrategy<Value>, at_most: usize) -> BoxedStrategy<Value> {
    prop_oneof![
        14 => vec(of, 0..at_most).prop_map(Value::from),
        1 => anything(),
    ]
    .boxed()
}

fn service_port() -> BoxedStrategy<Value> {
    object(vec![
        ("name", text(&["", "http", "dns", "metrics"]).boxed()),
        ("port", number().boxed()),
        ("nodePort", number().boxed()),
        (
            "targetPort",
            prop_oneof![number().boxed(), text(&["http", ""]).boxed()].boxed(),
        ),
        (
            "protocol",
            text(&["TCP", "UDP", "SCTP", "", "tcp", "ICMP"]).boxed(),
        ),
        ("appProtocol", text(&["http"]).boxed()),
    ])
}

fn service_spec() -> BoxedStrategy<Value> {
    let families = vec(select(vec!["IPv4", "IPv6", "IPv5", ""]), 0..3).prop_map(Value::from);
    object(vec![
        (
            "type",
            text(&[
                "ClusterIP",
                "NodePort",
                "LoadBalancer",
                "LoadBalancer",
                "ExternalName",
                "",
            ])
            .boxed(),
        ),
        ("clusterIP", address().prop_map(Value::from).boxed()),
        (
            "clusterIPs",
            option::weighted(0.4, addresses())
                .prop_map(|ips| ips.unwrap_or(Value::Null))
                .boxed(),
        ),
        (
            "ipFamilies",
            option::weighted(0.5, families)
                .prop_map(|some| some.unwrap_or(Value::Null))
                .boxed(),
        ),
        ("externalIPs", addresses().boxed()),
        ("ports", list(service_port(), 4)),
        (
            "selector",
            option::weighted(0.3, anything())
                .prop_map(|some| some.unwrap_or(Value::Null))
                .boxed(),
        ),
        ("internalTrafficPolicy", text(&["Cluster", "Local", ""]).boxed()),
        (
            "externalTrafficPolicy",
            text(&["Cluster", "Local", "Elsewhere"]).boxed(),
        ),
        ("healthCheckNodePort", number().boxed()),
        (
            "sessionAffinity",
            text(&["None", "None", "ClientIP", "Cookie"]).boxed(),
        ),
        (
            "publishNotReadyAddresses",
            text(&["yes"]).prop_map(|_| Value::Bool(true)).boxed(),
        ),
        (
            "loadBalancerSourceRanges",
            vec(
                select(vec![
                    "10.0.0.0/8",
                    "010.0.0.0/8",
                    "::/0",
                    "10.0.0.0/8",
                    "10.0.0.0/8 ",
                ]),
                0..3,
            )
            .prop_map(Value::from)
            .boxed(),
        ),
    ])
}

fn service() -> impl Strategy<Value = Value> {
    let ingress = object(vec![
        ("ip", address().prop_map(Value::from).boxed()),
        ("ipMode", text(&["VIP", "VIP", "Proxy"]).boxed()),
    ]);
    let status = list(ingress, 3).prop_map(|ingress| json!({"loadBalancer": {"ingress": ingress}}));
    let age = select(vec![
        "2020-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
        "0001-01-01T00:00:00Z",
    ]);
    // In order, but for a field here and there: of what is wrong all over, nothing is served.
    let addr = select(vec!["10.96.0.1", "10.96.0.2", "010.096.000.010", "10.96.0.8"]);
    let port = select(vec![
        json!({"port": 80}),
        json!({"name": "http", "port": 80, "nodePort": 30080}),
    ]);
    let kind = select(vec!["NodePort", "LoadBalancer"]);
    let spec =
        (service_spec(), vec(0..4u8, 13), addr, port, kind).prop_map(|(hostile, dice, addr, port, kind)| {
            let mut spec = json!({"type": kind, "clusterIP": addr, "ports": [port]});
            let fields = hostile.as_object().cloned().unwrap_or_default();
            for ((name, value), _) in fields.into_iter().zip(dice).filter(|(_, dice)| *dice == 0) {
                spec[name] = value;
            }
            spec
        });
    (spec, status, option::weighted(0.5, age)).prop_map(|(spec, status, age)| {
        json!({
            "apiVersion": "v1", "kind": "Service", "spec": spec, "status": status,
            "metadata": {"name": "hostile", "namespace": "ns", "creationTimestamp": age},
        })
    })
}

fn slice() -> impl Strategy<Value = Value> {
    let endpoint = object(vec![
        ("addresses", addresses().boxed()),
        (
            "conditions",
            object(vec![(
                "ready",
                text(&["x"]).prop_map(|_| Value::Bool(true)).boxed(),
            )]),
        ),
        ("nodeName", text(&["n1", "n2", ""]).boxed()),
        (
            "hints",
            option::weighted(0.2, anything())
                .prop_map(|some| some.unwrap_or(Value::Null))
                .boxed(),
        ),
    ]);
    let port = object(vec![
        ("name", text(&["", "http", "dns"]).boxed()),
        ("port", number().boxed()),
        ("protocol", text(&["TCP", "UDP", "SCTP"]).boxed()),
    ]);
    // In order, but for a field or an endpoint here and there.
    let addr = select(vec!["10.244.1.1", "010.244.001.002", "10.244.1.3"]);
    let endpoints = vec(
        prop_oneof![
            4 => addr.prop_map(|addr| json!({"addresses": [addr]})),
            1 => endpoint,
        ],
        1..5,
    )
    .prop_map(Value::from);
    let good_port = select(vec![json!({"port": 8080}), json!({"name": "http", "port": 8080})]);
    let ports = (good_port, option::weighted(0.2, port)).prop_map(|(good, hostile)| {
        let ports: Vec<Value> = std::iter::once(good).chain(hostile).collect();
        Value::from(ports)
    });
    let kind = prop_oneof![
        8 => Just(Value::from("IPv4")),
        1 => text(&["IPv6", "FQDN"]),
    ];
    let endpoints = prop_oneof![8 => endpoints.boxed(), 1 => anything().boxed()];
    let ports = prop_oneof![8 => ports.boxed(), 1 => anything().boxed()];
    let version = select(vec!["v1", "v1", "v1", "v1", "v1", "v1beta1"]);
    (kind, endpoints, ports, version).prop_map(|(kind, endpoints, ports, version)| {
        json!({
            "apiVersion": format!("discovery.k8s.io/{version}"), "kind": "EndpointSlice",
            "metadata": {"name": "s", "namespace": "ns", "labels": {"kubernetes.io/service-name": "hostile"}},
            "addressType": kind, "endpoints": endpoints, "ports": ports,
        })
    })
}

/// A good object with one field replaced by anything, wherever it is.
fn mutated(good: Value) -> impl Strategy<Value = Value> {
    let paths = paths(&good);
    (select(paths), anything(), any::<bool>()).prop_map(move |(path, value, is_gone)| {
        let mut object = good.clone();
        if let Some((last, parents)) = path.split_last() {
            let parent = parents.iter().try_fold(&mut object, |at, step| match at {
                Value::Object(fields) => fields.get_mut(step),
                Value::Array(items) => items.get_mut(step.parse::<usize>().ok()?),
                _ => None,
            });
            match parent {
                Some(Value::Object(fields)) if is_gone => drop(fields.remove(last)),
                Some(Value::Object(fields)) => drop(fields.insert(last.clone(), value)),
                Some(Value::Array(items)) => items[last.parse::<usize>().unwrap()] = value,
                _ => {}
            }
        }
        object
    })
}

fn paths(value: &Value) -> Vec<Vec<String>> {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(fields) => fields.iter().map(|(name, value)| (name.clone(), value)).collect(),
        Value::Array(items) => items
            .iter()
            .enumerate()
            .map(|(i, value)| (i.to_string(), value))
            .collect(),
        _ => Vec::new(),
    };
    children
        .into_iter()
        .flat_map(|(name, value)| {
            let below = paths(value).into_iter();
            let below = below.map(|path| [vec![name.clone()], path].concat());
            std::iter::once(vec![name.clone()]).chain(below.collect::<Vec<_>>())
        })
        .collect()
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "p", "namespace": "ns", "labels": {"app": "a"}, "creationTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {
            "nodeName": "n1", "hostNetwork": false,
            "containers": [{"name": "c", "ports": [
                {"name": "http", "containerPort": 8080, "hostPort": 8080, "hostIP": "192.0.2.1", "protocol": "TCP"},
            ]}],
            "initContainers": [{"name": "i", "restartPolicy": "Always", "ports": [{"containerPort": 53, "hostPort": 53}]}],
        },
        "status": {
            "phase": "Running", "podIP": "10.244.1.1", "podIPs": [{"ip": "10.244.1.1"}, {"ip": "fd01::1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    })
}

fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "a"}},
        "spec": {"taints": [{"key": "a", "effect": "NoSchedule"}]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]},
    })
}

/// A Service that is in order, at an address that the others may claim too.
fn innocent(name: &str, addr: &str) -> [Value; 2] {
    [
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": "ns", "creationTimestamp": "2025-01-01T00:00:00Z"},
            "spec": {"clusterIP": addr, "ports": [{"name": "http", "port": 80}], "type": "NodePort"},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "ns", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "endpoints": [{"addresses": ["10.244.9.9"]}],
            "ports": [{"name": "http", "port": 8080}],
        }),
    ]
}

/// What became of objects.
struct Outcome {
    compiled: BTreeMap<String, Arc<Compiled>>,
    problems: Vec<(String, Problem)>,
}

impl Outcome {
    fn of(objects: &[Value]) -> Self {
        let mut index = Index::new("n1");
        let mut dirty = Dirty::default();
        let mut problems = Vec::new();
        for object in objects {
            let (key, of_object) = match decode(object) {
                Decoded::Ignored { .. } => continue,
                Decoded::Object {
                    key,
                    object,
                    problems,
                } => {
                    dirty.merge(index.apply(object));
                    (Some(key), problems)
                }
                Decoded::Failed { key, problems } => {
                    assert!(!problems.is_empty(), "refused without a reason: {object}");
                    (key, problems)
                }
            };
            let name = key.map_or_else(String::new, |key: ObjectRef| key.to_string());
            problems.extend(of_object.into_iter().map(|problem| (name.clone(), problem)));
        }
        let mut compiler = Compiler::new(Options::default());
        let mut served: BTreeMap<String, Arc<Compiled>> = BTreeMap::new();
        let mut take = |updates: Vec<(ObjectRef, Option<Arc<Compiled>>)>| {
            for (owner, update) in updates {
                match update {
                    Some(update) => served.insert(owner.to_string(), update),
                    None => served.remove(&owner.to_string()),
                };
            }
        };
        take(compiler.update(&index, &dirty));
        take(compiler.set_own_addresses(&index, [("192.0.2.1".parse().unwrap(), true)].into()));
        problems.extend(
            compiler
                .problems()
                .into_iter()
                .map(|(owner, problem)| (owner.to_string(), problem)),
        );
        Self {
            compiled: served,
            problems,
        }
    }

    fn is_named(&self, object: &str) -> bool {
        self.problems.iter().any(|(of, _)| of == object)
    }

    fn frontends(&self, object: &str) -> BTreeSet<(IpAddr, u16)> {
        let compiled = self.compiled.get(object).into_iter();
        let balancers = compiled.flat_map(|compiled| compiled.balancers.iter());
        balancers
            .map(|one| (one.frontend.addr, one.frontend.port))
            .collect()
    }

    fn endpoints(&self, object: &str) -> BTreeSet<IpAddr> {
        let compiled = self.compiled.get(object).into_iter();
        let endpoints = compiled.flat_map(|compiled| compiled.endpoints.iter());
        endpoints.map(|(key, _)| key.addr).collect()
    }
}

/// The addresses that a Service asks for, as plainly as the API defines them; `None` where one is no address.
fn asked(service: &Value) -> Vec<Option<IpAddr>> {
    let spec = &service["spec"];
    let mut texts: Vec<&Value> = vec![&spec["clusterIP"]];
    texts.extend(spec["clusterIPs"].as_array().into_iter().flatten());
    texts.extend(spec["externalIPs"].as_array().into_iter().flatten());
    if spec["type"] == "LoadBalancer" {
        let ingress = service["status"]["loadBalancer"]["ingress"].as_array();
        let vips = ingress
            .into_iter()
            .flatten()
            .filter(|one| one["ipMode"] != "Proxy");
        texts.extend(vips.map(|one| &one["ip"]));
    }
    let stated = texts
        .into_iter()
        .filter_map(Value::as_str)
        .filter(|text| !text.is_empty());
    stated.map(plain_address).collect()
}

/// Decimal octets, whatever zeros lead them, or IPv6.
fn plain_address(text: &str) -> Option<IpAddr> {
    let octets: Option<Vec<u8>> = text
        .split('.')
        .map(|octet| {
            let is_decimal = !octet.is_empty() && octet.bytes().all(|byte| byte.is_ascii_digit());
            is_decimal.then(|| octet.trim_start_matches('0'))?;
            let digits = octet.trim_start_matches('0');
            if digits.is_empty() {
                Some(0)
            } else {
                digits.parse().ok()
            }
        })
        .collect();
    match octets.as_deref() {
        Some([a, b, c, d]) => Some(Ipv4Addr::new(*a, *b, *c, *d).into()),
        _ => text.parse::<Ipv6Addr>().ok().map(|addr| addr.to_canonical()),
    }
}

/// What nobody asks to be proxied.
fn is_left_alone(service: &Value) -> bool {
    service["spec"]["type"] == "ExternalName" || service["spec"]["clusterIP"] == "None"
}

const HOSTILE: &str = "Service ns/hostile";

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_address_and_port_is_served_or_named(service in service(), slice in slice()) {
        let [good, good_slice] = innocent("good", "10.96.0.1");
        let outcome = Outcome::of(&[good, good_slice, service.clone(), slice.clone()]);
        if !is_left_alone(&service) {
            let served = outcome.frontends(HOSTILE);
            let ports = service["spec"]["ports"].as_array().cloned().unwrap_or_default();
            let mut wanted: Vec<(Option<IpAddr>, &Value)> = Vec::new();
            for port in &ports {
                wanted.extend(asked(&service).into_iter().map(|addr| (addr, &port["port"])));
                if port["nodePort"].as_i64().is_some_and(|port| port != 0) {
                    wanted.push((None, &port["nodePort"]));
                }
            }
            let is_served = |(addr, port): &(Option<IpAddr>, &Value)| {
                let port = port.as_u64().and_then(|port| u16::try_from(port).ok());
                port.is_some_and(|port| match addr {
                    Some(addr) => served.contains(&(*addr, port)),
                    None => served.iter().any(|(addr, at)| addr.is_unspecified() && *at == port),
                })
            };
            prop_assert!(
                wanted.iter().all(is_served) || outcome.is_named(HOSTILE),
                "{service}\nserved {served:?}"
            );
        }
        // Its endpoints, where a port of the Service is theirs.
        let is_v1 = slice["apiVersion"] == "discovery.k8s.io/v1";
        let named = outcome.is_named("EndpointSlice ns/s");
        prop_assert!(is_v1 || named);
        let reached = outcome.endpoints(HOSTILE);
        let endpoints = slice["endpoints"].as_array().cloned().unwrap_or_default();
        let all = endpoints.iter().flat_map(|one| one["addresses"].as_array().cloned().unwrap_or_default());
        let all: Vec<Option<IpAddr>> = all.map(|addr| plain_address(addr.as_str().unwrap_or_default())).collect();
        prop_assert!(
            named || reached.is_empty() || all.iter().all(|addr| addr.is_some_and(|addr| reached.contains(&addr))),
            "{slice}\nreached {reached:?}"
        );
    }

    #[test]
    fn nobody_else_loses_anything(service in service(), slice in slice(), hostile_pod in mutated(pod()), hostile_node in mutated(node())) {
        let good = innocent("good", "10.96.0.77");
        let alone = Outcome::of(&good);
        let beside = Outcome::of(&[&good[..], &[service, slice, hostile_pod, hostile_node]].concat());
        let name = "Service ns/good";
        prop_assert_eq!(alone.compiled.get(name), beside.compiled.get(name));
        prop_assert!(!beside.is_named(name), "{:?}", beside.problems);
    }

    #[test]
    fn of_two_with_one_address_the_older_is_served_whatever_the_order(first in service(), is_last in any::<bool>()) {
        let good = innocent("good", "10.96.0.1");
        let mut objects = good.to_vec();
        objects.insert(if is_last { 2 } else { 0 }, first);
        let outcome = Outcome::of(&objects);
        let frontend = FrontendAddr { addr: "10.96.0.1".parse().unwrap(), port: 80, proto: Protocol::Tcp };
        let owners = ["Service ns/good", HOSTILE].map(|name| {
            let compiled = outcome.compiled.get(name);
            compiled.is_some_and(|compiled| compiled.balancers.iter().any(|one| one.frontend == frontend))
        });
        prop_assert!(!(owners[0] && owners[1]), "both are served");
        prop_assert!(owners[0] || outcome.is_named("Service ns/good"));
    }

    #[test]
    fn no_field_of_any_kind_makes_it_panic(
        hostile_pod in mutated(pod()),
        hostile_node in mutated(node()),
        hostile_service in mutated(innocent("hostile", "10.96.0.1")[0].clone()),
        hostile_slice in mutated(innocent("hostile", "10.96.0.1")[1].clone()),
        nonsense in anything(),
    ) {
        let objects = [hostile_pod, hostile_node, hostile_service, hostile_slice, nonsense];
        let _outcome = Outcome::of(&objects);
    }
}

/// What the properties above are worth: some of what is generated is served, and some is not.
#[test]
fn the_generators_reach_every_outcome() {
    let mut runner = TestRunner::deterministic();
    let (mut served, mut with_endpoints, mut named) = (0, 0, 0);
    for _ in 0..1000 {
        let (service, slice) = (service(), slice()).new_tree(&mut runner).unwrap().current();
        let outcome = Outcome::of(&[service, slice]);
        served += usize::from(!outcome.frontends(HOSTILE).is_empty());
        with_endpoints += usize::from(!outcome.endpoints(HOSTILE).is_empty());
        named += usize::from(outcome.is_named(HOSTILE));
    }
    let counts = (served, with_endpoints, named);
    assert!(served > 50 && with_endpoints > 50 && named > 200, "{counts:?}");
}

#[test]
fn large_objects_are_served_whole() {
    let ports: Vec<Value> = (0..1000)
        .map(
            |number| json!({"name": format!("p{number}"), "port": 1000 + number, "nodePort": 30000 + number}),
        )
        .collect();
    let endpoints: Vec<Value> = (0..1000)
        .map(|number| json!({"addresses": [Ipv4Addr::from(0x0af4_0000 + number).to_string()]}))
        .collect();
    let slice_ports: Vec<Value> = (0..1000)
        .map(|number| json!({"name": format!("p{number}"), "port": 8000 + number}))
        .collect();
    let name = "n".repeat(253);
    let objects = [
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"},
            "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "ports": ports},
        }),
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "s", "namespace": "ns", "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "endpoints": endpoints, "ports": slice_ports[..100],
        }),
    ];
    let outcome = Outcome::of(&objects);
    let service = format!("Service ns/{name}");
    assert_eq!(outcome.problems, []);
    assert_eq!(outcome.frontends(&service).len(), 2000);
    assert_eq!(outcome.compiled[&service].endpoints.iter().count(), 100_000);
}

#[test]
fn leading_zeros_are_never_octal() {
    let [mut service, slice] = innocent("hostile", "010.096.000.010");
    service["spec"]["externalIPs"] = json!(["0198.018.0.08"]);
    let outcome = Outcome::of(&[service, slice]);
    let served: Vec<String> = outcome
        .frontends(HOSTILE)
        .into_iter()
        .map(|(addr, _)| addr.to_string())
        .collect();
    assert_eq!(served, ["10.96.0.10", "198.18.0.8"]);
}

#[test]
fn a_slice_of_the_old_version_is_refused_by_name() {
    let [service, mut slice] = innocent("hostile", "10.96.0.1");
    slice["apiVersion"] = json!("discovery.k8s.io/v1beta1");
    let outcome = Outcome::of(&[service, slice]);
    let [(object, problem)] = &outcome.problems[..] else {
        panic!("{:?}", outcome.problems);
    };
    assert_eq!(object, "EndpointSlice ns/hostile");
    assert_eq!(
        problem.reason,
        "discovery.k8s.io/v1beta1 is not read, only discovery.k8s.io/v1"
    );
}

#[test]
fn names_that_are_none_are_refused() {
    for name in ["a/b", "a\u{0}b", "a\nb"] {
        let [mut service, _] = innocent("x", "10.96.0.1");
        service["metadata"]["name"] = name.into();
        let outcome = Outcome::of(&[service]);
        assert_eq!(outcome.problems.len(), 1, "{name:?}");
        assert_eq!(outcome.problems[0].1.field, "metadata.name");
        assert!(outcome.compiled.is_empty());
    }
}
