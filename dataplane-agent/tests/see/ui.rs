//! `ui` over HTTP.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::Value;

use crate::fake::Agent;

/// The command, until the test ends.
pub struct Ui {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub at: String,
}

impl Ui {
    pub fn start(socket: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_dataplane-agent"))
            .args(["ui", "--listen", "127.0.0.1:0", "--bpffs", "/nowhere", "--socket"])
            .arg(socket)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let at = line.trim().trim_start_matches("http://").trim_end_matches('/');
        Self {
            child,
            at: at.to_owned(),
        }
    }

    /// Status, head and body of an answer.
    fn ask(&self, method: &str, path: &str, host: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(&self.at).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: {host}\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_lowercase(), body.to_owned())
    }

    fn json(&self, path: &str) -> (u16, Value) {
        let (status, _, body) = self.ask("GET", path, &self.at);
        (status, serde_json::from_str(&body).unwrap())
    }
}

impl Drop for Ui {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

#[test]
fn what_the_agent_tells_is_passed_on_until_it_is_gone() {
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let (status, load) = ui.json("/api/load");
    assert_eq!(
        (status, &load["services"][1]["object"]),
        (200, &"Service shop/db".into())
    );
    let (_, told) = ui.json("/api/verdicts?after=0");
    assert_eq!(told.as_array().unwrap().len(), 4);
    let (_, told) = ui.json("/api/verdicts?after=4");
    assert_eq!(told.as_array().unwrap().len(), 0);
    let (_, services) = ui.json("/api/services");
    assert_eq!(services["problems"].as_array().unwrap().len(), 1);
    let (_, policies) = ui.json("/api/policies?pod=shop/db-0");
    assert_eq!(policies["ingress"]["isolated"], true);
    let (status, no_pod) = ui.json("/api/policies?pod=shop/nobody");
    assert_eq!(status, 404);
    assert!(
        no_pod["error"]
            .as_str()
            .unwrap()
            .starts_with("no Pod of this node")
    );
    // There are no tables here, and it says so.
    let (status, flows) = ui.json("/api/flows");
    assert_eq!(status, 503);
    assert!(flows["error"].is_string(), "{flows}");

    agent.stop();
    let (status, error) = ui.json("/api/load");
    assert_eq!(status, 503);
    let error = error["error"].as_str().unwrap();
    assert!(error.starts_with("failed to reach an agent at"), "{error}");
    assert_eq!(ui.ask("GET", "/", &ui.at).0, 200, "the page itself stays");

    agent.start_again();
    let (status, load) = ui.json("/api/load");
    assert_eq!(
        (status, &load["services"][1]["object"]),
        (200, &"Service shop/db".into())
    );
}

#[test]
fn without_agent_and_tables_each_answer_says_what_is_missing() {
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let (_, head, _) = ui.ask("GET", "/api/services", &ui.at);
    assert!(!head.contains("x-dataplane-without-agent"), "{head}");
    agent.stop();
    for what in [
        "services",
        "load",
        "verdicts",
        "policies",
        "policies?pod=10.244.1.21",
    ] {
        let (status, error) = ui.json(&format!("/api/{what}"));
        let error = error["error"].as_str().unwrap();
        assert_eq!(status, 503, "{what}: {error}");
        // Then why there are no tables: they are not there, or may not be read.
        let (agent, tables) = error.split_once("(os error 2): ").unwrap();
        assert!(
            agent.starts_with("failed to reach an agent at"),
            "{what}: {error}"
        );
        assert!(!tables.is_empty(), "{what}");
    }
    let (status, error) = ui.json("/api/policies?pod=shop/db-0");
    let error = error["error"].as_str().unwrap();
    assert_eq!(status, 503, "{error}");
    assert!(
        error.contains("names are known to a running agent alone: give an address of the Pod"),
        "{error}"
    );
}

#[test]
fn others_are_refused() {
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let (status, head, body) = ui.ask("GET", "/", "localhost");
    assert_eq!(status, 200);
    assert!(
        head.contains("content-security-policy: default-src 'self';"),
        "{head}"
    );
    assert!(body.contains("<title>dataplane</title>"), "{body}");
    let (status, _, body) = ui.ask("HEAD", "/", "localhost");
    assert_eq!((status, body.as_str()), (200, ""));
    for (method, path, host, expected) in [
        ("GET", "/", "evil.example", 403),
        ("GET", "/api/load", "evil.example:8090", 403),
        ("POST", "/api/load", "localhost", 405),
        ("PUT", "/", "localhost", 405),
        ("GET", "/etc/passwd", "localhost", 404),
        ("GET", "/api/wait", "localhost", 404),
    ] {
        assert_eq!(ui.ask(method, path, host).0, expected, "{method} {path} {host}");
    }
}

#[test]
fn an_address_that_is_taken_or_open_to_all_is_said() {
    let agent = Agent::start();
    let ui = Ui::start(&agent.socket());
    let output = Command::new(env!("CARGO_BIN_EXE_dataplane-agent"))
        .args(["ui", "--listen", &ui.at])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(
        error.contains(&format!("failed to listen on {}", ui.at)),
        "{error}"
    );
    assert!(!error.contains("warning"), "{error}");
    // An address for documentation, which nobody has.
    let output = Command::new(env!("CARGO_BIN_EXE_dataplane-agent"))
        .args(["ui", "--listen", "192.0.2.1:8090"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(
        error.contains("warning: whoever reaches 192.0.2.1:8090"),
        "{error}"
    );
}
