//! Packets at random, made by someone who knows what a packet looks like, and lies about it now and then.

use std::net::IpAddr;

use dataplane_common::addr::proto;
use dataplane_common::checksum;

/// A generator of random numbers by Steele, Lea and Flood (2014).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((u128::from(self.next()) * end as u128) >> 64) as usize
    }

    pub fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

/// Who talks to whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Talk {
    pub src: IpAddr,
    pub dst: IpAddr,
    pub sport: u16,
    pub dport: u16,
    pub proto: u8,
}

impl Talk {
    pub fn reversed(self) -> Self {
        Self {
            src: self.dst,
            dst: self.src,
            sport: self.dport,
            dport: self.sport,
            proto: self.proto,
        }
    }
}

/// TCP flags worth sending.
const FLAGS: [u8; 10] = [0x02, 0x02, 0x12, 0x10, 0x10, 0x18, 0x11, 0x14, 0x04, 0x00];

/// A sequence number that comes often.
const SEQUENCE: u32 = 0xffff_ff00;

/// A frame of `talk`, or about it.
pub fn frame(random: &mut Random, talk: Talk, macs: [u8; 12]) -> Vec<u8> {
    let v6 = talk.src.is_ipv6();
    let mut packet = if random.percent(12) {
        let message = icmp(random, talk);
        let kind = if v6 { proto::ICMPV6 } else { proto::ICMP };
        // The endpoint itself answers, or a router on the way.
        let src = if random.percent(70) { talk.dst } else { router(v6) };
        ip(random, src, talk.src, kind, &message, true)
    } else {
        let segment = segment(random, talk);
        ip(random, talk.src, talk.dst, talk.proto, &segment, true)
    };
    if random.percent(3) {
        let keep = random.below(packet.len() + 1);
        packet.truncate(keep);
    }
    if random.percent(3) {
        let padding = random.below(32);
        packet.resize(packet.len() + padding, 0);
    }
    if random.percent(2) && !packet.is_empty() {
        let at = random.below(packet.len().min(80));
        // But no multicast addresses: whether they have a route depends on too much.
        if !v6 || (at != 8 && at != 24) {
            packet[at] ^= 1 << random.below(8);
        }
    }
    let kind: u16 = match random.below(200) {
        0 => 0x0806,
        1 => 0x8100,
        2 if v6 => 0x0800,
        2 => 0x86dd,
        _ if v6 => 0x86dd,
        _ => 0x0800,
    };
    let mut frame = macs.to_vec();
    frame.extend(kind.to_be_bytes());
    frame.extend(packet);
    frame
}

fn router(v6: bool) -> IpAddr {
    if v6 {
        [0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 1].into()
    } else {
        [198, 51, 100, 1].into()
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The checksum over a pseudo header and a message, as stored.
fn l4_sum(src: IpAddr, dst: IpAddr, kind: u8, message: &[u8]) -> [u8; 2] {
    let mut bytes = octets(src);
    bytes.extend(octets(dst));
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend([0, 0, 0, kind]);
    bytes.extend(message);
    (!checksum::fold(checksum::sum(&bytes))).to_ne_bytes()
}

fn payload(random: &mut Random) -> Vec<u8> {
    let len = match random.below(20) {
        0 => 1200 + random.below(300),
        1..=8 => random.below(64),
        _ => 0,
    };
    (0..len).map(|at| at as u8).collect()
}

/// A TCP segment or a UDP datagram.
fn segment(random: &mut Random, talk: Talk) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(talk.sport.to_be_bytes());
    bytes.extend(talk.dport.to_be_bytes());
    let sum_at = if talk.proto == proto::TCP {
        let options = if random.percent(20) { random.below(11) } else { 0 };
        // Most acknowledge what everybody sends.
        let any = random.next() as u32;
        bytes.extend(random.pick(&[SEQUENCE, SEQUENCE, any]).to_be_bytes());
        let ahead = random.pick(&[1, 1, 1, 700, 0, 1 << 16, any]);
        bytes.extend(SEQUENCE.wrapping_add(ahead).to_be_bytes());
        let words = if random.percent(2) {
            random.below(16)
        } else {
            5 + options
        };
        bytes.extend([(words as u8) << 4, random.pick(&FLAGS)]);
        bytes.extend([0x20, 0, 0, 0, 0, 0]);
        bytes.extend(vec![1; options * 4]);
        bytes.extend(payload(random));
        16
    } else {
        let data = payload(random);
        let len = if random.percent(3) {
            random.next() as u16
        } else {
            8 + data.len() as u16
        };
        bytes.extend(len.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(data);
        6
    };
    let sum = match random.below(10) {
        0 => [0, 0],
        1 => [0xff, 0xff],
        2 => random.next().to_ne_bytes()[..2].try_into().unwrap_or_default(),
        _ => l4_sum(talk.src, talk.dst, talk.proto, &bytes),
    };
    bytes[sum_at..sum_at + 2].copy_from_slice(&sum);
    bytes
}

/// An ICMP message to the sender of `talk` that quotes a packet of it.
fn icmp(random: &mut Random, talk: Talk) -> Vec<u8> {
    let v6 = talk.src.is_ipv6();
    let kind = if v6 {
        random.pick(&[1, 1, 2, 3, 4, 128, 135])
    } else {
        random.pick(&[3, 3, 11, 12, 8, 0, 5])
    };
    let segment = segment(random, talk);
    let mut quoted = ip(random, talk.src, talk.dst, talk.proto, &segment, false);
    let keep = match random.below(10) {
        0 => random.below(quoted.len() + 1),
        1..=4 => quoted.len() - segment.len() + 8,
        _ => quoted.len().min(500),
    };
    quoted.truncate(keep);
    let mut bytes = vec![kind, random.below(5) as u8, 0, 0, 0, 0, 5, 0x14];
    bytes.extend(quoted);
    let kind = if v6 { proto::ICMPV6 } else { proto::ICMP };
    let sum = if v6 {
        // To whom it goes is decided later, and either build keeps a wrong sum as wrong as it was.
        l4_sum(talk.dst, talk.src, kind, &bytes)
    } else {
        (!checksum::fold(checksum::sum(&bytes))).to_ne_bytes()
    };
    bytes[2..4].copy_from_slice(&sum);
    bytes
}

/// A packet; `odd` ones may have options, extension headers, fragments and wrong lengths.
fn ip(random: &mut Random, src: IpAddr, dst: IpAddr, kind: u8, body: &[u8], odd: bool) -> Vec<u8> {
    let odd = odd || random.percent(10);
    if src.is_ipv6() {
        ipv6(random, src, dst, kind, body, odd)
    } else {
        ipv4(random, src, dst, kind, body, odd)
    }
}

/// The identification of a fragment: so few that several belong to one datagram.
fn identification(random: &mut Random) -> u16 {
    random.below(3) as u16
}

fn ttl(random: &mut Random) -> u8 {
    random.pick(&[64, 64, 64, 64, 63, 255, 2, 1, 0])
}

fn ipv4(random: &mut Random, src: IpAddr, dst: IpAddr, kind: u8, body: &[u8], odd: bool) -> Vec<u8> {
    let options = if odd && random.percent(8) {
        random.below(11)
    } else {
        0
    };
    let words = if odd && random.percent(1) {
        random.below(16)
    } else {
        5 + options
    };
    let version = if odd && random.percent(1) { 5 } else { 4 };
    let mut len = 20 + options * 4 + body.len();
    if odd && random.percent(4) {
        len = random.below(2 * len);
    }
    let fragment: u16 = match random.below(100) {
        0..=3 if odd => 0x2000,
        4..=6 if odd => 0x2010,
        7..=8 if odd => 0x0010,
        9..=50 => 0x4000,
        _ => 0,
    };
    let id = if matches!(fragment, 0 | 0x4000) {
        random.next() as u16
    } else {
        identification(random)
    };
    let mut bytes = vec![(version << 4) | words as u8, random.next() as u8];
    bytes.extend((len as u16).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([ttl(random), kind, 0, 0]);
    bytes.extend(octets(src));
    bytes.extend(octets(dst));
    bytes.extend(vec![1; options * 4]);
    let sum = !checksum::fold(checksum::sum(&bytes));
    bytes[10..12].copy_from_slice(&sum.to_ne_bytes());
    bytes.extend(body);
    bytes
}

fn ipv6(random: &mut Random, src: IpAddr, dst: IpAddr, kind: u8, body: &[u8], odd: bool) -> Vec<u8> {
    let headers = if odd && random.percent(10) {
        1 + random.below(6)
    } else {
        0
    };
    let kinds: Vec<u8> = (0..headers).map(|_| random.pick(&[0, 43, 60, 60, 44])).collect();
    let mut extensions = Vec::new();
    for (number, own) in kinds.iter().enumerate() {
        let next = kinds.get(number + 1).copied().unwrap_or(kind);
        if *own == 44 {
            let fragment = random.pick(&[0, 0, 1, 0x10, 0x11u16]);
            extensions.extend([next, 0]);
            extensions.extend(fragment.to_be_bytes());
            extensions.extend([1, 2]);
            extensions.extend(identification(random).to_be_bytes());
        } else {
            let units = if random.percent(70) { 0 } else { random.below(12) };
            let said = if random.percent(3) {
                random.next() as u8
            } else {
                units as u8
            };
            extensions.extend([next, said, 1, 4, 0, 0, 0, 0]);
            extensions.extend(vec![0; units * 8]);
        }
    }
    let mut len = extensions.len() + body.len();
    if odd && random.percent(4) {
        len = random.below(2 * len + 2);
    }
    let version = if odd && random.percent(1) { 0x70 } else { 0x60 };
    let mut bytes = vec![version, random.next() as u8, 0, 1];
    bytes.extend((len as u16).to_be_bytes());
    bytes.extend([kinds.first().copied().unwrap_or(kind), ttl(random)]);
    bytes.extend(octets(src));
    bytes.extend(octets(dst));
    bytes.extend(extensions);
    bytes.extend(body);
    bytes
}
