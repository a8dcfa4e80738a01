//! The page of `ui`: what an agent tells it, and what it finds in the pinned tables while there is none.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use dataplane_tests::agent::{self, patient};
use dataplane_tests::netns::NetNs;
use serde_json::{Value, json};

use crate::stage::{Mode, PORT, Stage};

const NODE: &str = "node1";
const CONNECTIONS: u32 = 20;
const CLIENT: &str = "10.244.1.10";
/// The endpoints of the Service; the first is a Pod of the node.
const BACKENDS: [&str; 2] = ["10.244.1.21:8080", "10.244.2.22:8080"];
/// A port that no policy lets anybody ask for.
const DENIED: &str = "10.244.1.21:9";
/// A new agent takes what has waited for it.
const TAKEN: Duration = Duration::from_secs(20);

#[test]
fn the_page_answers_without_an_agent_too() -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let mode = Mode::without_sockets("tc");
    let mut stage = Stage::set("page", mode, &[("be1", 1), ("be2", 2)], &["be1", "be2"], agent)?;
    stage.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "web", "namespace": "ns1"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": PORT, "protocol": "TCP"}]}]},
    }))?;
    stage.settle()?;
    stage.open("client1", "all", "10.96.0.41:80", CONNECTIONS)?;
    stage.exchange("client1", "all")?;

    let page = Page::serve(&stage)?;
    named(&page)?;
    stage.agents.kill_all();
    stage.begin("client1", "denied", DENIED)?;
    services_by_address(&page)?;
    policies_by_address(&page)?;

    stage.agents.start_all()?;
    stage.settle()?;
    named(&page)?;
    let end = Instant::now() + patient(TAKEN);
    loop {
        let told = page.by_agent("verdicts?after=0")?;
        if has_denied(&told, "ns1/client1 (10.244.1.10)", "ns1/be1 (10.244.1.21)") {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{told}");
        sleep(Duration::from_millis(100));
    }
}

/// With an agent there are names.
fn named(page: &Page) -> Result<()> {
    let load = page.by_agent("load")?;
    ensure!(
        any(&load["services"], |one| one["object"] == "Service ns1/svc1"),
        "{load}"
    );
    let services = page.by_agent("services")?;
    ensure!(
        any(&services["objects"], |one| one["object"] == "Service ns1/svc1"),
        "{services}"
    );
    let flows = page.by_agent("flows")?;
    ensure!(
        any(&flows["flows"], |one| one["from_pod"] == "ns1/client1"
            && one["service"] == "svc/ns1/svc1"),
        "{flows}"
    );
    let policies = page.by_agent("policies")?;
    ensure!(
        any(&policies["policies"], |one| one["policy"]
            == "NetworkPolicy ns1/web"),
        "{policies}"
    );
    for pod in ["ns1/be1", "10.244.1.21"] {
        let of_pod = page.by_agent(&format!("policies?pod={pod}"))?;
        ensure!(
            of_pod["pod"] == "ns1/be1" && of_pod["ingress"]["isolated"] == true,
            "{of_pod}"
        );
    }
    Ok(())
}

fn services_by_address(page: &Page) -> Result<()> {
    let load = page.by_tables("load")?;
    let services = load["services"].as_array().into_iter().flatten();
    let mut services = services.filter(|one| one["object"] == "10.96.0.41:80/TCP");
    let service = services.next().with_context(|| format!("no Service in {load}"))?;
    ensure!(service["connections"] == CONNECTIONS, "{service}");
    for backend in BACKENDS {
        ensure!(
            any(&service["endpoints"], |one| one["at"] == backend),
            "{service}"
        );
    }

    let services = page.by_tables("services")?;
    let frontends = &services["objects"][0]["frontends"];
    let of_service = |one: &Value| {
        one["at"] == "10.96.0.41:80/TCP"
            && BACKENDS
                .iter()
                .all(|at| any(&one["backends"], |one| one["at"] == *at))
    };
    ensure!(any(frontends, of_service), "{services}");
    ensure!(
        services["problems"] == json!([]) && services["conditions"] == json!([]),
        "{services}"
    );

    let flows = page.by_tables("flows")?;
    let of_client = |one: &&Value| {
        one["from"].as_str().is_some_and(|from| from.starts_with(CLIENT))
            && one["to"] == "10.96.0.41:80"
            && BACKENDS.iter().any(|at| one["endpoint"] == *at)
            && one["from_pod"].is_null()
            && one["service"].is_null()
    };
    let all = flows["flows"].as_array().into_iter().flatten();
    ensure!(all.filter(of_client).count() == CONNECTIONS as usize, "{flows}");
    ensure!(flows["found"].as_u64() >= Some(CONNECTIONS.into()), "{flows}");
    Ok(())
}

fn policies_by_address(page: &Page) -> Result<()> {
    let told = page.by_tables("verdicts?after=0")?;
    ensure!(has_denied(&told, CLIENT, "10.244.1.21"), "{told}");
    let last = told.as_array().and_then(|told| told.last()?["number"].as_u64());
    let more = page.by_tables(&format!("verdicts?after={}", last.context("no number")?))?;
    ensure!(more == json!([]), "{more}");

    let policies = page.by_tables("policies")?;
    let of_backend = |one: &Value| {
        any(&one["addresses"], |addr| addr == "10.244.1.21") && one["ingress"]["isolated"] == true
    };
    ensure!(any(&policies["pods"], of_backend), "{policies}");
    let of_pod = page.by_tables("policies?pod=10.244.1.21")?;
    let has_rule = |policy: &Value| {
        let is_number = |name: &str| name.starts_with("policy number ");
        policy["policy"].as_str().is_some_and(is_number)
            && any(&policy["rules"], |rule| rule["ports"] == "8080/TCP")
    };
    ensure!(any(&of_pod["ingress"]["policies"], has_rule), "{of_pod}");

    // What nobody has, and what an agent alone knows.
    for (pod, status, says) in [
        ("10.244.1.99", 404, "has the address 10.244.1.99"),
        ("ns1/be1", 503, "give an address of the Pod"),
    ] {
        let refused = page.ask(&format!("policies?pod={pod}"))?;
        let error = refused.json["error"].as_str().unwrap_or_default();
        ensure!(
            refused.status == status
                && error.starts_with("failed to reach an agent at")
                && error.contains(says),
            "{pod}: {refused:?}"
        );
    }
    Ok(())
}

/// Whether the denied connection is among these verdicts.
fn has_denied(told: &Value, from: &str, to: &str) -> bool {
    any(told, |one| {
        one["verdict"] == "Denied" && one["from"] == from && one["to"] == to && one["port"] == "9/TCP"
    })
}

fn any(list: &Value, is: impl Fn(&Value) -> bool) -> bool {
    list.as_array().into_iter().flatten().any(is)
}

/// `ui` on a node, until the test ends.
struct Page {
    child: Child,
    netns: NetNs,
    at: SocketAddr,
}

#[derive(Debug)]
struct Answer {
    status: u16,
    /// Why the tables answer.
    alone: Option<String>,
    json: Value,
}

impl Page {
    fn serve(stage: &Stage) -> Result<Self> {
        let bpffs = stage.agents.bpffs(NODE)?.display().to_string();
        let arguments = ["ui", "--listen", "127.0.0.1:0", "--bpffs", &bpffs];
        let mut child = stage.agents.going_on(NODE, &arguments)?;
        let stdout = child.stdout.take().context("no stdout")?;
        let mut page = Self {
            child,
            netns: NetNs::open(stage.cluster.node_netns(NODE)?.path())?,
            at: ([0, 0, 0, 0], 0).into(),
        };
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let at = line.trim().trim_start_matches("http://").trim_end_matches('/');
        page.at = at.parse().with_context(|| format!("`ui` printed {line:?}"))?;
        Ok(page)
    }

    fn ask(&self, what: &str) -> Result<Answer> {
        let answer = self.netns.enter(|| {
            let mut stream = TcpStream::connect(self.at)?;
            write!(stream, "GET /api/{what} HTTP/1.1\r\nHost: localhost\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        })?;
        let (head, body) = answer.split_once("\r\n\r\n").context("no answer")?;
        let mut headers = head.lines().filter_map(|line| line.split_once(": "));
        let alone = headers.find(|(name, _)| name.eq_ignore_ascii_case("x-dataplane-without-agent"));
        let status = head.split(' ').nth(1).context("no status")?;
        Ok(Answer {
            status: status.parse()?,
            alone: alone.map(|(_, why)| why.to_owned()),
            json: serde_json::from_str(body).with_context(|| format!("{what}: {body}"))?,
        })
    }

    fn by_agent(&self, what: &str) -> Result<Value> {
        let answer = self.ask(what)?;
        ensure!(
            answer.status == 200 && answer.alone.is_none(),
            "{what}: {answer:?}"
        );
        Ok(answer.json)
    }

    fn by_tables(&self, what: &str) -> Result<Value> {
        let answer = self.ask(what)?;
        let is_why = |why: &str| why.starts_with("failed to reach an agent at");
        ensure!(
            answer.status == 200 && answer.alone.as_deref().is_some_and(is_why),
            "{what}: {answer:?}"
        );
        Ok(answer.json)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}
