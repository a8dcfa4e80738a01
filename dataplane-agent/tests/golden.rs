//! Manifests in, tables out: the whole way from a folder to entries, over the tables in memory.

use std::{fs, net::IpAddr, path::Path};

use dataplane_agent::{
    compile::Compiler,
    model::{Dirty, Index, ObjectRef},
    source::{Batch, Change, manifests::Folder},
    store::{Limits, memory::Memory, policy::PolicyLimits},
    sync::{HostTables, Syncer},
};

const LIMITS: Limits = Limits {
    frontends: 100,
    services: 100,
    backends: 100,
    maglev: 10_000,
    source_ranges: 100,
    policy: PolicyLimits::new(100, 100, 100),
};

struct Pipeline {
    index: Index,
    compiler: Compiler,
    syncer: Syncer,
    memory: Memory,
}

impl Pipeline {
    fn new(memory: Memory) -> Self {
        let mut syncer = Syncer::restore(&memory).unwrap();
        let own: IpAddr = "192.0.2.1".parse().unwrap();
        let host = HostTables {
            own_addresses: [(own, 1)].into(),
            ..HostTables::default()
        };
        syncer.set_host(&memory, host);
        Self {
            index: Index::new("n1"),
            compiler: Compiler::default(),
            syncer,
            memory,
        }
    }

    fn take(&mut self, changes: Vec<Change>) {
        let mut dirty = Dirty::default();
        for change in changes {
            dirty.merge(match change {
                Change::Apply { object, .. } => self.index.apply(object),
                Change::Delete(key) => self.index.delete(&key),
            });
        }
        self.syncer.update(self.compiler.update(&self.index, &dirty));
        let report = self.syncer.run(&mut self.memory);
        assert!(report.failed.is_empty(), "{:?}", report.failed);
        assert!(self.syncer.is_settled());
        self.syncer.reclaim(&mut self.memory).unwrap();
    }
}

fn scan(path: &Path) -> Batch {
    let folder = tempfile::tempdir().unwrap();
    fs::copy(path, folder.path().join("m.yaml")).unwrap();
    let batch = Folder::new(folder.path().to_owned()).scan(true);
    assert!(batch.complete);
    assert_eq!(batch.rejected, []);
    batch
}

fn golden() -> Vec<Change> {
    scan(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/basic.yaml")).changes
}

/// `UPDATE_GOLDEN=1` writes the file anew.
fn compare(dump: &str, name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, dump).unwrap();
    }
    assert_eq!(dump, fs::read_to_string(&path).unwrap());
}

#[test]
fn manifests_become_tables() {
    let mut pipeline = Pipeline::new(Memory::new(LIMITS));
    pipeline.take(golden());
    compare(&pipeline.memory.dump(), "basic.txt");
}

#[test]
fn the_order_of_arrival_does_not_matter() {
    let mut together = Pipeline::new(Memory::new(LIMITS));
    together.take(golden());
    for reverse in [false, true] {
        let mut changes = golden();
        if reverse {
            changes.reverse();
        }
        let mut one_by_one = Pipeline::new(Memory::new(LIMITS));
        for change in changes {
            one_by_one.take(vec![change]);
        }
        assert_eq!(one_by_one.memory.dump(), together.memory.dump());
    }
}

#[test]
fn deleting_everything_ends_empty() {
    let mut pipeline = Pipeline::new(Memory::new(LIMITS));
    pipeline.take(golden());
    let delete = |change| match change {
        Change::Apply { key, .. } | Change::Delete(key) => Change::Delete(key),
    };
    pipeline.take(golden().into_iter().map(delete).collect());
    assert_eq!(pipeline.memory.dump(), "own 192.0.2.1 flags=1\n");
    assert_eq!(pipeline.syncer.usage(), (0, 0, 0));
}

#[test]
fn a_restart_writes_nothing_that_is_there_already() {
    let mut pipeline = Pipeline::new(Memory::new(LIMITS));
    pipeline.take(golden());
    let before = pipeline.memory.clone();
    let mut restarted = Pipeline::new(pipeline.memory);
    restarted.take(golden());
    assert_eq!(restarted.memory.writes, before.writes);
    assert_eq!(restarted.memory.dump(), before.dump());
    assert_eq!(restarted.memory.frontends, before.frontends);
}

#[test]
fn a_restart_removes_what_went_meanwhile() {
    let mut pipeline = Pipeline::new(Memory::new(LIMITS));
    pipeline.take(golden());
    let kept: Vec<Change> = golden()
        .into_iter()
        .filter(|change| !matches!(change, Change::Apply { key, .. } if is_web(key)))
        .collect();
    let mut restarted = Pipeline::new(pipeline.memory);
    restarted.take(kept.clone());
    let mut fresh = Pipeline::new(Memory::new(LIMITS));
    fresh.take(kept);
    assert_eq!(restarted.memory.dump(), fresh.memory.dump());
    assert_eq!(restarted.syncer.usage(), fresh.syncer.usage());
}

fn is_web(key: &ObjectRef) -> bool {
    key.name.namespace() == "shop"
}
