//! Where symbolic links lead: the names that decide which file is read, so that a change of any of them is noticed.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fs,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

/// As many as the kernel follows.
const LINKS_AT_MOST: usize = 40;

/// What lies on the way of links.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trail {
    /// Every link and every end, by its path without links.
    pub names: BTreeSet<PathBuf>,
    /// The folders that they are in, with device and inode.
    pub folders: BTreeMap<PathBuf, (u64, u64)>,
}

impl Trail {
    /// Records the way from `path`, an absolute path, to its end, whether or not that exists.
    pub fn follow(&mut self, path: &Path) {
        let mut rest: VecDeque<PathBuf> = parts(path).collect();
        let mut at = PathBuf::from("/");
        let mut links = 0;
        while let Some(part) = rest.pop_front() {
            match part.components().next() {
                Some(Component::RootDir) => at = PathBuf::from("/"),
                Some(Component::ParentDir) => {
                    at.pop();
                }
                Some(Component::Normal(name)) => {
                    let next = at.join(name);
                    let Ok(target) = fs::read_link(&next) else {
                        at = next;
                        continue;
                    };
                    self.add(next);
                    links += 1;
                    if links > LINKS_AT_MOST {
                        return;
                    }
                    for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
                        rest.push_front(part);
                    }
                }
                _ => {}
            }
        }
        self.add(at);
    }

    fn add(&mut self, name: PathBuf) {
        if let Some(folder) = name.parent()
            && let Ok(metadata) = fs::metadata(folder)
        {
            self.folders
                .insert(folder.to_owned(), (metadata.dev(), metadata.ino()));
        }
        self.names.insert(name);
    }
}

fn parts(path: &Path) -> impl Iterator<Item = PathBuf> {
    path.components()
        .map(|component| PathBuf::from(component.as_os_str()))
}
