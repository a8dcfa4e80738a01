//! kube-proxy on every node: itself, or the rules that it would write.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use dataplane_tests::api::relay::Relay;
use dataplane_tests::api::served::Served;
use dataplane_tests::cluster::Cluster;

use crate::nftables;
use crate::stage::Takers;

/// Who serves before the agents do.
pub enum Proxies {
    Processes(Vec<Process>),
    /// Rules in these nodes.
    Rules(Vec<String>),
}

/// A kube-proxy.
pub struct Process {
    child: Child,
    /// `kube-proxy --cleanup` where it has run.
    cleanup: Command,
    _relay: Relay,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Proxies {
    /// Starts kube-proxy on every node, in iptables mode.
    pub fn start(cluster: &Cluster, served: &Served, program: &Path) -> Result<Self> {
        let mut all = Vec::new();
        for node in &cluster.shape().nodes {
            let netns = cluster.node_netns(&node.name)?.path();
            let cgroup = cluster.node_cgroup(&node.name)?.join("host");
            let relay = Relay::start(Some(netns), served.server.port())?;
            let kubeconfig = served.server.write_kubeconfig(
                &format!("proxy-{}", node.name),
                relay.port(),
                "token: administrator",
            )?;
            let config: PathBuf = cluster.places().work.join(format!("{}-proxy.yaml", node.name));
            // In a namespace, the limit of connections is the machine's.
            let text = format!(
                "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
clientConnection: {{kubeconfig: {}, contentType: application/json}}
hostnameOverride: {}
mode: iptables
clusterCIDR: 10.244.0.0/16,fd00:10:244::/48
conntrack: {{maxPerCore: 0, min: 0}}
featureGates: {{EndpointSliceProxying: true, IPv6DualStack: true}}
iptables: {{minSyncPeriod: 0s, syncPeriod: 30s}}
",
                kubeconfig.display(),
                node.name
            );
            fs::write(&config, text)?;
            let log = fs::File::create(cluster.places().work.join(format!("{}-proxy.log", node.name)))?;
            let mut run = cluster.helper().enter(netns, &cgroup, program);
            run.arg("--config").arg(&config);
            run.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            let mut cleanup = cluster.helper().enter(netns, &cgroup, program);
            cleanup.arg("--cleanup");
            all.push(Process {
                child: run.spawn().context("failed to start kube-proxy")?,
                cleanup,
                _relay: relay,
            });
        }
        Ok(Self::Processes(all))
    }

    /// Writes the rules of kube-proxy's nftables mode.
    pub fn by_rules(cluster: &Cluster) -> Result<Self> {
        let mut nodes = Vec::new();
        for node in &cluster.shape().nodes {
            let file = cluster.places().work.join(format!("{}.nft", node.name));
            fs::write(&file, nftables::ruleset(&node.name))?;
            let mut nft = cluster.helper().enter(
                cluster.node_netns(&node.name)?.path(),
                &cluster.node_cgroup(&node.name)?.join("host"),
                Path::new("/usr/sbin/nft"),
            );
            let output = nft.arg("-f").arg(&file).output().context("failed to run nft")?;
            ensure!(
                output.status.success(),
                "nft: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            nodes.push(node.name.clone());
        }
        Ok(Self::Rules(nodes))
    }

    /// The end of kube-proxy, and of its rules: by itself, or by the agent.
    pub fn end(&mut self, takers: &Takers) -> Result<()> {
        match self {
            Self::Processes(all) => {
                for mut process in all.drain(..) {
                    let _ = process.child.kill();
                    let _ = process.child.wait();
                    let output = process
                        .cleanup
                        .output()
                        .context("failed to run kube-proxy --cleanup")?;
                    // It looks for IPVS too, and may complain of that; what is left of its rules is the agents' to say.
                    println!("kube-proxy --cleanup: {}", output.status);
                }
                Ok(())
            }
            Self::Rules(nodes) => {
                for node in nodes.iter() {
                    let output = takers.running()?.run(node, &["cleanup", "--kube-proxy-rules"])?;
                    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                    println!("{node}: {said}");
                    if !output.status.success() {
                        bail!("{}", String::from_utf8_lossy(&output.stderr));
                    }
                }
                Ok(())
            }
        }
    }
}
