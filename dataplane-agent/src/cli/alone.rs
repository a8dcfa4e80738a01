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

/// An answer, by an agent or by the tables.
#[derive(Debug)]
pub struct Said<T> {
    pub value: T,
    /// Why no agent gave it; `None`: one did.
    pub alone: Option<anyhow::Error>,
}

impl<T> Said<T> {
    pub const fn by_agent(value: T) -> Self {
        Self { value, alone: None }
    }

    /// The answer. Says on stderr where it is the tables'.
    pub fn noted(self) -> T {
        if let Some(error) = &self.alone {
            note(format_args!(
                "{error:#}: this is what the pinned tables say, without names"
            ));
        }
        self.value
    }

    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Said<U> {
        let Self { value, alone } = self;
        Said {
            value: change(value),
            alone,
        }
    }
}

/// What the tables say in place of an agent that does not answer, `error` being why.
pub fn instead<T>(
    error: anyhow::Error,
    tables: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<Said<T>> {
    let value = tables().with_context(|| format!("{error:#}"))?;
    Ok(Said {
        value,
        alone: Some(error),
    })
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
        let neither = instead(error, || Err::<u8, _>(anyhow!("no tables"))).unwrap_err();
        assert_eq!(
            format!("{neither:#}"),
            "failed to reach an agent: connection refused: no tables"
        );
    }

    #[test]
    fn the_answer_of_tables_tells_why_it_is_not_an_agents() {
        let said = instead(anyhow!("no agent"), || Ok(7))
            .unwrap()
            .map(|value| value + 1);
        assert_eq!(said.value, 8);
        assert_eq!(said.alone.as_ref().unwrap().to_string(), "no agent");
        assert_eq!(said.noted(), 8);
        assert!(Said::by_agent(7).alone.is_none());
    }
}
