//! A folder of manifests: what is in force after files change, go bad, vanish or are swapped.

use std::{
    fs,
    os::unix::fs::symlink,
    path::Path,
    time::{Duration, Instant},
};

use dataplane_agent::{
    cli::check::check,
    source::{Change, Source, manifests, manifests::Folder},
};

fn service(name: &str, ip: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {ip}, ports: [{{port: 80}}]}}\n"
    )
}

/// Changes as `+name` and `-name`.
fn changes(folder: &mut Folder) -> Vec<String> {
    describe(folder.scan(true).changes)
}

fn describe(changes: Vec<Change>) -> Vec<String> {
    changes
        .into_iter()
        .map(|change| match change {
            Change::Apply { key, .. } => format!("+{}", key.name.name()),
            Change::Delete(key) => format!("-{}", key.name.name()),
        })
        .collect()
}

fn problems(path: &Path) -> Vec<String> {
    let root = format!("{}/", path.display());
    check(path)
        .iter()
        .map(|rejected| rejected.to_string().replace(&root, ""))
        .collect()
}

#[test]
fn documents_come_and_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut folder = Folder::new(dir.path().to_owned());
    fs::create_dir(dir.path().join("sub")).unwrap();
    let file = dir.path().join("sub/a.yaml");
    fs::write(
        &file,
        service("a", "10.96.0.1") + "---\n" + &service("b", "10.96.0.2"),
    )
    .unwrap();
    assert_eq!(changes(&mut folder), ["+a", "+b"]);
    fs::write(&file, service("b", "10.96.0.2")).unwrap();
    assert_eq!(changes(&mut folder), ["-a"]);
    fs::rename(&file, dir.path().join("moved.yml")).unwrap();
    assert_eq!(changes(&mut folder), [""; 0]);
    fs::remove_file(dir.path().join("moved.yml")).unwrap();
    assert_eq!(changes(&mut folder), ["-b"]);
}

#[test]
fn a_document_that_turns_bad_keeps_its_last_good_version() {
    let dir = tempfile::tempdir().unwrap();
    let mut folder = Folder::new(dir.path().to_owned());
    let file = dir.path().join("a.yaml");
    let (a, b) = (service("a", "10.96.0.1"), service("b", "10.96.0.2"));
    fs::write(&file, format!("{a}---\n{b}")).unwrap();
    assert_eq!(changes(&mut folder), ["+a", "+b"]);
    // No YAML any more; the other document is still followed.
    fs::write(&file, format!("kind: [\n---\n{}", service("b", "10.96.0.3"))).unwrap();
    assert_eq!(changes(&mut folder), ["+b"]);
    // YAML, but not acceptable.
    fs::write(&file, format!("{}---\n{b}", service("a", "10.96.0.999"))).unwrap();
    assert_eq!(changes(&mut folder), ["+b"]);
    fs::write(&file, &b).unwrap();
    assert_eq!(changes(&mut folder), ["-a"]);
}

#[test]
fn a_folder_that_vanishes_deletes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("manifests");
    fs::create_dir(&root).unwrap();
    let mut folder = Folder::new(root.clone());
    fs::write(root.join("a.yaml"), service("a", "10.96.0.1")).unwrap();
    assert_eq!(changes(&mut folder), ["+a"]);
    fs::rename(&root, dir.path().join("away")).unwrap();
    let batch = folder.scan(false);
    assert_eq!(batch.changes, []);
    assert_eq!(batch.rejected.len(), 1);
    fs::rename(dir.path().join("away"), &root).unwrap();
    assert_eq!(changes(&mut folder), [""; 0]);
}

#[test]
fn a_config_map_is_swapped_as_a_whole() {
    let dir = tempfile::tempdir().unwrap();
    let version = |name: &str, text: &str| {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("a.yaml"), text).unwrap();
    };
    version("..1", &service("a", "10.96.0.1"));
    symlink("..1", dir.path().join("..data")).unwrap();
    symlink("..data/a.yaml", dir.path().join("a.yaml")).unwrap();
    let mut source = manifests::start(dir.path()).unwrap();
    let first = source.batches.blocking_recv().unwrap();
    assert_eq!(describe(first.changes), ["+a"]);
    assert!(first.complete);

    version("..2", &service("a", "10.96.0.2"));
    symlink("..2", dir.path().join("..tmp")).unwrap();
    let begun = Instant::now();
    fs::rename(dir.path().join("..tmp"), dir.path().join("..data")).unwrap();
    let second = source.batches.blocking_recv().unwrap();
    assert!(
        begun.elapsed() < Duration::from_millis(500),
        "{:?}",
        begun.elapsed()
    );
    assert_eq!(describe(second.changes), ["+a"]);
    assert_eq!(second.revision, 2);
}

/// The next batch, with what it changes and how long it took. Polling alone would take seconds.
fn next(source: &mut Source, begun: Instant) -> Vec<String> {
    let batch = source.batches.blocking_recv().unwrap();
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
    describe(batch.changes)
}

#[test]
fn links_out_of_the_folder_are_followed_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for folder in ["manifests", "one", "two", "way"] {
        fs::create_dir(path(folder)).unwrap();
    }
    fs::write(path("one/a.yaml"), service("a", "10.96.0.1")).unwrap();
    fs::write(path("two/a.yaml"), service("a", "10.96.0.2")).unwrap();
    // By way of a second link, which can be swapped; and a file beside the folder.
    symlink("../one", path("way/current")).unwrap();
    symlink("../way/current/a.yaml", path("manifests/a.yaml")).unwrap();
    symlink(path("beside.yaml"), path("manifests/b.yaml")).unwrap();
    let mut source = manifests::start(&path("manifests")).unwrap();
    assert_eq!(next(&mut source, Instant::now()), ["+a"]);

    let begun = Instant::now();
    fs::write(path("beside.yaml"), service("b", "10.96.0.9")).unwrap();
    let mut changes = next(&mut source, begun);
    // An empty file may be seen before its text.
    if changes.is_empty() {
        changes = next(&mut source, begun);
    }
    assert_eq!(changes, ["+b"]);

    let begun = Instant::now();
    fs::write(path("one/new"), service("a", "10.96.0.3")).unwrap();
    fs::rename(path("one/new"), path("one/a.yaml")).unwrap();
    assert_eq!(next(&mut source, begun), ["+a"]);

    let begun = Instant::now();
    symlink("../two", path("way/new")).unwrap();
    fs::rename(path("way/new"), path("way/current")).unwrap();
    assert_eq!(next(&mut source, begun), ["+a"]);

    // The old end does not count any more, the new one does.
    fs::write(path("one/a.yaml"), service("a", "10.96.0.4")).unwrap();
    let begun = Instant::now();
    fs::write(path("two/new"), service("a", "10.96.0.5")).unwrap();
    fs::rename(path("two/new"), path("two/a.yaml")).unwrap();
    assert_eq!(next(&mut source, begun), ["+a"]);
    assert!(source.batches.try_recv().is_err());
}

#[test]
fn the_same_object_twice_names_both_places() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("a.yaml"), service("a", "10.96.0.1")).unwrap();
    fs::write(dir.path().join("b.yaml"), service("a", "10.96.0.2")).unwrap();
    let problems = problems(dir.path());
    assert_eq!(
        problems,
        [
            "b.yaml: document 1: Service default/a: metadata.name: the same object is in a.yaml: document 1, which is in force"
        ]
    );
}

#[test]
fn what_is_wrong_is_named_with_its_field() {
    let dir = tempfile::tempdir().unwrap();
    let text = "\
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {type: NodePort, clusterIP: 10.96.0.1, ports: [{port: 80, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {type: NodePort, clusterIP: 10.96.0.2, ports: [{port: 80, nodePort: 30080}]}
---
apiVersion: v1
kind: Service
metadata: {name: c}
spec: {clusterIP: 10.96.0.300, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: d}
spec: {clusterIP: 10.96.0.4, ports: [{name: x, port: 80, protocol: SCTP}, {name: y, port: 81, protocol: ICMP}]}
---
apiVersion: v1
kind: Service
metadata: {name: e}
spec: {ports: [{port: 80}]}
---
kind: [
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: ignored}
";
    fs::write(dir.path().join("m.yaml"), text).unwrap();
    let problems = problems(dir.path());
    let expected = [
        "m.yaml: document 2: Service default/b: spec.ports[0].nodePort: node port 30080/TCP is taken by Service default/a",
        "m.yaml: document 3: Service default/c: spec.clusterIP: `10.96.0.300` is no IP address",
        "m.yaml: document 4: Service default/d: spec.ports[0].protocol: SCTP is not supported yet",
        "m.yaml: document 4: Service default/d: spec.ports[1].protocol: `ICMP` is no protocol",
        "m.yaml: document 5: Service default/e: spec.clusterIP: missing: addresses are not allocated here, give one or `None`",
        "m.yaml: document 6: line 27 column",
    ];
    assert_eq!(problems.len(), expected.len(), "{problems:#?}");
    for (problem, expected) in problems.iter().zip(expected) {
        assert!(problem.starts_with(expected), "{problem}\n{expected}");
    }
}
