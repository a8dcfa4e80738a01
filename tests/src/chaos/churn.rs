//! Objects that come, change and go, many times a second, on a thread of their own.
//!
//! What they say is random, and never takes from what must hold: a steady service always has an endpoint that is ready,
//! nobody refers to the outsiders, and policies of the insiders only allow more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use dataplane_tests::manifests::Manifests;
use fastrand::Rng;
use serde_json::{Value, json};

use crate::stage::{self, CHURN, GUARDED, INSIDERS, NODES, PORT, Stage, UDP_PORT, WEB};

const SERVICES: u8 = 40;
const PODS: u8 = 60;
const POLICIES: u8 = 20;
/// As much is made up for where changes have come late.
const BEHIND: Duration = Duration::from_millis(200);
/// Says a server that was killed while it made a Service: it keeps the address, or the port, for nobody, for some minutes.
const ALLOCATED: &str = "is already allocated";
/// So long such a Service is tried; then it waits for its next turn.
const TAKEN: Duration = Duration::from_secs(1);
/// How long a change may be refused in all, while the server is away or comes back.
const PATIENCE: Duration = Duration::from_mins(1);

/// An object that may be there: what of it can't be changed follows from its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    Service(u8),
    /// Of a service, by number.
    Slice(u8, u8),
    Pod(u8),
    /// Labels of a namespace that stays.
    Namespace(u8),
    /// In a namespace.
    Policy(&'static str, u8),
    ClusterPolicy(u8),
    /// Of a service that stays: its namespace, its servers' role, and the family.
    Steady(&'static str, &'static str, usize),
}

impl Place {
    /// By which objects are shared out.
    fn number(self) -> u8 {
        match self {
            Self::Service(number)
            | Self::Pod(number)
            | Self::Namespace(number)
            | Self::Policy(_, number)
            | Self::ClusterPolicy(number) => number,
            Self::Slice(service, number) => service.wrapping_add(number),
            Self::Steady(_, role, family) => family as u8 + 2 * u8::from(role == "web"),
        }
    }
}

/// How an endpoint stands in a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    NotReady,
    Serving,
    Absent,
}

/// The threads that change objects, each some of them.
pub struct Churning {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<(u32, u32)>>>,
}

impl Churning {
    pub fn start(stage: &Stage, seed: u64, rate: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        // A server answers several at once.
        let parts = if stage.served.is_some() { 4 } else { 1 };
        let threads = (0..parts).map(|part| {
            let (manifests, stopped) = (stage.manifests.clone(), stop.clone());
            let churn = Churn::new(seed, (part, parts));
            thread::spawn(move || churn.run(&manifests, rate / u32::from(parts), &stopped))
        });
        Self {
            threads: threads.collect(),
            stop,
        }
    }

    /// Ends it: how many changes there were, and how many of them had to be made again.
    pub fn finish(self) -> Result<(u32, u32)> {
        self.stop.store(true, Ordering::SeqCst);
        let (mut changes, mut refused) = (0, 0);
        for thread in self.threads {
            let ended = thread
                .join()
                .map_err(|_| anyhow!("a thread that changes objects panicked"))?;
            let of_thread = ended?;
            changes += of_thread.0;
            refused += of_thread.1;
        }
        Ok((changes, refused))
    }
}

enum Change {
    Apply(Value),
    Delete(Value),
}

impl Change {
    fn make(&self, manifests: &Manifests, is_again: bool) -> Result<()> {
        match self {
            Self::Apply(object) => manifests.apply(object),
            Self::Delete(object) => match manifests.delete(object) {
                // The server had done it before its answer was lost.
                Err(error) if is_again && format!("{error:#}").contains("404") => manifests.forget(object),
                result => result,
            },
        }
    }
}

struct Churn {
    rng: Rng,
    there: BTreeMap<Place, Value>,
    /// Which part of the objects it changes, of so many.
    part: (u8, u8),
}

impl Churn {
    fn new(seed: u64, part: (u8, u8)) -> Self {
        Self {
            rng: Rng::with_seed(seed.wrapping_add(u64::from(part.0))),
            there: BTreeMap::new(),
            part,
        }
    }

    /// Makes `rate` changes a second until it is told to stop: how many there were, and how many of them had to be made again.
    fn run(mut self, manifests: &Manifests, rate: u32, stopped: &AtomicBool) -> Result<(u32, u32)> {
        let period = Duration::from_secs(1) / rate.max(1);
        let (mut changes, mut refused) = (0, 0);
        let mut next = Instant::now();
        while !stopped.load(Ordering::SeqCst) {
            let (place, change) = self.next();
            let began = Instant::now();
            let mut tries = 0;
            while let Err(error) = change.make(manifests, tries > 0) {
                if began.elapsed() > TAKEN && format!("{error:#}").contains(ALLOCATED) {
                    self.there.remove(&place);
                    break;
                }
                if began.elapsed() > PATIENCE {
                    return Err(error.context("a change was refused again and again"));
                }
                tries += 1;
                sleep(Duration::from_millis(200));
            }
            changes += 1;
            refused += u32::from(tries > 0);
            // What was missed while the server was away is not made up for.
            let now = Instant::now();
            next = (next + period).max(now.checked_sub(BEHIND).unwrap_or(now));
            sleep(next.saturating_duration_since(now));
        }
        Ok((changes, refused))
    }

    fn next(&mut self) -> (Place, Change) {
        let place = loop {
            let place = self.place();
            if place.number() % self.part.1 == self.part.0 {
                break place;
            }
        };
        let stays = matches!(place, Place::Namespace(_) | Place::Steady(..));
        if !stays
            && self.rng.u8(..10) < 3
            && let Some(object) = self.there.remove(&place)
        {
            return (place, Change::Delete(object));
        }
        let object = self.object(place);
        if !stays {
            self.there.insert(place, object.clone());
        }
        (place, Change::Apply(object))
    }

    fn place(&mut self) -> Place {
        let rng = &mut self.rng;
        match rng.u8(..100) {
            0..20 => Place::Service(rng.u8(..SERVICES)),
            20..45 => Place::Slice(rng.u8(..SERVICES), rng.u8(..4)),
            45..60 => Place::Pod(rng.u8(..PODS)),
            60..63 => Place::Namespace(rng.u8(..CHURN.len() as u8)),
            63..78 => {
                let namespaces = [GUARDED, INSIDERS, CHURN[0]];
                Place::Policy(namespaces[rng.usize(..3)], rng.u8(..POLICIES))
            }
            78..80 => Place::ClusterPolicy(rng.u8(..4)),
            80..90 => Place::Steady(WEB, "web", rng.usize(..2)),
            _ => Place::Steady(GUARDED, "guard", rng.usize(..2)),
        }
    }

    fn object(&mut self, place: Place) -> Value {
        match place {
            Place::Service(number) => self.service(number),
            Place::Slice(service, number) => self.slice(service, number),
            Place::Pod(number) => self.pod(number),
            Place::Namespace(number) => namespace(CHURN[usize::from(number)], self.label()),
            Place::Policy(namespace, number) => self.policy(namespace, number),
            Place::ClusterPolicy(number) => self.cluster_policy(number),
            Place::Steady(namespace, role, family) => {
                let first = self.rng.usize(..NODES.len());
                let mut states = [State::Absent; NODES.len()];
                for (place, state) in states.iter_mut().enumerate() {
                    let all = [State::Ready, State::NotReady, State::Serving, State::Absent];
                    *state = if place == first {
                        State::Ready
                    } else {
                        all[self.rng.usize(..all.len())]
                    };
                }
                steady_slice(namespace, role, family, &states)
            }
        }
    }

    fn label(&mut self) -> &'static str {
        ["red", "green", "blue"][self.rng.usize(..3)]
    }

    fn protocol(&mut self) -> &'static str {
        ["TCP", "UDP"][self.rng.usize(..2)]
    }

    fn service(&mut self, number: u8) -> Value {
        let ips = [
            format!("10.96.8.{number}"),
            format!("fd00:10:96::{:x}", 0x800 + u16::from(number)),
        ];
        let families = [&[0][..], &[1], &[0, 1]][usize::from(number % 3)];
        let ips: Vec<&String> = families.iter().map(|family| &ips[*family]).collect();
        let names: Vec<&str> = families.iter().map(|family| ["IPv4", "IPv6"][*family]).collect();
        let kind = ["ClusterIP", "NodePort", "LoadBalancer"][self.rng.usize(..3)];
        let ports: Vec<Value> = (0..self.rng.u16(1..4))
            .map(|port| {
                let protocol = self.protocol();
                let mut one = json!({
                    "name": format!("p{port}"), "port": 80 + port, "protocol": protocol, "targetPort": PORT + port,
                });
                if kind != "ClusterIP" {
                    one["nodePort"] = json!(31_000 + 4 * u16::from(number) + port);
                }
                one
            })
            .collect();
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": format!("s{number}"), "namespace": CHURN[usize::from(number) % CHURN.len()]},
            "spec": {
                "type": kind, "clusterIP": ips[0], "clusterIPs": ips, "ipFamilies": names,
                "ipFamilyPolicy": if ips.len() == 2 { "RequireDualStack" } else { "SingleStack" },
                "sessionAffinity": (["None", "ClientIP"][self.rng.usize(..2)]), "ports": ports,
            },
        });
        if kind != "ClusterIP" {
            service["spec"]["externalTrafficPolicy"] = json!(["Cluster", "Local"][self.rng.usize(..2)]);
        }
        if self.rng.bool() {
            service["spec"]["internalTrafficPolicy"] = json!(["Cluster", "Local"][self.rng.usize(..2)]);
        }
        if kind == "LoadBalancer" {
            service["status"] = json!({"loadBalancer": {"ingress": [{"ip": format!("198.51.100.{number}"), "ipMode": "VIP"}]}});
            if self.rng.bool() {
                service["spec"]["loadBalancerSourceRanges"] =
                    json!([format!("198.18.{}.0/24", self.rng.u8(..)), "2001:db8::/32"]);
            }
        }
        service
    }

    fn slice(&mut self, service: u8, number: u8) -> Value {
        let family = usize::from(number % 2);
        let endpoints: Vec<Value> = (0..self.rng.u8(..8))
            .map(|_| {
                let node = NODES[self.rng.usize(..NODES.len())];
                let ip = stage::addresses(node, 100 + self.rng.u8(..PODS))[family];
                let (ready, leaving) = (self.rng.bool(), self.rng.u8(..5) == 0);
                json!({
                    "addresses": [ip], "nodeName": stage::node(node),
                    "conditions": {"ready": ready && !leaving, "serving": ready, "terminating": leaving},
                })
            })
            .collect();
        let ports: Vec<Value> = (0..self.rng.u16(1..4))
            .map(|port| json!({"name": format!("p{port}"), "port": PORT + port, "protocol": self.protocol()}))
            .collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("s{service}-{number}"), "namespace": CHURN[usize::from(service) % CHURN.len()],
                "labels": {"kubernetes.io/service-name": format!("s{service}")},
            },
            "addressType": (["IPv4", "IPv6"][family]), "endpoints": endpoints, "ports": ports,
        })
    }

    /// One that no interface on its node belongs to.
    fn pod(&mut self, number: u8) -> Value {
        let node = NODES[usize::from(number) % NODES.len()];
        let ips = stage::addresses(node, 100 + number);
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {
                "name": format!("p{number}"), "namespace": CHURN[usize::from(number / 3) % CHURN.len()],
                "uid": format!("uid-p{number}"), "labels": {"color": self.label()},
            },
            "spec": {
                "nodeName": stage::node(node),
                "containers": [{"name": "main", "image": "none", "ports": [{"name": "web", "containerPort": PORT}]}],
            },
            "status": {
                "phase": "Running", "podIP": ips[0], "podIPs": ips.map(|ip| json!({"ip": ip})),
                "conditions": [{"type": "Ready", "status": if self.rng.bool() { "True" } else { "False" }}],
            },
        })
    }

    /// Peers among what comes and goes.
    fn peers(&mut self) -> Vec<Value> {
        let count = self.rng.u8(1..4);
        (0..count)
            .map(|_| match self.rng.u8(..4) {
                0 => json!({"ipBlock": {
                    "cidr": format!("198.18.{}.0/24", self.rng.u8(..)),
                    "except": [],
                }}),
                1 => json!({"ipBlock": {"cidr": "198.19.0.0/16", "except": [format!("198.19.{}.0/24", self.rng.u8(..))]}}),
                2 => json!({"namespaceSelector": {"matchLabels": {"color": self.label()}}}),
                _ => json!({
                    "namespaceSelector": {"matchExpressions": [{"key": "color", "operator": "Exists"}]},
                    "podSelector": {"matchExpressions": [{"key": "color", "operator": "NotIn", "values": [self.label()]}]},
                }),
            })
            .collect()
    }

    fn policy_ports(&mut self) -> Vec<Value> {
        let count = self.rng.u8(..3);
        (0..count)
            .map(|_| match self.rng.u8(..3) {
                0 => json!({"protocol": self.protocol(), "port": "web"}),
                1 => {
                    let first = self.rng.u16(1..60_000);
                    json!({"protocol": self.protocol(), "port": first, "endPort": first + self.rng.u16(..2_000)})
                }
                _ => json!({"protocol": self.protocol(), "port": self.rng.u16(1..)}),
            })
            .collect()
    }

    fn policy(&mut self, namespace: &str, number: u8) -> Value {
        let is_egress = namespace != GUARDED;
        let rules: Vec<Value> = (0..self.rng.u8(1..4))
            .map(|_| json!({if is_egress { "to" } else { "from" }: self.peers(), "ports": self.policy_ports()}))
            .collect();
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": format!("n{number}"), "namespace": namespace},
            "spec": {
                "podSelector": {}, "policyTypes": [if is_egress { "Egress" } else { "Ingress" }],
                if is_egress { "egress" } else { "ingress" }: rules,
            },
        })
    }

    /// About pods that come and go, and in the guarded namespace about datagrams that nobody sends.
    fn cluster_policy(&mut self, number: u8) -> Value {
        let action = ["Allow", "Deny", "Pass"][self.rng.usize(..3)];
        let subject = if self.rng.bool() { GUARDED } else { CHURN[0] };
        json!({
            "apiVersion": "policy.networking.k8s.io/v1alpha1", "kind": "AdminNetworkPolicy",
            "metadata": {"name": format!("a{number}")},
            "spec": {
                "priority": number,
                "subject": {"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": subject}}},
                "ingress": [{
                    "name": "one", "action": action,
                    "from": [{"namespaces": {"matchLabels": {"color": self.label()}}}],
                    "ports": [{"portNumber": {"protocol": self.protocol(), "port": self.rng.u16(1..)}}],
                }],
            },
        })
    }
}

/// A namespace with its color; that of the steady ones is `none`, which no policy names.
pub fn namespace(name: &str, color: &str) -> Value {
    let mut labels = json!({"kubernetes.io/metadata.name": name});
    if CHURN.contains(&name) {
        labels["color"] = json!(color);
    }
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// The slice of a steady service, with a state for the server of each node.
pub fn steady_slice(namespace: &str, role: &str, family: usize, states: &[State]) -> Value {
    let endpoints: Vec<Value> = NODES
        .into_iter()
        .zip(states)
        .filter(|(_, state)| **state != State::Absent)
        .map(|(number, state)| {
            json!({
                "addresses": [stage::pod_addresses(role, number)[family]], "nodeName": stage::node(number),
                "conditions": {
                    "ready": *state == State::Ready, "serving": *state != State::NotReady,
                    "terminating": *state == State::Serving,
                },
            })
        })
        .collect();
    let mut ports = vec![json!({"name": "http", "port": PORT, "protocol": "TCP"})];
    if namespace == GUARDED {
        ports.push(json!({"name": "dns", "port": UDP_PORT, "protocol": "UDP"}));
    }
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{role}-{family}"), "namespace": namespace,
            "labels": {"kubernetes.io/service-name": role},
        },
        "addressType": (["IPv4", "IPv6"][family]), "endpoints": endpoints, "ports": ports,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(seed: u64) -> Vec<Value> {
        let mut churn = Churn::new(seed, (0, 1));
        let plain = |(_, change)| match change {
            Change::Apply(object) | Change::Delete(object) => object,
        };
        (0..2_000).map(|_| plain(churn.next())).collect()
    }

    #[test]
    fn a_seed_says_what_happens() {
        assert_eq!(changes(7), changes(7));
        assert_ne!(changes(7), changes(8));
    }

    #[test]
    fn a_steady_service_always_has_an_endpoint() {
        let steady = |object: &&Value| object["metadata"]["namespace"] == WEB;
        for slice in changes(3).iter().filter(steady) {
            let endpoints = slice["endpoints"].as_array().unwrap();
            assert!(
                endpoints
                    .iter()
                    .any(|endpoint| endpoint["conditions"]["ready"] == true),
                "{slice}"
            );
        }
    }

    #[test]
    fn nobody_speaks_of_outsiders() {
        for object in changes(5) {
            assert!(!object.to_string().contains(stage::OUTSIDERS), "{object}");
        }
    }
}
