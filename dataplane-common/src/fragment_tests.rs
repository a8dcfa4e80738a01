//! Datagrams in fragments through the host build: in order and not, and what is left of them.

extern crate std;

use core::net::{IpAddr, SocketAddr};
use std::{vec, vec::Vec};

use crate::{
    addr::{AnyAddr, Family, V4, V6, proto},
    backend::{Backend, BackendHead, backend_state},
    checksum,
    datagram::HELD_OF_DATAGRAM,
    device::own_flags,
    memory::{Frame, Memory, MemoryRoute},
    parse::ETHERNET_LEN,
    pipeline::Context,
    reason::Reason,
    service::{Scope, Service, ServiceHead},
    verdict::{Action, Hook, Verdict},
};

const DEVICE: u32 = 20;
const HELD: Verdict = Verdict::drop(Reason::FragmentHeld);

/// Addresses of one family.
struct Ends {
    pod: SocketAddr,
    service: SocketAddr,
    /// Without endpoints.
    empty: SocketAddr,
    backend: SocketAddr,
    client: SocketAddr,
    node: SocketAddr,
}

const FAMILIES: [[&str; 6]; 2] = [
    [
        "10.244.0.10:4000",
        "10.96.0.1:80",
        "10.96.0.2:80",
        "10.244.1.5:8080",
        "203.0.113.7:5000",
        "192.168.0.1:30080",
    ],
    [
        "[fd00:244::10]:4000",
        "[fd00:96::1]:80",
        "[fd00:96::2]:80",
        "[fd00:244:1::5]:8080",
        "[2001:db8::7]:5000",
        "[fd00:168::1]:30080",
    ],
];

fn families() -> [Ends; 2] {
    FAMILIES.map(|texts| {
        let [pod, service, empty, backend, client, node] =
            texts.map(|text| text.parse().expect("an address"));
        Ends {
            pod,
            service,
            empty,
            backend,
            client,
            node,
        }
    })
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn any(ip: IpAddr) -> AnyAddr {
    match ip {
        IpAddr::V4(ip) => V4::to_any(u32::from_ne_bytes(ip.octets())),
        IpAddr::V6(ip) => bytemuck::cast(ip.octets()),
    }
}

fn at(hook: Hook) -> Context {
    Context {
        hook,
        ifindex: DEVICE,
        from_host: false,
        l3: ETHERNET_LEN,
    }
}

/// A service with one backend and one without, and the first one's node port, in both families.
fn world() -> Memory {
    let mut world = Memory::default();
    for (id, ends) in families().iter().enumerate() {
        world.backends.push(Backend {
            head: BackendHead {
                generation: 1,
                port_be: ends.backend.port().to_be(),
                state: backend_state::ACTIVE,
                flags: 0,
            },
            addr_be: any(ends.backend.ip()),
            ..Backend::default()
        });
        let slots_offset = world.add_slice(&[id as u32]);
        for size_class in [1, 0] {
            world.services.push(Service {
                head: ServiceHead {
                    slots_offset,
                    generation: 1,
                    size_class,
                    flags: 0,
                },
                ..Service::default()
            });
        }
        let unspecified = match ends.node.ip() {
            IpAddr::V4(_) => IpAddr::from([0; 4]),
            IpAddr::V6(_) => IpAddr::from([0u16; 8]),
        };
        let node_port = SocketAddr::new(unspecified, ends.node.port());
        for (end, index, scope) in [
            (ends.service, 2 * id, Scope::Internal),
            (ends.empty, 2 * id + 1, Scope::Internal),
            (node_port, 2 * id, Scope::External),
        ] {
            let (addr, port_be) = (any(end.ip()), end.port().to_be());
            if end.is_ipv4() {
                let key = V4::frontend_key(addr[0], port_be, proto::UDP, scope);
                world.v4.frontends.insert(key, index as u32);
            } else {
                let key = V6::frontend_key(addr, port_be, proto::UDP, scope);
                world.v6.frontends.insert(key, index as u32);
            }
            world.add_port(proto::UDP, end.port(), end == node_port);
        }
        world.routes.push(MemoryRoute {
            version: if ends.pod.is_ipv4() { 4 } else { 6 },
            network: [0; 4],
            length: 0,
            ifindex: DEVICE,
            mtu: 1500,
            macs: Some(Default::default()),
        });
    }
    let [node4, node6] = families().map(|ends| any(ends.node.ip()));
    world.v4.own_addresses.insert(node4[0], own_flags::NODE_PORT);
    world.v6.own_addresses.insert(node6, own_flags::NODE_PORT);
    let device = crate::device::Device {
        snat4_be: node4[0],
        snat6_be: node6,
        ..Default::default()
    };
    world.devices.insert(DEVICE, device);
    world
}

/// The pseudo header's part of a UDP checksum.
fn pseudo(from: SocketAddr, to: SocketAddr, length: usize) -> Vec<u8> {
    let mut bytes = [octets(from.ip()), octets(to.ip())].concat();
    bytes.extend((length as u32).to_be_bytes());
    bytes.extend([0, 0, 0, proto::UDP]);
    bytes
}

/// One fragment, as a frame.
fn frame(
    from: SocketAddr,
    to: SocketAddr,
    id: u16,
    (l4, offset, more): (u8, usize, bool),
    piece: &[u8],
) -> Vec<u8> {
    let field = (offset / 8) as u16;
    let mut bytes = vec![2; 12];
    if from.is_ipv4() {
        bytes.extend([8, 0]);
        let mut header = vec![0x45, 0];
        header.extend((20 + piece.len() as u16).to_be_bytes());
        header.extend(id.to_be_bytes());
        header.extend((field | u16::from(more) << 13).to_be_bytes());
        header.extend([64, l4, 0, 0]);
        header.extend(octets(from.ip()));
        header.extend(octets(to.ip()));
        let sum = !checksum::fold(checksum::sum(&header));
        header[10..12].copy_from_slice(&sum.to_ne_bytes());
        bytes.extend(header);
    } else {
        bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        // Destination options come before the fragment header.
        bytes.extend((16 + piece.len() as u16).to_be_bytes());
        bytes.extend([60, 64]);
        bytes.extend(octets(from.ip()));
        bytes.extend(octets(to.ip()));
        bytes.extend([44, 0, 1, 4, 0, 0, 0, 0]);
        bytes.extend([l4, 0]);
        bytes.extend((field << 3 | u16::from(more)).to_be_bytes());
        bytes.extend([0, 7]);
        bytes.extend(id.to_be_bytes());
    }
    bytes.extend(piece);
    bytes
}

/// A UDP datagram in fragments of 1,000 bytes.
fn cut(from: SocketAddr, to: SocketAddr, id: u16, length: usize) -> Vec<Vec<u8>> {
    let mut datagram = Vec::new();
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend((8 + length as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend((0..length).map(|at| (at * 7 + usize::from(id)) as u8));
    let mut covered = pseudo(from, to, datagram.len());
    covered.extend(&datagram);
    let sum = !checksum::fold(checksum::sum(&covered));
    datagram[6..8].copy_from_slice(&sum.to_ne_bytes());
    let last = (datagram.len() - 1) / 1000;
    let pieces = datagram.chunks(1000).enumerate();
    pieces
        .map(|(number, piece)| frame(from, to, id, (proto::UDP, number * 1000, number != last), piece))
        .collect()
}

/// What the receiver makes of fragments: from whom, to whom, and the payload.
fn joined(frames: &[Vec<u8>]) -> (SocketAddr, SocketAddr, Vec<u8>) {
    let mut pieces: Vec<(usize, &[u8])> = Vec::new();
    let mut ends = None;
    for frame in frames {
        let ip = &frame[ETHERNET_LEN..];
        let (src, dst, field, piece) = if ip[0] >> 4 == 4 {
            assert_eq!(checksum::fold(checksum::sum(&ip[..20])), 0xffff, "IP checksum");
            let end = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[at..at + 4]).expect("4 bytes"));
            let field = u16::from_be_bytes([ip[6], ip[7]]);
            (end(12), end(16), usize::from(field & 0x1fff) * 8, &ip[20..])
        } else {
            let end = |at: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[at..at + 16]).expect("16 bytes"));
            let field = u16::from_be_bytes([ip[50], ip[51]]);
            (end(8), end(24), usize::from(field & 0xfff8), &ip[56..])
        };
        assert_eq!(
            *ends.get_or_insert((src, dst)),
            (src, dst),
            "all have the same addresses"
        );
        pieces.push((field, piece));
    }
    pieces.sort_unstable();
    pieces.dedup();
    let mut datagram = Vec::new();
    for (offset, piece) in pieces {
        assert_eq!(offset, datagram.len(), "no gap");
        datagram.extend(piece);
    }
    let (src, dst) = ends.expect("a fragment");
    let port = |at: usize| u16::from_be_bytes([datagram[at], datagram[at + 1]]);
    let (from, to) = (SocketAddr::new(src, port(0)), SocketAddr::new(dst, port(2)));
    let mut covered = pseudo(from, to, datagram.len());
    covered.extend(&datagram);
    assert_eq!(checksum::fold(checksum::sum(&covered)), 0xffff, "UDP checksum");
    (from, to, datagram.split_off(8))
}

/// Runs frames through a hook, and those that are sent again after the one that released them; what comes out of it.
fn run<'a>(
    world: &Memory,
    hook: Hook,
    frames: impl IntoIterator<Item = &'a Vec<u8>>,
) -> Vec<(Verdict, Vec<u8>)> {
    let mut out = Vec::new();
    for bytes in frames {
        let mut frame = Frame::new(bytes.clone());
        let verdict = world.run(&mut frame, &at(hook));
        out.push((verdict, frame.bytes));
        for bytes in world.fragments.sent_again.take() {
            let mut frame = Frame::new(bytes);
            let verdict = world.run(&mut frame, &at(hook));
            out.push((verdict, frame.bytes));
        }
    }
    out.retain(|(verdict, _)| *verdict != HELD);
    out
}

fn bytes(out: &[(Verdict, Vec<u8>)]) -> Vec<Vec<u8>> {
    out.iter().map(|(_, bytes)| bytes.clone()).collect()
}

/// Asserts that nothing waits any more, of anybody.
fn assert_idle(world: &Memory) {
    assert!(world.fragments.held.borrow().is_empty());
    assert!(
        world
            .fragments
            .sources
            .borrow()
            .values()
            .all(|source| source.held == 0)
    );
    assert_eq!(
        world.counted(Reason::FragmentHeld),
        world.counted(Reason::FragmentReleased)
    );
}

/// Orders in which fragments may come, by number of 8.
fn orders() -> Vec<Vec<usize>> {
    vec![
        vec![0, 1, 2, 3, 4, 5, 6, 7],
        vec![7, 6, 5, 4, 3, 2, 1, 0],
        vec![3, 1, 0, 7, 6, 2, 5, 4],
        // Duplicates before and behind the first, and of the first.
        vec![5, 5, 1, 0, 0, 5, 7, 7, 2, 3, 4, 6, 6],
    ]
}

#[test]
fn there_and_back_in_any_order() {
    for ends in families() {
        for order in orders() {
            let world = world();
            // A new flow, and an established one.
            for id in [1, 2] {
                let sent = cut(ends.pod, ends.service, id, 7500);
                let (.., payload) = joined(&sent);
                let out = run(&world, Hook::FromPod, order.iter().map(|at| &sent[*at]));
                assert!(
                    out.iter().all(|(verdict, _)| *verdict == Verdict::PASS),
                    "{out:?}"
                );
                assert_eq!(out.len(), order.len());
                assert_eq!(joined(&bytes(&out)), (ends.pod, ends.backend, payload));
                assert_idle(&world);

                let sent = cut(ends.backend, ends.pod, id, 7500);
                let (.., payload) = joined(&sent);
                let out = run(&world, Hook::ToPod, order.iter().map(|at| &sent[*at]));
                assert_eq!(joined(&bytes(&out)), (ends.service, ends.pod, payload));
                assert_idle(&world);
            }
        }
    }
}

#[test]
fn datagrams_do_not_mix() {
    for ends in families() {
        let world = world();
        let mut other = ends.pod;
        other.set_port(4001);
        let all = [
            cut(ends.pod, ends.service, 1, 5000),
            cut(other, ends.service, 2, 5000),
            cut(ends.backend, ends.pod, 1, 5000),
        ];
        let mixed = (0..6)
            .rev()
            .flat_map(|at| all.iter().map(move |frames| &frames[at]));
        let out = bytes(&run(&world, Hook::FromPod, mixed));
        assert_eq!(out.len(), 18);
        assert_idle(&world);
        for (number, (from, to)) in [
            (ends.pod, ends.backend),
            (other, ends.backend),
            // Nothing to us.
            (ends.backend, ends.pod),
        ]
        .into_iter()
        .enumerate()
        {
            let (.., payload) = joined(&all[number]);
            // Which of them a later fragment belongs to is told by its identification and its source.
            let id = |frame: &[u8]| {
                if from.is_ipv4() {
                    frame[18..20].to_vec()
                } else {
                    frame[66..70].to_vec()
                }
            };
            let src = |frame: &[u8]| {
                if from.is_ipv4() {
                    frame[26..30].to_vec()
                } else {
                    frame[22..38].to_vec()
                }
            };
            let own = out
                .iter()
                .filter(|f| id(f) == id(&all[number][0]) && src(f) == octets(from.ip()));
            let own: Vec<Vec<u8>> = own.cloned().collect();
            assert_eq!(joined(&own), (from, to, payload));
        }
    }
}

#[test]
fn hooks_do_not_share_verdicts() {
    for ends in families() {
        let world = world();
        let sent = cut(ends.pod, ends.service, 1, 2500);
        // No flow begins where a packet is on its way into a pod.
        assert_eq!(bytes(&run(&world, Hook::ToPod, &sent)), sent);
        let out = bytes(&run(&world, Hook::FromPod, &sent));
        assert_eq!(joined(&out).1, ends.backend);
    }
}

#[test]
fn a_node_port_routes_each_fragment_and_takes_a_hop() {
    for ends in families() {
        let world = world();
        let sent = cut(ends.client, ends.node, 1, 2500);
        let xdp = run(&world, Hook::Xdp, &sent);
        assert_eq!(bytes(&xdp), sent, "XDP leaves them as they are");
        let out = run(&world, Hook::FromNetdev, sent.iter().rev());
        let hops = if ends.client.is_ipv4() {
            ETHERNET_LEN + 8
        } else {
            ETHERNET_LEN + 7
        };
        for (verdict, bytes) in &out {
            assert_eq!(*verdict, Verdict::to(Action::Transmit, DEVICE));
            assert_eq!(bytes[hops], 63);
        }
        let (from, to, _) = joined(&bytes(&out));
        assert_eq!((from.ip(), to), (ends.node.ip(), ends.backend));
        let answer = cut(to, from, 9, 2500);
        let out = run(&world, Hook::FromNetdev, answer.iter().rev());
        let (from, to, payload) = joined(&bytes(&out));
        assert_eq!((from, to), (ends.node, ends.client));
        assert_eq!(payload, joined(&answer).2);
        assert_idle(&world);
    }
}

#[test]
fn a_refused_datagram_is_refused_as_a_whole() {
    for ends in families() {
        let world = world();
        let sent = cut(ends.pod, ends.empty, 1, 3500);
        // One before the first, two behind it.
        let out = run(&world, Hook::FromPod, [1, 0, 2, 3].map(|at| &sent[at]));
        let verdicts: Vec<Verdict> = out.iter().map(|(verdict, _)| *verdict).collect();
        let dropped = Verdict::drop(Reason::FragmentDropped);
        assert_eq!(verdicts, [Verdict::ANSWER, dropped, dropped]);
        assert_eq!(world.counted(Reason::FragmentDropped), 3);
        assert_eq!(world.counted(Reason::FragmentReleased), 0);
        assert!(world.fragments.held.borrow().is_empty());
    }
}

#[test]
fn what_waits_too_long_is_dropped() {
    for ends in families() {
        let mut world = world();
        let sent = cut(ends.pod, ends.service, 1, 2500);
        assert_eq!(run(&world, Hook::FromPod, &sent[1..]), []);
        world.now_ticks += world.config.fragment_ticks + 1;
        let out = bytes(&run(&world, Hook::FromPod, &sent[..1]));
        assert_eq!(out.len(), 1);
        assert_eq!(world.counted(Reason::FragmentTimedOut), 2);
        assert_eq!(world.counted(Reason::FragmentReleased), 0);
        assert!(world.fragments.held.borrow().is_empty());
        // The identification is used again, after the verdict is out of date.
        world.now_ticks += world.config.fragment_ticks + 1;
        assert_eq!(run(&world, Hook::FromPod, &sent[1..]), []);
        let out = bytes(&run(&world, Hook::FromPod, &sent[..1]));
        assert_eq!(joined(&out).1, ends.backend);
        assert_eq!(world.counted(Reason::FragmentReleased), 2);
    }
}

#[test]
fn room_is_made_of_those_whose_time_is_up_then_of_the_oldest() {
    let [ends, _] = families();
    let mut world = world();
    world.config.held = 8;
    let later = |id| cut(ends.pod, ends.service, id, 1500).remove(1);
    for id in 0..8 {
        assert_eq!(run(&world, Hook::FromPod, [&later(id)]), []);
    }
    let passed = |id| (Verdict::PASS, later(id));
    assert_eq!(run(&world, Hook::FromPod, [&later(8)]), [passed(8)]);
    assert_eq!(world.counted(Reason::FragmentLimit), 1);
    world.now_ticks += 3;
    assert_eq!(run(&world, Hook::FromPod, [&later(9)]), []);
    assert_eq!(world.counted(Reason::FragmentEvicted), 1);
    world.now_ticks += world.config.fragment_ticks;
    assert_eq!(run(&world, Hook::FromPod, [&later(10)]), []);
    assert_eq!(world.counted(Reason::FragmentTimedOut), 1);
    assert_eq!(world.fragments.held.borrow().len(), 8);
}

#[test]
fn a_source_and_a_datagram_have_a_share() {
    for ends in families() {
        let mut world = world();
        world.config.held = 8 * (HELD_OF_DATAGRAM + 6);
        let later = &cut(ends.pod, ends.service, 1, 1500)[1];
        for _ in 0..HELD_OF_DATAGRAM {
            assert_eq!(run(&world, Hook::FromPod, [later]), []);
        }
        assert_eq!(run(&world, Hook::FromPod, [later]).len(), 1, "of its datagram");
        for id in 2..8 {
            let later = &cut(ends.pod, ends.service, id, 1500)[1];
            assert_eq!(run(&world, Hook::FromPod, [later]), []);
        }
        let later = &cut(ends.pod, ends.service, 8, 1500)[1];
        assert_eq!(run(&world, Hook::FromPod, [later]).len(), 1, "of its source");
        assert_eq!(world.counted(Reason::FragmentLimit), 2);
        let of_other = &cut(ends.client, ends.service, 8, 1500)[1];
        assert_eq!(run(&world, Hook::FromPod, [of_other]), []);
        // A share comes back with the first fragment.
        let first = &cut(ends.pod, ends.service, 1, 1500)[0];
        run(&world, Hook::FromPod, [first]);
        assert_eq!(run(&world, Hook::FromPod, [later]), []);
    }
}

#[test]
fn the_largest_datagrams_fit_in_reverse() {
    for ends in families() {
        let world = world();
        let sent = cut(ends.pod, ends.service, 1, 63_000);
        assert_eq!(sent.len(), 64);
        let out = bytes(&run(&world, Hook::FromPod, sent.iter().rev()));
        assert_eq!(joined(&out).1, ends.backend);
        assert_idle(&world);
    }
}

#[test]
fn what_is_too_large_or_too_short_passes() {
    for ends in families() {
        let world = world();
        let large = frame(ends.pod, ends.service, 1, (proto::UDP, 8000, true), &[0; 4000]);
        let mut short = frame(ends.pod, ends.service, 2, (proto::UDP, 8, true), &[0; 40]);
        short.truncate(short.len() - 1);
        for bytes in [large, short] {
            assert_eq!(run(&world, Hook::FromPod, [&bytes]), [(Verdict::PASS, bytes)]);
        }
        assert_eq!(world.counted(Reason::FragmentTooLarge), 1);
        assert_eq!(world.counted(Reason::Truncated), 1);
        assert!(world.fragments.held.borrow().is_empty());
    }
}

#[test]
fn other_protocols_and_atomic_fragments_are_no_datagrams_of_ours() {
    for ends in families() {
        let world = world();
        let icmp = if ends.pod.is_ipv4() {
            proto::ICMP
        } else {
            proto::ICMPV6
        };
        for (offset, more) in [(0, true), (1000, true), (2000, false)] {
            for l4 in [icmp, proto::SCTP] {
                let bytes = frame(ends.pod, ends.service, 1, (l4, offset, more), &[0; 1000]);
                assert_eq!(run(&world, Hook::FromPod, [&bytes]), [(Verdict::PASS, bytes)]);
            }
        }
        let whole = cut(ends.pod, ends.service, 1, 500);
        let out = bytes(&run(&world, Hook::FromPod, &whole));
        assert_eq!(joined(&out).1, ends.backend);
        assert!(world.v4.datagrams.borrow().is_empty() && world.v6.datagrams.borrow().is_empty());
        assert!(world.fragments.held.borrow().is_empty());
    }
}

#[test]
fn segments_of_tcp_are_no_different() {
    let [ends, _] = families();
    let mut world = world();
    let key = V4::frontend_key(
        any(ends.service.ip())[0],
        ends.service.port().to_be(),
        proto::TCP,
        Scope::Internal,
    );
    world.v4.frontends.insert(key, 0);
    world.add_port(proto::TCP, ends.service.port(), false);
    let mut segment = [ends.pod.port().to_be_bytes(), ends.service.port().to_be_bytes()].concat();
    segment.extend([0, 0, 0, 9, 0, 0, 0, 7, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    segment.extend([7; 2500]);
    let l4_sum = |to: SocketAddr, segment: &[u8]| {
        let mut covered = pseudo(ends.pod, to, segment.len());
        *covered.last_mut().expect("a pseudo header") = proto::TCP;
        covered.extend(segment);
        checksum::fold(checksum::sum(&covered))
    };
    let sum = !l4_sum(ends.service, &segment);
    segment[16..18].copy_from_slice(&sum.to_ne_bytes());
    let pieces = segment.chunks(1000).enumerate();
    let sent: Vec<Vec<u8>> = pieces
        .map(|(at, piece)| frame(ends.pod, ends.service, 1, (proto::TCP, at * 1000, at != 2), piece))
        .collect();
    let out = bytes(&run(&world, Hook::FromPod, sent.iter().rev()));
    assert_idle(&world);
    // The first comes out first, the others in the order in which they came.
    let l4 = ETHERNET_LEN + 20;
    let joined = [&out[0][l4..], &out[2][l4..], &out[1][l4..]].concat();
    assert_eq!(
        joined[..4],
        [ends.pod.port().to_be_bytes(), ends.backend.port().to_be_bytes()].concat()
    );
    assert_eq!(l4_sum(ends.backend, &joined), 0xffff);
    let mut backend = octets(ends.backend.ip());
    backend.truncate(4);
    assert!(out.iter().all(|frame| frame[ETHERNET_LEN + 16..l4] == backend));
}
