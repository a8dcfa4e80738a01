//! A cluster as people change it: kubectl writes Services, Pods and policies, the controller manager makes the slices.

use std::{
    io::Write,
    path::PathBuf,
    process::{Command, Stdio},
};

use dataplane_agent::model::Object;
use serde_json::{Value, json};

use super::seen::{Bed, NODE, Seen};

#[test]
fn what_kubectl_writes_and_controllers_make_of_it_is_followed() {
    let Some(bed) = Bed::start() else { return };
    if !bed.server.run_controllers().unwrap() {
        println!("skipped: there is no kube-controller-manager beside kube-apiserver");
        return;
    }
    let kubectl = Kubectl::of(&bed);
    let mut seen = bed.follow();
    kubectl.run(&["create", "namespace", "shop"], None);
    kubectl.apply(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]},
    }));
    for (name, ip) in [("a", "10.244.1.1"), ("b", "10.244.1.2")] {
        kubectl.apply(&pod(name));
        let status = json!({"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": [{"type": "Ready", "status": "True"}],
        }});
        let patch = status.to_string();
        let args = [
            "-n",
            "shop",
            "patch",
            "pod",
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch,
        ];
        kubectl.run(&args, None);
    }
    seen.until("both pods in the slice", |seen| {
        ready(seen) == ["10.244.1.1:8080", "10.244.1.2:8080"]
    });
    // A pod that loses its label leaves the Service, and its peers' policies.
    kubectl.run(&["-n", "shop", "label", "pod", "a", "app-"], None);
    seen.until("one pod in the slice", |seen| ready(seen) == ["10.244.1.2:8080"]);
    seen.until("the pod without its label", |seen| labels(seen, "a").is_empty());
    kubectl.apply(&json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"]},
    }));
    seen.until("the policy", |seen| seen.has("NetworkPolicy shop/web"));
    kubectl.run(
        &["-n", "shop", "delete", "service/web", "networkpolicy/web"],
        None,
    );
    seen.until("nothing is left of the Service", |seen| {
        !seen.has("Service shop/web") && !seen.has("NetworkPolicy shop/web") && ready(seen).is_empty()
    });
    // A namespace takes along what is in it.
    kubectl.run(&["delete", "namespace", "shop", "--wait=false"], None);
    kubectl.run(
        &[
            "-n",
            "shop",
            "delete",
            "pods",
            "--all",
            "--force",
            "--grace-period=0",
        ],
        None,
    );
    seen.until("the namespace is gone", |seen| {
        !seen.has("Namespace shop") && !seen.has("Pod shop/b")
    });
    assert!(seen.is_complete);
}

fn pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": {"app": "web"}},
        "spec": {
            "nodeName": NODE, "automountServiceAccountToken": false,
            "containers": [{"name": "main", "image": "none", "ports": [{"name": "http", "containerPort": 8080}]}],
        },
    })
}

/// Addresses and ports of ready endpoints of the Service, in order.
fn ready(seen: &Seen) -> Vec<String> {
    let slices = seen.objects.values().filter_map(|object| match object {
        Object::EndpointSlice(slice) => Some(slice),
        _ => None,
    });
    let of_service = slices.filter(|slice| {
        slice
            .service
            .as_ref()
            .is_some_and(|name| name.to_string() == "shop/web")
    });
    let mut found: Vec<String> = of_service
        .flat_map(|slice| {
            let endpoints = slice.endpoints.iter().filter(|endpoint| endpoint.ready);
            let addresses: Vec<_> = endpoints.map(|endpoint| endpoint.addr).collect();
            let ports = slice.ports.to_vec();
            addresses.into_iter().flat_map(move |addr| {
                ports
                    .clone()
                    .into_iter()
                    .map(move |port| format!("{addr}:{}", port.port))
            })
        })
        .collect();
    found.sort();
    found
}

fn labels(seen: &Seen, pod: &str) -> Vec<String> {
    match seen.objects.get(&format!("Pod shop/{pod}")) {
        Some(Object::Pod(pod)) => pod.labels.iter().map(|(key, _)| key.to_owned()).collect(),
        _ => vec!["no pod".to_owned()],
    }
}

struct Kubectl {
    program: PathBuf,
    kubeconfig: PathBuf,
}

impl Kubectl {
    fn of(bed: &Bed) -> Self {
        Self {
            program: bed.server.program("kubectl"),
            kubeconfig: bed.server.kubeconfig().unwrap(),
        }
    }

    #[track_caller]
    fn apply(&self, object: &Value) {
        self.run(&["apply", "-f", "-"], Some(object));
    }

    #[track_caller]
    fn run(&self, args: &[&str], input: Option<&Value>) {
        let mut child = Command::new(&self.program)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let text = input.map_or_else(String::new, Value::to_string);
        stdin.write_all(text.as_bytes()).unwrap();
        drop(stdin);
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "kubectl {args:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}
