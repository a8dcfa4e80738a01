//! The first packet of a flow, made to be led through the host build of the datapath, and what it became.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::addr::{ethertype, proto};

use super::Port;

/// An Ethernet header with an address of zeros at both ends.
const LINK: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;

/// A SYN, an empty datagram, an INIT or an echo request.
pub fn first(from: (IpAddr, u16), to: (IpAddr, u16), port: Port) -> Vec<u8> {
    let (payload, number) = transport(from, to, port);
    let length = payload.len() as u16;
    let mut bytes = vec![0; LINK];
    match (from.0, to.0) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            bytes[12..].copy_from_slice(&ethertype::IPV4.to_be_bytes());
            bytes.extend([0x45, 0]);
            bytes.extend((IPV4 as u16 + length).to_be_bytes());
            bytes.extend([0, 0, 0x40, 0, 64, number, 0, 0]);
            bytes.extend(src.octets());
            bytes.extend(dst.octets());
        }
        (src, dst) => {
            bytes[12..].copy_from_slice(&ethertype::IPV6.to_be_bytes());
            bytes.extend([0x60, 0, 0, 0]);
            bytes.extend(length.to_be_bytes());
            bytes.extend([number, 64]);
            for addr in [src, dst] {
                bytes.extend(match addr {
                    IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
                    IpAddr::V6(addr) => addr.octets(),
                });
            }
        }
    }
    bytes.extend(payload);
    bytes
}

/// Header and protocol. Checksums are left out: nobody on the way looks at them.
fn transport(from: (IpAddr, u16), to: (IpAddr, u16), port: Port) -> (Vec<u8>, u8) {
    let Some(protocol) = port.proto else {
        return match from.0 {
            IpAddr::V4(_) => (vec![8, 0, 0, 0, 0, 0, 0, 0], proto::ICMP),
            IpAddr::V6(_) => (vec![128, 0, 0, 0, 0, 0, 0, 0], proto::ICMPV6),
        };
    };
    let number = protocol.number();
    let mut bytes = [from.1.to_be_bytes(), to.1.to_be_bytes()].concat();
    match number {
        // Sequence and acknowledgement, a header of five words, SYN, window, checksum, urgent.
        proto::TCP => bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 0xff, 0xff, 0, 0, 0, 0]),
        proto::UDP => bytes.extend([0, 8, 0, 0]),
        // Verification tag and checksum, then an INIT chunk of 20 bytes.
        _ => bytes.extend([[0; 8].as_slice(), &[1, 0, 0, 20], &[0; 16]].concat()),
    }
    (bytes, number)
}

/// Where a packet that [`first`] made comes from now.
pub fn source(bytes: &[u8]) -> Option<SocketAddr> {
    end(bytes, 0)
}

/// Where it goes now.
pub fn destination(bytes: &[u8]) -> Option<SocketAddr> {
    end(bytes, 1)
}

/// The first address and port of a packet, or the second.
fn end(bytes: &[u8], number: usize) -> Option<SocketAddr> {
    let port = |l4: usize| {
        let at = l4 + 2 * number;
        Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
    };
    if bytes.get(LINK)? >> 4 == 4 {
        let at = LINK + 12 + 4 * number;
        let addr: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        return Some((addr, port(LINK + IPV4)?).into());
    }
    let at = LINK + 8 + 16 * number;
    let addr: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
    Some((addr, port(LINK + IPV6)?).into())
}

#[cfg(test)]
mod tests {
    use dataplane_common::{
        addr::{Family, V4, V6},
        memory::Frame,
        packet::Packet,
        parse::{Headers, parse_l4},
        rewrite::RewriteIp,
    };

    use super::*;

    fn read<F: RewriteIp>(bytes: Vec<u8>) -> (u8, bool, u16) {
        let frame = Frame::new(bytes);
        let mut headers = Headers::<F::Addr>::default();
        F::parse_ip(&frame, LINK, &mut headers).unwrap();
        if matches!(headers.proto, proto::TCP | proto::UDP) {
            parse_l4::<F, _>(&frame, LINK, &mut headers).unwrap();
        }
        let port = match headers.proto {
            proto::SCTP => frame.load(headers.l4() + 2).unwrap(),
            _ => headers.tuple.dport_be,
        };
        (headers.proto, headers.is_syn(), u16::from_be(port))
    }

    #[test]
    fn the_datapath_reads_what_is_made() {
        for (text, number, is_syn) in [
            ("80/TCP", proto::TCP, true),
            ("80/UDP", proto::UDP, false),
            ("80/SCTP", proto::SCTP, false),
        ] {
            let port: Port = text.parse().unwrap();
            let four = first(
                ("10.0.0.1".parse().unwrap(), 4000),
                ("10.0.0.2".parse().unwrap(), 80),
                port,
            );
            let to: (IpAddr, u16) = ("fd00::2".parse().unwrap(), 80);
            let six = first(("fd00::1".parse().unwrap(), 4000), to, port);
            assert_eq!(destination(&six), Some(to.into()));
            assert_eq!(source(&six), Some("[fd00::1]:4000".parse().unwrap()));
            assert_eq!(source(&four), Some("10.0.0.1:4000".parse().unwrap()));
            assert_eq!(destination(&four), Some("10.0.0.2:80".parse().unwrap()));
            for read in [read::<V4>(four), read::<V6>(six)] {
                assert_eq!((read.0, read.2), (number, 80), "{text}");
                assert_eq!(read.1 && number == proto::TCP, is_syn, "{text}");
            }
        }
        let ping = |from: &str, to: &str| {
            let end = |text: &str| (text.parse().unwrap(), 0);
            first(end(from), end(to), "ICMP".parse().unwrap())
        };
        assert_eq!(read::<V4>(ping("10.0.0.1", "10.0.0.2")).0, V4::ICMP);
        assert_eq!(read::<V6>(ping("fd00::1", "fd00::2")).0, V6::ICMP);
    }
}
