//! Traffic that runs while something happens: connections that are kept and ask every few milliseconds, and new
//! connections all the time. What is judged: does any break, how long does any wait, does any new one fail.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use crate::web::{Client, in_netns};

/// Where connections come from and go to.
#[derive(Debug, Clone)]
pub struct Way {
    pub from: PathBuf,
    pub to: SocketAddr,
}

/// How often a connection asks, and how long it waits for an answer.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    pub period: Duration,
    pub patience: Duration,
}

/// What happened since the last look.
#[derive(Debug, Default, Clone)]
pub struct Lap {
    /// Kept connections that work, by who answers them.
    pub kept: BTreeMap<String, u32>,
    pub broken: Vec<String>,
    /// The longest time between a question and its answer, and what was slow.
    pub longest: Duration,
    /// New connections, by who answered them.
    pub fresh: BTreeMap<String, u32>,
    pub failed: Vec<String>,
}

/// Running traffic; dropping it ends it.
#[derive(Debug)]
pub struct Traffic {
    lap: Arc<Mutex<Lap>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Lap {
    #[must_use]
    pub fn kept_total(&self) -> u32 {
        self.kept.values().sum()
    }

    #[must_use]
    pub fn fresh_total(&self) -> u32 {
        self.fresh.values().sum()
    }
}

impl Traffic {
    /// Opens `kept` connections on each way and goes on opening new ones.
    #[must_use]
    pub fn start(ways: &[Way], kept: u32, pace: Pace) -> Self {
        let mut traffic = Self {
            lap: Arc::default(),
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for way in ways {
            for _ in 0..kept {
                traffic.spawn(way, pace, keep);
            }
            traffic.spawn(way, pace, renew);
        }
        traffic
    }

    /// Lets the traffic run for a while, and tells what happened in that time.
    pub fn lap(&self, during: Duration, act: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<Lap> {
        let _before = self.take();
        act()?;
        sleep(during);
        Ok(self.take())
    }

    /// What has happened since the last look. Kept connections stay in their places; everything else begins anew.
    #[must_use]
    pub fn take(&self) -> Lap {
        let mut lap = self.lap.lock().unwrap_or_else(PoisonError::into_inner);
        let next = Lap {
            kept: lap.kept.clone(),
            broken: lap.broken.clone(),
            ..Lap::default()
        };
        std::mem::replace(&mut *lap, next)
    }

    fn spawn(&mut self, way: &Way, pace: Pace, work: fn(SocketAddr, Pace, &Mutex<Lap>, &AtomicBool)) {
        let (to, lap, stop) = (way.to, Arc::clone(&self.lap), Arc::clone(&self.stop));
        self.threads
            .push(in_netns(&way.from, move || work(to, pace, &lap, &stop)));
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// One connection, as long as the traffic runs.
fn keep(to: SocketAddr, pace: Pace, lap: &Mutex<Lap>, stop: &AtomicBool) {
    let lock = || lap.lock().unwrap_or_else(PoisonError::into_inner);
    let mut client = match Client::connect(to, pace.patience) {
        Ok(client) => client,
        Err(error) => return lock().broken.push(format!("{to}: {error}")),
    };
    let mut server = String::new();
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        match client.ask() {
            Ok(name) => {
                let mut lap = lock();
                lap.longest = lap.longest.max(asked.elapsed());
                if server.is_empty() {
                    *lap.kept.entry(name.clone()).or_default() += 1;
                    server = name;
                }
            }
            Err(error) => {
                let mut lap = lock();
                lap.broken.push(format!("{to}, answered by {server}: {error}"));
                if let Some(count) = lap.kept.get_mut(&server) {
                    *count -= 1;
                }
                return;
            }
        }
        sleep(pace.period);
    }
}

/// A new connection again and again.
fn renew(to: SocketAddr, pace: Pace, lap: &Mutex<Lap>, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let result = Client::connect(to, pace.patience).and_then(|mut client| client.ask());
        {
            let mut lap = lap.lock().unwrap_or_else(PoisonError::into_inner);
            lap.longest = lap.longest.max(asked.elapsed());
            match result {
                Ok(name) => *lap.fresh.entry(name).or_default() += 1,
                Err(error) => lap.failed.push(format!("{to}: {error}")),
            }
        }
        sleep(pace.period);
    }
}
