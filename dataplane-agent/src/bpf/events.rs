//! `EVENTS`, the ring buffer in which the kernel side tells of single packets while somebody watches.

use std::{
    fmt,
    fs::{File, TryLockError},
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use aya::maps::{Map, MapData, RingBuf};
use dataplane_common::{
    monitor::{Event, monitor_state},
    policy::PolicyRule,
    reason::Reason,
};

use super::{
    counters::possible_cpus,
    map_names as names,
    pins::Pins,
    sys::{self, MapFd, PerCpuFd},
};

/// Events in a period, and its length. With what the ring holds meanwhile, some 2,500, they bound what a reader costs: 5,000 events of
/// some 0.3 µs in this time are 1.5 % of a CPU.
const EVENTS_AT_MOST: u32 = 2500;
const PERIOD: Duration = Duration::from_millis(100);

/// Why nobody can watch.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    #[error("somebody else watches already: there is one ring, and whoever reads takes")]
    Taken,
    #[error("failed to open table {name}")]
    Open {
        name: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("failed to lock the tables' folder")]
    Lock(#[source] io::Error),
}

/// Whoever watches. The kernel side is told when it is dropped.
pub struct Watch {
    ring: RingBuf<MapData>,
    state: MapFd<u32, u32>,
    counters: PerCpuFd<u64>,
    rules: MapFd<u32, PolicyRule>,
    /// Missed before this began.
    missed_before: u64,
    began_ns: u64,
    period: Instant,
    taken: u32,
    _lock: Option<File>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Opens the pinned maps, and has events written from now on.
    pub fn begin(pins: &Pins) -> Result<Self, WatchError> {
        let lock = File::open(pins.root()).map_err(WatchError::Lock)?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => WatchError::Taken,
            TryLockError::Error(error) => WatchError::Lock(error),
        })?;
        Self::over(|name| pins.open_map(name), Some(lock))
    }

    /// The same over maps that are found by name, of which there is no other reader while `lock` is open.
    pub fn over(find: impl Fn(&str) -> io::Result<OwnedFd>, lock: Option<File>) -> Result<Self, WatchError> {
        let named = |name| move |source| WatchError::Open { name, source };
        let ring = find(names::EVENTS).and_then(|fd| {
            let data = MapData::from_fd(fd).map_err(io::Error::other)?;
            RingBuf::try_from(Map::RingBuf(data)).map_err(io::Error::other)
        });
        let state = find(names::MONITOR).and_then(MapFd::new);
        let counters = find(names::COUNTERS).and_then(|fd| PerCpuFd::new(fd, possible_cpus()?));
        let rules = find(names::RULES).and_then(MapFd::new);
        let mut watch = Self {
            ring: ring.map_err(named(names::EVENTS))?,
            state: state.map_err(named(names::MONITOR))?,
            counters: counters.map_err(named(names::COUNTERS))?,
            rules: rules.map_err(named(names::RULES))?,
            missed_before: 0,
            began_ns: u64::try_from(sys::monotonic().as_nanos()).unwrap_or(u64::MAX),
            period: Instant::now(),
            taken: 0,
            _lock: lock,
        };
        watch.missed_before = watch.count_missed();
        watch.set(monitor_state::WATCHED);
        Ok(watch)
    }

    fn count_missed(&self) -> u64 {
        let of_cpus = self.counters.lookup(Reason::EventMissed as u32);
        of_cpus.map_or(0, |of_cpus| of_cpus.iter().sum())
    }

    fn set(&self, state: u32) {
        // An element of an array: it cannot be missing.
        let _set = self.state.update(&0, &state);
    }

    /// The next event.
    pub fn take(&mut self) -> Option<Event> {
        loop {
            let event: Event = {
                let record = self.ring.next()?;
                bytemuck::pod_read_unaligned(record.get(..size_of::<Event>())?)
            };
            // What whoever watched before has left.
            if event.at_ns < self.began_ns {
                continue;
            }
            self.taken += 1;
            if self.taken == EVENTS_AT_MOST {
                self.set(monitor_state::FULL);
            }
            return Some(event);
        }
    }

    /// Has events written again where there were too many, in a new period. To be called when all that was there is taken.
    pub fn go_on(&mut self) {
        if self.period.elapsed() >= PERIOD {
            self.period = Instant::now();
            self.taken = 0;
            self.set(monitor_state::WATCHED);
        }
    }

    /// Events that found no room since this began.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.count_missed().saturating_sub(self.missed_before)
    }

    /// The rule that an event refers to, as the table has it now.
    #[must_use]
    pub fn rule(&self, event: &Event) -> Option<PolicyRule> {
        self.rules.lookup(&event.rule).ok().flatten()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.set(monitor_state::IDLE);
    }
}
