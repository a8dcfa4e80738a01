//! One agent's machine: a namespace with an address and a default route, so that it has an uplink.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use dataplane_tests::{
    links::{Links, Route, everywhere},
    netns::NetNs,
    places::Places,
};
use serde::de::DeserializeOwned;

/// The machine, which is removed with everything on it when dropped.
pub struct Node {
    pub places: Places,
    netns: NetNs,
    _router: NetNs,
}

impl Drop for Node {
    fn drop(&mut self) {
        let cleaned = self.netns.enter(|| {
            dataplane_agent::attach::cleanup::cleanup(&self.places.bpffs)?;
            Ok(())
        });
        if let Err(error) = cleaned {
            eprintln!("failed to clean up: {error:#}");
        }
        self.places.remove();
    }
}

impl Node {
    pub fn build() -> Result<Self> {
        let places = Places::create("control")?;
        let netns = NetNs::create(&places.netns("node"))?;
        let router = NetNs::create(&places.netns("router"))?;
        let mut links = Links::open(&netns)?;
        links.set_up("lo")?;
        links.add_veth("eth0", "node", router.fd(), None)?;
        links.set_up("eth0")?;
        Links::open(&router)?.set_up("node")?;
        links.add_address("eth0", ([192, 0, 2, 10].into(), 24))?;
        let via = Route {
            via: Some([192, 0, 2, 1].into()),
            ..Route::default()
        };
        links.add_route(everywhere([0, 0, 0, 0].into()), via)?;
        Ok(Self {
            places,
            netns,
            _router: router,
        })
    }

    /// Measures in a process of its own, so that memory is the agent's alone.
    pub fn measure<T: DeserializeOwned>(&self, what: &str, settings: &[(&str, String)]) -> Result<T> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(what).arg("--netns").arg(self.netns.path());
        command.arg("--bpffs").arg(&self.places.bpffs);
        command.arg("--work").arg(&self.places.work);
        for (name, value) in settings {
            command.arg(format!("--{name}={value}"));
        }
        let output = command
            .stderr(Stdio::inherit())
            .output()
            .context("failed to start the measurement")?;
        ensure!(
            output.status.success(),
            "the measurement failed: {}",
            output.status
        );
        serde_json::from_slice(&output.stdout).context("failed to read the measurement")
    }
}
