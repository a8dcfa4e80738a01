//! `VERDICTS`, the ring buffer in which the kernel side tells of policies' verdicts, and the rules they refer to.

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
};

use aya::maps::{Map, MapData, RingBuf};
use dataplane_common::policy::{NO_RULE_INDEX, PolicyRule, VerdictEvent};
use tokio::io::unix::AsyncFd;

use super::{
    map_names,
    pins::Pins,
    sys::{self, MapFd, RingView},
};

/// The reading end.
pub struct Verdicts {
    ring: RingBuf<MapData>,
    readable: AsyncFd<OwnedFd>,
    rules: MapFd<u32, PolicyRule>,
}

impl fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Verdicts").finish_non_exhaustive()
    }
}

impl Verdicts {
    /// Opens the pinned maps; has to be called inside a runtime.
    pub fn open(pins: &Pins) -> io::Result<Self> {
        let data = MapData::from_fd(pins.open_map(map_names::VERDICTS)?).map_err(io::Error::other)?;
        let ring = RingBuf::try_from(Map::RingBuf(data)).map_err(io::Error::other)?;
        Ok(Self {
            readable: sys::watch_readable(ring.as_fd().try_clone_to_owned()?)?,
            ring,
            rules: MapFd::new(pins.open_map(map_names::RULES)?)?,
        })
    }

    /// Returns when there is something to [`take`](Self::take).
    pub async fn wait(&self) -> io::Result<()> {
        self.readable.readable().await?.clear_ready();
        Ok(())
    }

    /// The next event.
    pub fn take(&mut self) -> Option<VerdictEvent> {
        let record = self.ring.next()?;
        let bytes = record.get(..size_of::<VerdictEvent>())?;
        Some(bytemuck::pod_read_unaligned(bytes))
    }

    /// The rule that an event refers to, as the table has it now.
    pub fn rule(&self, event: &VerdictEvent) -> Option<PolicyRule> {
        rule(&self.rules, event)
    }
}

/// What nobody has taken yet, looked at and left where it is.
#[derive(Debug)]
pub struct Untaken {
    ring: RingView,
    rules: MapFd<u32, PolicyRule>,
    /// What was taken when this began.
    taken: u64,
    next: u64,
}

impl Untaken {
    /// Opens the pinned maps.
    pub fn open(pins: &Pins) -> io::Result<Self> {
        let ring = RingView::new(&pins.open_map(map_names::VERDICTS)?)?;
        Ok(Self {
            taken: ring.taken(),
            next: 0,
            ring,
            rules: MapFd::new(pins.open_map(map_names::RULES)?)?,
        })
    }

    /// The events that were not read before, each with the rule that it refers to.
    pub fn read(&mut self) -> Vec<(VerdictEvent, Option<PolicyRule>)> {
        let mut events = Vec::new();
        self.next = self.ring.read(self.next, |record| {
            if let Some(bytes) = record.get(..size_of::<VerdictEvent>()) {
                let event = bytemuck::pod_read_unaligned(bytes);
                events.push((event, rule(&self.rules, &event)));
            }
        });
        events
    }

    /// Whether somebody takes events now.
    pub fn is_taken(&self) -> bool {
        self.ring.taken() != self.taken
    }
}

fn rule(rules: &MapFd<u32, PolicyRule>, event: &VerdictEvent) -> Option<PolicyRule> {
    let rule = rules.lookup(&event.rule).ok().flatten();
    rule.filter(|_| event.rule != NO_RULE_INDEX)
}
