//! `wait`: asks a running agent over its socket.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};

/// Between attempts to reach an agent that is still starting.
const RETRY: Duration = Duration::from_millis(50);

/// Returns when all that the agent's source holds now is programmed.
pub fn run(socket: &Path, timeout: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match ask(socket, left) {
            Ok(answer) => return judge(&answer, timeout),
            // Not there yet, or replaced while we asked.
            Err(error) if Instant::now() + RETRY >= deadline => {
                return Err(error)
                    .with_context(|| format!("failed to reach an agent at {}", socket.display()));
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}

fn ask(socket: &Path, left: Duration) -> anyhow::Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    // The agent answers in time; what does not is no agent.
    stream.set_read_timeout(Some(left + Duration::from_secs(2)))?;
    write!(
        stream,
        "GET /wait?timeout_ms={} HTTP/1.1\r\nHost: agent\r\n\r\n",
        left.as_millis()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    anyhow::ensure!(!answer.is_empty(), "the agent hung up");
    Ok(answer)
}

fn judge(answer: &str, timeout: Duration) -> anyhow::Result<()> {
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body).trim();
    let status = answer.split(' ').nth(1);
    match status {
        Some("200") => Ok(()),
        Some("504") => bail!("not programmed within {} s: {body}", timeout.as_secs_f32()),
        _ => bail!(
            "the agent answered `{}`",
            answer.lines().next().unwrap_or_default()
        ),
    }
}
