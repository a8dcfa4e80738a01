//! The servers at `healthCheckNodePort`: they tell load balancers whether this node has endpoints of a Service with
//! `externalTrafficPolicy: Local`. Answers are kube-proxy's, byte for byte in their meaning.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;
use tokio::{sync::watch, task::JoinHandle};

use super::{
    Progress,
    http::{self, Answer},
    to_json,
};
use crate::{
    compile::health_checks::{Check, Checks},
    model::Name,
};

/// The listeners, one for each port and address. They follow [`Servers::set`].
#[derive(Debug)]
pub struct Servers {
    checks: Arc<Mutex<Checks>>,
    progress: watch::Receiver<Progress>,
    open: BTreeMap<SocketAddr, Open>,
    refused: BTreeMap<SocketAddr, String>,
}

/// A listener, until it is dropped.
#[derive(Debug)]
struct Open(JoinHandle<()>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Page<'a> {
    service: PageService<'a>,
    local_endpoints: usize,
    service_proxy_healthy: bool,
}

#[derive(Serialize)]
struct PageService<'a> {
    namespace: &'a str,
    name: &'a str,
}

impl Servers {
    pub fn new(progress: watch::Receiver<Progress>) -> Self {
        Self {
            checks: Arc::default(),
            progress,
            open: BTreeMap::new(),
            refused: BTreeMap::new(),
        }
    }

    /// Answers these checks at these addresses and no others. What could not be opened is tried again by every call.
    pub fn set(&mut self, checks: Checks, addrs: &BTreeSet<IpAddr>) {
        let wanted: BTreeSet<SocketAddr> = checks
            .keys()
            .flat_map(|port| addrs.iter().map(|addr| SocketAddr::new(*addr, *port)))
            .collect();
        *lock(&self.checks) = checks;
        self.open.retain(|addr, _| wanted.contains(addr));
        self.refused.clear();
        for addr in wanted {
            if self.open.contains_key(&addr) {
                continue;
            }
            match http::listen(addr) {
                Ok(listener) => {
                    let (checks, progress) = (self.checks.clone(), self.progress.clone());
                    let server = http::serve(listener, move |_| {
                        let answer = answer(addr.port(), &lock(&checks), &progress.borrow());
                        async { answer }
                    });
                    self.open.insert(addr, Open(tokio::spawn(server)));
                }
                Err(error) => {
                    let reason = format!("failed to listen on {addr}: {error}");
                    self.refused.insert(addr, reason);
                }
            }
        }
    }

    /// What could not be opened: the Service and why.
    pub fn refused(&self) -> Vec<(Name, String)> {
        let checks = lock(&self.checks);
        let with_service = |(addr, reason): (&SocketAddr, &String)| {
            let check = checks.get(&addr.port())?;
            Some((check.service.clone(), reason.clone()))
        };
        self.refused.iter().filter_map(with_service).collect()
    }
}

/// No code that holds the lock can panic half way through a change.
fn lock(checks: &Mutex<Checks>) -> MutexGuard<'_, Checks> {
    checks.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(port: u16, checks: &Checks, progress: &Progress) -> Answer {
    let Some(check) = checks.get(&port) else {
        // It was closed while the request came.
        return Answer::not_found();
    };
    let Check {
        service,
        local_endpoints,
    } = check;
    // Whether the node is being removed is not asked here: that is for `/healthz`.
    let healthy = progress.is_healthy();
    let page = Page {
        service: PageService {
            namespace: service.namespace(),
            name: service.name(),
        },
        local_endpoints: *local_endpoints,
        service_proxy_healthy: healthy,
    };
    Answer {
        weight: Some(*local_endpoints),
        ..Answer::of_health(healthy && *local_endpoints > 0, to_json(&page))
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        time,
    };

    use super::*;

    const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    fn check(name: &str, local_endpoints: usize) -> Check {
        Check {
            service: Name::new("ns", name),
            local_endpoints,
        }
    }

    fn servers(started: bool) -> (watch::Sender<Progress>, Servers) {
        let (sender, receiver) = watch::channel(Progress {
            started,
            ..Progress::default()
        });
        (sender, Servers::new(receiver))
    }

    /// A port that nobody listens on, until somebody else takes it.
    async fn free_port() -> u16 {
        let listener = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
        listener.local_addr().unwrap().port()
    }

    async fn get(port: u16) -> Option<String> {
        let mut stream = TcpStream::connect((LOCALHOST, port)).await.ok()?;
        let request = b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n";
        stream.write_all(request).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }

    async fn until_closed(port: u16) {
        let closed = async {
            while get(port).await.is_some() {
                time::sleep(Duration::from_millis(5)).await;
            }
        };
        time::timeout(Duration::from_secs(5), closed).await.unwrap();
    }

    #[tokio::test]
    async fn counts_are_told_as_kube_proxy_does() {
        let (_progress, mut servers) = servers(true);
        let (one, two) = (free_port().await, free_port().await);
        let checks = Checks::from([(one, check("a", 2)), (two, check("b", 0))]);
        servers.set(checks, &[LOCALHOST].into());
        let answer = get(one).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        assert!(
            answer.contains("X-Load-Balancing-Endpoint-Weight: 2\r\n"),
            "{answer}"
        );
        let body =
            r#"{"service":{"namespace":"ns","name":"a"},"localEndpoints":2,"serviceProxyHealthy":true}"#;
        assert!(answer.ends_with(&format!("\r\n\r\n{body}\n")), "{answer}");
        let answer = get(two).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(
            answer.contains("X-Load-Balancing-Endpoint-Weight: 0\r\n"),
            "{answer}"
        );
    }

    #[tokio::test]
    async fn an_unhealthy_agent_sends_traffic_away() {
        let (progress, mut servers) = servers(false);
        let port = free_port().await;
        servers.set([(port, check("a", 1))].into(), &[LOCALHOST].into());
        let answer = get(port).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.contains(r#""serviceProxyHealthy":false"#), "{answer}");
        progress.send_modify(|progress| progress.started = true);
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 200 "));
    }

    #[tokio::test]
    async fn listeners_follow_ports_and_owners() {
        let (_progress, mut servers) = servers(true);
        let (one, two) = (free_port().await, free_port().await);
        servers.set([(one, check("a", 1))].into(), &[LOCALHOST].into());
        servers.set([(two, check("a", 1))].into(), &[LOCALHOST].into());
        until_closed(one).await;
        assert!(get(two).await.unwrap().contains(r#""name":"a""#));
        servers.set([(two, check("b", 0))].into(), &[LOCALHOST].into());
        assert!(get(two).await.unwrap().contains(r#""name":"b""#));
        servers.set(Checks::new(), &[LOCALHOST].into());
        until_closed(two).await;
    }

    #[tokio::test]
    async fn a_port_of_somebody_else_is_named_and_tried_again() {
        let (_progress, mut servers) = servers(true);
        let other = TcpListener::bind((LOCALHOST, 0)).await.unwrap();
        let port = other.local_addr().unwrap().port();
        let checks = Checks::from([(port, check("a", 1))]);
        servers.set(checks.clone(), &[LOCALHOST].into());
        let refused = servers.refused();
        assert_eq!(refused[0].0, Name::new("ns", "a"));
        assert!(refused[0].1.contains(&format!("127.0.0.1:{port}")));
        drop(other);
        servers.set(checks, &[LOCALHOST].into());
        assert_eq!(servers.refused(), []);
        assert!(get(port).await.is_some());
    }
}
