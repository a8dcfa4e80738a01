//! The demo on a real API server: what a person would do there is done with kubectl, and printed.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use dataplane_tests::api::{self, served::Served};
use dataplane_tests::places::{Owned, Places};
use serde_json::{Value, json};

/// A server, and kubectl with all rights there.
#[derive(Debug)]
pub struct Api {
    pub served: Arc<Served>,
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    /// Removed last.
    _places: Owned,
}

impl Api {
    /// Starts a server; `None` where there are no programs for it, which was said.
    pub fn start() -> Result<Option<Self>> {
        let Some(binaries) = api::binaries() else {
            return Ok(None);
        };
        eprintln!("demo: a Kubernetes API server …");
        let places = Owned(Places::create("api")?);
        let served = Served::start(&binaries, &places.0.work)?;
        Ok(Some(Self {
            kubeconfig: served.server.kubeconfig()?,
            kubectl: binaries.join("kubectl"),
            served: Arc::new(served),
            _places: places,
        }))
    }

    /// How a person calls kubectl here.
    pub fn kubectl(&self) -> String {
        format!(
            "{} --kubeconfig {}",
            self.kubectl.display(),
            self.kubeconfig.display()
        )
    }

    /// Takes a pod out of service: not ready, and gone from the slices.
    pub fn take_out(&self, object: &Value, leaving: &str) -> Result<()> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name = text(&object["metadata"]["name"]);
        let namespace = text(&object["metadata"]["namespace"]);
        if object["kind"] == "Pod" && name == leaving {
            let patch = json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}});
            let patch = patch.to_string();
            self.run(&[
                "-n",
                &namespace,
                "patch",
                "pod",
                &name,
                "--subresource=status",
                "-p",
                &patch,
            ])?;
            return Ok(());
        }
        let Some(endpoints) = object["endpoints"].as_array() else {
            return Ok(());
        };
        let stays = |endpoint: &&Value| endpoint["targetRef"]["name"] != leaving;
        let endpoints: Vec<&Value> = endpoints.iter().filter(stays).collect();
        let patch = json!({"endpoints": endpoints}).to_string();
        self.run(&[
            "-n",
            &namespace,
            "patch",
            "endpointslice",
            &name,
            "--type=merge",
            "-p",
            &patch,
        ])?;
        Ok(())
    }

    fn run(&self, args: &[&str]) -> Result<()> {
        let mut shown: Vec<String> = args.iter().map(|arg| arg.chars().take(60).collect()).collect();
        for (arg, shown) in args.iter().zip(&mut shown) {
            if arg.len() > 60 {
                shown.push('…');
            }
        }
        println!("   kubectl {}", shown.join(" "));
        let output = Command::new(&self.kubectl)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .context("failed to start kubectl")?;
        if !output.status.success() {
            bail!(
                "kubectl failed: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(())
    }
}
