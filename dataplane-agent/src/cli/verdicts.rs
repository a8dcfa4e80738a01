//! `verdicts`: what policies have denied lately, what dry runs would have changed, and where the agent was told so, what
//! was allowed.

use std::{path::Path, thread, time::Duration};

use super::{
    ask,
    output::{Output, print, table},
};
use crate::told::Told;

/// Between two questions of `--follow`.
const PAUSE: Duration = Duration::from_millis(200);

/// Prints what the agent at `socket` has kept, and with `follow` what comes.
pub fn run(socket: &Path, follow: bool, output: Output) -> anyhow::Result<()> {
    let mut last = 0;
    let mut is_first = true;
    loop {
        let told: Vec<Told> = ask::value(socket, &format!("/verdicts?after={last}"))?;
        last = told.last().map_or(last, |told| told.number);
        if is_first || !told.is_empty() {
            let text = match output {
                Output::Json => lines(&told)?,
                Output::Table => render(&told),
            };
            print(&text)?;
        }
        if !follow {
            return Ok(());
        }
        is_first = false;
        thread::sleep(PAUSE);
    }
}

/// A JSON object a line.
fn lines(told: &[Told]) -> anyhow::Result<String> {
    let lines = told.iter().map(|told| Ok(serde_json::to_string(told)? + "\n"));
    lines.collect()
}

fn render(told: &[Told]) -> String {
    let rows = told.iter().map(|told| {
        vec![
            told.time.strftime("%H:%M:%S%.3f").to_string(),
            told.verdict.as_str().to_owned(),
            told.direction.clone(),
            told.from.clone(),
            told.to.clone(),
            told.port.clone(),
            by(told),
        ]
    });
    let header = ["TIME", "VERDICT", "DIRECTION", "FROM", "TO", "PORT", "BY"];
    table(&header, rows).trim_start_matches('\n').to_owned()
}

/// What gave the verdict.
fn by(told: &Told) -> String {
    let text = match (&told.policy, told.rule) {
        (Some(policy), Some(rule)) => format!("{policy}, rule {rule}"),
        (Some(policies), None) => format!("no rule of {policies}"),
        (None, _) => told.reason.clone(),
    };
    match told.untold {
        0 => text,
        untold => format!("{text} ({untold} more before this were not told)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_names_its_rule_or_the_policies_that_have_none() {
        let mut told = Told {
            policy: Some("NetworkPolicy shop/db".to_owned()),
            reason: "policy-denied".to_owned(),
            ..Told::default()
        };
        assert_eq!(by(&told), "no rule of NetworkPolicy shop/db");
        told.rule = Some(2);
        told.untold = 7;
        assert_eq!(
            by(&told),
            "NetworkPolicy shop/db, rule 2 (7 more before this were not told)"
        );
        told.policy = None;
        told.untold = 0;
        assert_eq!(by(&told), "policy-denied");
    }
}
