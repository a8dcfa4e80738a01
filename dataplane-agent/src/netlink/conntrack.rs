//! Connections of this network namespace that netfilter knows, as `ctnetlink` lists them.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use dataplane_common::addr::proto;
use netlink_packet_core::{NlasIterator, Parseable};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, IPTuple, ProtoInfo, ProtoInfoTCP, ProtoTuple, Status, Tuple,
};

use super::socket::RequestSocket;

/// `NFNL_SUBSYS_CTNETLINK` and `IPCTNL_MSG_CT_GET`.
const GET_CONNECTIONS: u16 = 1 << 8 | 1;
const NFGENMSG_LEN: usize = 4;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// `enum tcp_conntrack`: the states between the last FIN and oblivion.
mod tcp_state {
    pub const FIN_WAIT: u8 = 4;
    pub const CLOSE_WAIT: u8 = 5;
    pub const LAST_ACK: u8 = 6;
    pub const TIME_WAIT: u8 = 7;
    pub const CLOSE: u8 = 8;
}

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ends {
    pub src: SocketAddr,
    pub dst: SocketAddr,
}

impl Ends {
    #[must_use]
    pub fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
        }
    }
}

/// A TCP or UDP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    pub proto: u8,
    /// As the client sends it.
    pub original: Ends,
    /// As it is answered.
    pub reply: Ends,
    pub phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// UDP: both ends have taken part.
    Open,
    /// A FIN has passed.
    Closing,
    /// Remembered for its addresses alone. UDP: nobody has answered.
    Over,
}

impl Connection {
    /// Whether netfilter translates its destination.
    #[must_use]
    pub fn is_translated(&self) -> bool {
        self.original.dst != self.reply.src
    }
}

/// The connections that are of interest.
pub fn connections(
    socket: &mut RequestSocket,
    is_of_interest: impl Fn(&Connection) -> bool,
) -> io::Result<Vec<Connection>> {
    let mut all = Vec::new();
    for family in [AF_INET, AF_INET6] {
        let mut body = [0; NFGENMSG_LEN];
        body[0] = family;
        // Connections that come and go meanwhile make no dump inconsistent: each is whole in itself.
        socket.dump_each(GET_CONNECTIONS, &body, |message| {
            let found = message.body.get(NFGENMSG_LEN..).and_then(parse);
            all.extend(found.filter(&is_of_interest));
        })?;
    }
    Ok(all)
}

fn parse(attributes: &[u8]) -> Option<Connection> {
    let (mut original, mut reply, mut state) = (None, None, None);
    let mut status = Status::empty();
    for attribute in NlasIterator::new(attributes) {
        // What this version does not understand says nothing that is needed here.
        match ConntrackAttribute::parse(&attribute.ok()?) {
            Ok(ConntrackAttribute::CtaTupleOrig(parts)) => original = ends(&parts),
            Ok(ConntrackAttribute::CtaTupleReply(parts)) => reply = ends(&parts),
            Ok(ConntrackAttribute::CtaStatus(found)) => status = found,
            Ok(ConntrackAttribute::CtaProtoInfo(infos)) => state = tcp_state_of(&infos),
            _ => {}
        }
    }
    let ((l4, original), (_, reply)) = (original?, reply?);
    let phase = match l4 {
        proto::TCP => match state {
            Some(tcp_state::FIN_WAIT | tcp_state::CLOSE_WAIT | tcp_state::LAST_ACK) => Phase::Closing,
            Some(tcp_state::TIME_WAIT | tcp_state::CLOSE) => Phase::Over,
            _ => Phase::Open,
        },
        proto::UDP if status.contains(Status::Assured) => Phase::Open,
        proto::UDP => Phase::Over,
        _ => return None,
    };
    Some(Connection {
        proto: l4,
        original,
        reply,
        phase,
    })
}

fn ends(parts: &[Tuple]) -> Option<(u8, Ends)> {
    let (mut src, mut dst): (Option<IpAddr>, Option<IpAddr>) = (None, None);
    let (mut l4, mut sport, mut dport) = (None, None, None);
    for part in parts {
        match part {
            Tuple::Ip(addrs) => {
                for addr in addrs {
                    match addr {
                        IPTuple::SourceAddress(addr) => src = Some(*addr),
                        IPTuple::DestinationAddress(addr) => dst = Some(*addr),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(infos) => {
                for info in infos {
                    match info {
                        ProtoTuple::Protocol(number) => l4 = Some(u8::from(*number)),
                        ProtoTuple::SourcePort(port) => sport = Some(*port),
                        ProtoTuple::DestinationPort(port) => dport = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let ends = Ends {
        src: SocketAddr::new(src?, sport?),
        dst: SocketAddr::new(dst?, dport?),
    };
    Some((l4?, ends))
}

fn tcp_state_of(infos: &[ProtoInfo]) -> Option<u8> {
    infos.iter().find_map(|info| match info {
        ProtoInfo::TCP(parts) => parts.iter().find_map(|part| match part {
            ProtoInfoTCP::State(state) => Some(*state),
            _ => None,
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::socket::push_attribute;

    fn nested(kind: u16, parts: &[(u16, &[u8])]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, value) in parts {
            push_attribute(&mut body, *kind, value);
        }
        let mut outer = Vec::new();
        push_attribute(&mut outer, kind | 0x8000, &body);
        outer
    }

    fn tuple(kind: u16, l4: u8, src: ([u8; 4], u16), dst: ([u8; 4], u16)) -> Vec<u8> {
        let ip = nested(1, &[(1, &src.0), (2, &dst.0)]);
        let ports = [src.1.to_be_bytes(), dst.1.to_be_bytes()];
        let l4 = nested(2, &[(1, &[l4]), (2, &ports[0]), (3, &ports[1])]);
        let mut outer = Vec::new();
        push_attribute(&mut outer, kind | 0x8000, &[ip, l4].concat());
        outer
    }

    /// `parse` of a connection from 10.244.1.10:4000 to 10.96.0.1:80.
    fn connection(l4: u8, answers: ([u8; 4], u16), status: u32, state: Option<u8>) -> Option<Connection> {
        let client = ([10, 244, 1, 10], 4000);
        let mut bytes = tuple(1, l4, client, ([10, 96, 0, 1], 80));
        bytes.extend(tuple(2, l4, answers, client));
        push_attribute(&mut bytes, 3, &status.to_be_bytes());
        if let Some(state) = state {
            let mut tcp = Vec::new();
            push_attribute(&mut tcp, 1 | 0x8000, &nested(1, &[(1, &[state])])[4..]);
            push_attribute(&mut bytes, 4 | 0x8000, &tcp);
        }
        // Some attribute of a later kernel.
        push_attribute(&mut bytes, 77, &[1, 2, 3]);
        parse(&bytes)
    }

    #[test]
    fn connections_are_found_with_their_phase() {
        const ASSURED: u32 = 1 << 2;
        let endpoint = ([10, 244, 2, 21], 8080);
        let found = connection(proto::TCP, endpoint, ASSURED, Some(3)).unwrap();
        assert_eq!(found.original.src, "10.244.1.10:4000".parse().unwrap());
        assert_eq!(found.original.dst, "10.96.0.1:80".parse().unwrap());
        assert_eq!(found.reply.src, "10.244.2.21:8080".parse().unwrap());
        assert!(found.is_translated());
        let itself = connection(proto::TCP, ([10, 96, 0, 1], 80), ASSURED, Some(3)).unwrap();
        assert!(!itself.is_translated());

        let phase = |l4, status, state| connection(l4, endpoint, status, state).map(|found| found.phase);
        let handshake = Some(1);
        assert_eq!(phase(proto::TCP, 0, handshake), Some(Phase::Open));
        assert_eq!(phase(proto::TCP, ASSURED, Some(3)), Some(Phase::Open));
        for state in [4, 5, 6] {
            assert_eq!(phase(proto::TCP, ASSURED, Some(state)), Some(Phase::Closing));
        }
        for state in [7, 8] {
            assert_eq!(phase(proto::TCP, ASSURED, Some(state)), Some(Phase::Over));
        }
        assert_eq!(phase(proto::UDP, ASSURED, None), Some(Phase::Open));
        assert_eq!(phase(proto::UDP, 0, None), Some(Phase::Over));
        assert_eq!(phase(proto::ICMP, ASSURED, None), None);
    }

    #[test]
    fn what_is_cut_off_is_no_connection() {
        let whole = tuple(1, proto::TCP, ([10, 0, 0, 1], 1), ([10, 0, 0, 2], 2));
        for len in 0..=whole.len() {
            assert_eq!(parse(&whole[..len]), None);
        }
    }
}
