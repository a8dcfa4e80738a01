//! `ui`: a page for a browser, of what an agent tells, or the pinned tables where none does. It reads, and changes nothing.

mod api;
mod site;

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use anyhow::Context;
use hyper::header::HOST;

use self::site::Site;
use super::{
    alone,
    output::{note, print},
};
use crate::health::http::{self, Listener};

/// Where what is shown comes from.
#[derive(Clone, Debug)]
pub struct Places {
    /// The agent's socket.
    pub socket: PathBuf,
    /// The BPF file system of the agent.
    pub bpffs: PathBuf,
}

impl Places {
    fn borrowed(&self) -> alone::Places<'_> {
        alone::Places {
            bpffs: &self.bpffs,
            socket: &self.socket,
        }
    }
}

/// Serves the page until it is killed; prints where.
pub fn run(listen: SocketAddr, allow_host: &[String], places: Places) -> anyhow::Result<()> {
    if !listen.ip().is_loopback() {
        note(format_args!(
            "warning: whoever reaches {listen} reads the names and addresses of this node's Pods and Services; nobody is asked for a password"
        ));
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("failed to start the runtime")?
        .block_on(serve(listen, allow_host, places))
}

async fn serve(listen: SocketAddr, allow_host: &[String], places: Places) -> anyhow::Result<()> {
    let failed = || format!("failed to listen on {listen}");
    let listener = http::listen(listen).with_context(failed)?;
    let at = match &listener {
        Listener::Tcp(listener) => listener.local_addr().with_context(failed)?,
        Listener::Unix(_) => listen,
    };
    print(&format!("http://{at}/\n"))?;
    let site = Arc::new(Site::new(listen.ip(), allow_host, places));
    http::serve_requests(listener, move |request| {
        let site = site.clone();
        async move {
            let host = request
                .headers()
                .get(HOST)
                .map(|host| host.to_str().unwrap_or_default());
            site.answer(request.method(), request.uri(), host).await
        }
    })
    .await;
    Ok(())
}
