//! Responders: they tell who they are, where they were reached and which source they saw.

use std::io::{BufRead, BufReader, ErrorKind, IoSlice, IoSliceMut, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg,
    sendmsg, setsockopt, sockopt,
};
use socket2::{Domain, Protocol, Socket, Type};

use super::protocol::{Identity, Proto, Reply, plain};
use super::{arrivals, sctp};

/// How long a responder waits for the next line of a connection.
const IDLE: Duration = Duration::from_mins(10);
/// Bytes of a datagram socket's receive buffer.
pub const RECEIVE_BUFFER: usize = 8 << 20;

/// Answers at `port` of every address, both families, until the process ends.
pub fn listen(name: &Arc<str>, proto: Proto, port: u16) -> Result<()> {
    if proto == Proto::Sctp && !sctp::is_in_kernel() {
        return sctp::listen(name, port);
    }
    for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
        let addr = SocketAddr::new(any, port);
        let name = Arc::clone(name);
        match proto {
            Proto::Udp => {
                let socket: UdpSocket = bind(addr, Type::DGRAM, Protocol::UDP)?.into();
                // A busy machine does not lose what arrives in a quarter of a second.
                setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)?;
                show_destinations(&socket, any)?;
                thread::spawn(move || answer_datagrams(&name, &socket, port));
            }
            Proto::Tcp | Proto::Sctp => {
                let protocol = if proto == Proto::Tcp {
                    Protocol::TCP
                } else {
                    Protocol::from(libc::IPPROTO_SCTP)
                };
                let socket = bind(addr, Type::STREAM, protocol)?;
                socket
                    .listen(1024)
                    .with_context(|| format!("failed to listen at {addr}"))?;
                let listener: TcpListener = socket.into();
                thread::spawn(move || accept(&name, &listener, (proto, port)));
            }
        }
    }
    Ok(())
}

pub(super) fn bind(addr: SocketAddr, kind: Type, protocol: Protocol) -> Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(addr), kind, Some(protocol)).context("failed to open a socket")?;
    socket.set_reuse_address(true)?;
    if addr.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket
        .bind(&addr.into())
        .with_context(|| format!("failed to bind {addr}"))?;
    Ok(socket)
}

fn accept(name: &Arc<str>, listener: &TcpListener, (proto, port): (Proto, u16)) {
    loop {
        // A client may have gone again.
        let Ok((stream, client)) = listener.accept() else {
            continue;
        };
        arrivals::note(proto, port, client);
        let name = Arc::clone(name);
        // A connection that breaks is the client's to report.
        thread::spawn(move || answer_lines(&name, &stream).ok());
    }
}

fn answer_lines(name: &str, stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    let identity = Identity {
        name: name.to_owned(),
        at: plain(stream.local_addr()?),
        client: plain(stream.peer_addr()?),
    };
    let mut writer = stream;
    for line in BufReader::new(stream).lines() {
        let mut reply = serde_json::to_string(&Reply {
            identity: identity.clone(),
            echo: line?,
        })?;
        reply.push('\n');
        writer.write_all(reply.as_bytes())?;
    }
    Ok(())
}

fn answer_datagrams(name: &str, socket: &UdpSocket, port: u16) {
    loop {
        // Errors of one client (an ICMP error for an answer) must not end the service to the others.
        if answer_datagram(name, socket, port).is_err_and(|error| {
            error
                .downcast_ref::<std::io::Error>()
                .is_some_and(|error| error.kind() == ErrorKind::InvalidInput)
        }) {
            return;
        }
    }
}

fn answer_datagram(name: &str, socket: &UdpSocket, port: u16) -> Result<()> {
    let mut data = [0; 2048];
    let (length, client, local) = receive(socket, &mut data)?;
    arrivals::note(Proto::Udp, port, client);
    let identity = Identity {
        name: name.to_owned(),
        at: SocketAddr::new(local, port),
        client,
    };
    let echo = String::from_utf8_lossy(&data[..length]).trim_end().to_owned();
    let reply = serde_json::to_vec(&Reply { identity, echo })?;
    answer_from(socket, local, client, &reply)
}

/// Reads a packet: its length, the client, and the address that it arrived at, for which [`show_destinations`] has asked.
pub(super) fn receive(socket: &impl AsRawFd, data: &mut [u8]) -> Result<(usize, SocketAddr, IpAddr)> {
    let mut control = nix::cmsg_space!(libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(data)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let client = message.address.as_ref().and_then(to_std);
    let local = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => Some(IpAddr::from(Ipv4Addr::from_bits(u32::from_be(
            info.ipi_spec_dst.s_addr,
        )))),
        ControlMessageOwned::Ipv6PacketInfo(info) => {
            Some(IpAddr::from(Ipv6Addr::from(info.ipi6_addr.s6_addr)))
        }
        _ => None,
    });
    Ok((
        message.bytes,
        client.context("a packet without source")?,
        local.context("a packet without destination")?,
    ))
}

/// Has the kernel say where each packet arrived.
pub(super) fn show_destinations(socket: &impl AsFd, family: IpAddr) -> Result<()> {
    setsockopt(socket, sockopt::Ipv4PacketInfo, &true)
        .or_else(|error| if family.is_ipv6() { Ok(()) } else { Err(error) })?;
    if family.is_ipv6() {
        setsockopt(socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    Ok(())
}

/// Sends from the address the datagram had arrived at: a host has several.
pub(super) fn answer_from(
    socket: &impl AsRawFd,
    local: IpAddr,
    client: SocketAddr,
    reply: &[u8],
) -> Result<()> {
    let parts = [IoSlice::new(reply)];
    let fd = socket.as_raw_fd();
    match (local, client) {
        (IpAddr::V4(local), SocketAddr::V4(client)) => {
            let source = libc::in_addr {
                s_addr: local.to_bits().to_be(),
            };
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: source,
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(
                fd,
                &parts,
                &control,
                MsgFlags::empty(),
                Some(&SockaddrIn::from(client)),
            )?;
        }
        (IpAddr::V6(local), SocketAddr::V6(client)) => {
            let source = libc::in6_addr {
                s6_addr: local.octets(),
            };
            let info = libc::in6_pktinfo {
                ipi6_ifindex: 0,
                ipi6_addr: source,
            };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(
                fd,
                &parts,
                &control,
                MsgFlags::empty(),
                Some(&SockaddrIn6::from(client)),
            )?;
        }
        _ => bail!("a datagram from {client} arrived at {local}"),
    }
    Ok(())
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|addr| SocketAddrV4::from(*addr).into());
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|addr| SocketAddrV6::from(*addr).into())
    })
}
