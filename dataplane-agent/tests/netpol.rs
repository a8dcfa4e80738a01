//! Policy scenarios against the host build: the files' objects through decode and compile, and each cell of their tables
//! judged as the datapath does. `DATAPLANE_NETPOL_SCENARIOS` names another file or folder than tests/scenarios/netpol.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use dataplane_agent::{
    compile::policy::{
        PolicyCompiler, Subjects,
        tables::{Tables, judge},
    },
    decode::{Decoded, decode},
    model::{Dirty, Index, Name, policy::Direction},
};
use serde_json::{Value, json};

#[test]
fn policy_scenarios_hold_on_the_host() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scenarios/netpol");
    let place = std::env::var_os("DATAPLANE_NETPOL_SCENARIOS").map_or(own, PathBuf::from);
    let mut files = Vec::new();
    collect(&place, &mut files);
    files.sort();
    let (mut passed, mut failed, mut cells) = (0, 0, 0);
    for file in &files {
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let scenario: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        if scenario["schema"] != "scenario-netpol/1" {
            continue;
        }
        let outcome = run(&scenario);
        cells += outcome.cells;
        if outcome.wrong.is_empty() {
            passed += 1;
            continue;
        }
        failed += 1;
        println!(
            "{} failed, {}",
            scenario["id"].as_str().unwrap_or("?"),
            file.display()
        );
        for wrong in outcome.wrong.iter().take(10) {
            println!("    {wrong}");
        }
    }
    println!("{cells} cells; {passed} passed, {failed} failed");
    assert!(failed == 0 && passed > 0, "{passed} passed, {failed} failed");
}

fn collect(place: &Path, files: &mut Vec<PathBuf>) {
    if !place.is_dir() {
        assert!(place.is_file(), "there is no {}", place.display());
        files.push(place.to_owned());
        return;
    }
    for entry in fs::read_dir(place).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() || path.extension().is_some_and(|extension| extension == "json") {
            collect(&path, files);
        }
    }
}

#[derive(Default)]
struct Outcome {
    cells: usize,
    wrong: Vec<String>,
}

struct Cluster {
    index: Index,
    compiler: PolicyCompiler,
    /// The Pods as manifests, by namespace/name.
    pods: BTreeMap<String, Value>,
    /// Ends that are no Pods, by id.
    others: BTreeMap<String, IpAddr>,
    is_ipv6: bool,
    problems: Vec<String>,
}

fn run(scenario: &Value) -> Outcome {
    let pods = list(&scenario["pods"]).chain(
        list(&scenario["steps"])
            .flat_map(|step| list(&step["actions"]))
            .map(|action| &action["pod"])
            .filter(|pod| !pod.is_null()),
    );
    let names: BTreeSet<Name> = pods
        .map(|pod| Name::new(text(&pod["ns"]), text(&pod["name"])))
        .collect();
    let mut cluster = Cluster {
        index: Index::new(""),
        compiler: PolicyCompiler::new(Subjects::These(names)),
        pods: BTreeMap::new(),
        others: BTreeMap::new(),
        is_ipv6: scenario["family"] == "IPv6",
        problems: Vec::new(),
    };
    cluster.begin(scenario);
    let mut outcome = Outcome::default();
    for (i, step) in list(&scenario["steps"]).enumerate() {
        for action in list(&step["actions"]) {
            cluster.act(action);
        }
        cluster.compiler.drop_unused();
        cluster.compare(i + 1, &step["expected"], &mut outcome);
    }
    outcome.wrong.append(&mut cluster.problems);
    outcome
}

impl Cluster {
    fn begin(&mut self, scenario: &Value) {
        for namespace in list(&scenario["namespaces"]) {
            self.apply(&json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": namespace["name"], "labels": namespace["labels"]},
            }));
        }
        for (i, host) in list(&scenario["hosts"]).enumerate() {
            let addresses = list_of(
                ["ip", "ip6"]
                    .iter()
                    .filter_map(|field| host[field].as_str())
                    .map(|ip| json!({"type": "InternalIP", "address": ip})),
            );
            self.apply(&json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": format!("host-{i}"), "labels": host["nodelabels"]}, "status": {"addresses": addresses},
            }));
            let mut pod = manifest(host);
            pod["metadata"]["name"] = format!("host-{i}").into();
            pod["spec"]["hostNetwork"] = true.into();
            self.apply(&pod);
            self.other(host);
        }
        list(&scenario["externals"]).for_each(|external| self.other(external));
        for pod in list(&scenario["pods"]) {
            self.pod(manifest(pod));
        }
    }

    fn other(&mut self, other: &Value) {
        let field = if self.is_ipv6 { "ip6" } else { "ip" };
        if let Some(addr) = other[field].as_str().and_then(|addr| addr.parse().ok()) {
            self.others.insert(text(&other["id"]).to_owned(), addr);
        }
    }

    fn pod(&mut self, pod: Value) {
        self.apply(&pod);
        self.pods.insert(id(&pod["metadata"]), pod);
    }

    fn act(&mut self, action: &Value) {
        match text(&action["verb"]) {
            "create" | "update" => self.apply(&action["object"]),
            "delete" => self.delete(&action["object"]),
            "createPod" => self.pod(manifest(&action["pod"])),
            "deletePod" => {
                let pod = manifest(&action["pod"]);
                self.pods.remove(&id(&pod["metadata"]));
                self.delete(&pod);
            }
            "updateLabels" => {
                let metadata = &action["object"]["metadata"];
                let mut pod = self.pods[&id(metadata)].clone();
                pod["metadata"]["labels"] = metadata["labels"].clone();
                self.pod(pod);
            }
            other => panic!("unknown verb {other}"),
        }
    }

    fn apply(&mut self, object: &Value) {
        match decode(object) {
            Decoded::Object {
                object,
                problems,
                key,
            } => {
                self.problems
                    .extend(problems.iter().map(|problem| format!("{key}: {problem:?}")));
                let dirty = self.index.apply(object);
                self.update(&dirty);
            }
            other => self.problems.push(format!("{other:?}")),
        }
    }

    fn delete(&mut self, object: &Value) {
        // Some files say only which policy is deleted.
        if let Decoded::Object { key, .. } | Decoded::Failed { key: Some(key), .. } = decode(object) {
            let dirty = self.index.delete(&key);
            self.update(&dirty);
        }
    }

    fn update(&mut self, dirty: &Dirty) {
        self.compiler.update(&self.index, &dirty.policy);
    }

    fn addr(&self, id: &str) -> Option<IpAddr> {
        let Some(pod) = self.pods.get(id) else {
            return self.others.get(id).copied();
        };
        let ips = list(&pod["status"]["podIPs"]).filter_map(|ip| ip["ip"].as_str()?.parse::<IpAddr>().ok());
        let mut ips = ips;
        ips.find(|ip| ip.is_ipv6() == self.is_ipv6)
    }

    /// Egress of the source and ingress of the destination, where they are Pods.
    fn is_allowed(&self, tables: &Tables, from: &str, to: &str, proto: u8, port: u16) -> bool {
        let (Some(from_addr), Some(to_addr)) = (self.addr(from), self.addr(to)) else {
            panic!("{from} or {to} has no address");
        };
        let judged = |direction, id: &str, peer| {
            let Some((namespace, name)) = id.split_once('/').filter(|_| self.pods.contains_key(id)) else {
                return true;
            };
            let set = self.compiler.set_of(&Name::new(namespace, name), direction);
            judge(tables, set, peer, proto, port).is_allowed()
        };
        judged(Direction::Egress, from, to_addr) && judged(Direction::Ingress, to, from_addr)
    }

    fn compare(&self, step: usize, expected: &Value, outcome: &mut Outcome) {
        let tables = Tables::of(&self.compiler);
        let ids: Vec<&str> = list(&expected["ids"]).map(text).collect();
        for (key, rows) in expected["table"].as_object().into_iter().flatten() {
            let (proto, port) = key.split_once('/').unwrap();
            let number = match proto {
                "TCP" => 6,
                "UDP" => 17,
                "SCTP" => 132,
                other => panic!("unknown protocol {other}"),
            };
            let port = port.parse().unwrap();
            for (from, row) in ids.iter().zip(list(rows)) {
                for (to, cell) in ids.iter().zip(text(row).chars()) {
                    let wanted = match cell {
                        '.' => true,
                        'X' => false,
                        _ => continue,
                    };
                    outcome.cells += 1;
                    if self.is_allowed(&tables, from, to, number, port) != wanted {
                        let wanted = if wanted { "connect" } else { "not connect" };
                        outcome
                            .wrong
                            .push(format!("step {step}: {from} -> {to} {key} must {wanted}"));
                    }
                }
            }
        }
    }
}

/// A pod of a file as a manifest.
fn manifest(pod: &Value) -> Value {
    let ips = list_of(
        ["ip", "ip6"]
            .iter()
            .filter_map(|field| pod[field].as_str())
            .map(|ip| json!({"ip": ip})),
    );
    let ports =
        list_of(list(&pod["ports"]).map(
            |port| json!({"containerPort": port["port"], "protocol": port["proto"], "name": port["name"]}),
        ));
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod["name"], "namespace": pod["ns"], "labels": pod["labels"]},
        "spec": {"containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": "Running", "podIPs": ips},
    })
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn list_of(values: impl Iterator<Item = Value>) -> Vec<Value> {
    values.collect()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

fn id(metadata: &Value) -> String {
    format!("{}/{}", text(&metadata["namespace"]), text(&metadata["name"]))
}
