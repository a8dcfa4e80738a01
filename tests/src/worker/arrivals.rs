//! What arrived at this process's responders, whoever was answered: datagrams, connections, and SYNs whose answer has
//! not come back.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use super::protocol::{Proto, plain};

/// So many are kept at most.
const KEPT: usize = 1 << 16;
/// `TCP_SYN_RECV` in `/proc/net/tcp`.
const SYN_RECEIVED: &str = "03";

static WATCHED: AtomicBool = AtomicBool::new(false);
static SEEN: Mutex<BTreeSet<Arrival>> = Mutex::new(BTreeSet::new());

/// Protocol, own port and client.
pub type Arrival = (Proto, u16, SocketAddr);

/// Notes an arrival, if anybody has asked for them.
pub fn note(proto: Proto, port: u16, client: SocketAddr) {
    if WATCHED.load(Ordering::Relaxed) {
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() < KEPT {
            seen.insert((proto, port, plain(client)));
        }
    }
}

/// What has arrived since the last call; the first call begins the watch.
pub fn take() -> Vec<Arrival> {
    WATCHED.store(true, Ordering::Relaxed);
    let seen = std::mem::take(&mut *SEEN.lock().unwrap_or_else(PoisonError::into_inner));
    let tables = ["/proc/self/net/tcp", "/proc/self/net/tcp6"]
        .map(|path| fs::read_to_string(path).unwrap_or_default());
    let half_open = tables
        .iter()
        .flat_map(|table| table.lines())
        .filter_map(half_open);
    seen.into_iter().chain(half_open).collect()
}

/// A line of `/proc/net/tcp` if it is a connection that waits for the client's ACK.
fn half_open(line: &str) -> Option<Arrival> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, remote, state) = (fields.next()?, fields.next()?, fields.next()?);
    if state != SYN_RECEIVED {
        return None;
    }
    Some((Proto::Tcp, address(local)?.port(), plain(address(remote)?)))
}

/// `0100007F:0050`: the address in words of this machine's byte order, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (words, port) = text.split_once(':')?;
    let word = |at: usize| {
        Some(
            u32::from_str_radix(words.get(at..at + 8)?, 16)
                .ok()?
                .to_ne_bytes(),
        )
    };
    let ip = if words.len() == 8 {
        IpAddr::from(word(0)?)
    } else {
        let bytes = [word(0)?, word(8)?, word(16)?, word(24)?].concat();
        IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_open_connections_are_found_in_the_kernels_table() {
        let words = |ip: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(ip));
        let line = |state: &str| {
            let (local, remote) = (words([10, 244, 1, 11]), words([10, 244, 2, 12]));
            format!("   3: {local}:0050 {remote}:80E8 {state} 00000000:00000000 01:00000064 00000000")
        };
        let client = "10.244.2.12:33000".parse().unwrap();
        assert_eq!(half_open(&line("03")), Some((Proto::Tcp, 80, client)));
        assert_eq!(half_open(&line("0A")), None);
        assert_eq!(half_open("  sl  local_address rem_address   st tx_queue"), None);
        let six = address(&format!(
            "{}{}{}{}:0051",
            words([0xfd, 0, 0, 0x10]),
            words([2, 0x44, 0, 1]),
            words([0; 4]),
            words([0, 0, 0, 0xb])
        ));
        assert_eq!(six, Some("[fd00:10:244:1::b]:81".parse().unwrap()));
    }
}
