//! WireGuard devices, configured over generic netlink as `wg` does.

use std::net::{IpAddr, SocketAddrV4};

use anyhow::{Context, Result, bail, ensure};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

use crate::links::Prefix;
use crate::netns::NetNs;

/// A private and a public key.
pub type Keys = (&'static str, &'static str);

/// Two pairs for tests, of no worth.
pub const KEYS: [Keys; 2] = [
    (
        "e8f267fb88cddf24905c99743b0581752d295855f9e339b1d26f7201b0c4c145",
        "aa243ed9f237efe8f9a7dd37ace34731daba6b56896e2aad23d26988b231de30",
    ),
    (
        "c80d34130c4aa96825ac20114fba00a312d8925857a1192d21f7ae802e72626e",
        "86097b954a912718bf6fe9b6ff316f1b208a1e2e8be6a48074cef1e7665b405a",
    ),
];

const REQUEST_ACK: u16 = 0x1 | 0x4;
const NESTED: u16 = 1 << 15;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// One attribute: length, type, value, padding.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = (value.len() as u16 + 4).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Gives the device `name` of `netns` its key and port, and one peer: its public key, where it is, and what is sent to it and
/// taken from it.
pub fn configure(
    netns: &NetNs,
    name: &str,
    private: &str,
    peer: (&str, SocketAddrV4),
    allowed: &[Prefix],
) -> Result<()> {
    let allowed: Vec<u8> = allowed
        .iter()
        .flat_map(|(ip, length)| {
            let (family, bytes) = match ip {
                IpAddr::V4(ip) => (AF_INET, ip.octets().to_vec()),
                IpAddr::V6(ip) => (AF_INET6, ip.octets().to_vec()),
            };
            let entry = [
                attribute(1, &family.to_ne_bytes()),
                attribute(2, &bytes),
                attribute(3, &[*length]),
            ];
            attribute(NESTED, &entry.concat())
        })
        .collect();
    let (public, at) = peer;
    let mut endpoint = AF_INET.to_ne_bytes().to_vec();
    endpoint.extend(at.port().to_be_bytes());
    endpoint.extend(at.ip().octets());
    endpoint.extend([0; 8]);
    let peer = [
        attribute(1, &key(public)?),
        attribute(4, &endpoint),
        attribute(9 | NESTED, &allowed),
    ];
    let mut device = name.as_bytes().to_vec();
    device.push(0);
    let device = [
        attribute(2, &device),
        attribute(3, &key(private)?),
        attribute(6, &at.port().to_ne_bytes()),
        attribute(8 | NESTED, &attribute(NESTED, &peer.concat())),
    ];
    netns.enter(|| {
        let socket = Socket::new(NETLINK_GENERIC).context("failed to open a netlink socket")?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let found = request(&socket, 0x10, 3, &attribute(2, b"wireguard\0")).context("no WireGuard here")?;
        let family = family(&found).context("WireGuard has no number")?;
        request(&socket, family, 1, &device.concat())
            .with_context(|| format!("failed to configure {name}"))?;
        Ok(())
    })
}

fn key(hex: &str) -> Result<Vec<u8>> {
    ensure!(hex.len() == 64, "a key has 32 bytes");
    (0..32)
        .map(|at| u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).context("a key is hexadecimal"))
        .collect()
}

/// Sends a command, and returns what comes before its acknowledgement.
fn request(socket: &Socket, family: u16, command: u8, attributes: &[u8]) -> Result<Vec<u8>> {
    let mut message = (attributes.len() as u32 + 20).to_ne_bytes().to_vec();
    message.extend(family.to_ne_bytes());
    message.extend(REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([command, 1, 0, 0]);
    message.extend(attributes);
    socket.send(&message, 0)?;
    let mut answer = Vec::new();
    loop {
        let (data, _) = socket.recv_from_full()?;
        let word = |at: usize| {
            data.get(at..at + 4)
                .map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]])
        };
        let kind = word(4).context("a short answer")?;
        if u16::from_ne_bytes([kind[0], kind[1]]) == 2 {
            let error = i32::from_ne_bytes(word(16).context("a short answer")?);
            if error != 0 {
                bail!("{}", std::io::Error::from_raw_os_error(-error));
            }
            return Ok(answer);
        }
        answer = data;
    }
}

/// `CTRL_ATTR_FAMILY_ID` among the attributes of an answer.
fn family(answer: &[u8]) -> Option<u16> {
    let mut rest = answer.get(20..)?;
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        if u16::from_ne_bytes([rest[2], rest[3]]) == 1 {
            return Some(u16::from_ne_bytes([*rest.get(4)?, *rest.get(5)?]));
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
    None
}
