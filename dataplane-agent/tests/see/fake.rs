//! An agent's socket without an agent behind it.

use std::{
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering},
    thread,
};

use dataplane_agent::{
    enforced::{EnforcedPolicy, EnforcedRule, OfDirection, OfPod},
    load::{Load, PodLoad},
    model::Cause,
    served::{Problem, Served, conditions},
    told::{Told, ToldVerdict},
};
use jiff::Timestamp;

use crate::canned;

/// It answers as long as the test runs.
pub struct Agent {
    folder: tempfile::TempDir,
    pods: Vec<PodLoad>,
}

impl Agent {
    /// One at which each `/load` is a second later than the one before.
    pub fn start() -> Self {
        Self::with(Vec::new())
    }

    /// The same with more Pods here.
    pub fn with(pods: Vec<PodLoad>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let agent = Self { folder, pods };
        agent.start_again();
        agent
    }

    /// The next one after [`Self::stop`].
    pub fn start_again(&self) {
        let listener = UnixListener::bind(self.socket()).unwrap();
        let pods = self.pods.clone();
        thread::spawn(move || {
            let seconds = AtomicU64::new(0);
            for stream in listener.incoming() {
                answer(&stream.unwrap(), &seconds, &pods);
            }
        });
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("agent.sock")
    }

    /// Nobody is reached any more.
    pub fn stop(&self) {
        std::fs::remove_file(self.socket()).unwrap();
    }
}

fn answer(stream: &UnixStream, seconds: &AtomicU64, pods: &[PodLoad]) {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let request = lines.next().unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default();
    lines.take_while(|line| !line.is_empty()).for_each(drop);
    let body = match path {
        "/load" => serde_json::to_string(&load(seconds.fetch_add(1, Ordering::Relaxed), pods)),
        "/services" => serde_json::to_string(&served()),
        "/verdicts?after=0" => serde_json::to_string(&told()),
        "/policies?pod=shop/db-0" => serde_json::to_string(&of_db()),
        path if path.starts_with("/verdicts?") => Ok("[]".to_owned()),
        path if path.starts_with("/names?") => Ok("{}".to_owned()),
        _ => {
            let _gone = (&*stream).write_all(b"HTTP/1.1 404 Not Found\r\n\r\n{}\n");
            return;
        }
    };
    let answer = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}",
        body.unwrap()
    );
    // Who asked may have gone.
    let _gone = (&*stream).write_all(answer.as_bytes());
}

fn load(seconds: u64, pods: &[PodLoad]) -> Load {
    let mut load = canned::load(seconds);
    load.pods.extend_from_slice(pods);
    load
}

fn served() -> Served {
    let problems = vec![Problem {
        object: "Service shop/legacy".to_owned(),
        field: "spec.ports[0].protocol".to_owned(),
        reason: "SCTP is not served".to_owned(),
        cause: Cause::Unsupported,
        file: None,
    }];
    Served {
        objects: Vec::new(),
        conditions: conditions(&problems),
        problems,
    }
}

fn told() -> Vec<Told> {
    let denied = |number, from: &str, to: &str, port: &str| Told {
        number,
        time: Timestamp::from_second(1_790_000_000 - 60 + i64::try_from(number).unwrap()).unwrap(),
        verdict: ToldVerdict::Denied,
        reason: "policy-denied".to_owned(),
        direction: "ingress".to_owned(),
        from: from.to_owned(),
        to: to.to_owned(),
        port: port.to_owned(),
        policy: Some("NetworkPolicy shop/db".to_owned()),
        ..Told::default()
    };
    let (batch, db) = ("shop/batch-0 (10.244.1.31)", "shop/db-0 (10.244.1.21)");
    vec![
        denied(1, batch, db, "5432/TCP"),
        denied(2, "203.0.113.9", db, "22/TCP"),
        denied(3, batch, db, "5432/TCP"),
        Told {
            verdict: ToldVerdict::WouldDeny,
            ..denied(
                4,
                "shop/web-0 (10.244.1.11)",
                "shop/db-1 (10.244.2.21)",
                "9187/TCP",
            )
        },
    ]
}

fn of_db() -> OfPod {
    let rule = |rule, action: &str, peers: &str, ports: &str, verdicts| EnforcedRule {
        direction: "ingress".to_owned(),
        rule,
        action: action.to_owned(),
        peers: peers.to_owned(),
        ports: ports.to_owned(),
        verdicts,
        ..EnforcedRule::default()
    };
    let policy = |policy: &str, tier: &str, rules| EnforcedPolicy {
        policy: policy.to_owned(),
        tier: tier.to_owned(),
        dry_run: false,
        pods: 1,
        rules,
    };
    OfPod {
        pod: "shop/db-0".to_owned(),
        ingress: OfDirection {
            isolated: true,
            policies: vec![
                policy(
                    "ClusterNetworkPolicy guard",
                    "admin",
                    vec![rule(Some(0), "deny", "198.51.100.0/24", "any", 0)],
                ),
                policy(
                    "NetworkPolicy shop/db",
                    "NetworkPolicy",
                    vec![
                        rule(Some(0), "allow", "pods with app=web in shop", "5432/TCP", 1874),
                        rule(None, "deny", "any", "any", 10_800),
                    ],
                ),
            ],
            ..OfDirection::default()
        },
        ..OfPod::default()
    }
}
