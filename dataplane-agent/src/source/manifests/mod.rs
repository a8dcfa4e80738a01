//! A folder of manifests as a source: [`folder`] reads, [`documents`] parses, this file follows changes.
//!
//! Every folder that was read is watched by inotify, and so are those that symbolic links lead through ([`trail`]). An
//! event only says "look again": what has changed is found by comparing, so no order of events can leave a wrong
//! state. A slow poll covers what inotify cannot see, such as network file systems.

mod documents;
mod folder;
mod strict;
mod trail;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{self, Receiver, RecvTimeoutError, Sender},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use notify::{
    EventKind, RecommendedWatcher, RecursiveMode, Watcher,
    event::{AccessKind, AccessMode},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc as async_mpsc, oneshot};

pub use folder::Folder;

use super::{Batch, Rescan, Source, State};

/// Without events the folder is looked at this often.
const POLL: Duration = Duration::from_secs(5);
/// After an event, this much silence is waited for ...
const QUIET: Duration = Duration::from_millis(5);
/// ... but not longer than this.
const QUIET_AT_MOST: Duration = Duration::from_millis(30);

/// What the following thread is told.
#[derive(Debug)]
pub enum Request {
    /// The file system says that something has changed.
    Changed,
    /// Read everything, whatever its time stamps say, and answer with the revision.
    Rescan(oneshot::Sender<u64>),
}

/// What has been read of a folder, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    pub path: PathBuf,
    pub files: usize,
    /// Those in force.
    pub objects: usize,
    /// Documents that are refused.
    pub refused: usize,
    /// When the folder was last read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_look: Option<Timestamp>,
    /// When something in it was last found changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_change: Option<Timestamp>,
}

/// Starts following `root` in a thread of its own, which ends when its batches are not received any more.
pub fn start(root: &Path) -> notify::Result<Source> {
    let root = absolute(root);
    let (requests, inbox) = mpsc::channel();
    let (batches, outbox) = async_mpsc::unbounded_channel();
    let watches = Watches::new(&root, requests.clone())?;
    let report = Arc::new(Mutex::new(Report {
        path: root.clone(),
        ..Report::default()
    }));
    let follower = Follower {
        report: report.clone(),
        folder: Folder::new(root),
        watches,
        inbox,
        batches,
        revision: 0,
        last: None,
    };
    std::thread::Builder::new()
        .name("manifests".to_owned())
        .spawn(move || follower.run())
        .map_err(notify::Error::io)?;
    Ok(Source {
        batches: outbox,
        rescan: Rescan::Folder(requests),
        state: State::Folder(report),
        servers: Vec::new(),
        events: None,
        node_status: None,
    })
}

/// The path with its parent resolved, so that the folder itself may be a symbolic link that is swapped.
fn absolute(root: &Path) -> PathBuf {
    let absolute = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    match (
        absolute.parent().and_then(|parent| parent.canonicalize().ok()),
        absolute.file_name(),
    ) {
        (Some(parent), Some(name)) => parent.join(name),
        _ => absolute,
    }
}

struct Follower {
    report: Arc<Mutex<Report>>,
    folder: Folder,
    watches: Watches,
    inbox: Receiver<Request>,
    batches: async_mpsc::UnboundedSender<Batch>,
    revision: u64,
    last: Option<Batch>,
}

impl Follower {
    fn run(mut self) {
        let mut waiting = Vec::new();
        loop {
            if !self.look(!waiting.is_empty()) {
                return;
            }
            for reply in waiting.drain(..) {
                let reply: oneshot::Sender<u64> = reply;
                if self.folder.is_readable() {
                    // Whoever asked may have gone; the answer is for nobody else.
                    let _gone = reply.send(self.revision);
                }
            }
            if !self.wait(&mut waiting) {
                return;
            }
        }
    }

    /// Scans, and scans again where new folders were found: they may have filled before they were watched.
    /// False when nobody listens.
    fn look(&mut self, force: bool) -> bool {
        loop {
            let batch = self.folder.scan(force);
            let news = self.last.as_ref().is_none_or(|last| {
                !batch.changes.is_empty()
                    || last.rejected != batch.rejected
                    || last.ignored != batch.ignored
                    || last.complete != batch.complete
            });
            self.tell(&batch, news);
            if news {
                self.revision += 1;
                let batch = Batch {
                    revision: self.revision,
                    ..batch
                };
                self.last = Some(Batch {
                    changes: Vec::new(),
                    ..batch.clone()
                });
                if self.batches.send(batch).is_err() {
                    return false;
                }
            }
            if !self.watches.follow(&self.folder) {
                return !self.batches.is_closed();
            }
        }
    }

    fn tell(&self, batch: &Batch, news: bool) {
        let mut report = self.report.lock().unwrap_or_else(PoisonError::into_inner);
        report.refused = batch.rejected.len();
        if self.folder.is_readable() {
            let now = Timestamp::now();
            report.last_look = Some(now);
            (report.files, report.objects) = self.folder.size();
            if news {
                report.last_change = Some(now);
            }
        }
    }

    /// Waits for something to do, then for a moment of silence. False when nobody can ask any more.
    fn wait(&self, waiting: &mut Vec<oneshot::Sender<u64>>) -> bool {
        match self.inbox.recv_timeout(if self.folder.is_settled() {
            POLL
        } else {
            QUIET_AT_MOST
        }) {
            Ok(Request::Rescan(reply)) => {
                waiting.push(reply);
                return true;
            }
            Ok(Request::Changed) => {}
            Err(RecvTimeoutError::Timeout) => return true,
            Err(RecvTimeoutError::Disconnected) => return false,
        }
        let until = Instant::now() + QUIET_AT_MOST;
        while Instant::now() < until {
            match self.inbox.recv_timeout(QUIET) {
                Ok(Request::Changed) => {}
                Ok(Request::Rescan(reply)) => {
                    waiting.push(reply);
                    break;
                }
                Err(_) => break,
            }
        }
        true
    }
}

/// The inotify watches: one for each folder that was read or that a link leads through, and one for the folder above
/// the root.
struct Watches {
    watcher: RecommendedWatcher,
    parent: PathBuf,
    has_parent: bool,
    /// By path, with the (device, inode) that is watched: a folder replaced by another needs a new watch.
    watched: BTreeMap<PathBuf, (u64, u64)>,
    /// Names outside of the root whose events count.
    names: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl Watches {
    fn new(root: &Path, requests: Sender<Request>) -> notify::Result<Self> {
        let below = root.to_owned();
        let names = Arc::new(Mutex::new(BTreeSet::new()));
        let outside = names.clone();
        let counts = move |path: &PathBuf| {
            let outside = outside.lock().unwrap_or_else(PoisonError::into_inner);
            path.starts_with(&below) || outside.contains(path)
        };
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let relevant = match event {
                // Reading makes events too.
                Ok(event) => {
                    (!event.kind.is_access()
                        || event.kind == EventKind::Access(AccessKind::Close(AccessMode::Write)))
                        && (event.paths.is_empty() || event.paths.iter().any(&counts))
                }
                // An overflow, for example.
                Err(_) => true,
            };
            if relevant {
                // The follower has ended: nothing to tell.
                let _ended = requests.send(Request::Changed);
            }
        })?;
        Ok(Self {
            watcher,
            parent: root.parent().unwrap_or(root).to_owned(),
            has_parent: false,
            watched: BTreeMap::new(),
            names,
        })
    }

    /// Watches exactly what a scan has met; true when a watch is new.
    fn follow(&mut self, folder: &Folder) -> bool {
        if !self.has_parent {
            self.has_parent = self
                .watcher
                .watch(&self.parent, RecursiveMode::NonRecursive)
                .is_ok();
        }
        let (read, trail) = (folder.directories(), folder.trail());
        let mut wanted = read.clone();
        // The kernel has one watch for a folder, however many paths lead there.
        let inodes: BTreeSet<(u64, u64)> = read.values().copied().collect();
        let on_the_way = trail.folders.iter().filter(|(_, inode)| !inodes.contains(inode));
        wanted.extend(on_the_way.map(|(path, inode)| (path.clone(), *inode)));
        wanted.remove(&self.parent);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if *names != trail.names {
            names.clone_from(&trail.names);
        }
        drop(names);

        let gone: Vec<PathBuf> = self
            .watched
            .iter()
            .filter(|(path, inode)| wanted.get(*path) != Some(inode))
            .map(|(path, _)| path.clone())
            .collect();
        for path in gone {
            // A watch on a folder that was removed is gone already.
            let _gone = self.watcher.unwatch(&path);
            self.watched.remove(&path);
        }
        let mut new = false;
        for (path, inode) in wanted {
            if self.watched.contains_key(&path) {
                continue;
            }
            match self.watcher.watch(&path, RecursiveMode::NonRecursive) {
                Ok(()) => {
                    self.watched.insert(path, inode);
                    new = true;
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "failed to watch, polling instead");
                }
            }
        }
        new
    }
}
