//! `--debug-log`: the programs' lines, from their ring buffer into the agent's own log.
//!
//! The ring buffer is not pinned: it comes and goes with the programs that write to it, so a start without debug lines
//! takes over from one with them, and the other way round.

use std::{fmt, io, os::fd::AsFd, thread};

use aya_log::{EbpfLogger, Level};
use tokio::sync::watch;

use super::sys;

/// The ring buffer, as aya-log calls it.
pub const MAP: &str = "AYA_LOGS";
/// Its size where it is read: some 2,000 lines. What does not fit is lost.
pub const BYTES: u32 = 1 << 20;
/// The target of the lines in the agent's log, for filters in `DATAPLANE_LOG`.
const TARGET: &str = "dataplane_ebpf";

/// The value of [`aya_log::LEVEL`].
pub fn level(on: bool) -> u8 {
    if on { Level::Info as u8 } else { 0 }
}

/// The reading end of the ring buffer.
pub struct DebugLog(EbpfLogger<Lines>);

impl fmt::Debug for DebugLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DebugLog").finish_non_exhaustive()
    }
}

impl DebugLog {
    pub fn of(object: &mut aya::Ebpf) -> Result<Self, aya_log::Error> {
        EbpfLogger::init_with_logger(object, Lines).map(Self)
    }

    /// Logs lines on a thread of their own, however many there are, until nobody sends to `others` any more.
    pub fn forward_until_gone<T: Send + Sync + 'static>(
        self,
        mut others: watch::Receiver<T>,
    ) -> io::Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        thread::Builder::new()
            .name("debug-log".to_owned())
            .spawn(move || {
                let gone = async { while others.changed().await.is_ok() {} };
                let forwarded = runtime.block_on(async {
                    tokio::select! {
                        () = gone => Ok(()),
                        result = self.forward() => result,
                    }
                });
                if let Err(error) = forwarded {
                    tracing::warn!("no more debug lines: failed to read them ({error})");
                }
            })
            .map(drop)
    }

    async fn forward(mut self) -> io::Result<()> {
        let readable = sys::watch_readable(self.0.as_fd().try_clone_to_owned()?)?;
        loop {
            let mut ready = readable.readable().await?;
            self.0.flush();
            ready.clear_ready();
        }
    }
}

/// Hands aya-log's records to `tracing`.
struct Lines;

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        tracing::enabled!(target: TARGET, tracing::Level::INFO)
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::info!(target: TARGET, "{}", record.args());
    }

    fn flush(&self) {}
}
