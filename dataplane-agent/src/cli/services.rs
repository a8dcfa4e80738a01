//! `services`: what a running agent serves, and what it does not.

use std::path::Path;

use super::{
    ask,
    output::{self, Output, table},
};
use crate::served::{Problem, Served};

/// Prints the Services of the agent at `socket`, or only what is wrong with them.
pub fn run(socket: &Path, problems: bool, output: Output) -> anyhow::Result<()> {
    let served: Served = ask::value(socket, "/services")?;
    if problems {
        output.print(&served.problems, |problems| of_problems(problems))
    } else {
        output.print(&served, render)
    }
}

fn of_problems(problems: &[Problem]) -> String {
    let problems = output::problems(problems, "NOT SERVED BECAUSE");
    problems.trim_start_matches('\n').to_owned()
}

fn render(served: &Served) -> String {
    let Served {
        objects,
        problems,
        conditions: _,
    } = served;
    let problems = output::problems(problems, "NOT SERVED BECAUSE");
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
    use crate::served::{Clients, ServedFrontend, ServedObject};

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
        let problems = of_problems(&served.problems);
        assert!(problems.starts_with(" OBJECT"), "{problems}");
        assert!(problems.contains("Service ns/b"), "{problems}");
        assert!(!problems.contains("10.96.0.1"), "{problems}");
        let all = render(&served);
        assert!(all.starts_with(" OBJECT"), "{all}");
        assert!(all.contains("10.96.0.1:80/TCP"), "{all}");
        assert!(all.contains("missing"), "{all}");
    }
}
