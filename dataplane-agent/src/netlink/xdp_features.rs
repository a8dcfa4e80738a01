//! What drivers say of XDP (generic netlink's family `netdev`, 6.3), without an attempt to attach anything.

use std::{collections::BTreeMap, io};

use super::socket::{RequestSocket, attributes, push_attribute, read_u16, read_u32};

/// `GENL_ID_CTRL` and `CTRL_CMD_GETFAMILY`.
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// `NETDEV_CMD_DEV_GET`.
const GET_DEVICE: u8 = 1;
const DEVICE_IFINDEX: u16 = 1;
const DEVICE_XDP_FEATURES: u16 = 3;

const GENL_HEADER_LEN: usize = 4;

/// `enum netdev_xdp_act`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(u64);

impl Features {
    const BASIC: u64 = 1;
    const TRANSMIT: u64 = 4;

    /// Pass, drop and send back.
    pub fn has_basic(self) -> bool {
        self.0 & Self::BASIC != 0
    }

    /// What XDP programs of other devices send out here.
    pub fn has_transmit(self) -> bool {
        self.0 & Self::TRANSMIT != 0
    }
}

/// The features of every device, by ifindex. Fails where the kernel does not tell.
pub fn dump() -> io::Result<BTreeMap<u32, Features>> {
    let mut socket = RequestSocket::open_generic()?;
    let mut body = vec![GET_FAMILY, 1, 0, 0];
    push_attribute(&mut body, FAMILY_NAME, b"netdev\0");
    let family = socket.get(CONTROLLER, &body)?;
    let mut found = attributes(family.body.get(GENL_HEADER_LEN..).unwrap_or_default());
    let id = found
        .find(|&(kind, _)| kind == FAMILY_ID)
        .and_then(|(_, value)| read_u16(value, 0))
        .ok_or(io::ErrorKind::NotFound)?;
    let devices = socket.dump(id, &[GET_DEVICE, 1, 0, 0])?;
    Ok(devices.iter().filter_map(|device| parse(&device.body)).collect())
}

fn parse(body: &[u8]) -> Option<(u32, Features)> {
    let (mut ifindex, mut features) = (None, Features::default());
    for (kind, value) in attributes(body.get(GENL_HEADER_LEN..)?) {
        match kind {
            DEVICE_IFINDEX => ifindex = read_u32(value, 0),
            DEVICE_XDP_FEATURES => features = Features(u64::from_ne_bytes(value.try_into().ok()?)),
            _ => {}
        }
    }
    Some((ifindex?, features))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_read_off_a_device() {
        let mut body = vec![GET_DEVICE, 1, 0, 0];
        push_attribute(&mut body, DEVICE_IFINDEX, &7u32.to_ne_bytes());
        push_attribute(&mut body, DEVICE_XDP_FEATURES, &5u64.to_ne_bytes());
        let (ifindex, features) = parse(&body).unwrap();
        assert_eq!(ifindex, 7);
        assert!(features.has_basic() && features.has_transmit());
        assert_eq!(parse(&body[..8]), None);
    }
}
