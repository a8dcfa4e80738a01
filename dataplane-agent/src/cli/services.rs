//! `services`: what a running agent serves, and what it does not.

use std::{io::Write, path::Path, time::Duration};

use anyhow::Context;

use super::{
    ask::ask,
    status::{Output, table},
};
use crate::served::Served;

const WITHIN: Duration = Duration::from_secs(10);

/// Prints the Services of the agent at `socket`, or only what is wrong with them.
pub fn run(socket: &Path, problems: bool, output: Output) -> anyhow::Result<()> {
    let answer = ask(socket, "/services", WITHIN)
        .with_context(|| format!("failed to reach an agent at {}", socket.display()))?;
    let served: Served = answer.value()?;
    let text = match (output, problems) {
        (Output::Json, false) => serde_json::to_string_pretty(&served)? + "\n",
        (Output::Json, true) => serde_json::to_string_pretty(&served.problems)? + "\n",
        (Output::Table, problems) => render(&served, problems),
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .context("failed to print")
}

fn render(served: &Served, only_problems: bool) -> String {
    let Served {
        objects,
        problems,
        conditions: _,
    } = served;
    let rows = problems.iter().map(|problem| {
        vec![
            problem.object.clone(),
            problem.field.clone(),
            problem.reason.clone(),
            problem.file.clone().unwrap_or_default(),
        ]
    });
    let problems = table(&["OBJECT", "FIELD", "NOT SERVED BECAUSE", "IN"], rows);
    if only_problems {
        return problems.trim_start_matches('\n').to_owned();
    }
    let rows = objects.iter().flat_map(|object| {
        object.frontends.iter().map(|frontend| {
            vec![
                object.object.clone(),
                frontend.at.clone(),
                frontend.clients.as_str().to_owned(),
                frontend.endpoints.to_string(),
            ]
        })
    });
    let services = table(&["OBJECT", "AT", "CLIENTS", "ENDPOINTS"], rows);
    format!("{}{problems}", services.trim_start_matches('\n'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::served::{Clients, Problem, ServedFrontend, ServedObject};

    #[test]
    fn problems_stand_alone_or_below_the_services() {
        let served = Served {
            objects: vec![ServedObject {
                object: "Service ns/a".to_owned(),
                frontends: vec![ServedFrontend {
                    at: "10.96.0.1:80/TCP".to_owned(),
                    clients: Clients::All,
                    endpoints: 3,
                }],
            }],
            problems: vec![Problem {
                object: "Service ns/b".to_owned(),
                field: "spec.clusterIP".to_owned(),
                reason: "missing".to_owned(),
                cause: crate::model::Cause::Invalid,
                file: None,
            }],
            conditions: Vec::new(),
        };
        let problems = render(&served, true);
        assert!(problems.starts_with(" OBJECT"), "{problems}");
        assert!(problems.contains("Service ns/b"), "{problems}");
        assert!(!problems.contains("10.96.0.1"), "{problems}");
        let all = render(&served, false);
        assert!(all.starts_with(" OBJECT"), "{all}");
        assert!(all.contains("10.96.0.1:80/TCP"), "{all}");
        assert!(all.contains("missing"), "{all}");
    }
}
