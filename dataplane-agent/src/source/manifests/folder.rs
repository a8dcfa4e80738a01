//! The folder's state: which file holds which objects, and which of them are in force.
//!
//! What is in force changes only on evidence. A folder or file that cannot be read deletes nothing; a document that
//! turns bad leaves its object's last good version; a document that is gone deletes its object.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet, hash_map::DefaultHasher},
    fs,
    hash::{Hash, Hasher},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    documents::{self, Parsed},
    trail::Trail,
};
use crate::{
    model::{Cause, Object, ObjectRef, Origin, Problem, Rejected},
    source::{Batch, Change},
};

/// A file changed so recently may change again without a new time stamp.
const RACY: Duration = Duration::from_millis(50);
const DEPTH: usize = 32;

/// The manifests of one folder.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Every document of an object; `None` where it is refused.
    documents: BTreeMap<ObjectRef, BTreeMap<Origin, Option<Object>>>,
    /// What is in force, and where it comes from.
    in_force: BTreeMap<ObjectRef, (Origin, Object)>,
    directories: BTreeMap<PathBuf, (u64, u64)>,
    trail: Trail,
    complete: bool,
    readable: bool,
}

#[derive(Debug)]
struct File {
    path: Arc<PathBuf>,
    /// `None`: read it again next time.
    stamp: Option<Stamp>,
    digest: u64,
    keys: BTreeSet<ObjectRef>,
    problems: Vec<Rejected>,
    /// See [`Parsed::opaque`].
    opaque: bool,
    ignored: BTreeMap<String, usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

/// What a walk over the folder finds.
#[derive(Default)]
struct Walk {
    files: BTreeMap<PathBuf, Stamp>,
    directories: BTreeMap<PathBuf, (u64, u64)>,
    trail: Trail,
    unreadable: BTreeMap<PathBuf, io::Error>,
    seen: HashSet<(u64, u64)>,
}

impl Folder {
    pub fn new(root: PathBuf) -> Self {
        Self {
            root,
            files: BTreeMap::new(),
            documents: BTreeMap::new(),
            in_force: BTreeMap::new(),
            directories: BTreeMap::new(),
            trail: Trail::default(),
            complete: false,
            readable: false,
        }
    }

    /// The folders that were read, with device and inode.
    pub fn directories(&self) -> &BTreeMap<PathBuf, (u64, u64)> {
        &self.directories
    }

    /// The way of the symbolic links that were followed.
    pub fn trail(&self) -> &Trail {
        &self.trail
    }

    /// Whether the last scan could read the root.
    pub fn is_readable(&self) -> bool {
        self.readable
    }

    /// How many files were read, and how many objects are in force.
    pub fn size(&self) -> (usize, usize) {
        (self.files.len(), self.in_force.len())
    }

    /// Whether every file's time stamp can be trusted.
    pub fn is_settled(&self) -> bool {
        self.files.values().all(|file| file.stamp.is_some())
    }

    /// Looks at the folder; reads what has changed, or everything when `force`. The batch has no revision yet.
    pub fn scan(&mut self, force: bool) -> Batch {
        let mut walk = Walk::default();
        if self.root.is_symlink() {
            walk.trail.follow(&self.root);
        }
        walk.directory(&self.root, 0);
        self.readable = !walk.unreadable.contains_key(&self.root);
        let mut unreadable = walk.unreadable;
        let mut touched = BTreeSet::new();
        if self.readable {
            for (path, stamp) in &walk.files {
                if force || self.files.get(path).is_none_or(|file| file.stamp != Some(*stamp)) {
                    match fs::read(path) {
                        Ok(text) => self.update(path, &text, *stamp, &mut touched),
                        // Removed since the walk: the next scan will find it missing.
                        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {}
                        Err(error) => {
                            unreadable.insert(path.clone(), error);
                        }
                    }
                }
            }
            let gone: Vec<PathBuf> = self
                .files
                .keys()
                .filter(|path| {
                    !walk.files.contains_key(*path) && !unreadable.keys().any(|at| path.starts_with(at))
                })
                .cloned()
                .collect();
            for path in gone {
                self.forget(&path, &mut touched);
            }
            self.directories = walk.directories;
            self.trail = walk.trail;
            self.complete = true;
        } else {
            // Should it come back, nothing of it is watched.
            self.directories.clear();
            self.trail = Trail::default();
        }
        let changes = touched.into_iter().filter_map(|key| self.settle(&key)).collect();
        Batch {
            revision: 0,
            complete: self.complete,
            changes,
            rejected: self.rejected(&unreadable),
            ignored: self.ignored(),
        }
    }

    /// Takes over a file's text.
    fn update(&mut self, path: &Path, text: &[u8], stamp: Stamp, touched: &mut BTreeSet<ObjectRef>) {
        let digest = digest(text);
        let stamp = (!stamp.is_racy()).then_some(stamp);
        if let Some(file) = self.files.get_mut(path)
            && file.digest == digest
        {
            file.stamp = stamp;
            return;
        }
        self.forget(path, touched);
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let mut parsed = documents::parse(text, is_json);
        parsed.drop_twins();
        let Parsed {
            entries,
            problems,
            opaque,
            ignored,
        } = parsed;
        let path = Arc::new(path.to_owned());
        let origin = |document| Origin {
            file: path.clone(),
            document,
        };
        let mut keys = BTreeSet::new();
        for entry in entries {
            keys.insert(entry.key.clone());
            touched.insert(entry.key.clone());
            let places = self.documents.entry(entry.key).or_default();
            places.insert(origin(entry.document), entry.object);
        }
        let problems = problems
            .into_iter()
            .map(|problem| Rejected {
                origin: Some(origin(problem.document)),
                object: problem.object,
                problem: problem.problem,
            })
            .collect();
        let file = File {
            path: path.clone(),
            stamp,
            digest,
            keys,
            problems,
            opaque,
            ignored,
        };
        self.files.insert(path.to_path_buf(), file);
    }

    /// Drops a file's documents; what is in force stays until it is settled.
    fn forget(&mut self, path: &Path, touched: &mut BTreeSet<ObjectRef>) {
        let Some(file) = self.files.remove(path) else {
            return;
        };
        for key in &file.keys {
            if let Some(places) = self.documents.get_mut(key) {
                places.retain(|origin, _| origin.file != file.path);
                if places.is_empty() {
                    self.documents.remove(key);
                }
            }
        }
        touched.extend(file.keys);
        if file.opaque {
            // Versions that were kept only because the file could not be read in full.
            let kept = self
                .in_force
                .iter()
                .filter(|(_, (origin, _))| origin.file == file.path);
            touched.extend(kept.map(|(key, _)| key.clone()));
        }
    }

    /// Decides which version of an object is in force.
    fn settle(&mut self, key: &ObjectRef) -> Option<Change> {
        let incumbent = self.in_force.get(key);
        let Some(places) = self.documents.get(key) else {
            let (origin, _) = incumbent?;
            if self.files.get(&*origin.file).is_some_and(|file| file.opaque) {
                return None;
            }
            self.in_force.remove(key);
            return Some(Change::Delete(key.clone()));
        };
        let (origin, object) = places
            .iter()
            .min_by_key(|(origin, object)| {
                let from = incumbent.map(|(from, _)| from);
                let same_file = from.is_some_and(|from| from.file == origin.file);
                (from != Some(origin), !same_file, object.is_none(), *origin)
            })
            .map(|(origin, object)| (origin.clone(), object.clone()))?;
        let object = object?;
        if let Some((from, previous)) = self.in_force.get_mut(key)
            && *previous == object
        {
            // One copy of it will do.
            if let Some(kept) = self
                .documents
                .get_mut(key)
                .and_then(|places| places.get_mut(&origin))
            {
                *kept = Some(previous.clone());
            }
            *from = origin;
            return None;
        }
        self.in_force
            .insert(key.clone(), (origin.clone(), object.clone()));
        Some(Change::Apply {
            key: key.clone(),
            object,
            origin: Some(origin),
        })
    }

    fn rejected(&self, unreadable: &BTreeMap<PathBuf, io::Error>) -> Vec<Rejected> {
        let mut rejected: Vec<Rejected> = self
            .files
            .values()
            .flat_map(|file| file.problems.iter().cloned())
            .collect();
        for (key, places) in self.documents.iter().filter(|(_, places)| places.len() > 1) {
            let in_force = self.in_force.get(key).map(|(origin, _)| origin);
            let first = in_force.or(places.keys().next());
            for origin in places.keys().filter(|origin| Some(*origin) != first) {
                let reason = match first {
                    Some(first) => format!("the same object is in {first}, which is in force"),
                    None => "the same object is in another document".to_owned(),
                };
                rejected.push(Rejected {
                    origin: Some(origin.clone()),
                    object: key.to_string(),
                    problem: Problem::new("metadata.name", reason).because(Cause::Conflict),
                });
            }
        }
        for (path, error) in unreadable {
            rejected.push(Rejected {
                origin: Some(Origin {
                    file: Arc::new(path.clone()),
                    document: 0,
                }),
                object: String::new(),
                problem: Problem::new("", format!("failed to read: {error}")).because(Cause::Unreadable),
            });
        }
        rejected.sort();
        rejected
    }

    fn ignored(&self) -> BTreeMap<String, usize> {
        let mut ignored = BTreeMap::new();
        for (kind, count) in self.files.values().flat_map(|file| &file.ignored) {
            *ignored.entry(kind.clone()).or_default() += count;
        }
        ignored
    }
}

impl Walk {
    /// Follows symbolic links; hidden names are skipped, so that of a mounted `ConfigMap` only the links are read.
    fn directory(&mut self, path: &Path, depth: usize) {
        let mut read = || -> io::Result<Vec<PathBuf>> {
            let metadata = fs::metadata(path)?;
            let inode = (metadata.dev(), metadata.ino());
            if !self.seen.insert(inode) || depth > DEPTH {
                return Ok(Vec::new());
            }
            let mut paths = Vec::new();
            for entry in fs::read_dir(path)? {
                let entry = entry?;
                if !entry.file_name().as_encoded_bytes().starts_with(b".") {
                    paths.push(entry.path());
                }
            }
            paths.sort();
            self.directories.insert(path.to_owned(), inode);
            Ok(paths)
        };
        let paths = match read() {
            Ok(paths) => paths,
            Err(error) => {
                self.unreadable.insert(path.to_owned(), error);
                return;
            }
        };
        for path in paths {
            let is_manifest = path
                .extension()
                .is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known));
            if path.is_symlink() {
                self.trail.follow(&path);
            }
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => self.directory(&path, depth + 1),
                Ok(metadata) if is_manifest && metadata.is_file() => {
                    self.files.insert(path, Stamp::new(&metadata));
                }
                Err(error) if path.is_symlink() || error.kind() != io::ErrorKind::NotFound => {
                    self.unreadable.insert(path, error);
                }
                _ => {}
            }
        }
    }
}

impl Stamp {
    fn new(metadata: &fs::Metadata) -> Self {
        Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "files have the time of day; one that is written once more than needed does no harm"
    )]
    fn is_racy(self) -> bool {
        let changed = Duration::new(
            self.changed.0.unsigned_abs(),
            self.changed.1.unsigned_abs() as u32,
        );
        SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .is_ok_and(|now| now.saturating_sub(changed) < RACY)
    }
}

fn digest(text: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}
