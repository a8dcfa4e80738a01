//! Policy scenarios against the host build: the files' objects through decode and compile, and each cell of their tables
//! judged as the datapath does. `DATAPLANE_NETPOL_SCENARIOS` names another file or folder than tests/scenarios/netpol.

use std::{
    collections::BTreeSet,
    fs,
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
use dataplane_tests::{
    scenario::netpol::{
        file::{Case, Expected, SCHEMA},
        layout::Layout,
        objects::{Change, Objects},
    },
    worker::protocol::Proto,
};
use serde_json::Value;

#[test]
fn policy_scenarios_hold_on_the_host() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/scenarios/netpol");
    let place = std::env::var_os("DATAPLANE_NETPOL_SCENARIOS").map_or(own, PathBuf::from);
    let mut files = Vec::new();
    collect(&place, &mut files);
    files.sort();
    let (mut passed, mut failed, mut cells) = (0, 0, 0);
    for file in &files {
        let text = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let head: Value =
            serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        if head["schema"] != SCHEMA {
            continue;
        }
        let case = Case::parse(&text).unwrap_or_else(|error| panic!("{}: {error:#}", file.display()));
        let outcome = run(&case);
        cells += outcome.cells;
        if outcome.wrong.is_empty() {
            passed += 1;
            continue;
        }
        failed += 1;
        println!("{} failed, {}", case.id, file.display());
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

struct Cluster<'a> {
    index: Index,
    compiler: PolicyCompiler,
    case: &'a Case,
    objects: Objects<'a>,
    problems: Vec<String>,
}

fn run(case: &Case) -> Outcome {
    let names: BTreeSet<Name> = case.all_pods().map(|pod| Name::new(&pod.ns, &pod.name)).collect();
    let layout = Layout::of(case).unwrap();
    let (objects, before) = Objects::begin(case, &layout).unwrap();
    let mut cluster = Cluster {
        index: Index::new(""),
        compiler: PolicyCompiler::new(Subjects::These(names)),
        case,
        objects,
        problems: Vec::new(),
    };
    for object in &before {
        cluster.apply(object);
    }
    let mut outcome = Outcome::default();
    for (i, step) in case.steps.iter().enumerate() {
        for action in &step.actions {
            match cluster.objects.act(action).unwrap() {
                Change::Apply(object) => cluster.apply(&object),
                Change::Delete(object) => cluster.delete(&object),
            }
        }
        cluster.compiler.drop_unused();
        cluster.compare(i + 1, &step.expected, &mut outcome);
    }
    outcome.wrong.append(&mut cluster.problems);
    outcome
}

impl Cluster<'_> {
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

    /// Egress of the source and ingress of the destination, where they are Pods.
    fn is_allowed(&self, tables: &Tables, from: &str, to: &str, proto: u8, port: u16) -> bool {
        let judged = |direction, id: &str, peer| {
            let Some(pod) = self.objects.pods().get(id) else {
                return true;
            };
            let set = self.compiler.set_of(&Name::new(&pod.ns, &pod.name), direction);
            judge(tables, set, peer, proto, port).is_allowed()
        };
        let addr = |id| self.objects.address(self.case, id).unwrap();
        judged(Direction::Egress, from, addr(to)) && judged(Direction::Ingress, to, addr(from))
    }

    fn compare(&self, step: usize, expected: &Expected, outcome: &mut Outcome) {
        let tables = Tables::of(&self.compiler);
        for cell in expected.cells().unwrap() {
            let number = match cell.proto {
                Proto::Tcp => 6,
                Proto::Udp => 17,
                Proto::Sctp => 132,
            };
            outcome.cells += 1;
            if self.is_allowed(&tables, cell.from, cell.to, number, cell.port) != cell.connects {
                let wanted = if cell.connects { "connect" } else { "not connect" };
                outcome.wrong.push(format!(
                    "step {step}: {} -> {} {:?}/{} must {wanted}",
                    cell.from, cell.to, cell.proto, cell.port
                ));
            }
        }
    }
}
