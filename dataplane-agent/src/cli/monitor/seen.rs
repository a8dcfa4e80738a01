//! An event in words.

use std::{
    fmt::{self, Write as _},
    net::{IpAddr, SocketAddr},
};

use dataplane_common::{
    addr::{AnyAddr, V4, V6, proto},
    icmp,
    memory::Frame,
    monitor::{Event, EventKind},
    parse::{Fragment, Headers, parse_ports},
    reason::Reason,
    rewrite::RewriteIp,
};
use jiff::Timestamp;
use serde::Serialize;

use crate::{
    cli::names::Names,
    sync::encode,
    told::{Told, ToldVerdict, wall_clock},
};

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Word {
    Drop,
    /// Answered as by a host with a closed port, or by an endpoint where nothing listens.
    Refuse,
    /// Larger than the path's MTU; its sender is told.
    TooBig,
    /// The first of a flow through a Service, sent to an endpoint.
    Translate,
    /// A policy allows the flow; told with `--verdicts all` of `run`.
    Allow,
    /// A policy that is a dry run would deny it.
    WouldDeny,
    /// A policy that is a dry run would allow it.
    WouldAllow,
}

impl Word {
    pub const fn as_str(self) -> &'static str {
        match self {
            Word::Drop => "drop",
            Word::Refuse => "refuse",
            Word::TooBig => "too-big",
            Word::Translate => "translate",
            Word::Allow => "allow",
            Word::WouldDeny => "would-deny",
            Word::WouldAllow => "would-allow",
        }
    }
}

/// What decided, where policies did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct By {
    /// The one whose rule decided, or all that isolate the pod; empty where no agent knows.
    pub policies: Vec<String>,
    pub rule: Option<u32>,
    pub action: Option<String>,
    /// Why nothing is allowed there, if something of the policies cannot be written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
}

/// What is shown of an event.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Seen {
    pub time: Timestamp,
    pub verdict: Word,
    /// As in `dataplane_packets_total`; empty where there is none.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub reason: String,
    pub hook: &'static str,
    pub device: String,
    pub protocol: &'static str,
    pub from: Option<IpAddr>,
    pub from_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from_pod: Option<String>,
    pub to: Option<IpAddr>,
    pub to_port: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_pod: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint_pod: Option<String>,
    /// What the endpoint sees in place of the client's address.
    #[serde(rename = "seen_as", skip_serializing_if = "Option::is_none")]
    pub client_as: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Bytes of the packet.
    pub length: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub by: Option<By>,
    /// What has no room in the tables, where that is why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unwritten: Option<String>,
    /// The words of a verdict that the agent told.
    #[serde(skip)]
    told: Option<String>,
}

/// Addresses and ports of a packet, as far as its first bytes tell.
#[derive(Clone, Copy, Debug, Default)]
struct Ends {
    proto: u8,
    from: Option<IpAddr>,
    to: Option<IpAddr>,
    ports: Option<(u16, u16)>,
}

fn ends(event: &Event) -> Ends {
    if event.family == 4 {
        ends_of::<V4>(event)
    } else {
        ends_of::<V6>(event)
    }
}

fn ends_of<F: RewriteIp>(event: &Event) -> Ends {
    let bytes = &event.bytes[..usize::from(event.captured).min(event.bytes.len())];
    let frame = Frame::new(bytes.to_vec());
    let mut headers = Headers::default();
    if F::parse_ip(&frame, event.l3.into(), &mut headers).is_err() {
        return Ends::default();
    }
    if event.kind != EventKind::RefusedByBackend as u8 || headers.proto != F::ICMP {
        return Ends::of::<F>(&frame, headers);
    }
    // It refuses what it quotes, in place of an answer.
    let mut quoted = Headers::default();
    match F::parse_ip(&frame, headers.l4() + icmp::HEADER_LEN, &mut quoted) {
        Ok(()) => Ends::of::<F>(&frame, quoted).reversed(),
        Err(_) => Ends::default(),
    }
}

/// Whose names are of interest.
pub fn addresses(event: &Event) -> impl Iterator<Item = IpAddr> + use<> {
    let Flow { ends, behind } = Flow::of(event);
    let endpoint = behind.map(|(_, to)| to.ip());
    [ends.from, ends.to, endpoint].into_iter().flatten()
}

/// The flow that an event is about.
#[derive(Clone, Copy, Debug)]
struct Flow {
    /// As its client sends it.
    ends: Ends,
    /// As its endpoint sees it, if it has been given one.
    behind: Option<(SocketAddr, SocketAddr)>,
}

impl Flow {
    fn of(event: &Event) -> Self {
        let ends = ends(event);
        let ip = |addr: AnyAddr| encode::ip(addr, event.family == 6);
        let becomes = (
            SocketAddr::new(ip(event.src_be), u16::from_be(event.sport_be)),
            SocketAddr::new(ip(event.dst_be), u16::from_be(event.dport_be)),
        );
        if event.kind == EventKind::Begun as u8 {
            return Self {
                ends,
                behind: Some(becomes),
            };
        }
        if event.kind == EventKind::RefusedByBackend as u8 {
            // What is seen is an answer.
            let (asked, client) = becomes;
            return Self {
                ends: Ends {
                    from: Some(client.ip()),
                    to: Some(asked.ip()),
                    ports: Some((client.port(), asked.port())),
                    ..ends
                },
                behind: ends.asked().zip(ends.came()),
            };
        }
        Self { ends, behind: None }
    }
}

impl Ends {
    fn of<F: RewriteIp>(frame: &Frame, mut headers: Headers<F::Addr>) -> Self {
        let ip = |addr: F::Addr| Some(encode::ip(F::to_any(addr), F::VERSION == 6));
        let mut ends = Self {
            proto: headers.proto,
            from: ip(headers.tuple.src),
            to: ip(headers.tuple.dst),
            ports: None,
        };
        let has_ports = matches!(headers.proto, proto::TCP | proto::UDP | proto::SCTP);
        if has_ports
            && headers.fragment != Fragment::Later
            && parse_ports::<F, _>(frame, &mut headers).is_ok()
        {
            let tuple = &headers.tuple;
            ends.ports = Some((u16::from_be(tuple.sport_be), u16::from_be(tuple.dport_be)));
        }
        ends
    }

    fn reversed(self) -> Self {
        Self {
            proto: self.proto,
            from: self.to,
            to: self.from,
            ports: self.ports.map(|(from, to)| (to, from)),
        }
    }

    /// Where it comes from.
    fn came(&self) -> Option<SocketAddr> {
        let (port, _) = self.ports?;
        Some(SocketAddr::new(self.from?, port))
    }

    /// Where it is sent to.
    fn asked(&self) -> Option<SocketAddr> {
        let (_, port) = self.ports?;
        Some(SocketAddr::new(self.to?, port))
    }
}

fn hook(number: u8) -> &'static str {
    const HOOKS: [&str; 6] = ["xdp", "from_netdev", "to_netdev", "to_lo", "from_pod", "to_pod"];
    HOOKS.get(usize::from(number)).copied().unwrap_or("unknown")
}

impl Seen {
    pub fn of(event: &Event, names: &Names) -> Self {
        let Flow { ends, behind } = Flow::of(event);
        let Ends {
            proto,
            from,
            to,
            ports,
        } = ends;
        let pod = |addr: Option<IpAddr>| names.pod(addr?).cloned();
        let reason = Reason::from_number(event.reason).map(Reason::label);
        let verdict = match EventKind::ALL.get(usize::from(event.kind)) {
            Some(EventKind::Refused | EventKind::RefusedByBackend) => Word::Refuse,
            Some(EventKind::TooBig) => Word::TooBig,
            Some(EventKind::Begun) => Word::Translate,
            Some(EventKind::Dropped) | None => Word::Drop,
        };
        // Also counted where traffic policies are the reason.
        let may_lack_room = event.reason == Reason::NoLocalEndpoints as u32;
        let asked = ends.asked();
        let unwritten = asked.filter(|_| may_lack_room);
        Self {
            time: wall_clock(event.at_ns),
            verdict,
            reason: match verdict {
                Word::Translate => String::new(),
                _ => reason.unwrap_or("unknown").to_owned(),
            },
            hook: hook(event.hook),
            device: event.ifindex.to_string(),
            protocol: encode::protocol_name(proto).unwrap_or("other"),
            from,
            from_port: ports.map(|(from, _)| from),
            from_pod: pod(from),
            to,
            to_port: ports.map(|(_, to)| to),
            to_pod: pod(to),
            service: asked.and_then(|asked| names.service(proto, asked)).cloned(),
            endpoint: behind.map(|(_, to)| to),
            endpoint_pod: pod(behind.map(|(_, to)| to.ip())),
            client_as: behind
                .map(|(from, _)| from)
                .filter(|from| Some(*from) != ends.came()),
            mtu: (verdict == Word::TooBig).then_some(event.mtu),
            length: event.length,
            by: None,
            unwritten: unwritten.and_then(|asked| names.unwritten(proto, asked)).cloned(),
            told: None,
        }
    }

    /// Names the Pod that has sent the packet, whatever address it says that it has.
    pub fn sent_by(&mut self, event: &Event, sender: String) {
        // Where an endpoint refuses, its answer is what is seen, and the client is at the other end.
        if event.kind == EventKind::RefusedByBackend as u8 {
            self.endpoint_pod = Some(sender);
        } else {
            self.from_pod = Some(sender);
        }
    }

    /// A verdict that the agent has told, with the names that it has put into it.
    pub fn of_verdict(told: Told) -> Self {
        let end = |text: &str| -> (Option<IpAddr>, Option<String>) {
            match text.split_once(" (") {
                Some((pod, addr)) => (addr.trim_end_matches(')').parse().ok(), Some(pod.to_owned())),
                None => (text.parse().ok(), None),
            }
        };
        let ((from, from_pod), (to, to_pod)) = (end(&told.from), end(&told.to));
        let (port, protocol) = told.port.split_once('/').unwrap_or(("", &told.port));
        let numbers = [proto::TCP, proto::UDP, proto::SCTP, proto::ICMP, proto::ICMPV6];
        let protocol = numbers
            .into_iter()
            .filter_map(encode::protocol_name)
            .find(|name| *name == protocol);
        Self {
            time: told.time,
            verdict: match told.verdict {
                ToldVerdict::Denied => Word::Drop,
                ToldVerdict::Allowed => Word::Allow,
                ToldVerdict::WouldDeny => Word::WouldDeny,
                ToldVerdict::WouldAllow => Word::WouldAllow,
            },
            reason: told.reason,
            hook: if told.direction == "egress" {
                "from_pod"
            } else {
                "to_pod"
            },
            device: String::new(),
            protocol: protocol.unwrap_or("other"),
            from,
            from_port: None,
            from_pod,
            to,
            to_port: port.parse().ok(),
            to_pod,
            service: None,
            endpoint: None,
            endpoint_pod: None,
            client_as: None,
            mtu: None,
            length: 0,
            by: Some(By {
                policies: told.policy.into_iter().collect(),
                rule: told.rule,
                action: told.action,
                closed: told.closed,
            }),
            unwritten: None,
            told: None,
        }
    }

    /// That the packet is for.
    pub fn port(&self) -> Option<u16> {
        self.to_port
    }

    /// Why, in words.
    pub fn why(&self) -> String {
        let mut text = self.reason.clone();
        if let Some(mtu) = self.mtu {
            let _infallible = write!(text, ": {} bytes, MTU {mtu}", self.length);
        }
        if let (Word::Refuse, Some(endpoint)) = (self.verdict, self.endpoint) {
            let _infallible = write!(text, ": nothing listens at port {}", endpoint.port());
        }
        if let Some(unwritten) = &self.unwritten {
            let _infallible = write!(text, ": {unwritten}");
        }
        match &self.by {
            Some(By {
                policies,
                rule: Some(rule),
                ..
            }) if policies.is_empty() => {
                let _infallible = write!(text, ": rule {rule} of a policy whose name a running agent knows");
            }
            Some(By {
                policies,
                rule: Some(rule),
                ..
            }) => {
                let _infallible = write!(text, ": {}, rule {rule}", policies.join(", "));
            }
            Some(By {
                policies,
                rule: None,
                closed: Some(closed),
                ..
            }) => {
                let policies = policies.join(", ");
                let _infallible = write!(text, ": {policies} cannot be honoured: {closed}");
            }
            Some(By {
                policies, rule: None, ..
            }) if !policies.is_empty() => {
                let _infallible = write!(text, ": no rule of {}", policies.join(", "));
            }
            _ => {}
        }
        text
    }
}

struct End<'a>(Option<IpAddr>, Option<u16>, Option<&'a String>);

impl fmt::Display for End<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let End(addr, port, name) = self;
        let at = match (addr, port) {
            (Some(addr), Some(port)) => SocketAddr::new(*addr, *port).to_string(),
            (Some(addr), None) => addr.to_string(),
            (None, Some(port)) => format!("port {port}"),
            (None, None) => "?".to_owned(),
        };
        match name {
            Some(name) => write!(f, "{name} ({at})"),
            None => f.write_str(&at),
        }
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = self.time.strftime("%H:%M:%S%.3f");
        let to = self.service.as_ref().or(self.to_pod.as_ref());
        write!(
            f,
            "{time} {:<11} {:<11} {:<15} {} -> {} {}",
            self.verdict.as_str(),
            self.hook,
            self.device,
            End(self.from, self.from_port, self.from_pod.as_ref()),
            End(self.to, self.to_port, to),
            self.protocol,
        )?;
        if let Some(endpoint) = self.endpoint {
            let end = End(
                Some(endpoint.ip()),
                Some(endpoint.port()),
                self.endpoint_pod.as_ref(),
            );
            write!(f, " to {end}")?;
        }
        if let Some(client) = self.client_as {
            write!(f, " as {client}")?;
        }
        match self.why() {
            why if why.is_empty() => Ok(()),
            why => write!(f, ": {why}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use dataplane_common::monitor::CAPTURED;

    use super::*;
    use crate::explain::packet;

    const CLIENT: &str = "10.244.1.10:40000";
    const ENDPOINT: &str = "10.244.1.21:8080";
    const SERVICE: &str = "10.96.0.80:80";

    /// What is told of a packet that a Pod sends, and what the packet becomes.
    fn from_pod(kind: EventKind, (from, to): (&str, &str), becomes: (&str, &str)) -> Event {
        let at = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let of = |text: &str| (at(text).ip(), at(text).port());
        let first = packet::first(of(from), of(to), "80/TCP".parse().unwrap());
        let mut bytes = [0; CAPTURED];
        bytes[..first.len()].copy_from_slice(&first);
        let word = |text: &str| encode::any_addr(at(text).ip());
        Event {
            kind: kind as u8,
            hook: 4,
            l3: 14,
            family: 4,
            captured: first.len() as u16,
            src_be: word(becomes.0),
            dst_be: word(becomes.1),
            sport_be: at(becomes.0).port().to_be(),
            dport_be: at(becomes.1).port().to_be(),
            bytes,
            ..bytemuck::Zeroable::zeroed()
        }
    }

    fn named() -> Names {
        let mut names = Names::default();
        names.name_pod("10.244.1.10".parse().unwrap(), "shop/client");
        names.name_pod("10.244.1.21".parse().unwrap(), "shop/web");
        names
    }

    #[test]
    fn the_client_of_an_endpoint_that_refuses_is_not_who_sends_the_answer() {
        let event = from_pod(EventKind::RefusedByBackend, (ENDPOINT, CLIENT), (SERVICE, CLIENT));
        let mut seen = Seen::of(&event, &named());
        seen.sent_by(&event, "shop/web".to_owned());
        assert_eq!(seen.from, Some("10.244.1.10".parse().unwrap()));
        assert_eq!(seen.from_pod.as_deref(), Some("shop/client"));
        assert_eq!(seen.to, Some("10.96.0.80".parse().unwrap()));
        assert_eq!(seen.endpoint_pod.as_deref(), Some("shop/web"));
    }

    #[test]
    fn who_sends_from_an_address_of_another_is_named() {
        let event = from_pod(EventKind::Dropped, (CLIENT, SERVICE), (CLIENT, SERVICE));
        let mut seen = Seen::of(&event, &named());
        seen.sent_by(&event, "shop/forger".to_owned());
        assert_eq!(seen.from_pod.as_deref(), Some("shop/forger"));
        assert_eq!(seen.endpoint_pod, None);
    }
}
