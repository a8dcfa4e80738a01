//! Packets that policies forbid, sent all the time: none may arrive, and those of insiders have to.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use dataplane_tests::web;

use crate::stage::{GUARD_SERVICE, NODES, PORT, Stage, UDP_PORT, pod_addresses};

const PERIOD: Duration = Duration::from_millis(20);
/// How long a connection is waited for that must not come about.
const PATIENCE: Duration = Duration::from_millis(200);

#[derive(Default)]
struct Seen {
    stop: AtomicBool,
    tried: AtomicU64,
    allowed: AtomicU64,
    passed: Mutex<Vec<String>>,
}

impl Seen {
    fn passed(&self) -> MutexGuard<'_, Vec<String>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }
}

/// Senders and receivers; dropping it ends them.
pub struct Forbidden {
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

impl Forbidden {
    pub fn start(stage: &Stage) -> Result<Self> {
        let mut all = Self {
            seen: Arc::default(),
            threads: Vec::new(),
        };
        let services = GUARD_SERVICE.map(str::parse::<IpAddr>);
        let mut targets = Vec::new();
        for (family, service) in services.into_iter().enumerate() {
            targets.push(service.context("a service has no address")?);
            targets.extend(NODES.map(|node| pod_addresses("guard", node)[family]));
        }
        for node in NODES {
            all.receive(stage, node)?;
            for (role, is_allowed) in [("out", false), ("in", true)] {
                let (targets, seen) = (targets.clone(), all.seen.clone());
                let from = stage.netns(&format!("{role}-{node}"))?;
                all.spawn(&from, move || datagrams(&targets, is_allowed, &seen));
            }
            let (targets, seen) = (targets.clone(), all.seen.clone());
            all.spawn(&stage.netns(&format!("out-{node}"))?, move || {
                connections(&targets, node, &seen);
            });
        }
        Ok(all)
    }

    /// What has passed since the last look.
    pub fn passed(&self) -> Vec<String> {
        std::mem::take(&mut *self.seen.passed())
    }

    /// How much was tried, in words.
    pub fn told(&self) -> String {
        format!(
            "{} forbidden packets and connections were sent, {} allowed datagrams arrived",
            self.seen.tried.load(Ordering::Relaxed),
            self.seen.allowed.load(Ordering::Relaxed)
        )
    }

    fn spawn(&mut self, netns: &Path, work: impl FnOnce() + Send + 'static) {
        self.threads.push(web::in_netns(netns, work));
    }

    /// Takes what arrives at the guarded server of a node.
    fn receive(&mut self, stage: &Stage, node: u8) -> Result<()> {
        let outsiders: Vec<IpAddr> = NODES
            .into_iter()
            .flat_map(|node| pod_addresses("out", node))
            .collect();
        let netns = stage.cluster.member_netns(&format!("guard-{node}"))?;
        let socket = netns.enter(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, UDP_PORT))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            Ok(socket)
        })?;
        let seen = self.seen.clone();
        self.threads.push(std::thread::spawn(move || {
            let mut buffer = [0; 64];
            while seen.goes_on() {
                let Ok((_, from)) = socket.recv_from(&mut buffer) else {
                    continue;
                };
                if outsiders.contains(&from.ip().to_canonical()) {
                    let how = format!("a datagram of {} reached guard-{node}", from.ip().to_canonical());
                    seen.passed().push(how);
                } else {
                    seen.allowed.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
        Ok(())
    }
}

impl Drop for Forbidden {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // What went wrong in it was told.
            let _panicked = thread.join();
        }
    }
}

/// Datagrams to everybody who is guarded, each by a new socket, so that each is a new flow.
fn datagrams(targets: &[IpAddr], is_allowed: bool, seen: &Seen) {
    while seen.goes_on() {
        for to in targets {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0));
            let to = match to {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().into(),
                IpAddr::V6(_) => *to,
            };
            // While a cable is out there may be no way.
            let sent = socket.and_then(|socket| socket.send_to(b"guarded?", SocketAddr::new(to, UDP_PORT)));
            if !is_allowed && sent.is_ok() {
                seen.tried.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(PERIOD);
        }
    }
}

/// Connections to everybody who is guarded.
fn connections(targets: &[IpAddr], node: u8, seen: &Seen) {
    while seen.goes_on() {
        for (place, to) in targets.iter().enumerate() {
            // The service's port, or the server's.
            let is_service = place % (NODES.len() + 1) == 0;
            let to = SocketAddr::new(*to, if is_service { 80 } else { PORT });
            seen.tried.fetch_add(1, Ordering::Relaxed);
            if TcpStream::connect_timeout(&to, PATIENCE).is_ok() {
                seen.passed().push(format!("out-{node} connected to {to}"));
            }
        }
    }
}
