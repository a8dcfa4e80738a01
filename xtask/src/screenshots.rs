//! `cargo xtask screenshots`: the pictures of the documentation, drawn anew by the tests that know what is shown.

use anyhow::Result;

use crate::{ebpf, process, progress};

/// The command.
pub fn run() -> Result<()> {
    // The agent embeds the object: its build says so if there is none.
    ebpf::run(&ebpf::Args::default())?;
    progress::note("docs/images/top.svg: what `top` draws");
    draw(&["--lib", "top::"])?;
    progress::note("docs/images/ui.png: the page of `ui`, in a chromium");
    draw(&["--test", "see", "picture", "--", "--ignored"])
}

fn draw(tests: &[&str]) -> Result<()> {
    let mut command = process::cargo("test");
    command
        .args(["--package", "dataplane-agent"])
        .args(tests)
        .env("UPDATE_DOCS", "1");
    process::run(&mut command)
}
