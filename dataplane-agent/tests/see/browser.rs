//! The page of `ui` in a browser without a window, where there is one.

use std::{
    collections::BTreeSet,
    env,
    path::{Path, PathBuf},
    process::Command,
};

use dataplane_agent::load::PodLoad;
use serde_json::Value;

use crate::{fake::Agent, ui::Ui};

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
        println!("SKIPPED: needs a chromium in PATH or named by CHROMIUM (Debian's package chromium)");
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
    let profile = tempfile::tempdir().unwrap();
    let log = profile.path().join("net.json");
    let page = format!("http://{}/#shop/db-0", ui.at);
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
    ] {
        assert!(dom.contains(expected), "{expected}:\n{dom}");
    }
    assert!(!dom.contains("<img"), "{dom}");
    let hostile = HOSTILE.replace('<', "&lt;").replace('>', "&gt;");
    assert!(dom.contains(&hostile), "{dom}");

    let ours = format!("http://{}/", ui.at);
    let asked = asked_by_the_page(&log, &ours);
    assert!(asked.contains(&format!("{ours}api/load")), "{asked:?}");
    for url in &asked {
        assert!(url.starts_with(&ours), "{asked:?}");
    }

    agent.stop();
    let dom = load(&program, profile.path(), &page, &["--dump-dom".to_owned()]);
    assert!(dom.contains("The agent does not answer"), "{dom}");
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
