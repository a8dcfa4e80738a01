//! etcd and kube-apiserver on 127.0.0.1, with a certificate authority of their own. Both die with this process.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::client::Client;
use crate::agent::patient;

/// How long a server may take until it is ready.
const START: Duration = Duration::from_mins(2);
const STEP: Duration = Duration::from_millis(50);
/// The administrator's.
const TOKEN: &str = "administrator";
/// What versions before 1.21 do not do without being asked.
const OLD_GATES: &str = "--feature-gates=EndpointSliceNodeName=true,EndpointSliceTerminatingCondition=true,IPv6DualStack=true,MixedProtocolLBService=true";
/// Service addresses, as scenarios have them.
const SERVICES: &str = "10.96.0.0/16,fd00:10:96::/108";

/// A running server. Dropping it ends it; its data goes with its folder.
#[derive(Debug)]
pub struct Server {
    binaries: PathBuf,
    dir: PathBuf,
    port: u16,
    etcd_port: u16,
    running: Mutex<Running>,
}

/// The processes of a server.
#[derive(Debug, Default)]
struct Running {
    etcd: Option<Child>,
    apiserver: Option<Child>,
    controllers: Option<Child>,
}

impl Server {
    /// Starts a server that keeps its data in `dir`, and waits until it is ready.
    pub fn start(binaries: &Path, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let [port, etcd_port] = free_ports()?;
        let server = Self {
            binaries: binaries.to_owned(),
            dir: dir.to_owned(),
            port,
            etcd_port,
            running: Mutex::default(),
        };
        server.certificates()?;
        let tokens = format!("{TOKEN},admin,admin,\"system:masters\"\n");
        fs::write(server.dir.join("tokens.csv"), tokens)?;
        server.run()?;
        Ok(server)
    }

    /// Starts what does not run, and waits until it is ready.
    pub fn run(&self) -> Result<()> {
        let mut running = self.running();
        if running.etcd.is_none() {
            let own = format!("http://127.0.0.1:{}", self.etcd_port);
            let data = self.data();
            let mut etcd = self.command("etcd")?;
            etcd.arg("--data-dir").arg(data);
            etcd.args(["--listen-client-urls", &own, "--advertise-client-urls", &own]);
            // A single member: nobody ever connects to it as a peer.
            etcd.args(["--listen-peer-urls", "http://127.0.0.1:0", "--unsafe-no-fsync"]);
            running.etcd = Some(etcd.spawn().context("failed to start etcd")?);
        }
        let client = self.client()?;
        let end = Instant::now() + patient(START);
        loop {
            // Where etcd is slow to start, it gives up.
            if let Some(status) = running
                .apiserver
                .as_mut()
                .and_then(|child| child.try_wait().ok()?)
            {
                ensure!(
                    Instant::now() < end,
                    "the API server has ended ({status}){}",
                    self.last_words()
                );
                running.apiserver = None;
            }
            if running.apiserver.is_none() {
                running.apiserver = Some(
                    self.apiserver()?
                        .spawn()
                        .context("failed to start kube-apiserver")?,
                );
            }
            if client.text("/readyz").is_ok_and(|text| text == "ok") {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "the API server is not ready{}",
                self.last_words()
            );
            sleep(STEP);
        }
    }

    /// Starts the controllers that make slices, and end namespaces. False: their program is not there.
    pub fn run_controllers(&self) -> Result<bool> {
        if !self.program("kube-controller-manager").is_file() {
            return Ok(false);
        }
        let mut command = self.command("kube-controller-manager")?;
        command.arg("--kubeconfig").arg(self.kubeconfig()?);
        command.args([
            "--controllers=endpoint,endpointslice,namespace,garbagecollector",
            "--kube-api-content-type=application/json",
            "--leader-elect=false",
            "--secure-port=0",
        ]);
        if self.is_old()? {
            command.args(["--port=0", OLD_GATES]);
        }
        self.running().controllers = Some(command.spawn().context("failed to start the controllers")?);
        Ok(true)
    }

    /// Where a program of the server's folder is.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.binaries.join(name)
    }

    /// Kills the API server as a crash would; etcd stays.
    pub fn kill_apiserver(&self) {
        end(&mut self.running().apiserver, Signal::SIGKILL);
    }

    /// Kills both as a crash of their machine would.
    pub fn kill_both(&self) {
        let mut running = self.running();
        end(&mut running.etcd, Signal::SIGKILL);
        end(&mut running.apiserver, Signal::SIGKILL);
    }

    /// Ends both in good order, so that the data is whole.
    pub fn stop(&self) {
        let mut running = self.running();
        end(&mut running.apiserver, Signal::SIGTERM);
        end(&mut running.etcd, Signal::SIGTERM);
    }

    /// Where etcd keeps its data: copied while stopped, it is a backup.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.dir.join("etcd")
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The certificate of the authority that signed the server's.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A client with all rights.
    pub fn client(&self) -> Result<Client> {
        Client::new(&self.kubeconfig()?)
    }

    /// A kubeconfig with all rights.
    pub fn kubeconfig(&self) -> Result<PathBuf> {
        let user = format!("token: {TOKEN}");
        self.write_kubeconfig("admin", self.port, &user)
    }

    /// A kubeconfig for a user, who reaches the server at a port of 127.0.0.1.
    pub fn write_kubeconfig(&self, name: &str, port: u16, user: &str) -> Result<PathBuf> {
        let path = self.dir.join(format!("{name}.kubeconfig"));
        let text = format!(
            "apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: \"https://127.0.0.1:{port}\", certificate-authority: {ca}}}}}]
users: [{{name: {name}, user: {{{user}}}}}]
contexts: [{{name: test, context: {{cluster: test, user: {name}}}}}]
current-context: test
",
            ca = self.ca().display()
        );
        fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))?;
        Ok(path)
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apiserver(&self) -> Result<Command> {
        let dir = self.dir.display();
        let mut command = self.command("kube-apiserver")?;
        command.args([
            format!("--etcd-servers=http://127.0.0.1:{}", self.etcd_port),
            "--bind-address=127.0.0.1".to_owned(),
            "--advertise-address=127.0.0.1".to_owned(),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={dir}/server.crt"),
            format!("--tls-private-key-file={dir}/server.key"),
            format!("--token-auth-file={dir}/tokens.csv"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={dir}/account.pub"),
            format!("--service-account-signing-key-file={dir}/account.key"),
            "--authorization-mode=RBAC".to_owned(),
            "--allow-privileged=true".to_owned(),
            // Pods of tests have no service accounts, and priorities and tolerations are no matter.
            "--disable-admission-plugins=ServiceAccount,DefaultTolerationSeconds,Priority".to_owned(),
            "--storage-media-type=application/json".to_owned(),
            "--runtime-config=api/all=true".to_owned(),
            format!("--service-cluster-ip-range={SERVICES}"),
        ]);
        if self.is_old()? {
            command.arg(OLD_GATES);
        }
        Ok(command)
    }

    /// Versions before 1.21 have dual stack behind a gate, which later ones do not know any more.
    fn is_old(&self) -> Result<bool> {
        let output = Command::new(self.binaries.join("kube-apiserver"))
            .arg("--version")
            .output()
            .context("failed to run kube-apiserver")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let minor = text.split('.').nth(1).and_then(|minor| minor.parse::<u32>().ok());
        Ok(minor.is_some_and(|minor| minor < 21))
    }

    /// A program of the server, logging to a file named after it.
    fn command(&self, program: &str) -> Result<Command> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{program}.log")))
            .context("failed to open a log")?;
        let mut command = Command::new(self.binaries.join(program));
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // SAFETY: prctl is async-signal-safe, and nothing else runs between fork and exec.
        unsafe {
            command.pre_exec(|| set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
        }
        Ok(command)
    }

    fn certificates(&self) -> Result<()> {
        let names = "subjectAltName=DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1";
        let days = "-days 30";
        let script = format!(
            "set -e; cd {dir}
openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt {days} -subj /CN=test-ca
openssl genrsa -out account.key 2048
openssl rsa -in account.key -pubout -out account.pub
openssl req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=kube-apiserver
printf '{names}\\nextendedKeyUsage=serverAuth' > server.ext
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial {days} -out server.crt -extfile server.ext",
            dir = self.dir.display()
        );
        let output = Command::new("sh")
            .args(["-c", &script])
            .output()
            .context("failed to start openssl")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            bail!("openssl failed: {}", text.lines().last().unwrap_or_default());
        }
        Ok(())
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(self.dir.join("kube-apiserver.log")).unwrap_or_default();
        let line = log.lines().rev().find(|line| !line.trim().is_empty());
        line.map_or_else(String::new, |line| format!(": {line}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let mut running = self.running();
        end(&mut running.controllers, Signal::SIGKILL);
        end(&mut running.apiserver, Signal::SIGKILL);
        end(&mut running.etcd, Signal::SIGKILL);
    }
}

fn end(child: &mut Option<Child>, signal: Signal) {
    if let Some(mut child) = child.take() {
        // It may have ended by itself.
        let _gone = kill(Pid::from_raw(child.id().cast_signed()), signal);
        let _ended = child.wait();
    }
}

/// Ports that nobody has at this moment.
fn free_ports<const N: usize>() -> Result<[u16; N]> {
    let listeners = [(); N].map(|()| TcpListener::bind(("127.0.0.1", 0)));
    let mut ports = [0; N];
    for (port, listener) in ports.iter_mut().zip(listeners) {
        *port = listener
            .and_then(|listener| listener.local_addr())
            .context("failed to find a free port")?
            .port();
    }
    Ok(ports)
}
