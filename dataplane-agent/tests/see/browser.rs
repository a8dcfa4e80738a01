//! The page of `ui` in a browser without a window, where there is one.

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
};

use dataplane_agent::load::PodLoad;
use serde_json::{Value, json};

use crate::{
    fake::Agent,
    front::{Canned, Front},
    ui::Ui,
};

/// A name that would be a part of the page if it were not text.
const HOSTILE: &str = "shop/<img src=x onerror=alert(1)>";

/// A chromium, `CHROMIUM` first; says so if there is none.
fn chromium() -> Option<PathBuf> {
    let named = env::var_os("CHROMIUM").map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let found = named.or_else(|| {
        env::split_paths(&path)
            .flat_map(|folder| {
                ["chromium", "chromium-browser", "google-chrome"].map(|name| folder.join(name))
            })
            .find(|program| program.is_file())
    });
    if found.is_none() {
        println!("skipped: needs a chromium in PATH or named by CHROMIUM (Debian's package chromium)");
    }
    found
}

/// Loads a page, lets five seconds pass, and gives what the browser printed.
fn load(program: &Path, profile: &Path, url: &str, arguments: &[String]) -> String {
    let output = Command::new(program)
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
            "--window-size=1280,800",
            "--virtual-time-budget=5000",
        ])
        .arg(format!("--user-data-dir={}", profile.display()))
        .args(arguments)
        .arg(url)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn the_page_shows_services_denials_and_rules_and_asks_nobody_else() {
    let Some(program) = chromium() else { return };
    let agent = Agent::with(vec![PodLoad {
        pod: HOSTILE.to_owned(),
        here: true,
        ..PodLoad::default()
    }]);
    let ui = Ui::start(&agent.socket());
    let flows = flows(Some("svc/shop/web"), Some("shop/web-0"), Some(HOSTILE));
    let flows = Canned::agent(&flows);
    let front = Front::start(&ui.at, move |path| (path == "/api/flows").then(|| flows.clone()));
    let profile = tempfile::tempdir().unwrap();
    let log = profile.path().join("net.json");
    let page = format!("http://{}/#shop/db-0", front.at);
    let arguments = [
        "--dump-dom".to_owned(),
        format!("--log-net-log={}", log.display()),
    ];
    let dom = load(&program, profile.path(), &page, &arguments);

    for expected in [
        // The map, with rates: it has seen two answers.
        ">shop/web</text>",
        ">kube-system/kube-dns</text>",
        "210 conn/s",
        ">shop/db-1</text>",
        // A denial is an edge of its own.
        "class=\"edge drop\"",
        "data-from=\"shop/batch-0\" data-to=\"shop/db-0\"",
        "data-from=\"203.0.113.9\"",
        // The rules of the Pod that the address names.
        "<td>pods with app=web in shop</td>",
        "<td class=\"number\">1874</td>",
        "none isolates it",
        // What is wrong.
        "ObjectsUsable does not hold",
        "spec.ports[0].protocol: SCTP is not served",
        // The flow, and how many there are.
        "<td>shop/web-0 (10.244.1.11:41000)</td><td>svc/shop/web (10.96.0.9:80)</td>",
        "<td>established</td><td class=\"number\">3 s</td>",
        "1 of 7",
    ] {
        assert!(dom.contains(expected), "{expected}:\n{dom}");
    }
    assert!(!dom.contains(ALONE), "{dom}");
    assert!(!dom.contains("<img"), "{dom}");
    let hostile = HOSTILE.replace('<', "&lt;").replace('>', "&gt;");
    let of_flow = format!("<td>{hostile} (10.244.2.11:8080)</td>");
    assert!(dom.contains(&of_flow), "{dom}");

    let ours = format!("http://{}/", front.at);
    let asked = asked_by_the_page(&log, &ours);
    assert!(asked.contains(&format!("{ours}api/load")), "{asked:?}");
    for url in &asked {
        assert!(url.starts_with(&ours), "{asked:?}");
    }

    agent.stop();
    let dom = load(&program, profile.path(), &page, &["--dump-dom".to_owned()]);
    assert!(
        dom.contains("What stands here is old: failed to reach an agent at"),
        "{dom}"
    );
}

/// What the page says where the tables answer.
const ALONE: &str = "No agent answers: failed to reach an agent at /nowhere: no such file; this is what the pinned tables say, without names";

/// One flow of seven.
fn flows(service: Option<&str>, from_pod: Option<&str>, endpoint_pod: Option<&str>) -> Value {
    json!({"found": 7, "flows": [{
        "protocol": "TCP", "from": "10.244.1.11:41000", "from_pod": from_pod, "to": "10.96.0.9:80", "service": service,
        "endpoint": "10.244.2.11:8080", "endpoint_pod": endpoint_pod, "seen_as": null, "state": "established", "idle_seconds": 3,
    }]})
}

/// What `ui` answers without an agent, in a cluster of one Service and one Pod.
fn of_tables(path: &str) -> Option<Canned> {
    let rule = json!({
        "direction": "ingress", "rule": 0, "action": "allow", "peers": "10.244.0.0/16", "ports": "5432/TCP", "verdicts": 12, "dry_run": 0,
    });
    let traffic = json!({"connections": 5, "refused": 0, "packets_in": 9, "bytes_in": 900, "packets_out": 9, "bytes_out": 900, "dropped": 0});
    let with_traffic = |mut value: Value| {
        let fields = traffic.as_object().unwrap().clone();
        value.as_object_mut().unwrap().extend(fields);
        value
    };
    let direction = json!({"isolated": true, "rules": 1, "verdicts": 12, "dry_run": 0});
    let value = match path {
        "/api/load" => json!({
            "at": jiff::Timestamp::now(), "drops": {},
            "services": [with_traffic(json!({
                "object": "10.96.0.9:5432/TCP",
                "endpoints": [with_traffic(json!({"at": "10.244.1.21:5432", "state": "active"}))],
            }))],
            "pods": [with_traffic(json!({"pod": "veth7", "here": true, "drops": 0}))],
        }),
        "/api/services" => json!({"objects": [], "problems": [], "conditions": []}),
        "/api/flows" => flows(None, None, None),
        "/api/policies" => json!({"pods": [{
            "device": "veth7", "ifindex": 7, "addresses": ["10.244.1.21", "fd00:10:244:1::15"], "source_checked": true,
            "ingress": direction, "egress": direction,
        }]}),
        "/api/policies?pod=10.244.1.21" => json!({
            "pod": "10.244.1.21", "problems": [], "egress": {"isolated": false, "policies": []},
            "ingress": {"isolated": true, "policies": [
                {"policy": "policy number 77", "tier": "NetworkPolicy", "dry_run": false, "pods": 1, "rules": [rule]},
            ]},
        }),
        "/api/verdicts?after=0" => json!([{
            "number": 1, "time": jiff::Timestamp::now(), "verdict": "Denied", "reason": "policy-denied", "direction": "ingress",
            "from": "10.244.1.31", "to": "10.244.1.21", "port": "22/TCP", "policy": null, "rule": null, "action": null, "untold": 0,
        }]),
        path if path.starts_with("/api/verdicts?") => json!([]),
        _ => return None,
    };
    Some(Canned::tables(
        &value,
        "failed to reach an agent at /nowhere: no such file",
    ))
}

#[test]
fn without_an_agent_the_page_shows_addresses_and_says_so() {
    let Some(program) = chromium() else { return };
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let front = Front::start(&ui.at, of_tables);
    let profile = tempfile::tempdir().unwrap();
    // The Pod that the address names has no name here.
    let page = format!("http://{}/#shop/db-0", front.at);
    let dom = load(&program, profile.path(), &page, &["--dump-dom".to_owned()]);
    for expected in [
        ALONE,
        ">10.96.0.9:5432/TCP</text>",
        ">10.244.1.21</text>",
        "0 conn/s, 0B/s",
        "data-from=\"10.244.1.31\" data-to=\"10.244.1.21\"",
        "10.244.1.21, fd00:10:244:1::15 at veth7</option>",
        "<td>policy number 77</td>",
        "<td>5432/TCP</td><td class=\"number\">12</td>",
        "<td>10.244.1.11:41000</td><td>10.96.0.9:80</td><td>10.244.2.11:8080</td>",
    ] {
        assert!(dom.contains(expected), "{expected}:\n{dom}");
    }
    for named in ["shop/", "What stands here is old"] {
        assert!(!dom.contains(named), "{named}:\n{dom}");
    }
}

#[test]
fn names_are_back_with_the_agent() {
    let Some(program) = chromium() else { return };
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let met = Mutex::new(BTreeSet::new());
    // Each is asked of the tables once.
    let front = Front::start(&ui.at, move |path| {
        let what = path.split('?').next().unwrap_or_default().to_owned();
        met.lock()
            .unwrap()
            .insert(what)
            .then(|| of_tables(path))
            .flatten()
    });
    let profile = tempfile::tempdir().unwrap();
    let page = format!("http://{}/#shop/db-0", front.at);
    let dom = load(&program, profile.path(), &page, &["--dump-dom".to_owned()]);
    for expected in [
        ">shop/web</text>",
        "210 conn/s",
        "data-from=\"shop/batch-0\" data-to=\"shop/db-0\"",
        "<td>pods with app=web in shop</td>",
        "ObjectsUsable does not hold",
    ] {
        assert!(dom.contains(expected), "{expected}:\n{dom}");
    }
    for of_tables in ["No agent answers", "10.244.1.31\"", "veth7", "policy number 77"] {
        assert!(!dom.contains(of_tables), "{of_tables}:\n{dom}");
    }
}

/// Addresses that the browser's log of the network has, as far as a page of ours has asked for them.
fn asked_by_the_page(log: &Path, ours: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(log).unwrap();
    let log: Value = serde_json::from_str(&text).unwrap();
    let events = log["events"].as_array().unwrap();
    events
        .iter()
        .filter_map(|event| {
            let initiator = event["params"]["initiator"].as_str()?;
            let url = event["params"]["url"].as_str()?;
            initiator
                .starts_with(ours.trim_end_matches('/'))
                .then(|| url.to_owned())
        })
        .collect()
}

#[test]
#[ignore = "writes docs/images/ui.png: cargo xtask screenshots"]
fn picture() {
    let Some(program) = chromium() else {
        panic!("a picture of the page needs a chromium");
    };
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let profile = tempfile::tempdir().unwrap();
    let to = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/images/ui.png");
    load(
        &program,
        profile.path(),
        &format!("http://{}/#shop/db-0", ui.at),
        &[format!("--screenshot={to}")],
    );
}
