//! A synchronous rtnetlink socket: one request, its answers, its error.

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::netns::NetNs;

/// A socket that stays in the namespace it was opened in, whichever thread uses it.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket in `netns`.
    pub fn open(netns: &NetNs) -> Result<Self> {
        netns.enter(|| {
            let mut socket = Socket::new(NETLINK_ROUTE).context("failed to open a netlink socket")?;
            socket.bind_auto().context("failed to bind a netlink socket")?;
            socket
                .connect(&SocketAddr::new(0, 0))
                .context("failed to connect a netlink socket")?;
            Ok(Self { socket, sequence: 0 })
        })
    }

    /// Sends one request and returns the messages that came before its acknowledgement.
    pub fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<Vec<RouteNetlinkMessage>> {
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        self.sequence += 1;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut buffer = vec![0; packet.buffer_len()];
        packet.serialize(&mut buffer);
        self.socket
            .send(&buffer, 0)
            .context("failed to send a netlink request")?;
        self.answers()
    }

    fn answers(&mut self) -> Result<Vec<RouteNetlinkMessage>> {
        let mut answers = Vec::new();
        loop {
            let (data, _) = self
                .socket
                .recv_from_full()
                .context("failed to read a netlink answer")?;
            let mut rest = data.as_slice();
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .context("failed to decode a netlink answer")?;
                let length = (message.header.length as usize)
                    .next_multiple_of(4)
                    .min(rest.len());
                if length == 0 {
                    bail!("a netlink answer has no length");
                }
                rest = &rest[length..];
                if message.header.sequence_number != self.sequence {
                    continue;
                }
                match message.payload {
                    NetlinkPayload::Error(error) => {
                        return match error.code {
                            None => Ok(answers),
                            Some(_) => Err(error.to_io()).context("the kernel refused a netlink request"),
                        };
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}
