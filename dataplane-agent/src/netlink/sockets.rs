//! Connected UDP sockets of this network namespace, as `sock_diag` shows them, and their end.

use std::{io, net::SocketAddr};

use netlink_packet_core::{Emitable, Parseable};
use netlink_packet_sock_diag::{
    SOCK_DESTROY, SOCK_DIAG_BY_FAMILY,
    constants::{AF_INET, AF_INET6, IPPROTO_UDP},
    inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags},
};

use super::socket::RequestSocket;

/// A connected UDP socket.
#[derive(Clone, Debug)]
pub struct UdpSocket {
    family: u8,
    id: SocketId,
}

impl UdpSocket {
    /// To whom it is connected; IPv4 as such, also where the socket is an IPv6 one.
    pub fn peer(&self) -> SocketAddr {
        let addr = self.id.destination_address.to_canonical();
        SocketAddr::new(addr, self.id.destination_port)
    }

    /// `bpf_get_socket_cookie`.
    pub fn cookie(&self) -> u64 {
        u64::from_ne_bytes(self.id.cookie)
    }
}

/// Every connected UDP socket.
pub fn connected(socket: &mut RequestSocket) -> io::Result<Vec<UdpSocket>> {
    let mut all = Vec::new();
    for (family, id) in [(AF_INET, SocketId::new_v4()), (AF_INET6, SocketId::new_v6())] {
        for message in socket.dump(SOCK_DIAG_BY_FAMILY, &request(family, id))? {
            // What this version does not understand is left alone.
            if let Ok(header) = InetResponseHeader::parse(&message.body) {
                all.push(UdpSocket {
                    family: header.family,
                    id: header.socket_id,
                });
            }
        }
    }
    Ok(all)
}

/// Ends a socket's connection: its process gets `ECONNABORTED`. False if it is gone already.
pub fn destroy(socket: &mut RequestSocket, target: &UdpSocket) -> io::Result<bool> {
    let body = request(target.family, target.id.clone());
    match socket.change(SOCK_DESTROY, 0, &body) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Fails where the kernel cannot do it: without `CONFIG_INET_UDP_DIAG` or `CONFIG_INET_DIAG_DESTROY`.
pub fn probe(socket: &mut RequestSocket) -> io::Result<()> {
    connected(socket)?;
    // From port 0 to port 0: there is none.
    let nobody = UdpSocket {
        family: AF_INET,
        id: SocketId::new_v4(),
    };
    destroy(socket, &nobody).map(drop)
}

/// What it means that sockets cannot be ended, for people.
pub fn unable(error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "the kernel was built without CONFIG_INET_DIAG_DESTROY".to_owned(),
        Some(libc::ENOENT) => "the kernel was built without CONFIG_INET_UDP_DIAG".to_owned(),
        _ => error.to_string(),
    };
    format!("connected UDP sockets of this host are not told when their endpoint is gone: {why}")
}

fn request(family: u8, socket_id: SocketId) -> Vec<u8> {
    let request = InetRequest {
        family,
        protocol: IPPROTO_UDP,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::ESTABLISHED,
        socket_id,
    };
    let mut body = vec![0; request.buffer_len()];
    request.emit(&mut body);
    body
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket as StdSocket;

    use super::*;

    /// On loopback: of two sockets with the same peer, the one that is meant ends, and hears of it.
    #[test]
    fn one_connected_socket_is_destroyed_and_its_neighbour_is_not() {
        for (local, peer) in [("127.0.0.1:0", "127.0.0.1:9"), ("[::]:0", "[::ffff:127.0.0.1]:9")] {
            let mut netlink = RequestSocket::open_sock_diag().unwrap();
            match probe(&mut netlink) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOENT)) => return,
                other => other.unwrap(),
            }
            let open = || {
                let socket = StdSocket::bind(local).unwrap();
                socket.connect(peer).unwrap();
                socket
            };
            let (meant, other) = (open(), open());
            let port = meant.local_addr().unwrap().port();
            let found = connected(&mut netlink).unwrap();
            let target = found.iter().find(|one| one.id.source_port == port).unwrap();
            assert_eq!(target.peer(), "127.0.0.1:9".parse().unwrap());
            assert_ne!(target.cookie(), 0);
            match destroy(&mut netlink, target) {
                // Needs CAP_NET_ADMIN.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return,
                done => assert!(done.unwrap()),
            }
            let error = meant.recv(&mut [0]).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNABORTED));
            assert!(other.peer_addr().is_ok());
            assert!(!destroy(&mut netlink, target).unwrap(), "it is gone already");
        }
    }
}
