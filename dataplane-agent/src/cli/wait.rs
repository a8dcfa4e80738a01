//! `wait`: asks a running agent over its socket.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

use super::ask::{Answer, ask};

/// Between attempts to reach an agent that is still starting.
const RETRY: Duration = Duration::from_millis(50);
/// The agent answers in time; what does not is no agent.
const GRACE: Duration = Duration::from_secs(1);

/// Returns when all that the agent's source holds now is programmed.
pub fn run(socket: &Path, timeout: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let path = format!("/wait?timeout_ms={}", left.as_millis());
        match ask(socket, &path, left + GRACE) {
            Ok(answer) => return judge(&answer, timeout),
            Err(error) if is_silence(&error) => bail!(
                "not programmed within {} s: the agent is silent",
                timeout.as_secs_f32()
            ),
            // Not there yet, or replaced while we asked.
            Err(error) if Instant::now() + RETRY >= deadline => {
                return Err(error)
                    .with_context(|| format!("failed to reach an agent at {}", socket.display()));
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}

/// Its socket is there before it has started.
fn is_silence(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
}

fn judge(answer: &Answer, timeout: Duration) -> anyhow::Result<()> {
    let Answer { status, body, .. } = answer;
    match status {
        200 => Ok(()),
        504 => bail!(
            "not programmed within {} s: {}",
            timeout.as_secs_f32(),
            body.trim()
        ),
        status => bail!(
            "the agent answered with status {status}{}",
            answer.other_version()
        ),
    }
}
