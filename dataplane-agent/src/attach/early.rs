//! A thread that gives new interfaces their programs on the kernel's notice, before anybody looks whose they are: a look
//! lists much, and waits for notices to settle, while the pod behind the interface may be reached already.

use std::{
    io,
    sync::{Mutex, PoisonError, Weak},
    thread,
};

use tokio::sync::watch;

use super::Attacher;
use crate::{
    host::{Unknown, WantedPods},
    netlink::{events::LinkEvents, pods::interface_id, select::DevicePatterns, socket::RequestSocket},
};

/// Starts the thread. It ends when nobody else has the attacher, or says what is wanted.
pub fn spawn(
    attacher: Weak<Mutex<Attacher>>,
    patterns: DevicePatterns,
    wanted: watch::Receiver<WantedPods>,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (opened, is_open) = std::sync::mpsc::channel();
    thread::Builder::new()
        .name("interfaces".to_owned())
        .spawn(move || {
            let outcome = runtime.block_on(async {
                let events = LinkEvents::open();
                let _waits = opened.send(events.is_ok());
                run(&events?, &attacher, &patterns, wanted).await
            });
            if let Err(error) = outcome {
                tracing::warn!("new interfaces get their programs late: failed to listen for them ({error})");
            }
        })?;
    // What comes from now on brings a notice.
    let _opened = is_open.recv();
    Ok(())
}

async fn run(
    events: &LinkEvents,
    attacher: &Weak<Mutex<Attacher>>,
    patterns: &DevicePatterns,
    mut wanted: watch::Receiver<WantedPods>,
) -> io::Result<()> {
    let mut socket = RequestSocket::open()?;
    loop {
        let links = tokio::select! {
            links = events.changed() => links?,
            changed = wanted.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return Ok(()),
            },
        };
        if wanted.borrow().unknown != Unknown::Close {
            continue;
        }
        let may_be_pods = links.iter().filter(|link| {
            interface_id(link).is_some() && patterns.chosen(std::slice::from_ref(*link)).is_empty()
        });
        for link in may_be_pods {
            let Some(attacher) = attacher.upgrade() else {
                return Ok(());
            };
            let mut attacher = attacher.lock().unwrap_or_else(PoisonError::into_inner);
            match attacher.close_early(&mut socket, link) {
                Ok(true) => tracing::debug!(device = link.name, "closed until it is known whose it is"),
                Ok(false) => {}
                // The next look tries again, and tells.
                Err(error) => tracing::debug!(device = link.name, "{error}"),
            }
        }
    }
}
