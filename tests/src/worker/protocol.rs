//! What is said between a [`super::Worker`] handle and its process, and between clients and responders.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

/// A transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Proto {
    Tcp,
    Udp,
    Sctp,
}

/// A numbered line to the worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Call {
    pub id: u64,
    pub request: Request,
}

/// A numbered line from the worker.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    pub id: u64,
    pub response: Response,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Answer at this port of every address.
    Listen { proto: Proto, port: u16 },
    /// Make new connections.
    Probe(Probe),
    /// Fetch a page.
    HttpGet {
        to: SocketAddr,
        path: String,
        timeout_ms: u64,
    },
    /// Open a flow that stays.
    FlowStart {
        name: String,
        proto: Proto,
        from: SocketAddr,
        to: SocketAddr,
        timeout_ms: u64,
    },
    /// One exchange on a kept connection (TCP, SCTP).
    FlowExchange { name: String, timeout_ms: u64 },
    /// Open more connections of a herd.
    HerdOpen {
        name: String,
        to: SocketAddr,
        connections: u32,
        timeout_ms: u64,
    },
    /// One exchange on every connection of a herd.
    HerdExchange { name: String, timeout_ms: u64 },
    /// What became of the datagrams from number `from` on (UDP).
    FlowHistory { name: String, from: u64 },
    /// Take part in bulk transfers at this port of every address.
    TransferListen { port: u16 },
    /// Make a bulk transfer.
    Transfer(Transfer),
    /// Numbered datagrams at a steady rate from one connected socket.
    StreamStart {
        name: String,
        to: SocketAddr,
        per_second: u32,
    },
    /// Which of them were answered.
    StreamReport { name: String, stop: bool },
    /// One connection or datagram to each of many targets.
    Sweep(Sweep),
    /// What has arrived at the responders since the last time; the first time begins the watch.
    Arrivals,
}

/// Targets that are tried all at once.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    pub targets: Vec<Target>,
    /// The first source port; each try has the next.
    pub first_port: u16,
    /// How long a target that should not answer is listened to at least.
    pub silence_ms: u64,
    /// How long a try of one that should may take.
    pub patience_ms: u64,
    /// How often one that should answer is tried.
    pub tries: u32,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Target {
    pub proto: Proto,
    pub to: SocketAddr,
    /// Whether an answer is expected.
    pub answers: bool,
}

/// What became of a target.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Swept {
    pub attempt: Attempt,
    /// Whether in any try a connection was established or anything came back.
    pub reached: bool,
    pub tries: u32,
    /// The addresses tried from.
    pub sources: Vec<SocketAddr>,
}

/// New connections to one destination.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Probe {
    pub proto: Proto,
    pub to: SocketAddr,
    /// Unspecified parts are the kernel's to choose.
    pub from: SocketAddr,
    pub connections: u32,
    /// All at once instead of one after the other.
    pub parallel: bool,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    /// Give up after so many connections that no one answered.
    pub stop_after_failures: u32,
    /// Stop as soon as another backend answers.
    pub until_backend_changes: bool,
    /// The backend to change from; the first one that answers if absent.
    pub first_backend: Option<String>,
}

/// Which side of a connection sends the bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Direction {
    Upload,
    Download,
}

/// One bulk transfer over TCP.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Transfer {
    pub to: SocketAddr,
    pub direction: Direction,
    pub bytes: u64,
    pub timeout_ms: u64,
}

/// A transfer that arrived whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Transferred {
    pub by: Identity,
    pub ms: u64,
    /// The path MTU that the sender's kernel knew at the end.
    pub path_mtu: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    Done,
    Attempts(Vec<Attempt>),
    Herd(HerdReport),
    Http {
        status: u16,
        body: String,
    },
    History {
        next: u64,
        datagrams: Vec<Datagram>,
    },
    Transferred(Transferred),
    /// By number, who answered; and why sockets were opened anew.
    Stream {
        answered: Vec<Option<String>>,
        reopened: Vec<String>,
    },
    Swept(Vec<Swept>),
    /// Protocol, own port and client of each.
    Arrivals(Vec<(Proto, u16, SocketAddr)>),
    Failed(String),
}

/// Who answered, and what it saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub name: String,
    /// Where the packet arrived.
    pub at: SocketAddr,
    /// Where it came from.
    pub client: SocketAddr,
}

impl Identity {
    /// Address and port as scenario files write them: no brackets, whatever the family.
    pub fn backend(&self) -> String {
        format!("{}:{}", self.at.ip(), self.at.port())
    }
}

/// What became of the connections of a herd.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HerdReport {
    /// How many connections each responder has answered, by its name.
    pub alive: BTreeMap<String, u32>,
    /// The responder of each connection that broke, and how; no name where it was never opened.
    pub broken: Vec<(String, String)>,
}

/// One datagram of a flow.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Datagram {
    pub number: u64,
    pub attempt: Option<Attempt>,
}

/// What became of one connection or datagram.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Attempt {
    Answered {
        by: Identity,
        ms: u64,
    },
    /// A TCP RST in place of the handshake, or an ICMP error.
    Refused {
        how: String,
        ms: u64,
    },
    /// Nothing came.
    Silent,
    /// The connection was there and broke, or an answer did not make sense.
    Broken {
        how: String,
    },
    /// This machine cannot do it.
    Unsupported,
}

impl Attempt {
    /// The answer's backend, as scenario files write it.
    pub fn backend(&self) -> Option<String> {
        match self {
            Self::Answered { by, .. } => Some(by.backend()),
            _ => None,
        }
    }
}

/// What a responder sends back.
#[derive(Debug, Serialize, Deserialize)]
pub struct Reply {
    pub identity: Identity,
    /// The line that was sent.
    pub echo: String,
}

/// IPv4 addresses as such, also where a socket shows them mapped.
pub fn plain(addr: SocketAddr) -> SocketAddr {
    let ip: IpAddr = addr.ip().to_canonical();
    SocketAddr::new(ip, addr.port())
}

/// The unspecified address of the family of `like`.
pub fn any(like: SocketAddr, port: u16) -> SocketAddr {
    let ip: IpAddr = if like.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    SocketAddr::new(ip, port)
}
