//! `SERVICE_TRAFFIC` and `BACKEND_TRAFFIC`: what goes over each service and each backend, by their indices.
//!
//! Connections are counted when they begin, and when they are refused, each of them; so is each packet that begins nothing. Packets would each write to memory that all CPUs share, or take a place for
//! each CPU and backend; one in [`SAMPLED`], at random, is counted, for that many. After n counted packets the standard error is about 1/√n: 1 % at
//! 640,000 packets.

use core::ops::AddAssign;

use bytemuck::{Pod, Zeroable};

/// One packet in so many is counted, as so many.
pub const SAMPLED: u32 = 64;

/// What has gone over a service or a backend since its place was given to it. Whoever gives a place to another sets all to 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Traffic {
    /// Connections, and flows of datagrams, that have begun.
    pub connections: u64,
    /// Those whose first answer was a refusal: RST, or ICMP port unreachable.
    pub refused: u64,
    /// Packets of clients, estimated. What is still to be cut (GSO) is one.
    pub packets_in: u64,
    /// Bytes of clients from the IP header on, estimated.
    pub bytes_in: u64,
    /// Packets of backends, likewise.
    pub packets_out: u64,
    pub bytes_out: u64,
    /// Packets of clients, and connects, that begin nothing, because they are dropped or refused here: there is no endpoint, the client
    /// is in none of the source ranges, a policy forbids it before it begins, or no port is left, for example. Of a backend: those for
    /// which it had been chosen.
    #[cfg_attr(feature = "serde", serde(default))]
    pub dropped: u64,
}

const _: () = assert!(size_of::<Traffic>() == 56);
const _: () = assert!(SAMPLED.is_power_of_two());

/// A packet that is counted, in one number: functions that are verified apart have no other arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    pub bytes: u32,
    /// From the backend to the client.
    pub is_reply: bool,
}

impl Sample {
    #[inline(always)]
    pub fn to_raw(self) -> u64 {
        u64::from(self.bytes) << 1 | u64::from(self.is_reply)
    }

    /// The sample of [`Self::to_raw`].
    #[inline(always)]
    pub fn from_raw(raw: u64) -> Self {
        Self {
            bytes: (raw >> 1) as u32,
            is_reply: raw & 1 != 0,
        }
    }
}

impl AddAssign for Traffic {
    fn add_assign(&mut self, more: Self) {
        self.connections += more.connections;
        self.refused += more.refused;
        self.packets_in += more.packets_in;
        self.bytes_in += more.bytes_in;
        self.packets_out += more.packets_out;
        self.bytes_out += more.bytes_out;
        self.dropped += more.dropped;
    }
}

impl Traffic {
    /// Adds a sampled packet, for all that are not.
    #[cfg(any(test, feature = "memory"))]
    pub fn count(&mut self, sample: Sample) {
        let (packets, bytes) = if sample.is_reply {
            (&mut self.packets_out, &mut self.bytes_out)
        } else {
            (&mut self.packets_in, &mut self.bytes_in)
        };
        *packets += u64::from(SAMPLED);
        *bytes += u64::from(SAMPLED) * u64::from(sample.bytes);
    }
}
