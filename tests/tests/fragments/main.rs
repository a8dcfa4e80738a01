//! Datagrams in fragments through Services, both ways, byte for byte: cut by the kernel, and cut by hand and sent out of
//! order, interleaved, duplicated.

mod raw;
mod stage;

use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use dataplane_tests::agent;
use dataplane_tests::shape::Network;

use stage::{CLIENT, OUTSIDE, PORT, REVERSE, SERVICES, Stage, cluster_ip, node_ip};

/// The largest payloads of UDP datagrams; in IPv6, behind an extension header of eight bytes.
const LARGEST4: usize = 65535 - 20 - 8;
const LARGEST6: usize = 65535 - 8 - 8;

/// Bytes that tell where they belong.
fn payload(first: u8, length: usize) -> Vec<u8> {
    let mut seed = u32::from(first) + length as u32;
    let mut bytes: Vec<u8> = (0..length)
        .map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 24) as u8
        })
        .collect();
    bytes[0] = first;
    bytes
}

/// Takes one answer for each of `sent`, in any order.
fn expect(socket: &UdpSocket, from: SocketAddr, sent: &[&[u8]]) -> Result<()> {
    let mut left = sent.to_vec();
    let mut bytes = vec![0; 65536];
    while !left.is_empty() {
        let (length, by) = socket
            .recv_from(&mut bytes)
            .with_context(|| format!("{} of {} answers are missing", left.len(), sent.len()))?;
        ensure!(by == from, "the answer of {from} comes from {by}");
        let answer = &bytes[..length];
        let found = left.iter().position(|sent| *sent == answer);
        left.remove(found.with_context(|| format!("nobody sent these {length} bytes"))?);
    }
    Ok(())
}

/// Who asks which address.
struct Way {
    client: &'static str,
    to: SocketAddr,
}

fn ways(v6: bool) -> Vec<Way> {
    let mut ways = Vec::new();
    for (number, (_, _, node_port)) in (1..).zip(SERVICES) {
        for client in [CLIENT, "node1"] {
            let to = SocketAddr::new(cluster_ip(number, v6), PORT);
            ways.push(Way { client, to });
        }
        let to = SocketAddr::new(node_ip(v6), node_port);
        ways.push(Way { client: OUTSIDE, to });
    }
    ways
}

/// A way's turn; ports and identifications are new in each.
struct Turn<'a> {
    stage: &'a Stage,
    way: &'a Way,
    socket: UdpSocket,
    id: u16,
}

impl Turn<'_> {
    fn raw(&mut self, payload: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.id += 1;
        let from = self.socket.local_addr()?;
        raw::fragments(from, self.way.to, self.id, payload, self.stage.extension_headers)
    }

    fn send<'a>(&self, packets: impl Iterator<Item = &'a Vec<u8>> + Send) -> Result<()> {
        let to = self.way.to.ip();
        self.stage
            .netns(self.way.client)?
            .enter(|| raw::send(to, packets))
    }

    fn by_the_kernel(&self, length: usize) -> Result<()> {
        for first in [b'a', REVERSE] {
            let payload = payload(first, length);
            let ask = || {
                self.socket.send_to(&payload, self.way.to)?;
                expect(&self.socket, self.way.to, &[&payload])
            };
            // Once, a sender may have to learn that the way is narrower than its own link.
            ask()
                .or_else(|_| ask())
                .with_context(|| format!("{length} bytes, answer {}", char::from(first)))?;
        }
        Ok(())
    }

    fn reversed(&mut self, length: usize) -> Result<()> {
        let payload = payload(b'a', length);
        let packets = self.raw(&payload)?;
        self.send(packets.iter().rev())?;
        expect(&self.socket, self.way.to, &[&payload]).context("from the last to the first")
    }

    /// Every order of three.
    fn every_order(&mut self) -> Result<()> {
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let payload = payload(b'b', 4000);
            let packets = self.raw(&payload)?;
            ensure!(packets.len() == 3, "{} fragments", packets.len());
            self.send(order.iter().map(|at| &packets[*at]))?;
            expect(&self.socket, self.way.to, &[&payload]).with_context(|| format!("{order:?}"))?;
        }
        Ok(())
    }

    fn interleaved(&mut self) -> Result<()> {
        let payloads = [
            payload(b'c', 20_000),
            payload(b'd', 20_000),
            payload(b'e', 20_000),
        ];
        let mut packets = Vec::new();
        for payload in &payloads {
            packets.push(self.raw(payload)?);
        }
        let mut mixed = Vec::new();
        for at in (0..packets[0].len()).rev() {
            mixed.extend(packets.iter().map(|packets| &packets[at]));
        }
        self.send(mixed.into_iter())?;
        let sent: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
        expect(&self.socket, self.way.to, &sent).context("three datagrams interleaved")
    }

    fn duplicated(&mut self) -> Result<()> {
        let payload = payload(b'f', 20_000);
        let packets = self.raw(&payload)?;
        let (first, others) = packets.split_first().context("no fragment")?;
        // All but one come twice before the first, which comes twice too.
        let twice = others[1..].iter().flat_map(|packet| [packet, packet]);
        self.send(twice.chain([first, first]).chain(&others[..1]))?;
        expect(&self.socket, self.way.to, &[&payload]).context("duplicated")
    }
}

fn every_way(name: &str, network: Network, flags: &[&str]) -> Result<()> {
    let Some(agent) = agent::built() else {
        return Ok(());
    };
    let stage = Stage::set(name, &agent, network, flags)?;
    let mut port = 20_000;
    for v6 in [false, true] {
        let largest = if v6 { LARGEST6 } else { LARGEST4 };
        for way in &ways(v6) {
            port += 1;
            let mut turn = Turn {
                stage: &stage,
                way,
                socket: stage.socket(way.client, port, v6)?,
                // No two datagrams of one client may have one identification within half a minute.
                id: (port - 20_000) * 100,
            };
            let mut run = || {
                for length in [1600, 3000, largest] {
                    turn.by_the_kernel(length)?;
                }
                turn.every_order()?;
                turn.reversed(largest)?;
                turn.interleaved()?;
                turn.duplicated()
            };
            run().with_context(|| format!("{} asks {}", way.client, way.to))?;
        }
    }
    // Every order means that some were held, and none is left.
    let held = stage.counted("node1", "fragment-held")?;
    ensure!(held > 0, "no fragment was held");
    ensure!(
        held == stage.counted("node1", "fragment-released")?,
        "not all were released"
    );
    for reason in [
        "fragment-limit",
        "fragment-too-large",
        "fragment-timed-out",
        "fragment-evicted",
    ] {
        let count = stage.counted("node1", reason)?;
        ensure!(count == 0, "{count} counted as {reason}");
    }
    Ok(())
}

#[test]
fn routed() -> Result<()> {
    every_way("frag-routed", Network::Routed, &["--socket-lb", "off"])
}

#[test]
fn overlay_and_masquerade() -> Result<()> {
    every_way("frag-vxlan", Network::Vxlan, &["--socket-lb", "off"])
}
