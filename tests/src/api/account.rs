//! The agent's service account: the rights of `deploy/rbac.yaml`, no others, and real tokens.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::Client;
use super::objects;
use super::server::Server;

const NAMESPACE: &str = "kube-system";
const NAME: &str = "dataplane-agent";

/// The documents of `deploy/rbac.yaml`.
pub fn documents() -> Result<Vec<Value>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/rbac.yaml");
    let text = fs::read_to_string(&path).with_context(|| format!("failed to read {}", path.display()))?;
    serde_norway::Deserializer::from_str(&text)
        .map(|document| {
            Value::deserialize(document).with_context(|| format!("failed to decode {}", path.display()))
        })
        .collect()
}

/// Creates the account and its rights.
pub fn install(client: &Client) -> Result<()> {
    documents()?
        .iter()
        .try_for_each(|document| objects::apply(client, document))
}

/// A fresh token for the account, written to a file as the kubelet does.
pub fn write_token(client: &Client, file: &Path) -> Result<()> {
    let path = format!("/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{NAME}/token");
    let request = json!({
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "spec": {"expirationSeconds": 3600, "audiences": ["https://kubernetes.default.svc"]},
    });
    let answer = client.create(&path, &request)?.done()?;
    let token = answer["status"]["token"]
        .as_str()
        .context("there is no token in the answer")?;
    fs::write(file, token).with_context(|| format!("failed to write {}", file.display()))
}

/// A kubeconfig with the account's token in a file beside it, for a server behind a port of 127.0.0.1.
pub fn kubeconfig(server: &Server, client: &Client, name: &str, port: u16) -> Result<PathBuf> {
    let token = server.dir().join(format!("{name}.token"));
    write_token(client, &token)?;
    server.write_kubeconfig(name, port, &format!("tokenFile: {}", token.display()))
}
