//! Packets through the host build, one after the other, and what each of them becomes.

extern crate std;

mod affinity;
mod datagrams;
mod direct;
mod endings;
mod left;
mod policies;
mod sources;
mod unbound;

use std::{vec, vec::Vec};

use crate::{
    addr::{Family, V4, proto},
    backend::{Backend, BackendHead, backend_state},
    checksum,
    device::own_flags,
    flow::{FlowEvent, FlowMeta, flow_state},
    memory::{Frame, Memory, MemoryRange, MemoryRoute},
    parse::{ETHERNET_LEN, tcp},
    pipeline::Context,
    reason::Reason,
    service::{ECHO_PORT, Scope, Service, ServiceHead, service_flags},
    traffic::Traffic,
    verdict::{Action, Hook, Verdict},
};

const POD: [u8; 4] = [10, 244, 0, 10];
const SERVICE: [u8; 4] = [10, 96, 0, 1];
const BACKENDS: [[u8; 4]; 2] = [[10, 244, 1, 5], [10, 244, 1, 6]];
const NODE: [u8; 4] = [192, 168, 0, 1];
const CLIENT: [u8; 4] = [203, 0, 113, 7];
const DEVICE: u32 = 20;

const FROM_POD: Context = at(Hook::FromPod);
const TO_POD: Context = at(Hook::ToPod);
const FROM_NETDEV: Context = at(Hook::FromNetdev);

const fn at(hook: Hook) -> Context {
    Context {
        hook,
        ifindex: DEVICE,
        from_host: false,
        l3: ETHERNET_LEN,
    }
}

type End = ([u8; 4], u16);

/// In every TCP packet; the number after it is acknowledged.
const SEQUENCE: u32 = 0x0100_0009;

/// TCP and UDP port 80 of a service, and node port 30080, in front of `backends`.
fn world(backends: &[[u8; 4]]) -> Memory {
    let mut world = Memory::default();
    for addr in backends {
        world.backends.push(Backend {
            head: BackendHead {
                generation: 1,
                port_be: 8080u16.to_be(),
                state: backend_state::ACTIVE,
                flags: 0,
            },
            addr_be: [u32::from_ne_bytes(*addr), 0, 0, 0],
            ..Backend::default()
        });
    }
    let ids: Vec<u32> = (0..backends.len() as u32).collect();
    let slots_offset = if ids.is_empty() { 0 } else { world.add_slice(&ids) };
    world.services.push(Service {
        head: ServiceHead {
            slots_offset,
            generation: 1,
            size_class: u8::from(!ids.is_empty()),
            flags: 0,
        },
        ..Service::default()
    });
    for l4 in [proto::TCP, proto::UDP] {
        for (addr, port, scope) in [(SERVICE, 80, Scope::Internal), ([0; 4], 30080, Scope::External)] {
            let key = V4::frontend_key(u32::from_ne_bytes(addr), u16::to_be(port), l4, scope);
            world.v4.frontends.insert(key, 0);
            world.add_port(l4, port, addr == [0; 4]);
        }
    }
    let own = u32::from_ne_bytes(NODE);
    world.v4.own_addresses.insert(own, own_flags::NODE_PORT);
    let device = crate::device::Device {
        snat4_be: own,
        ..Default::default()
    };
    world.devices.insert(DEVICE, device);
    world.routes.push(MemoryRoute {
        version: 4,
        network: [0; 4],
        length: 0,
        ifindex: DEVICE,
        mtu: 1500,
        macs: Some(Default::default()),
    });
    world
}

fn ip(l4: u8, src: [u8; 4], dst: [u8; 4], body: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0];
    packet.extend((20 + body.len() as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, l4, 0, 0]);
    packet.extend(src);
    packet.extend(dst);
    let sum = !checksum::fold(checksum::sum(&packet));
    packet[10..12].copy_from_slice(&sum.to_ne_bytes());
    packet.extend(body);
    packet
}

/// The sum over a message, with a pseudo header where there is one: 0xffff if its checksum is right.
fn l4_sum(packet: &[u8]) -> u16 {
    let mut bytes = packet[20..].to_vec();
    if packet[9] != proto::ICMP {
        bytes.extend(&packet[12..20]);
        bytes.extend([0, packet[9]]);
        bytes.extend((packet.len() as u16 - 20).to_be_bytes());
    }
    checksum::fold(checksum::sum(&bytes))
}

fn segment(l4: u8, (src, sport): End, (dst, dport): End, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(sport.to_be_bytes());
    body.extend(dport.to_be_bytes());
    let sum_at = if l4 == proto::TCP {
        let [sequence, acknowledged] = [SEQUENCE, SEQUENCE + 1].map(u32::to_be_bytes);
        body.extend([sequence, acknowledged].concat());
        body.extend([0x50, flags, 1, 0, 0, 0, 0, 0]);
        36
    } else {
        body.extend((8 + payload.len() as u16).to_be_bytes());
        body.extend([0, 0]);
        26
    };
    body.extend(payload);
    // Even, so that the pseudo header can be summed behind it.
    assert_eq!(payload.len() % 2, 0);
    let mut packet = ip(l4, src, dst, &body);
    let sum = !l4_sum(&packet);
    packet[sum_at..sum_at + 2].copy_from_slice(&sum.to_ne_bytes());
    packet
}

/// `kind`: type and code.
fn icmp_error(kind: [u8; 2], (src, dst): ([u8; 4], [u8; 4]), quoted: &[u8]) -> Vec<u8> {
    let mut body = vec![kind[0], kind[1], 0, 0, 0, 0, 5, 0];
    body.extend(quoted);
    let sum = !checksum::fold(checksum::sum(&body));
    body[2..4].copy_from_slice(&sum.to_ne_bytes());
    ip(proto::ICMP, src, dst, &body)
}

fn tcp_packet(src: End, dst: End, flags: u8) -> Vec<u8> {
    segment(proto::TCP, src, dst, flags, &[])
}

/// Runs an IPv4 packet and checks the checksums of what it becomes.
fn run(world: &Memory, at: &Context, packet: &[u8]) -> (Verdict, Vec<u8>) {
    let mut frame = Frame::new([&[2; 12][..], &[8, 0], packet].concat());
    let verdict = world.run(&mut frame, at);
    let packet = frame.bytes.split_off(ETHERNET_LEN);
    assert_eq!(
        checksum::fold(checksum::sum(&packet[..20])),
        0xffff,
        "IP checksum"
    );
    assert_eq!(l4_sum(&packet), 0xffff, "layer 4 checksum");
    (verdict, packet)
}

fn ends(packet: &[u8]) -> (End, End) {
    let addr = |from: usize| [packet[from], packet[from + 1], packet[from + 2], packet[from + 3]];
    let port = |from: usize| u16::from_be_bytes([packet[from], packet[from + 1]]);
    ((addr(12), port(20)), (addr(16), port(22)))
}

/// A connection from the pod by way of the service; the backend that has it.
fn connect(world: &Memory, sport: u16) -> End {
    let (verdict, syn) = run(
        world,
        &FROM_POD,
        &tcp_packet((POD, sport), (SERVICE, 80), tcp::SYN),
    );
    assert_eq!(verdict, Verdict::PASS);
    let backend = ends(&syn).1;
    let (_, answer) = run(
        world,
        &TO_POD,
        &tcp_packet(backend, (POD, sport), tcp::SYN | tcp::ACK),
    );
    assert_eq!(ends(&answer), ((SERVICE, 80), (POD, sport)));
    let ack = tcp_packet((POD, sport), (SERVICE, 80), tcp::ACK);
    assert_eq!(ends(&run(world, &FROM_POD, &ack).1).1, backend);
    backend
}

/// The entry of the pod's packets.
fn meta(world: &Memory, sport: u16) -> FlowMeta {
    let flows = world.v4.flows.borrow();
    let found = flows
        .iter()
        .find(|(key, _)| key.src_be == u32::from_ne_bytes(POD) && key.sport_be == sport.to_be());
    *V4::meta(found.expect("the connection is established").1)
}

#[test]
fn cluster_ip_there_and_back() {
    let world = world(&BACKENDS[..1]);
    assert_eq!(connect(&world, 4000), (BACKENDS[0], 8080));
    assert_eq!(world.v4.flows.borrow().len(), 2);
    let datagram = segment(proto::UDP, (POD, 4000), (SERVICE, 80), 0, b"ping");
    let (_, out) = run(&world, &FROM_POD, &datagram);
    assert_eq!(ends(&out), ((POD, 4000), (BACKENDS[0], 8080)));
}

/// A packet whose acknowledgement number is off by so much, towards either side.
fn guessing(mut packet: Vec<u8>, by: u32) -> Vec<u8> {
    packet[28..32].copy_from_slice(&(SEQUENCE + 1).wrapping_add(by).to_be_bytes());
    packet[36..38].copy_from_slice(&[0, 0]);
    let sum = !l4_sum(&packet);
    packet[36..38].copy_from_slice(&sum.to_ne_bytes());
    packet
}

#[test]
fn floods_never_enter_the_flows_answered_or_not() {
    let world = world(&BACKENDS);
    for flood in 0..2000u32 {
        let client = ([198, 18, (flood >> 8) as u8, flood as u8], 4000);
        let (_, syn) = run(&world, &FROM_POD, &tcp_packet(client, (SERVICE, 80), tcp::SYN));
        let backend = ends(&syn).1;
        let flags = if flood % 3 == 0 { tcp::RST } else { tcp::SYN } | tcp::ACK;
        let (_, answer) = run(&world, &TO_POD, &tcp_packet(backend, client, flags));
        assert_eq!(ends(&answer), ((SERVICE, 80), client));
        // Whoever forges the source does not see the number to acknowledge.
        let guess = flood.wrapping_mul(0x9e37_79b1) | 1 << 23;
        let ack = tcp_packet(client, (SERVICE, 80), tcp::ACK);
        let (_, out) = run(&world, &FROM_POD, &guessing(ack, guess));
        assert_eq!(ends(&out), (client, backend));
        let datagram = segment(proto::UDP, client, (SERVICE, 80), 0, b"ping");
        let (_, out) = run(&world, &FROM_POD, &datagram);
        for _ in 0..2 {
            let answer = segment(proto::UDP, ends(&out).1, client, 0, b"pong");
            assert_eq!(ends(&run(&world, &TO_POD, &answer).1), ((SERVICE, 80), client));
        }
    }
    assert!(world.v4.flows.borrow().is_empty());
    let events = |of: FlowEvent| world.flow_events.borrow()[of as usize];
    assert_eq!(events(FlowEvent::Begun), 4000);
    assert_eq!(events(FlowEvent::Established), 0);
    // A third of the SYNs was refused.
    assert_eq!(events(FlowEvent::Answered), 4000 - 667);
}

#[test]
fn a_flow_is_established_when_the_client_goes_on() {
    for (l4, ahead) in [(proto::TCP, 0), (proto::TCP, 1400), (proto::UDP, 0)] {
        let mut world = world(&BACKENDS);
        let (client, service) = ((POD, 4000), (SERVICE, 80));
        let first = segment(l4, client, service, tcp::SYN, &[]);
        let backend = ends(&run(&world, &FROM_POD, &first).1).1;
        let answer = segment(l4, backend, client, tcp::SYN | tcp::ACK, &[]);
        assert_eq!(ends(&run(&world, &TO_POD, &answer).1), (service, client));
        assert!(world.v4.flows.borrow().is_empty());
        // Whatever becomes of the service's slice meanwhile.
        let id = u32::from(backend.0 == BACKENDS[1]);
        world.services[0].head.slots_offset = world.add_slice(&[1 - id]);
        let mut second = segment(l4, client, service, tcp::ACK, b"data");
        if l4 == proto::TCP {
            second = guessing(second, ahead);
        }
        for _ in 0..2 {
            assert_eq!(ends(&run(&world, &FROM_POD, &second).1), (client, backend));
            assert_eq!(world.v4.flows.borrow().len(), 2);
        }
        let answer = segment(l4, backend, client, tcp::ACK, b"data");
        assert_eq!(ends(&run(&world, &TO_POD, &answer).1), (service, client));
        assert_eq!(world.flow_events.borrow()[..], [1, 1, 1]);
        assert!(world.v4.flows.borrow().values().all(|flow| {
            let meta = V4::meta(flow);
            (meta.state, meta.sequence) == (flow_state::OPEN, [0; 3])
        }));
    }
}

#[test]
fn a_client_stays_with_the_first_backend_that_answers_its_syn() {
    let mut world = world(&BACKENDS);
    let (client, service) = ((POD, 4000), (SERVICE, 80));
    let syn = tcp_packet(client, service, tcp::SYN);
    let mut backends = Vec::new();
    for id in [0, 1] {
        world.services[0].head.slots_offset = world.add_slice(&[id]);
        backends.push(ends(&run(&world, &FROM_POD, &syn).1).1);
    }
    assert_ne!(backends[0], backends[1]);
    let mut outcomes = Vec::new();
    for backend in [backends[0], backends[1], backends[0]] {
        let answer = tcp_packet(backend, client, tcp::SYN | tcp::ACK);
        outcomes.push(run(&world, &TO_POD, &answer).0);
    }
    let superseded = Verdict::drop(Reason::FlowSuperseded);
    assert_eq!(outcomes, [Verdict::PASS, superseded, Verdict::PASS]);
    let ack = tcp_packet(client, service, tcp::ACK);
    assert_eq!(ends(&run(&world, &FROM_POD, &ack).1).1, backends[0]);
    // It gives up and begins anew: the other one may answer.
    let rst = tcp_packet(client, service, tcp::RST);
    assert_eq!(ends(&run(&world, &FROM_POD, &rst).1).1, backends[0]);
    assert_eq!(ends(&run(&world, &FROM_POD, &syn).1).1, backends[1]);
    let answer = tcp_packet(backends[1], client, tcp::SYN | tcp::ACK);
    assert_eq!(run(&world, &TO_POD, &answer).0, Verdict::PASS);
}

#[test]
fn a_client_that_begins_anew_from_its_port_hears_one_of_two_backends() {
    let (client, service) = ((POD, 4000), (SERVICE, 80));
    let send = |world: &Memory, flags| ends(&run(world, &FROM_POD, &tcp_packet(client, service, flags)).1).1;
    let answer = |world: &Memory, backend, flags| run(world, &TO_POD, &tcp_packet(backend, client, flags)).0;
    let superseded = Verdict::drop(Reason::FlowSuperseded);
    for is_old_first in [true, false] {
        let mut world = world(&BACKENDS);
        world.services[0].head.slots_offset = world.add_slice(&[0]);
        let old = send(&world, tcp::SYN);
        assert_eq!(answer(&world, old, tcp::SYN | tcp::ACK), Verdict::PASS);
        send(&world, tcp::ACK);
        assert_eq!(
            (world.v4.flows.borrow().len(), world.v4.half_open.borrow().len()),
            (2, 0)
        );
        send(&world, tcp::FIN | tcp::ACK);
        assert_eq!(send(&world, tcp::SYN), old);
        // Its backend leaves before the SYN is sent again; then both answer.
        world.backends[0].head.state = backend_state::DRAINING;
        world.services[0].head.slots_offset = world.add_slice(&[1]);
        let new = send(&world, tcp::SYN);
        assert_ne!(new, old);
        let [first, second] = if is_old_first { [old, new] } else { [new, old] };
        assert_eq!(answer(&world, first, tcp::SYN | tcp::ACK), Verdict::PASS);
        assert_eq!(answer(&world, second, tcp::SYN | tcp::ACK), superseded);
        assert_eq!(send(&world, tcp::ACK), first);
        assert_eq!(answer(&world, second, tcp::SYN | tcp::ACK), superseded);
        assert_eq!(answer(&world, first, tcp::ACK), Verdict::PASS);
        assert_eq!(world.flow_events.borrow()[..], [3, 2, 2]);
    }
}

#[test]
fn hairpin_shows_the_service_as_source() {
    let world = world(&[POD]);
    let (verdict, out) = run(
        &world,
        &FROM_POD,
        &tcp_packet((POD, 4000), (SERVICE, 80), tcp::SYN),
    );
    assert_eq!(verdict, Verdict::to(Action::Pod, DEVICE));
    assert_eq!(ends(&out), ((SERVICE, 4000), (POD, 8080)));
    let answer = tcp_packet((POD, 8080), (SERVICE, 4000), tcp::SYN | tcp::ACK);
    let (verdict, out) = run(&world, &FROM_POD, &answer);
    assert_eq!(verdict, Verdict::to(Action::Pod, DEVICE));
    assert_eq!(ends(&out), ((SERVICE, 80), (POD, 4000)));
}

#[test]
fn loopback_addresses_are_for_processes_of_this_host_and_are_seen_by_nobody_else() {
    const LO: u32 = 1;
    const LOCALHOST: [u8; 4] = [127, 0, 0, 1];
    let to_lo = Context {
        ifindex: LO,
        from_host: true,
        ..at(Hook::ToLo)
    };
    let mut world = world(&BACKENDS[..1]);
    let localhost = u32::from_ne_bytes(LOCALHOST);
    for (addr, port) in [(0, 30080u16), (localhost, 8081)] {
        world.add_port(proto::TCP, port, addr == 0);
        let key = V4::frontend_key(addr, port.to_be(), proto::TCP, Scope::Internal);
        world.v4.frontends.insert(key, 0);
    }
    world.v4.own_addresses.insert(localhost, 0);
    let ask = |world: &Memory, at: &Context, port| {
        run(
            world,
            at,
            &tcp_packet((LOCALHOST, 4000), (LOCALHOST, port), tcp::SYN),
        )
    };
    // Without the switch, a host port that a Pod has there has no source to be asked from.
    assert_eq!(ask(&world, &to_lo, 30080).0, Verdict::PASS);
    assert_eq!(ask(&world, &to_lo, 8081).0, Verdict::drop(Reason::NoSnatAddress));

    world
        .v4
        .own_addresses
        .insert(localhost, own_flags::HOST_NODE_PORT);
    let lo = world.devices[&DEVICE];
    world.devices.insert(LO, lo);
    for port in [30080, 8081] {
        for other in [FROM_NETDEV, FROM_POD] {
            let spoofed = tcp_packet((CLIENT, 4000), (LOCALHOST, port), tcp::SYN);
            assert_eq!(run(&world, &other, &spoofed), (Verdict::PASS, spoofed));
        }
        let (verdict, out) = ask(&world, &to_lo, port);
        assert_eq!(verdict, Verdict::to(Action::Transmit, DEVICE));
        let (source, backend) = ends(&out);
        assert_eq!((source.0, backend), (NODE, (BACKENDS[0], 8080)));
        assert!(source.1 >= world.config.snat_port_min, "{source:?}");
        let answer = tcp_packet(backend, source, tcp::SYN | tcp::ACK);
        let (verdict, out) = run(&world, &FROM_NETDEV, &answer);
        assert_eq!(verdict, Verdict::to(Action::Host, LO));
        assert_eq!(ends(&out), ((LOCALHOST, port), (LOCALHOST, 4000)));
    }
}

#[test]
fn a_taken_port_leads_to_another_and_none_left_to_a_drop() {
    let mut world = world(&BACKENDS[..1]);
    world.config.snat_port_min = 61_000;
    world.config.snat_port_max = 61_001;
    let mut ports = Vec::new();
    for sport in 4000..4020 {
        let syn = tcp_packet((CLIENT, sport), (NODE, 30080), tcp::SYN);
        let (verdict, out) = run(&world, &FROM_NETDEV, &syn);
        if verdict == Verdict::drop(Reason::SnatPortsExhausted) {
            continue;
        }
        assert_eq!(verdict, Verdict::to(Action::Transmit, DEVICE));
        let ((source, port), backend) = ends(&out);
        assert_eq!((source, backend), (NODE, (BACKENDS[0], 8080)));
        ports.push(port);
    }
    ports.sort_unstable();
    assert_eq!(ports, [61_000, 61_001]);
    assert_eq!(world.counted(Reason::SnatPortsExhausted), 18);
    assert_eq!(dropped(&world), [18, 18]);
}

/// All that is counted of services, and of backends.
fn counted(world: &Memory) -> [Traffic; 2] {
    [&world.traffic.services, &world.traffic.backends].map(|of| {
        let mut sum = Traffic::default();
        for one in of.borrow().values() {
            sum += *one;
        }
        sum
    })
}

/// What services have not begun, and backends that had been chosen for it.
fn dropped(world: &Memory) -> [u64; 2] {
    counted(world).map(|traffic| traffic.dropped)
}

#[test]
fn what_does_not_fit_is_told_and_a_super_packet_is_as_large_as_its_segments() {
    let mut world = world(&BACKENDS[..1]);
    world.routes[0].mtu = 1400;
    let sent = segment(proto::TCP, (CLIENT, 4000), (NODE, 30080), tcp::ACK, &[7; 1380]);
    let of = |gso_size| {
        let mut frame = Frame::new([&[2; 12][..], &[8, 0], &sent].concat());
        frame.gso_size = gso_size;
        frame
    };
    for mut frame in [of(0), of(1361)] {
        assert_eq!(world.run(&mut frame, &FROM_NETDEV), Verdict::ANSWER);
        let answer = &frame.bytes[ETHERNET_LEN..];
        assert_eq!((&answer[12..16], &answer[16..20]), (&NODE[..], &CLIENT[..]));
        // Fragmentation needed, the MTU, and the packet as the client knows it.
        assert_eq!(
            (&answer[20..22], &answer[26..28]),
            (&[3, 4][..], &1400u16.to_be_bytes()[..])
        );
        assert_eq!(answer[28..], sent[..28]);
        assert_eq!(l4_sum(answer), 0xffff);
    }
    // 20 bytes of each header, and segments that just fit.
    let verdict = world.run(&mut of(1360), &FROM_NETDEV);
    assert_eq!(verdict, Verdict::to(Action::Transmit, DEVICE));
}

#[test]
fn a_flow_leaves_a_backend_that_is_gone_or_another() {
    for reused in [false, true] {
        let mut world = world(&BACKENDS);
        let before = connect(&world, 4000);
        let id = meta(&world, 4000).backend;
        let other = 1 - id;
        let head = &mut world.backends[id as usize].head;
        if reused {
            head.generation += 1;
        } else {
            head.state = backend_state::GONE;
        }
        world.services[0].head.slots_offset = world.add_slice(&[other]);
        let ack = tcp_packet((POD, 4000), (SERVICE, 80), tcp::ACK);
        let (_, out) = run(&world, &FROM_POD, &ack);
        let after = ends(&out).1;
        assert_eq!(after, (BACKENDS[other as usize], 8080));
        assert_ne!(before, after);
    }
}

/// A client uses a port again at once, as it may after an RST, which only the other direction's entry has seen.
#[test]
fn a_port_that_is_used_again_leads_away_from_a_backend_that_takes_no_new_connections() {
    for state in [
        backend_state::SERVING,
        backend_state::DRAINING,
        backend_state::GONE,
    ] {
        let mut world = world(&BACKENDS);
        let before = connect(&world, 4000);
        let id = meta(&world, 4000).backend;
        world.services[0].head.slots_offset = world.add_slice(&[1 - id]);
        world.backends[id as usize].head.state = state;
        assert_ne!(connect(&world, 4000), before);
        assert_eq!(meta(&world, 4000).backend, 1 - id);
    }
}

#[test]
fn a_deleted_service_keeps_its_connections_and_begins_none() {
    let mut world = world(&BACKENDS[..1]);
    let backend = connect(&world, 4000);
    world.services[0].head.flags |= service_flags::DELETED;
    world.v4.frontends.clear();
    let (_, out) = run(
        &world,
        &FROM_POD,
        &tcp_packet((POD, 4000), (SERVICE, 80), tcp::ACK),
    );
    assert_eq!(ends(&out).1, backend);
    let syn = tcp_packet((POD, 4001), (SERVICE, 80), tcp::SYN);
    assert_eq!(run(&world, &FROM_POD, &syn), (Verdict::PASS, syn));
}

#[test]
fn without_endpoints_tcp_is_reset_and_udp_told() {
    let world = world(&[]);
    let syn = tcp_packet((POD, 4000), (SERVICE, 80), tcp::SYN);
    let (verdict, reset) = run(&world, &FROM_POD, &syn);
    assert_eq!(verdict, Verdict::ANSWER);
    assert_eq!(ends(&reset), ((SERVICE, 80), (POD, 4000)));
    assert_eq!(reset[33], tcp::RST | tcp::ACK);
    assert_eq!(
        reset[28..32],
        (SEQUENCE + 1).to_be_bytes(),
        "one more than the SYN's number"
    );
    let datagram = segment(proto::UDP, (POD, 4000), (SERVICE, 80), 0, b"ping");
    let (verdict, error) = run(&world, &FROM_POD, &datagram);
    assert_eq!(verdict, Verdict::ANSWER);
    assert_eq!((error[9], &error[20..22]), (proto::ICMP, &[3, 3][..]));
    assert_eq!(error[28..], datagram[..28]);
    assert_eq!((&error[12..16], &error[16..20]), (&SERVICE[..], &POD[..]));
}

#[test]
fn icmp_errors_are_translated_both_ways() {
    let world = world(&BACKENDS[..1]);
    let backend = connect(&world, 4000);
    let error = |src, dst, quoted: &[u8]| icmp_error([3, 4], (src, dst), quoted);
    // A router tells the pod about its packet to the backend, then the pod tells the backend about an answer.
    let router = [192, 0, 2, 1];
    let sent = tcp_packet((POD, 4000), backend, tcp::ACK);
    let meant = tcp_packet((POD, 4000), (SERVICE, 80), tcp::ACK);
    let (_, out) = run(&world, &TO_POD, &error(router, POD, &sent));
    assert_eq!((&out[12..16], &out[16..20]), (&router[..], &POD[..]));
    assert_eq!(out[28..], meant);
    let got = tcp_packet((SERVICE, 80), (POD, 4000), tcp::ACK);
    let meant = tcp_packet(backend, (POD, 4000), tcp::ACK);
    let (_, out) = run(&world, &FROM_POD, &error(POD, SERVICE, &got));
    assert_eq!((&out[12..16], &out[16..20]), (&POD[..], &backend.0[..]));
    assert_eq!(out[28..], meant);
}

#[test]
fn pings_to_services_are_answered_where_a_row_says_so() {
    let mut world = world(&BACKENDS);
    let key = V4::frontend_key(
        u32::from_ne_bytes(SERVICE),
        ECHO_PORT,
        proto::ICMP,
        Scope::Internal,
    );
    let ping = |kind, code, dst| {
        let mut body = vec![kind, code, 0, 0, 0x12, 0x34, 0, 7];
        body.extend(b"odd");
        let mut even = body.clone();
        even.push(0);
        let sum = !checksum::fold(checksum::sum(&even));
        body[2..4].copy_from_slice(&sum.to_ne_bytes());
        // The test's own sums are over even bytes.
        body.push(0);
        ip(proto::ICMP, POD, dst, &body)
    };
    let request = ping(8, 0, SERVICE);
    assert_eq!(run(&world, &FROM_POD, &request), (Verdict::PASS, request.clone()));
    world.v4.frontends.insert(key, 0);
    let (verdict, reply) = run(&world, &FROM_POD, &request);
    assert_eq!(verdict, Verdict::ANSWER);
    assert_eq!((&reply[12..16], &reply[16..20]), (&SERVICE[..], &POD[..]));
    assert_eq!((&reply[20..22], &reply[24..]), (&[0, 0][..], &request[24..]));
    let to_lo = Context {
        from_host: true,
        ..at(Hook::ToLo)
    };
    for (at, packet) in [
        // From outside nobody may ask this address, XDP leaves it to TC, at `lo` the kernel answers.
        (FROM_NETDEV, request.clone()),
        (at(Hook::Xdp), request.clone()),
        (TO_POD, request.clone()),
        (to_lo, request),
        (FROM_POD, ping(8, 1, SERVICE)),
        (FROM_POD, ping(0, 0, SERVICE)),
        (FROM_POD, ping(8, 0, NODE)),
        (FROM_POD, ping(8, 0, CLIENT)),
    ] {
        assert_eq!(run(&world, &at, &packet), (Verdict::PASS, packet));
    }
}

#[test]
fn fin_closes_and_data_opens_again() {
    let world = world(&BACKENDS[..1]);
    connect(&world, 4000);
    let (client, service) = ((POD, 4000), (SERVICE, 80));
    for flag in [tcp::FIN, tcp::RST] {
        run(&world, &FROM_POD, &tcp_packet(client, service, flag | tcp::ACK));
        assert_eq!(meta(&world, 4000).state, flow_state::CLOSING);
        run(&world, &FROM_POD, &tcp_packet(client, service, tcp::ACK));
        assert_eq!(meta(&world, 4000).state, flow_state::CLOSING);
        let data = segment(proto::TCP, client, service, tcp::ACK, b"data");
        run(&world, &FROM_POD, &data);
        assert_eq!(meta(&world, 4000).state, flow_state::OPEN);
    }
}

#[test]
fn a_flow_may_begin_in_mid_stream() {
    let world = world(&BACKENDS[..1]);
    let (client, service) = ((POD, 4000), (SERVICE, 80));
    let (_, out) = run(&world, &FROM_POD, &tcp_packet(client, service, tcp::ACK));
    let backend = ends(&out).1;
    assert_eq!(backend, (BACKENDS[0], 8080));
    let (_, out) = run(&world, &TO_POD, &tcp_packet(backend, client, tcp::ACK));
    assert_eq!(ends(&out), (service, client));
    assert_eq!(world.v4.flows.borrow().len(), 2);
}

#[test]
fn source_ranges_are_for_new_flows_and_come_before_everything_else() {
    for backends in [&BACKENDS[..], &[]] {
        let mut world = world(backends);
        world.services[0].head.flags = service_flags::RANGES;
        let syn = |client, sport| tcp_packet((client, sport), (NODE, 30080), tcp::SYN);
        let drop = Verdict::drop(Reason::SourceRange);
        assert_eq!(run(&world, &FROM_NETDEV, &syn(CLIENT, 4000)).0, drop);
        for (service, network, length) in [
            (1, CLIENT, 32),
            (0, [203, 0, 112, 0], 24),
            (0, [203, 0, 113, 4], 30),
        ] {
            world.v4.ranges.push(MemoryRange {
                service,
                network: [u32::from_ne_bytes(network), 0, 0, 0],
                length,
            });
        }
        assert_ne!(run(&world, &FROM_NETDEV, &syn(CLIENT, 4000)).0, drop);
        assert_eq!(run(&world, &FROM_NETDEV, &syn([203, 0, 113, 8], 4000)).0, drop);
        assert_eq!(run(&world, &at(Hook::Xdp), &syn([203, 0, 113, 8], 4000)).0, drop);
        assert_eq!(world.counted(Reason::SourceRange), 3);
        let refused = u64::from(backends.is_empty());
        assert_eq!(dropped(&world)[0], 3 + refused);
    }
    let mut world = world(&BACKENDS[..1]);
    let backend = connect(&world, 4000);
    world.services[0].head.flags = service_flags::RANGES;
    let ack = tcp_packet((POD, 4000), (SERVICE, 80), tcp::ACK);
    assert_eq!(ends(&run(&world, &FROM_POD, &ack).1).1, backend);
    let syn = tcp_packet((POD, 4001), (SERVICE, 80), tcp::SYN);
    assert_eq!(run(&world, &FROM_POD, &syn).0, Verdict::drop(Reason::SourceRange));
}
