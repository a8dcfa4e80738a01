//! The way from a node's namespace to an API server outside of it: a port of the node's 127.0.0.1. It can be cut, closed
//! and slowed, which is what networks do to servers.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use crate::netns::NetNs;

/// A relay. Dropping it cuts all connections.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    is_closed: AtomicBool,
    is_ended: AtomicBool,
    /// Bytes that the server may still send until connections are cut, if there is a limit.
    budget: Mutex<Option<u64>>,
    received: AtomicU64,
    connections: Mutex<Vec<TcpStream>>,
}

impl Relay {
    /// Listens in a namespace, or in this one, for a server at a port of this namespace's 127.0.0.1.
    pub fn start(netns: Option<&Path>, server: u16) -> Result<Self> {
        let listen = || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .context("failed to listen for connections to the server")
        };
        let listener = match netns {
            Some(path) => NetNs::open(path)?.enter(listen)?,
            None => listen()?,
        };
        let port = listener
            .local_addr()
            .context("failed to find the relay's port")?
            .port();
        let shared = Arc::new(Shared::default());
        let of_thread = shared.clone();
        thread::spawn(move || accept(&listener, server, &of_thread));
        Ok(Self { port, shared })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Bytes that have come from the server, TLS included.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.shared.received.load(Ordering::Relaxed)
    }

    /// Cuts all connections; new ones are served.
    pub fn cut(&self) {
        for stream in self.shared.connections().drain(..) {
            // It may have ended by itself.
            let _gone = stream.shutdown(Shutdown::Both);
        }
    }

    /// Cuts all connections and serves no new ones, until it is opened.
    pub fn close(&self) {
        self.shared.is_closed.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub fn open(&self) {
        *self.shared.budget() = None;
        self.shared.is_closed.store(false, Ordering::SeqCst);
    }

    /// Lets the server send so many bytes more in all, and then cuts.
    pub fn cut_after(&self, bytes: u64) {
        *self.shared.budget() = Some(bytes);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.is_ended.store(true, Ordering::SeqCst);
        self.close();
    }
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn budget(&self) -> std::sync::MutexGuard<'_, Option<u64>> {
        self.budget.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes bytes off the budget; false when it is spent.
    fn spend(&self, bytes: u64) -> bool {
        let mut budget = self.budget();
        match &mut *budget {
            Some(left) if *left < bytes => false,
            Some(left) => {
                *left -= bytes;
                true
            }
            None => true,
        }
    }
}

fn accept(listener: &TcpListener, server: u16, shared: &Arc<Shared>) {
    for client in listener.incoming().flatten() {
        if shared.is_ended.load(Ordering::SeqCst) {
            return;
        }
        if shared.is_closed.load(Ordering::SeqCst) {
            continue;
        }
        // A server that is down refuses: so do we, by closing.
        let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, server)) else {
            continue;
        };
        let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else {
            continue;
        };
        let kept = [client.try_clone(), server.try_clone()];
        shared.connections().extend(kept.into_iter().flatten());
        thread::spawn(move || copy(&client, &server, |_| true));
        let shared = shared.clone();
        thread::spawn(move || {
            copy(&server_too, &client_too, |bytes| {
                shared.received.fetch_add(bytes, Ordering::Relaxed);
                shared.spend(bytes)
            });
        });
    }
}

/// Copies until either side ends or may send no more, and ends both.
fn copy(mut from: &TcpStream, mut to: &TcpStream, mut may: impl FnMut(u64) -> bool) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if !may(length as u64) || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        let _gone = stream.shutdown(Shutdown::Both);
    }
}
