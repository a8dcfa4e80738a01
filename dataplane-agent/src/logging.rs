//! The log: to stderr, with levels that a command changes while the agent runs. Its last lines are kept for `bugreport`.

use std::{
    collections::VecDeque,
    env::VarError,
    io::{self, IsTerminal, Write},
    sync::{Mutex, OnceLock, PoisonError},
};

use tracing::{Level, Metadata};
use tracing_subscriber::{
    EnvFilter, Layer as _, Registry, filter::filter_fn, layer::SubscriberExt as _, reload,
    util::SubscriberInitExt as _,
};

/// Levels by module, as `tracing` writes them.
pub const VARIABLE: &str = "DATAPLANE_LOG";
/// Where the variable says nothing.
const DEFAULT: &str = "info";

/// The log is one for a process.
static LEVELS: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Begins to log. Colours only on a terminal and without `NO_COLOR`. Levels that cannot be read are told, and those of
/// [`DEFAULT`] are in force: a typing error ends no agent.
pub fn start() {
    let wanted = at_start();
    let problem = wanted.as_ref().err().cloned();
    let (levels, handle) = reload::Layer::new(wanted.unwrap_or_else(|_| EnvFilter::new(DEFAULT)));
    let colours = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| Kept)
        .with_ansi(colours)
        .with_filter(filter_fn(is_ours_to_tell));
    tracing_subscriber::registry().with(levels).with(lines).init();
    // There is none yet: what has begun before would have panicked above.
    let _first = LEVELS.set(handle);
    if let Some(problem) = problem {
        tracing::warn!("{problem}; the level is {DEFAULT}");
    }
}

/// Not what the API client calls an error: each request that fails, without an address. Whoever asked says what failed, and where.
fn is_ours_to_tell(line: &Metadata<'_>) -> bool {
    *line.level() != Level::ERROR || !line.target().starts_with("kube_client")
}

/// Bytes of lines that are kept at the most.
const KEPT: usize = 256 << 10;

static LINES: Mutex<Lines> = Mutex::new(Lines {
    lines: VecDeque::new(),
    bytes: 0,
});

/// The last lines, the oldest first.
#[derive(Debug, Default)]
struct Lines {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
}

impl Lines {
    fn push(&mut self, line: &[u8]) {
        self.bytes += line.len();
        self.lines.push_back(line.into());
        while self.bytes > KEPT
            && let Some(oldest) = self.lines.pop_front()
        {
            self.bytes -= oldest.len();
        }
    }
}

/// The last lines that were logged.
pub fn last_lines() -> String {
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines
        .lines
        .iter()
        .map(|line| String::from_utf8_lossy(line))
        .collect()
}

/// Writes to stderr, a line at once, and keeps it.
struct Kept;

impl Write for Kept {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LINES.lock().unwrap_or_else(PoisonError::into_inner).push(line);
        io::stderr().write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

fn at_start() -> Result<EnvFilter, String> {
    match std::env::var(VARIABLE) {
        Ok(text) if !text.is_empty() => parse(&text).map_err(|problem| format!("{VARIABLE}: {problem}")),
        Ok(_) | Err(VarError::NotPresent) => Ok(EnvFilter::new(DEFAULT)),
        Err(error) => Err(format!("{VARIABLE}: {error}")),
    }
}

fn parse(text: &str) -> Result<EnvFilter, String> {
    EnvFilter::try_new(text).map_err(|error| format!("`{text}`: {error}"))
}

/// The levels in force; empty where nothing is logged.
pub fn levels() -> String {
    let levels = LEVELS
        .get()
        .map(|handle| handle.with_current(ToString::to_string));
    levels.and_then(Result::ok).unwrap_or_default()
}

/// Sets the levels; those of the start without a text. An error says what is wrong with it, and nothing has changed.
pub fn set_levels(text: Option<&str>) -> Result<(), String> {
    let levels = match text {
        Some(text) => parse(text)?,
        None => at_start()?,
    };
    let handle = LEVELS.get().ok_or("nothing is logged")?;
    handle.reload(levels).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_and_older_ones_let_go() {
        let mut lines = Lines::default();
        let long = vec![b'x'; KEPT / 4];
        lines.push(b"first\n");
        for _ in 0..4 {
            lines.push(&long);
        }
        assert_eq!(lines.lines.len(), 4);
        assert_eq!(lines.bytes, KEPT);
        lines.push(b"last\n");
        assert_eq!(lines.lines.len(), 4);
        assert_eq!(&*lines.lines[3], b"last\n");
    }

    #[test]
    fn levels_that_nobody_could_mean_are_refused() {
        assert!(set_levels(Some("info,dataplane_agent::sync=lots")).is_err());
    }
}
