//! `explain` on a folder of manifests: verdict, rule and reason, for people and for programs.

use std::{fs, path::Path, process::Command};

use serde_json::Value;

const CLUSTER: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: shop}}
---
apiVersion: v1
kind: Node
metadata: {name: n1}
status: {addresses: [{type: InternalIP, address: 192.168.77.11}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop, labels: {app: front}}
spec: {nodeName: n1, containers: [{name: c}]}
status: {phase: Running, podIPs: [{ip: 10.244.1.11}, {ip: "fd00::b"}]}
---
apiVersion: v1
kind: Pod
metadata: {name: back, namespace: shop, labels: {app: back}}
spec: {nodeName: n1, containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}
status: {phase: Running, podIPs: [{ip: 10.244.1.12}, {ip: "fd00::c"}], conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: back, namespace: shop}
spec: {clusterIP: 10.96.0.9, selector: {app: back}, ports: [{port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: idle, namespace: shop}
spec: {clusterIP: 10.96.0.10, selector: {app: front}, ports: [{port: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: back, namespace: shop}
spec:
  podSelector: {matchLabels: {app: back}}
  ingress:
  - from: [{ipBlock: {cidr: 198.51.100.0/24}}]
  - from: [{podSelector: {matchLabels: {app: front}}}]
    ports: [{port: web}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: odd, namespace: shop}
spec: {podSelector: {matchLabels: {app: back}}, ingress: [{when: night}]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: trial, namespace: shop, annotations: {dataplane/dry-run: "true"}}
spec: {podSelector: {matchLabels: {app: front}}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}]}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: guard}
spec:
  tier: Admin
  priority: 1
  subject: {namespaces: {matchLabels: {team: shop}}}
  egress:
  - {name: no-metadata, action: Deny, to: [{networks: [169.254.169.254/32]}]}
"#;

/// Exit status, and what was printed to stdout and stderr.
fn explain(folder: &Path, from: &str, to: &str, port: &str, more: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_dataplane-agent"))
        .args([
            "explain",
            "--from",
            from,
            "--to",
            to,
            "--port",
            port,
            "--manifests",
        ])
        .arg(folder)
        .args(more)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code().unwrap(),
        text(output.stdout),
        text(output.stderr),
    )
}

#[test]
fn policy_verdicts_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cluster.yaml"), CLUSTER).unwrap();
    for (from, to, port, status, expected) in [
        (
            "shop/front",
            "shop/back",
            "8080/TCP",
            0,
            &[
                "shop/front (10.244.1.11) -> shop/back (10.244.1.12), 8080/TCP: allowed",
                "shop/front (fd00::b) -> shop/back (fd00::c), 8080/TCP: allowed",
                "NetworkPolicy spec.ingress[1] of NetworkPolicy shop/back: allow",
                "selected by NetworkPolicy shop/back, NetworkPolicy shop/odd",
                "no rule decides, and no NetworkPolicy selects it in this direction",
                "spec.ingress[0].when: not known here: the rule allows nothing",
            ][..],
        ),
        (
            "10.244.1.11",
            "10.244.1.12",
            "80",
            1,
            &[
                "ingress of shop/back (10.244.1.12): denied",
                "no rule allows this",
            ],
        ),
        (
            "198.51.100.7",
            "shop/back",
            "ICMP",
            0,
            &["spec.ingress[0] of NetworkPolicy shop/back: allow"],
        ),
        (
            "192.168.77.11",
            "shop/back",
            "9/UDP",
            0,
            &["its own node always reaches it"],
        ),
        (
            "shop/back",
            "shop/back",
            "9/UDP",
            0,
            &["a Pod always reaches itself"],
        ),
        (
            "shop/front",
            "169.254.169.254",
            "80/TCP",
            1,
            &[
                "egress of shop/front (10.244.1.11): denied",
                "admin spec.egress[0] of ClusterNetworkPolicy guard: deny",
            ],
        ),
        (
            "shop/front",
            "192.0.2.1",
            "80",
            0,
            &[
                "egress of shop/front (10.244.1.11): allowed",
                "without dry run denied: a NetworkPolicy selects it in this direction, and no rule allows this",
                "selected by ClusterNetworkPolicy guard, NetworkPolicy shop/trial (dry run)",
            ],
        ),
        (
            "192.0.2.1",
            "192.0.2.2",
            "80/TCP",
            0,
            &["neither end is a Pod of this cluster"],
        ),
    ] {
        let (code, text, errors) = explain(dir.path(), from, to, port, &[]);
        assert_eq!((code, &*errors), (status, ""), "{text}");
        for part in expected {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
    let (code, text, _) = explain(
        dir.path(),
        "shop/front",
        "169.254.169.254",
        "80/TCP",
        &["-o", "json"],
    );
    let answer: Value = serde_json::from_str(&text).unwrap();
    let flow = &answer["flows"][0];
    assert_eq!((code, &flow["allowed"]), (1, &Value::Bool(false)));
    assert_eq!(flow["steps"][0]["rule"]["name"], "no-metadata");
    assert_eq!(flow["steps"][0]["rule"]["policy"], "ClusterNetworkPolicy guard");
    assert_eq!(answer["problems"].as_array().unwrap().len(), 1);
}

#[test]
fn policy_questions_without_an_answer_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("cluster.yaml"), CLUSTER).unwrap();
    for (from, to, port, expected) in [
        ("shop/nobody", "shop/back", "80", "there is no Pod shop/nobody"),
        (
            "shop/front",
            "10.96.0.9",
            "81",
            "Service shop/back has no port 81/TCP",
        ),
        (
            "shop/front",
            "svc/shop/none",
            "80",
            "there is no Service shop/none",
        ),
        (
            "svc/shop/back",
            "shop/back",
            "80",
            "Service shop/back begins no flows",
        ),
        (
            "shop/front",
            "svc/shop/idle",
            "80",
            "Service shop/idle has no endpoint at port 80/TCP: shop/front (10.244.1.11) is not ready",
        ),
        ("10.0.0.1", "fd00::c", "80", "no address family in common"),
        (
            "front",
            "shop/back",
            "80",
            "neither namespace/pod, svc/namespace/service nor an address",
        ),
        ("shop/front", "shop/back", "0/TCP", "is no port"),
        ("shop/front", "shop/back", "80/QUIC", "is no port"),
    ] {
        let (code, text, errors) = explain(dir.path(), from, to, port, &[]);
        assert!(code != 0 && text.is_empty(), "{text}");
        assert!(errors.contains(expected), "{expected}\n{errors}");
    }
    let (code, _, errors) = explain(&dir.path().join("missing"), "shop/front", "shop/back", "80", &[]);
    assert_eq!(code, 1);
    assert!(
        errors.contains("failed to read: No such file or directory"),
        "{errors}"
    );
}
