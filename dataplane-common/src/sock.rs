//! `SOCK_CHOSEN`: which backend an unconnected UDP socket was given, so that its datagrams stay together.
//! `SOCK_REVERSE_V4` and `SOCK_REVERSE_V6`: which service address a socket asked for, by the backend it was given; and
//! which backend that is, so that a connected UDP socket can be told when it is gone.

use bytemuck::{Pod, Zeroable};

/// Key of `SOCK_CHOSEN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SockService {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// Index into `SERVICES`.
    pub service: u32,
    pub service_generation: u32,
}

/// A backend that a socket was given; it is that one while the backend has this generation. Value of `SOCK_CHOSEN`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SockBackend {
    /// Index into `BACKENDS`.
    pub backend: u32,
    pub backend_generation: u32,
}

/// Key of `SOCK_REVERSE_V4`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SockKey4 {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// The backend.
    pub addr_be: u32,
    pub port_be: u16,
    pub unused: [u8; 2],
}

/// Key of `SOCK_REVERSE_V6`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
pub struct SockKey6 {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// The backend.
    pub addr_be: [u32; 4],
    pub port_be: u16,
    pub unused: [u8; 6],
}

impl SockKey4 {
    #[inline(always)]
    pub fn new(cookie: u64, addr_be: u32, port_be: u16) -> Self {
        Self {
            cookie,
            addr_be,
            port_be,
            unused: [0; 2],
        }
    }
}

impl SockKey6 {
    /// Made of whole words: the compiler would clear the last six bytes by stores that are not aligned, which the
    /// verifier does not allow on the stack.
    #[inline(always)]
    pub fn new(cookie: u64, addr_be: [u32; 4], port_be: u16) -> Self {
        let [high, low]: [u64; 2] = bytemuck::cast(addr_be);
        bytemuck::cast([cookie, high, low, bytemuck::cast([port_be, 0, 0, 0])])
    }
}

/// Value of `SOCK_REVERSE_V4`: the service's address, and the backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SockAddr4 {
    pub addr_be: u32,
    pub port_be: u16,
    /// 1 where it was asked for by connect, and the socket sends nowhere else; 0 where by a single datagram.
    pub connected: u16,
    pub given: SockBackend,
}

/// Value of `SOCK_REVERSE_V6`: the service's address, and the backend.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct SockAddr6 {
    pub addr_be: [u32; 4],
    pub port_be: u16,
    /// 1 where it was asked for by connect, and the socket sends nowhere else; 0 where by a single datagram.
    pub connected: u16,
    pub given: SockBackend,
}

const _: () = assert!(size_of::<SockService>() == 16);
const _: () = assert!(size_of::<SockKey4>() == 16);
const _: () = assert!(size_of::<SockKey6>() == 32);
const _: () = assert!(size_of::<SockAddr4>() == 16);
const _: () = assert!(size_of::<SockAddr6>() == 28);
