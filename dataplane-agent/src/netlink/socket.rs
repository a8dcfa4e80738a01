//! Requests and answers on a netlink socket, and the parsing of attributes.
//!
//! Only the fields that are used are decoded: a kernel that adds or widens an attribute changes nothing here.

use std::io;

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_GENERIC, NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_SOCK_DIAG},
};

pub const NLM_F_REQUEST: u16 = 1;
pub const NLM_F_ACK: u16 = 4;
pub const NLM_F_REPLACE: u16 = 0x100;
pub const NLM_F_EXCL: u16 = 0x200;
pub const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_DUMP_INTR: u16 = 0x10;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER_LEN: usize = 16;
/// A dump that the kernel calls inconsistent this often is taken as it is; the next one corrects it.
const DUMP_ATTEMPTS: usize = 5;

/// One message of an answer.
#[derive(Clone, Debug)]
pub struct Message {
    pub kind: u16,
    /// What follows the netlink header.
    pub body: Vec<u8>,
}

/// A blocking socket for requests.
#[derive(Debug)]
pub struct RequestSocket {
    socket: Socket,
    sequence: u32,
}

impl RequestSocket {
    pub fn open() -> io::Result<Self> {
        Self::open_family(NETLINK_ROUTE)
    }

    pub fn open_netfilter() -> io::Result<Self> {
        Self::open_family(NETLINK_NETFILTER)
    }

    pub fn open_generic() -> io::Result<Self> {
        Self::open_family(NETLINK_GENERIC)
    }

    pub fn open_sock_diag() -> io::Result<Self> {
        Self::open_family(NETLINK_SOCK_DIAG)
    }

    fn open_family(family: isize) -> io::Result<Self> {
        let mut socket = Socket::new(family)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Without strict checking the kernel ignores filters of a dump, IFA_TARGET_NETNSID among them (4.20).
        socket.set_netlink_get_strict_chk(true)?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Every message of a dump.
    pub fn dump(&mut self, kind: u16, body: &[u8]) -> io::Result<Vec<Message>> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut messages = Vec::new();
            let interrupted = self.dump_each(kind, body, |message| messages.push(message.to_message()))?;
            if !interrupted || attempts == DUMP_ATTEMPTS {
                return Ok(messages);
            }
        }
    }

    /// Hands over the messages of a dump as they come. Returns whether the kernel calls it inconsistent.
    pub fn dump_each(&mut self, kind: u16, body: &[u8], each: impl FnMut(&Part<'_>)) -> io::Result<bool> {
        self.exchange(kind, NLM_F_REQUEST | NLM_F_DUMP, body, each)
    }

    /// The message that answers a request for one object.
    pub fn get(&mut self, kind: u16, body: &[u8]) -> io::Result<Message> {
        let mut first = None;
        self.exchange(kind, NLM_F_REQUEST, body, |message| {
            first.get_or_insert_with(|| message.to_message());
        })?;
        first.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
    }

    /// Asks for a change and waits for the kernel's word on it.
    pub fn change(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.exchange(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body, |_| {})
            .map(drop)
    }

    /// Asks for several changes of nftables (type, flags, body), which are made together or not at all.
    pub fn change_all(&mut self, subsystem: u16, changes: &[(u16, u16, Vec<u8>)]) -> io::Result<()> {
        const BATCH_BEGIN: u16 = 0x10;
        const BATCH_END: u16 = 0x11;
        // `struct nfgenmsg`, whose last field names the subsystem in network byte order.
        let mut around = vec![0, 0];
        around.extend((subsystem >> 8).to_be_bytes());
        let first = self.sequence.wrapping_add(1);
        let mut datagram = frame(BATCH_BEGIN, NLM_F_REQUEST, first, &around);
        for (kind, flags, body) in changes {
            self.sequence = self.sequence.wrapping_add(1);
            datagram.extend(frame(
                *kind,
                NLM_F_REQUEST | NLM_F_ACK | flags,
                self.sequence,
                body,
            ));
        }
        datagram.extend(frame(BATCH_END, NLM_F_REQUEST, self.sequence, &around));
        self.socket.send(&datagram, 0)?;
        let mut answers = 0;
        while answers < changes.len() {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in split(&datagram) {
                if message.sequence.wrapping_sub(first) as usize >= changes.len()
                    || message.kind != NLMSG_ERROR
                {
                    continue;
                }
                answers += 1;
                match error_code(message.body) {
                    0 => {}
                    code => return Err(io::Error::from_raw_os_error(-code)),
                }
            }
        }
        Ok(())
    }

    fn exchange(
        &mut self,
        kind: u16,
        flags: u16,
        body: &[u8],
        mut each: impl FnMut(&Part<'_>),
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&frame(kind, flags, self.sequence, body), 0)?;
        let expects_done = flags & NLM_F_DUMP == NLM_F_DUMP && flags & NLM_F_ACK == 0;
        let expects_ack = flags & NLM_F_ACK != 0;
        let mut any = false;
        let mut interrupted = false;
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            for message in split(&datagram) {
                if message.sequence != self.sequence {
                    // What is left of an exchange that failed midway.
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    // Both carry an error number, negative; DONE may come without.
                    NLMSG_DONE if message.body.is_empty() => return Ok(interrupted),
                    NLMSG_DONE | NLMSG_ERROR => match error_code(message.body) {
                        0 => return Ok(interrupted),
                        code => return Err(io::Error::from_raw_os_error(-code)),
                    },
                    _ => {
                        any = true;
                        each(&message);
                    }
                }
            }
            if !expects_done && !expects_ack && any {
                return Ok(interrupted);
            }
        }
    }
}

fn frame(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_LEN + body.len());
    frame.extend(((HEADER_LEN + body.len()) as u32).to_ne_bytes());
    frame.extend(kind.to_ne_bytes());
    frame.extend(flags.to_ne_bytes());
    frame.extend(sequence.to_ne_bytes());
    frame.extend(0u32.to_ne_bytes());
    frame.extend(body);
    frame
}

fn error_code(body: &[u8]) -> i32 {
    read_u32(body, 0).map_or(-libc::EBADMSG, u32::cast_signed)
}

/// A message inside a datagram.
#[derive(Debug)]
pub struct Part<'a> {
    pub kind: u16,
    flags: u16,
    sequence: u32,
    pub body: &'a [u8],
}

impl Part<'_> {
    fn to_message(&self) -> Message {
        Message {
            kind: self.kind,
            body: self.body.to_vec(),
        }
    }
}

/// The messages of a datagram; stops at one that is cut off.
pub fn split(datagram: &[u8]) -> impl Iterator<Item = Part<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let len = read_u32(rest, 0)? as usize;
        let body = rest.get(HEADER_LEN..len)?;
        let part = Part {
            kind: read_u16(rest, 4)?,
            flags: read_u16(rest, 6)?,
            sequence: read_u32(rest, 8)?,
            body,
        };
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some(part)
    })
}

/// The attributes that stand in `bytes`: type without its flag bits, and value.
pub fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const TYPE_MASK: u16 = 0x3fff;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let len = read_u16(rest, 0)? as usize;
        let kind = read_u16(rest, 2)? & TYPE_MASK;
        let value = rest.get(4..len)?;
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Appends an attribute.
pub fn push_attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend(((4 + value.len()) as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

pub fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub fn read_string(value: &[u8]) -> String {
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cut_off_messages_and_attributes_end_the_iteration() {
        let mut body = Vec::new();
        push_attribute(&mut body, 3, b"eth0\0");
        push_attribute(&mut body, 4, &1500u32.to_ne_bytes());
        for len in 0..=body.len() {
            assert!(attributes(&body[..len]).count() <= 2);
        }
        assert_eq!(
            attributes(&body)
                .map(|(kind, value)| (kind, value.len()))
                .collect::<Vec<_>>(),
            [(3, 5), (4, 4)]
        );

        let frame = frame(16, 0, 1, &body);
        for len in 0..frame.len() {
            assert_eq!(split(&frame[..len]).count(), 0, "{len}");
        }
        assert_eq!(split(&frame).count(), 1);
        // A length of zero must not loop.
        assert_eq!(split(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
    }
}
