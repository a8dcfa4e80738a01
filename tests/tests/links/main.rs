//! What links do to packets: their size, their checksums and their devices, under real transfers through every kind of
//! translation.

mod bed;
mod neighbours;
mod offload;
mod path_mtu;
mod uplinks;
mod vxlan;
