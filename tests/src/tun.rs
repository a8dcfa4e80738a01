//! Pairs of tun devices, which have no link layer: what is sent to one comes out of the other. A thread for each
//! direction carries packets between them, as a VPN's process would.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use nix::libc::{self, c_char, c_short};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netns::NetNs;

const PATH: &str = "/dev/net/tun";
/// A thread looks at least so often whether it is still wanted.
const LOOK_MS: u16 = 100;
/// More than any packet has.
const BUFFER: usize = 1 << 16;

/// `struct ifreq` as TUNSETIFF uses it.
#[repr(C)]
struct Request {
    name: [c_char; 16],
    flags: c_short,
    padding: [u8; 22],
}

nix::ioctl_write_ptr_bad!(set_interface, libc::TUNSETIFF, Request);

/// Two devices and the threads between them. Dropping it removes the devices.
#[derive(Debug)]
pub struct TunPair {
    wanted: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl TunPair {
    /// Makes both devices, each in its namespace; neither is up yet.
    pub fn create(one: (&NetNs, &str), other: (&NetNs, &str)) -> Result<Self> {
        let open = |(netns, name): (&NetNs, &str)| netns.enter(|| open(name));
        let (one, other) = (open(one)?, open(other)?);
        let wanted = Arc::new(AtomicBool::new(true));
        let mut threads = Vec::new();
        for (from, to) in [(one.try_clone()?, other.try_clone()?), (other, one)] {
            let wanted = Arc::clone(&wanted);
            threads.push(thread::spawn(move || carry(from, to, &wanted)));
        }
        Ok(Self { wanted, threads })
    }
}

impl Drop for TunPair {
    fn drop(&mut self) {
        self.wanted.store(false, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A device of the calling thread's namespace. It lives as long as the file.
fn open(name: &str) -> Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .open(PATH)
        .with_context(|| format!("failed to open {PATH}"))?;
    let mut request = Request {
        name: [0; 16],
        flags: (libc::IFF_TUN | libc::IFF_NO_PI) as c_short,
        padding: [0; 22],
    };
    ensure!(name.len() < request.name.len(), "{name} is too long a name");
    for (to, from) in request.name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    // SAFETY: the request is as the kernel wants it, its name ends with a zero, and it lives across the call.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }
        .with_context(|| format!("failed to make tun device {name}"))?;
    Ok(file)
}

fn carry(mut from: File, mut to: File, wanted: &AtomicBool) {
    let mut buffer = vec![0; BUFFER];
    while wanted.load(Ordering::SeqCst) {
        let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
        // A device that is down has an error for every poll and read, and refuses what is written.
        if poll(&mut ready, PollTimeout::from(LOOK_MS)).is_err() {
            continue;
        }
        if !ready[0]
            .revents()
            .is_some_and(|events| events.contains(PollFlags::POLLIN))
        {
            thread::sleep(std::time::Duration::from_millis(1));
            continue;
        }
        if let Ok(length) = from.read(&mut buffer) {
            let _ = to.write(&buffer[..length]);
        }
    }
}
