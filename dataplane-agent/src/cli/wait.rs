//! `wait`: asks a running agent over its socket.

use std::{
    io,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use serde::Deserialize;

use super::ask::{Answer, Silent, ask};

/// Between attempts to reach an agent that is still starting.
const RETRY: Duration = Duration::from_millis(50);
/// The agent answers in time; what does not is no agent.
const GRACE: Duration = Duration::from_secs(1);

/// Returns when all that the agent's source holds now is programmed.
pub fn run(socket: &Path, timeout: Duration) -> anyhow::Result<()> {
    let deadline = Instant::now() + timeout;
    loop {
        match ask_until(socket, deadline) {
            Ok(answer) => return judge(&answer, timeout),
            Err(error) if error.is::<Silent>() => bail!(
                "not programmed within {} s: the agent has not started, or is silent",
                timeout.as_secs_f32()
            ),
            // Not there yet, or replaced while we asked; who may not ask need not wait.
            Err(error) if is_forbidden(&error) || Instant::now() + RETRY >= deadline => {
                return Err(error)
                    .with_context(|| format!("failed to reach an agent at {}", socket.display()));
            }
            Err(_) => thread::sleep(RETRY),
        }
    }
}

/// Whether this user may not ask an agent.
fn is_forbidden(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<io::Error>();
    cause.is_some_and(|cause| cause.kind() == io::ErrorKind::PermissionDenied)
}

/// The agent's socket is there before it has started, and it tells in time what it waits for only if it hears how much time is left
/// when it takes questions.
fn ask_until(socket: &Path, deadline: Instant) -> anyhow::Result<Answer> {
    let left = || deadline.saturating_duration_since(Instant::now());
    ask(socket, "/livez", left() + GRACE)?;
    let path = format!("/wait?timeout_ms={}", left().as_millis());
    ask(socket, &path, left() + GRACE)
}

/// How far an agent says that it is.
#[derive(Deserialize)]
struct Page {
    revision: u64,
    source_revision: u64,
    failed: Vec<String>,
    /// Why what the source holds is not known. The first agents did not tell.
    unfollowed: Option<String>,
}

fn why(body: &str) -> String {
    let Ok(page) = serde_json::from_str::<Page>(body) else {
        return body.trim().to_owned();
    };
    if let Some(why) = page.unfollowed {
        return why;
    }
    match page.failed.split_first() {
        Some((first, [])) => first.clone(),
        Some((first, others)) => format!("{first}, and {} more: see `status`", others.len()),
        None if page.revision < page.source_revision => format!(
            "the tables are at revision {} of {} of the source",
            page.revision, page.source_revision
        ),
        None => "the agent still reads its source, or looks at this machine".to_owned(),
    }
}

fn judge(answer: &Answer, timeout: Duration) -> anyhow::Result<()> {
    let Answer { status, body, .. } = answer;
    match status {
        200 => Ok(()),
        504 => bail!("not programmed within {} s: {}", timeout.as_secs_f32(), why(body)),
        status => bail!(
            "the agent answered with status {status}{}",
            answer.other_version()
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{BufRead as _, BufReader, Write as _},
        os::unix::net::UnixListener,
    };

    use serde_json::json;

    use super::*;

    /// An agent whose socket is there a second and a half before it takes questions.
    fn starting(socket: &Path) {
        let listener = UnixListener::bind(socket).unwrap();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(1500));
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut question = String::new();
                BufReader::new(&stream).read_line(&mut question).unwrap();
                let timeout = question.split([' ', '=']).nth(2).and_then(|ms| ms.parse().ok());
                thread::sleep(Duration::from_millis(timeout.unwrap_or(0)));
                let page = json!({"revision": 0, "source_revision": 0, "failed": ["a is full"]});
                write!(stream, "HTTP/1.1 504 Gateway Timeout\r\n\r\n{page}").unwrap();
            }
        });
    }

    #[test]
    fn an_agent_that_is_about_to_start_tells_what_it_waits_for() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        starting(&socket);
        let error = run(&socket, Duration::from_secs(3)).unwrap_err().to_string();
        assert_eq!(error, "not programmed within 3 s: a is full");
    }

    #[test]
    fn who_may_not_ask_does_not_wait() {
        let error = |kind: io::ErrorKind| anyhow::Error::from(io::Error::from(kind)).context("run as root");
        assert!(is_forbidden(&error(io::ErrorKind::PermissionDenied)));
        assert!(!is_forbidden(&error(io::ErrorKind::NotFound)));
        assert!(!is_forbidden(&error(io::ErrorKind::ConnectionRefused)));
    }

    #[test]
    fn what_is_waited_for_is_told_in_a_line() {
        let page = |revision: u64, failed: &[&str]| {
            let page = json!({
                "ready": false, "revision": revision, "source_revision": 7, "rejected": [], "failed": failed,
            });
            why(&page.to_string())
        };
        assert_eq!(
            page(3, &["a is full", "b is full", "c is full"]),
            "a is full, and 2 more: see `status`"
        );
        assert_eq!(page(3, &["a is full"]), "a is full");
        assert_eq!(page(3, &[]), "the tables are at revision 3 of 7 of the source");
        assert!(page(7, &[]).contains("still reads"));
        assert_eq!(why("{}\n"), "{}");
        let unread = json!({
            "revision": 0, "source_revision": 1, "failed": ["a is full"], "unfollowed": "the server is down",
        });
        assert_eq!(why(&unread.to_string()), "the server is down");
    }
}
