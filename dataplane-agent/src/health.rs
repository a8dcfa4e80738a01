//! `/healthz`, `/livez` and `/readyz` over HTTP, and `/wait` besides on the agent's own socket.
//!
//! As much of HTTP as probes and `curl` speak: one GET a connection.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Context;
use serde::Serialize;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    sync::{mpsc, oneshot, watch},
    time,
};

use crate::source::Rescan;

const REQUEST_AT_MOST: usize = 8192;
/// How long `/wait` lasts unless it says.
const WAIT: Duration = Duration::from_mins(1);
const REQUEST_WITHIN: Duration = Duration::from_secs(5);
/// The loop shows a sign of life more often than this.
const ALIVE_WITHIN: Duration = Duration::from_secs(30);

/// How far the agent's loop has come.
#[derive(Clone, Debug)]
pub struct Progress {
    pub alive: Instant,
    /// The source has been read completely once, the machine observed, and the result written.
    pub started: bool,
    /// The last revision that the loop has taken in.
    pub taken: u64,
    /// The last revision of which everything is programmed.
    pub revision: u64,
    /// The last look at the machine that is programmed.
    pub host_revision: u64,
    pub rejected: Vec<String>,
    /// What could not be programmed, and is tried again.
    pub failed: Vec<String>,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            alive: Instant::now(),
            started: false,
            taken: 0,
            revision: 0,
            host_revision: 0,
            rejected: Vec::new(),
            failed: Vec::new(),
        }
    }
}

/// Asks the loop for a fresh look at the machine; the answer is the number of that look.
pub type LookAgain = oneshot::Sender<u64>;

/// What the servers need of the agent.
#[derive(Clone, Debug)]
pub struct Health {
    pub progress: watch::Receiver<Progress>,
    pub rescan: Rescan,
    pub look_again: mpsc::UnboundedSender<LookAgain>,
}

/// The answer of `/readyz`.
#[derive(Serialize)]
struct Page<'a> {
    ready: bool,
    /// Everything up to this revision of the source is programmed.
    revision: u64,
    source_revision: u64,
    rejected: &'a [String],
    failed: &'a [String],
}

struct Answer {
    status: &'static str,
    json: String,
}

impl Health {
    /// Serves probes at an address.
    pub async fn serve_tcp(self, listener: TcpListener) {
        loop {
            if let Ok((stream, _)) = listener.accept().await {
                let health = self.clone();
                tokio::spawn(async move { health.connection(stream, false).await });
            }
        }
    }

    /// Serves `wait` and the probes on a socket.
    pub async fn serve_unix(self, listener: UnixListener) {
        loop {
            if let Ok((stream, _)) = listener.accept().await {
                let health = self.clone();
                tokio::spawn(async move { health.connection(stream, true).await });
            }
        }
    }

    async fn connection(mut self, mut stream: impl AsyncRead + AsyncWrite + Unpin, may_wait: bool) {
        let Ok(Some(path)) = time::timeout(REQUEST_WITHIN, read_path(&mut stream)).await else {
            return;
        };
        let Answer { status, json } = self.answer(&path, may_wait).await;
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            json.len()
        );
        // The client may have gone: nobody else wants the answer.
        let _gone = stream.write_all((head + &json).as_bytes()).await;
        let _gone = stream.shutdown().await;
    }

    async fn answer(&mut self, path: &str, may_wait: bool) -> Answer {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let progress = self.progress.borrow().clone();
        let alive = progress.alive.elapsed() < ALIVE_WITHIN;
        match path {
            "/livez" => answer(alive, &progress),
            "/healthz" => answer(alive && progress.started, &progress),
            "/readyz" => answer(progress.started, &progress),
            "/wait" if may_wait => {
                let timeout = query
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("timeout_ms=")?.parse().ok())
                    .map_or(WAIT, Duration::from_millis);
                let done = time::timeout(timeout, self.wait()).await;
                let progress = self.progress.borrow().clone();
                match done {
                    Ok(Some(())) => answer(true, &progress),
                    _ => Answer {
                        status: "504 Gateway Timeout",
                        ..answer(false, &progress)
                    },
                }
            }
            _ => Answer {
                status: "404 Not Found",
                json: "{}\n".to_owned(),
            },
        }
    }

    /// Returns when all that the source holds and the machine has at this moment is programmed.
    async fn wait(&mut self) -> Option<()> {
        let revision = loop {
            if let Some(revision) = self.rescan.now().await {
                break revision;
            }
            // The folder cannot be read at the moment.
            time::sleep(Duration::from_millis(50)).await;
        };
        // The loop's look at the machine must know the pods of this revision.
        self.progress
            .wait_for(|progress| progress.taken >= revision)
            .await
            .ok()?;
        let (reply, look) = oneshot::channel();
        self.look_again.send(reply).ok()?;
        let look = look.await.ok()?;
        self.progress
            .wait_for(|progress| {
                progress.started && progress.revision >= revision && progress.host_revision >= look
            })
            .await
            .ok()?;
        Some(())
    }
}

/// The socket of `wait`; a stale one of a killed agent is replaced.
pub fn bind_unix(path: &Path) -> anyhow::Result<UnixListener> {
    let failed = || format!("failed to listen on {}", path.display());
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(failed)?;
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error).with_context(failed),
        _ => {}
    }
    UnixListener::bind(path).with_context(failed)
}

fn answer(good: bool, progress: &Progress) -> Answer {
    let page = Page {
        ready: good,
        revision: progress.revision,
        source_revision: progress.taken,
        rejected: &progress.rejected,
        failed: &progress.failed,
    };
    Answer {
        status: if good { "200 OK" } else { "503 Service Unavailable" },
        json: serde_json::to_string(&page).unwrap_or_default() + "\n",
    }
}

/// The path of a GET request.
async fn read_path(stream: &mut (impl AsyncRead + Unpin)) -> Option<String> {
    let mut request = Vec::new();
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        if request.len() > REQUEST_AT_MOST || stream.read_buf(&mut request).await.ok()? == 0 {
            return None;
        }
    }
    let line = String::from_utf8_lossy(&request);
    let mut words = line.lines().next()?.split(' ');
    (words.next()? == "GET").then(|| words.next().map(str::to_owned))?
}
