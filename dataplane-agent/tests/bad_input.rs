//! What `check` says of every kind of bad document: a line with document, object and field, and never a panic.

use std::{
    fs,
    time::{Duration, Instant},
};

use dataplane_agent::cli::check::check;

/// What `check` says of one file, without the folder's name.
fn problems(name: &str, text: &[u8]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(name), text).unwrap();
    let root = format!("{}/", dir.path().display());
    let rejected = check(dir.path());
    rejected
        .iter()
        .map(|one| one.to_string().replace(&root, ""))
        .collect()
}

/// A Service whose spec is given.
fn service(spec: &str) -> String {
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: a}}\nspec: {spec}\n")
}

#[test]
fn each_mistake_is_named_with_document_object_and_field() {
    let port = |port: &str| service(&format!("{{clusterIP: 10.96.0.1, ports: [{port}]}}"));
    let of_service = "m.yaml: document 1: Service default/a: ";
    for (text, expected) in [
        (port("{port: 0}"), "spec.ports[0].port: 0 is no port (1-65535)"),
        (
            port("{port: 65536}"),
            "spec.ports[0].port: 65536 is no port (1-65535)",
        ),
        (port("{port: -1}"), "spec.ports[0].port: -1 is no port (1-65535)"),
        (
            port("{port: 80.5}"),
            "spec.ports[0].port: invalid type: floating point `80.5`",
        ),
        (
            port("{port: 80, protocol: ICMP}"),
            "spec.ports[0].protocol: `ICMP` is no protocol",
        ),
        (
            port("{port: 80, targetPort: 70000}"),
            "spec.ports[0].targetPort: 70000 is no port",
        ),
        (
            port("{port: 80}, {port: 81}"),
            "spec.ports[1].name: missing, and another port has none",
        ),
        (
            port("{name: a, port: 80}, {name: b, port: 80}"),
            "spec.ports[1].port: 80/TCP stands twice",
        ),
        (
            service("{clusterIP: 10.96.0.300, ports: [{port: 80}]}"),
            "spec.clusterIP: `10.96.0.300` is no IP address",
        ),
        (
            service("{clusterIP: [1], ports: [{port: 80}]}"),
            "spec.clusterIP: invalid type: sequence, expected a string",
        ),
        (
            service("{clusterIP: 10.96.0.1, ports: {port: 80}}"),
            "spec.ports: invalid type: map, expected a sequence",
        ),
        (service("{clusterIP: 10.96.0.1}"), "spec.ports: missing"),
        (
            service("hello"),
            "spec: invalid type: string \"hello\", expected ServiceSpec",
        ),
        (
            port("{port: 80}").replace("v1", "v2"),
            "apiVersion: v2 is not read, only v1",
        ),
    ] {
        let problems = problems("m.yaml", text.as_bytes());
        assert_eq!(problems.len(), 1, "{text}{problems:#?}");
        let expected = format!("{of_service}{expected}");
        assert!(problems[0].starts_with(&expected), "{}\n{expected}", problems[0]);
    }
}

#[test]
fn a_document_that_says_too_little_is_named_by_its_place() {
    for (text, expected) in [
        ("hello\n", "document 1: not an object"),
        ("- a\n- b\n", "document 1: not an object"),
        ("apiVersion: v1\n", "document 1: kind: missing"),
        ("kind: Service\n", "document 1: Service: apiVersion: missing"),
        (
            "apiVersion: v1\nkind: Service\n",
            "document 1: Service: metadata.name: missing",
        ),
        (
            "apiVersion: v1\nkind: Service\nmetadata: {name: 12}\n",
            "document 1: Service: metadata.name: not a string",
        ),
        (
            "apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: 1}\n",
            "document 1: Pod: metadata.namespace: not a string",
        ),
        ("kind: List\n", "document 1: List: items: not a list"),
        (
            "kind: List\nitems: {a: b}\n",
            "document 1: List: items: not a list",
        ),
        (
            "kind: ServiceList\nitems: 3\n",
            "document 1: ServiceList: items: not a list",
        ),
        ("kind: List\nitems: [1]\n", "document 1: items[0]: not an object"),
        (
            "kind: List\nitems: [{kind: List, items: [{kind: Pod}]}]\n",
            "document 1: Pod: items[0].items[0].apiVersion: missing",
        ),
        (
            "a: 1\n---\nkind: *nope\n",
            "document 2: line 3 column 7: unknown anchor",
        ),
        (
            "a:\n\tb: 1\n",
            "document 1: line 2 column 1: found character that cannot start any token",
        ),
        (
            "a: 1\nb: 2\na: 3\n",
            "document 1: line 1 column 1: the key `a` stands twice",
        ),
        (
            "a: {<<: 3}\n",
            "document 1: line 1 column 4: a: `<<` merges mappings only",
        ),
        (
            "\0\0\0\0",
            "document 1: line 1 column 1: control characters are not allowed",
        ),
    ] {
        let problems = problems("m.yaml", text.as_bytes());
        let expected = format!("m.yaml: {expected}");
        assert!(
            problems.iter().any(|problem| problem.starts_with(&expected)),
            "{text:?}: {problems:#?}\n{expected}"
        );
    }
}

#[test]
fn odd_but_good_documents_pass() {
    let good = service("{clusterIP: 10.96.0.1, ports: [{port: 80}]}");
    let merged = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec:\n  clusterIP: 10.96.0.1\n  ports:\n  - &p {name: a, port: 80, protocol: TCP}\n  - {<<: *p, name: b, port: 81}\n";
    for text in [
        String::new(),
        "  \n\t\n# nothing\n---\n---\n...\n".to_owned(),
        format!("\u{feff}{good}"),
        format!("%YAML 1.2\n---\n{good}...\n"),
        format!("{good}...\n---\n{good}")
            .replacen("name: a", "name: b", 1)
            .replacen("0.1", "0.2", 1),
        good.replace('\n', "\r\n"),
        service("{clusterIP: 010.096.000.041, ports: [{port: 80}]}"),
        merged.to_owned(),
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: a}}\ndata: {{a: '{}'}}\n",
            "x".repeat(10_000_000)
        ),
    ] {
        let problems = problems("m.yaml", text.as_bytes());
        assert!(problems.is_empty(), "{problems:#?}");
    }
}

/// What is made to take long or to break the reader ends in a line, and soon.
#[test]
fn hostile_files_cost_a_line() {
    let bomb = (b'b'..b'k').fold("a: &a [x,x,x,x,x,x,x,x,x,x]\n".to_owned(), |text, name| {
        let (name, before) = (name as char, (name - 1) as char);
        text + &format!("{name}: &{name} [{}]\n", format!("*{before},").repeat(10))
    });
    let garbage: Vec<u8> = (0..100_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    for (name, text) in [
        ("m.yaml", bomb.into_bytes()),
        ("m.yaml", "[".repeat(100_000).into_bytes()),
        ("m.yaml", "{a: ".repeat(100_000).into_bytes()),
        ("m.yaml", "- ".repeat(100_000).into_bytes()),
        ("m.json", "[".repeat(100_000).into_bytes()),
        ("m.json", "{\"a\":".repeat(100_000).into_bytes()),
        ("m.json", b"{} x".to_vec()),
        ("m.yaml", garbage.clone()),
        ("m.json", garbage),
    ] {
        let begun = Instant::now();
        let problems = problems(name, &text);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        assert!(
            !problems.is_empty() && problems.iter().all(|one| one.starts_with(name)),
            "{problems:#?}"
        );
    }
}
