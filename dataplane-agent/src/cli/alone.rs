//! Without an agent: what commands ask the pinned tables in its place, which know addresses and no names.

use std::path::Path;

use anyhow::{Context, anyhow};

use super::output::note;

/// Where an agent is asked, and where its tables are.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    pub bpffs: &'a Path,
    pub socket: &'a Path,
}

/// What the tables say in place of an agent that does not answer, `error` being why. Says so on stderr.
pub fn instead<T>(error: &anyhow::Error, tables: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    let said = tables().with_context(|| format!("{error:#}"))?;
    note(format_args!(
        "{error:#}: this is what the pinned tables say, without names"
    ));
    Ok(said)
}

/// Says on stderr why addresses have to do where names were wanted.
pub fn unnamed(error: &anyhow::Error) {
    note(format_args!("no names: {error:#}"));
}

/// What only an agent can say. `way_out`: what can be asked in its place.
pub fn only_an_agent(error: &anyhow::Error, knows: &str, way_out: &str) -> anyhow::Error {
    anyhow!("{error:#}; {knows} are known to a running agent alone: {way_out}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_gets_no_answer_hears_why_and_what_to_ask() {
        let error = anyhow!("connection refused").context("failed to reach an agent");
        let text = only_an_agent(&error, "names", "give addresses").to_string();
        assert_eq!(
            text,
            "failed to reach an agent: connection refused; names are known to a running agent alone: give addresses"
        );
        assert_eq!(instead(&error, || Ok(7)).unwrap(), 7);
        let neither = instead(&error, || Err::<u8, _>(anyhow!("no tables"))).unwrap_err();
        assert_eq!(
            format!("{neither:#}"),
            "failed to reach an agent: connection refused: no tables"
        );
    }
}
