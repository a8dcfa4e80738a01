//! Bulk transfers over TCP whose every byte is checked, and the path MTU that their sender has found out.
//!
//! The client says in one line which way and how much; the bytes are a sequence that both sides can make. At the end the
//! server says who it is and what it has seen.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{getsockopt, sockopt};
use nix::{getsockopt_impl, libc, sockopt_impl};
use serde::{Deserialize, Serialize};
use socket2::Type;

use super::protocol::{Direction, Identity, Response, Transfer, Transferred, plain};
use super::responder::bind;

/// Bytes of one write: enough that the kernel makes super-packets of them.
const CHUNK: usize = 64 * 1024;
/// How long one side waits for the other.
const IDLE: Duration = Duration::from_secs(10);

sockopt_impl!(
    /// As `IP_MTU`.
    Ipv6Mtu,
    GetOnly,
    libc::IPPROTO_IPV6,
    libc::IPV6_MTU,
    libc::c_int
);

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    direction: Direction,
    bytes: u64,
    seed: u64,
}

/// What a server says at the end.
#[derive(Debug, Serialize, Deserialize)]
struct Receipt {
    identity: Identity,
    path_mtu: u32,
    /// Why the bytes that arrived are not those that were sent.
    damage: Option<String>,
}

/// Takes orders at `port` of every address, both families, until the process ends.
pub fn listen(name: &Arc<str>, port: u16) -> Result<()> {
    for any in [
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
        (Ipv6Addr::UNSPECIFIED, port).into(),
    ] {
        let socket = bind(any, Type::STREAM, socket2::Protocol::TCP)?;
        socket
            .listen(64)
            .with_context(|| format!("failed to listen at {any}"))?;
        let (listener, name) = (TcpListener::from(socket), Arc::clone(name));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let name = Arc::clone(&name);
                // A connection that breaks is the client's to report.
                thread::spawn(move || serve(&name, &stream).ok());
            }
        });
    }
    Ok(())
}

fn serve(name: &str, stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let Order {
        direction,
        bytes,
        seed,
    } = serde_json::from_str(&line)?;
    let damage = match direction {
        Direction::Upload => receive(&mut reader, bytes, seed)?,
        Direction::Download => {
            send(stream, bytes, seed)?;
            // The client says when it has all: until then the path MTU may still change.
            reader.read_line(&mut line)?;
            None
        }
    };
    let identity = Identity {
        name: name.to_owned(),
        at: plain(stream.local_addr()?),
        client: plain(stream.peer_addr()?),
    };
    let path_mtu = path_mtu(stream)?;
    say(
        stream,
        &Receipt {
            identity,
            path_mtu,
            damage,
        },
    )
}

/// Makes one transfer, and fails if a byte of it is wrong or it does not end in time.
pub fn run(transfer: &Transfer) -> Result<Response> {
    let Transfer {
        to,
        direction,
        bytes,
        timeout_ms,
    } = *transfer;
    let start = Instant::now();
    let timeout = Duration::from_millis(timeout_ms);
    let stream =
        TcpStream::connect_timeout(&to, timeout).with_context(|| format!("failed to connect to {to}"))?;
    let watch = stream.try_clone()?;
    // Bounds the whole, however slowly it crawls.
    let (done, ended) = std::sync::mpsc::channel::<()>();
    thread::spawn(move || {
        if ended.recv_timeout(timeout).is_err() {
            let _ = watch.shutdown(std::net::Shutdown::Both);
        }
    });
    let result = exchange(&stream, direction, bytes, u64::from(to.port()) << 16 | bytes);
    let _ = done.send(());
    let (receipt, own_path_mtu) = result.with_context(|| {
        format!(
            "{direction:?} of {bytes} bytes, {to}, after {:?}",
            start.elapsed()
        )
    })?;
    if let Some(damage) = receipt.damage {
        bail!("{direction:?} of {bytes} bytes, {to}: {damage}");
    }
    Ok(Response::Transferred(Transferred {
        by: receipt.identity,
        ms: start.elapsed().as_millis() as u64,
        path_mtu: match direction {
            Direction::Upload => own_path_mtu,
            Direction::Download => receipt.path_mtu,
        },
    }))
}

fn exchange(stream: &TcpStream, direction: Direction, bytes: u64, seed: u64) -> Result<(Receipt, u32)> {
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    say(
        stream,
        &Order {
            direction,
            bytes,
            seed,
        },
    )?;
    let mut reader = BufReader::with_capacity(CHUNK, stream);
    match direction {
        Direction::Upload => send(stream, bytes, seed)?,
        Direction::Download => {
            let damage = receive(&mut reader, bytes, seed)?;
            ensure!(damage.is_none(), "{}", damage.unwrap_or_default());
            say(stream, &"received")?;
        }
    }
    let mut line = String::new();
    reader.read_line(&mut line).context("no receipt")?;
    Ok((
        serde_json::from_str(&line).context("no receipt")?,
        path_mtu(stream)?,
    ))
}

fn say(mut stream: &TcpStream, what: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    Ok(stream.write_all(&line)?)
}

fn send(mut stream: &TcpStream, bytes: u64, seed: u64) -> Result<()> {
    let mut left = bytes;
    let mut sequence = Sequence(seed | 1);
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        let part = &mut chunk[..left.min(CHUNK as u64) as usize];
        sequence.fill(part);
        stream
            .write_all(part)
            .with_context(|| format!("failed to send, {left} bytes are left"))?;
        left -= part.len() as u64;
    }
    Ok(())
}

/// Reads all; what is wrong with it, if anything is.
fn receive(reader: &mut impl Read, bytes: u64, seed: u64) -> Result<Option<String>> {
    let mut left = bytes;
    let mut sequence = Sequence(seed | 1);
    let (mut chunk, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut damage = None;
    while left > 0 {
        let length = left.min(CHUNK as u64) as usize;
        reader
            .read_exact(&mut chunk[..length])
            .with_context(|| format!("failed to receive, {left} bytes are left"))?;
        sequence.fill(&mut expected[..length]);
        if damage.is_none() && chunk[..length] != expected[..length] {
            let at = chunk
                .iter()
                .zip(&expected)
                .position(|(is, should)| is != should)
                .unwrap_or_default();
            damage = Some(format!("byte {} is wrong", bytes - left + at as u64));
        }
        left -= length as u64;
    }
    Ok(damage)
}

/// The path MTU as the socket's own kernel knows it.
fn path_mtu(stream: &TcpStream) -> Result<u32> {
    let mtu = if stream.local_addr()?.is_ipv4() {
        getsockopt(stream, sockopt::IpMtu)
    } else {
        getsockopt(stream, Ipv6Mtu)
    };
    Ok(mtu.context("failed to ask for the path MTU")?.cast_unsigned())
}

/// Bytes that do not repeat (xorshift64): a lost, doubled or moved segment is seen.
struct Sequence(u64);

impl Sequence {
    fn fill(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let length = word.len();
            word.copy_from_slice(&self.0.to_le_bytes()[..length]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_is_found_and_named() {
        let mut bytes = vec![0; 3 * CHUNK];
        let mut sequence = Sequence(7);
        bytes.chunks_mut(CHUNK).for_each(|chunk| sequence.fill(chunk));
        assert_eq!(receive(&mut bytes.as_slice(), 3 * CHUNK as u64, 7).unwrap(), None);
        bytes[CHUNK + 3] ^= 0x10;
        let damage = receive(&mut bytes.as_slice(), 3 * CHUNK as u64, 7).unwrap();
        assert_eq!(damage, Some(format!("byte {} is wrong", CHUNK + 3)));
    }
}
