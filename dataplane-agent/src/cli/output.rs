//! How commands print: tables for people, JSON for programs.

use std::{
    fmt::Display,
    io::{self, IsTerminal as _, Write},
};

use comfy_table::{Table, presets};
use ratatui::crossterm::{
    cursor::MoveTo,
    execute,
    terminal::{Clear, ClearType},
};
use serde::Serialize;

use crate::served::Problem;

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    Table,
    Json,
}

impl Output {
    /// Prints a value, which `render` makes a table of.
    pub fn print<T: Serialize>(self, value: &T, render: impl FnOnce(&T) -> String) -> anyhow::Result<()> {
        match self {
            Output::Json => print(&(serde_json::to_string_pretty(value)? + "\n")),
            Output::Table => print(&render(value)),
        }
    }

    /// The same; where there is nothing to make a table of, that is said on stderr.
    pub fn print_or_note<T: Serialize>(
        self,
        value: &T,
        render: impl FnOnce(&T) -> String,
        nothing: &str,
    ) -> anyhow::Result<()> {
        let render = |value: &T| {
            let text = render(value);
            if text.is_empty() {
                note(nothing);
            }
            text
        };
        self.print(value, render)
    }
}

/// Prints a text at once.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| unprinted(error, "failed to print"))
}

/// Makes a terminal empty, for what is shown anew.
pub fn clear_screen() -> anyhow::Result<()> {
    let mut out = io::stdout();
    if out.is_terminal() {
        execute!(out, Clear(ClearType::All), MoveTo(0, 0))
            .map_err(|error| unprinted(error, "failed to print"))?;
    }
    Ok(())
}

/// Whoever read what is printed has had enough (`| head`): the end of a command, and no failure.
#[derive(Debug, thiserror::Error)]
#[error("nobody reads on")]
pub struct Closed;

/// Why something was not printed.
pub fn unprinted(error: impl Into<anyhow::Error>, what: &'static str) -> anyhow::Error {
    let error = error.into();
    let mut causes = error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>());
    if causes.any(|cause| cause.kind() == io::ErrorKind::BrokenPipe) {
        return Closed.into();
    }
    error.context(what)
}

/// Says something on stderr beside what is printed.
pub fn note(text: impl Display) {
    // Nothing is left to report to when stderr is closed.
    let _closed = writeln!(io::stderr(), "{text}");
}

/// Nothing when there are no rows, else an empty line first.
pub fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for row in rows {
        table.add_row(row);
    }
    if table.row_count() == 0 {
        return String::new();
    }
    let mut text = String::from("\n");
    for line in table.lines() {
        text += line.trim_end();
        text += "\n";
    }
    text
}

/// A number that may not be known.
pub fn number(value: Option<usize>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// A share, from 0 to 1.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

/// A table of problems, whose reasons stand below `because`.
pub fn problems(problems: &[Problem], because: &str) -> String {
    let rows = problems.iter().map(|problem| {
        vec![
            problem.object.clone(),
            problem.field.clone(),
            problem.reason.clone(),
            problem.file.clone().unwrap_or_default(),
        ]
    });
    table(&["OBJECT", "FIELD", because, "IN"], rows)
}
