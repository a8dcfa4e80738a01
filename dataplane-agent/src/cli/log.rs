//! `log`: the levels of a running agent's log.

use std::path::Path;

use anyhow::ensure;

use super::{ask, output::print};
use crate::health::Levels;

/// Sets the levels of the agent at `socket` if any are given, those of its start with `reset`, and prints which are in force.
pub fn run(levels: Option<&str>, reset: bool, socket: &Path) -> anyhow::Result<()> {
    let path = match levels {
        Some(levels) => {
            let is_plain =
                |character: char| character.is_ascii_alphanumeric() || "_:=,.-".contains(character);
            ensure!(
                levels.chars().all(is_plain),
                "no levels are written so: `{levels}` (some are: `info,dataplane_agent::sync=debug`)"
            );
            format!("/log?levels={levels}")
        }
        None if reset => "/log?reset=1".to_owned(),
        None => "/log".to_owned(),
    };
    let Levels { levels, error } = ask::value(socket, &path)?;
    if let Some(error) = error {
        anyhow::bail!(error);
    }
    print(&format!("{levels}\n"))
}
