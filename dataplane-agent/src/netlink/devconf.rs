//! IPv4 parameters of a device by rtnetlink, which asks for `CAP_NET_ADMIN` alone: in containers `/proc/sys` is read-only.

use std::io;

use super::socket::{RequestSocket, push_attribute};

const RTM_SETLINK: u16 = 19;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET_CONF: u16 = 1;
const AF_INET: u16 = libc::AF_INET as u16;
/// `struct ifinfomsg`.
const IFINFOMSG_LEN: usize = 16;
const IFINDEX_AT: usize = 4;

/// A parameter, by its number in `linux/ip.h` (`IPV4_DEVCONF_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Parameter {
    AcceptLocal = 23,
    RouteLocalnet = 26,
}

/// Sets a parameter of a device, as writing to `/proc/sys/net/ipv4/conf/DEVICE/…` does.
pub fn set(ifindex: u32, parameter: Parameter, value: u32) -> io::Result<()> {
    RequestSocket::open()?.change(RTM_SETLINK, 0, &request(ifindex, parameter, value))
}

fn request(ifindex: u32, parameter: Parameter, value: u32) -> Vec<u8> {
    let nest = |kind: u16, content: &[u8]| {
        let mut attribute = Vec::new();
        push_attribute(&mut attribute, kind, content);
        attribute
    };
    let parameter = nest(parameter as u16, &value.to_ne_bytes());
    let of_family = nest(AF_INET, &nest(IFLA_INET_CONF, &parameter));
    let mut body = vec![0; IFINFOMSG_LEN];
    body[IFINDEX_AT..IFINDEX_AT + 4].copy_from_slice(&ifindex.to_ne_bytes());
    push_attribute(&mut body, IFLA_AF_SPEC, &of_family);
    body
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::socket::{attributes, read_u32};

    #[test]
    fn a_request_names_the_device_and_nests_the_parameter_three_deep() {
        let body = request(1, Parameter::AcceptLocal, 1);
        assert_eq!(read_u32(&body, IFINDEX_AT), Some(1));
        let mut content = &body[IFINFOMSG_LEN..];
        for expected in [IFLA_AF_SPEC, AF_INET, IFLA_INET_CONF, 23] {
            let (kind, inner) = attributes(content).next().unwrap();
            assert_eq!(kind, expected);
            content = inner;
        }
        assert_eq!(content, 1u32.to_ne_bytes());
    }
}
