//! Calls about this process, its sockets and its files.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
    path::Path,
    time::Duration,
};

use tokio::io::{Interest, unix::AsyncFd};

use super::{map_in_map_update, path_string};

/// Returns when every CPU has passed through a quiescent state (a `synchronize_rcu`).
pub fn grace_period() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: libc::c_int = 1;
    // SAFETY: no addresses.
    match unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) } {
        0 => Ok(()),
        // A kernel without it, or with `nohz_full=`.
        _ => map_in_map_update(),
    }
}

/// Kernels before 5.11 charge maps to this limit.
pub fn raise_memlock_limit() {
    let limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` lives across the call. Failure shows when a map cannot be made.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) };
}

/// By what steps the coarse clocks go on (`clock_getres`(2)).
pub fn coarse_resolution() -> io::Result<Duration> {
    let mut step = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `step` lives across the call.
    match unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut step) } {
        0 => Ok(Duration::new(
            step.tv_sec.cast_unsigned(),
            step.tv_nsec.cast_unsigned() as u32,
        )),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps glibc from holding more memory than is used: one heap for all threads, of which one does nearly all work, and large
/// pieces apart, which go back to the system when they are freed. Left alone, it keeps ever larger ones.
pub fn keep_heap_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator locks itself. What it does not know, it ignores.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Gives memory that was freed back to the system; glibc keeps it otherwise.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the allocator locks itself.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Bytes of a page of memory.
pub fn page_size() -> usize {
    // SAFETY: sysconf has no preconditions.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.cast_unsigned() as usize
}

/// Gives back the memory of a part of the program that was read and will hardly be read again: where it is, it is read from its
/// file anew.
pub fn forget_read(bytes: &'static [u8]) {
    let page = page_size();
    let range = bytes.as_ptr_range();
    // Pages that are nobody else's.
    let (first, end) = (
        (range.start as usize).next_multiple_of(page),
        range.end as usize / page * page,
    );
    if first < end {
        // SAFETY: the pages are mapped from the program's file and constant, so what is read from them stays the same.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_DONTNEED) };
    }
}

/// `SO_NETNS_COOKIE` (5.14): the cookie of the network namespace that the socket belongs to.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` and `len` live across the call, and `len` is the size of `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(cookie)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The rules of the table `filter` of iptables-legacy or ip6tables-legacy in this network namespace, as the kernel's
/// blob (`struct ipt_entry` and `struct ip6t_entry`). Loads the table's module, if there is one. Needs
/// `CAP_NET_ADMIN`.
pub fn legacy_filter_rules(is_ipv6: bool) -> io::Result<Vec<u8>> {
    // `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES`; IPv6 has the same numbers.
    const GET_INFO: libc::c_int = 64;
    const GET_ENTRIES: libc::c_int = 65;
    // `struct ipt_getinfo`: a name of 32 bytes, eleven words, entries, size. `struct ipt_get_entries`: name, size,
    // padding, then the entries.
    const INFO_LEN: usize = 84;
    const SIZE_AT: usize = 80;
    const ENTRIES_AT: usize = 40;
    const ATTEMPTS: usize = 5;
    let (any, level) = if is_ipv6 {
        ("[::]:0", libc::IPPROTO_IPV6)
    } else {
        ("0.0.0.0:0", libc::IPPROTO_IP)
    };
    let socket = UdpSocket::bind(any)?;
    let get = |option: libc::c_int, bytes: &mut [u8]| {
        let mut len = bytes.len() as libc::socklen_t;
        // SAFETY: `bytes` and `len` live across the call, and `len` is the length of `bytes`.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                level,
                option,
                bytes.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    };
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut info = [0; INFO_LEN];
        info[..6].copy_from_slice(b"filter");
        get(GET_INFO, &mut info)?;
        let size: [u8; 4] = info[SIZE_AT..].try_into().unwrap_or_default();
        let mut entries = vec![0; ENTRIES_AT + u32::from_ne_bytes(size) as usize];
        entries[..6].copy_from_slice(b"filter");
        entries[32..36].copy_from_slice(&size);
        match get(GET_ENTRIES, &mut entries) {
            Ok(()) => return Ok(entries.split_off(ENTRIES_AT)),
            // Somebody has replaced the table in between.
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && attempt < ATTEMPTS => {}
            Err(error) => return Err(error),
        }
    }
}

/// The monotonic clock, by which the kernel side tells the time of events.
pub fn monotonic() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the clock is always there, and `time` is its type.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec.cast_unsigned(), time.tv_nsec.cast_unsigned() as u32)
}

/// The same in the ticks of flows' entries, of 2^30 ns.
pub fn ticks() -> u32 {
    (monotonic().as_nanos() >> 30) as u32
}

/// How long ago an entry was seen, whose clock may be a tick ahead.
pub fn since_ticks(now: u32, seen: u32) -> Duration {
    Duration::from_nanos(u64::from(now.saturating_sub(seen)) << 30)
}

/// The `f_type` of the filesystem that holds `path`.
pub fn filesystem_magic(path: &Path) -> io::Result<u32> {
    let path = path_string(path)?;
    let mut stat = std::mem::MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: `path` is a terminated string and `stat` is large enough; both live across the call.
    if unsafe { libc::statfs(path.as_ptr(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `statfs` is plain integers, for which zeroes are valid, and the kernel has filled it in.
    Ok(unsafe { stat.assume_init() }.f_type.cast_unsigned() as u32)
}

/// Waits for a descriptor inside a tokio runtime.
pub fn watch_readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the `AsyncFd` owns the descriptor, so it stays open and the same for as long as it is registered.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from)
}
