//! `completions`, `man`, and the reference of the command line in `docs/cli.md`: all of them from the definition of the arguments.

use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;
use clap_complete::Shell;

use super::output;
use crate::args::Cli;

const NAME: &str = "dataplane-agent";

/// Prints what a shell needs to complete the command line.
pub fn completions(shell: Shell) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), NAME, &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

/// Writes a page for the program and one for each command.
pub fn write_pages(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder).with_context(|| format!("failed to make {}", folder.display()))?;
    clap_mangen::generate_to(Cli::command(), folder)
        .with_context(|| format!("failed to write the manual to {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    /// `docs/cli.md` is what the arguments say. To write it anew: `UPDATE_DOCS=1 cargo test -p dataplane-agent --lib reference`.
    #[test]
    fn the_reference_of_the_command_line_is_up_to_date() {
        let mut cli = Cli::command().term_width(100);
        cli.build();
        let mut text = String::from(
            "# Command line\n\nGenerated from the arguments' definitions, which a test compares with this page. The manual has the same: \
             `dataplane-agent man DIR`. Shells complete the command line by `dataplane-agent completions bash` (or `zsh`, `fish` and others).\n",
        );
        for command in cli.get_subcommands_mut() {
            if command.get_name() == "help" {
                continue;
            }
            let name = command.get_name().to_owned();
            let help = command.render_long_help().to_string();
            let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
            write!(
                text,
                "\n## {name}\n\n```text\n{}\n```\n",
                lines.join("\n").trim_end()
            )
            .unwrap();
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/cli.md");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &text).unwrap();
        }
        assert_eq!(
            std::fs::read_to_string(path).unwrap_or_default(),
            text,
            "docs/cli.md is not what the code says: UPDATE_DOCS=1 cargo test -p dataplane-agent --lib reference"
        );
    }

    #[test]
    fn every_command_has_a_page_and_is_completed() {
        let folder = tempfile::tempdir().unwrap();
        write_pages(folder.path()).unwrap();
        for command in Cli::command().get_subcommands() {
            let page = folder.path().join(format!("{NAME}-{}.1", command.get_name()));
            assert!(page.exists(), "{}", page.display());
        }
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), NAME, &mut script);
        assert!(String::from_utf8_lossy(&script).contains("--kube-proxy-rules"));
    }
}
