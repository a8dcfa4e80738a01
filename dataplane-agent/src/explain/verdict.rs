//! What comes of a flow, as far as this node decides it.

use serde::{Deserialize, Serialize};

use super::{Explained, unserved::NOT_SERVED};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// By every step, and every step is taken here.
    #[default]
    Allowed,
    /// By every step that is taken here; another is taken elsewhere.
    AllowedHere,
    /// No step is taken here, and one elsewhere.
    NotDecidedHere,
    Denied,
    /// A Service's address, and no entry of the tables is for it.
    NotServed,
}

impl Verdict {
    pub fn of(flow: &Explained) -> Self {
        let is_not_served = || flow.steps.iter().any(|step| step.reason.starts_with(NOT_SERVED));
        match (flow.allowed, flow.elsewhere.is_empty()) {
            (false, _) if is_not_served() => Self::NotServed,
            (false, _) => Self::Denied,
            (true, true) => Self::Allowed,
            (true, false) if flow.steps.is_empty() => Self::NotDecidedHere,
            (true, false) => Self::AllowedHere,
        }
    }
}

impl Explained {
    /// The verdict in words.
    pub fn headline(&self) -> String {
        match self.verdict {
            Verdict::Allowed => "allowed".to_owned(),
            Verdict::Denied => "denied".to_owned(),
            Verdict::NotServed => "not served".to_owned(),
            Verdict::NotDecidedHere => "not decided here".to_owned(),
            Verdict::AllowedHere => {
                let others = self.elsewhere.iter().map(|one| match &one.node {
                    Some(node) => format!("; {node} decides {}", one.direction),
                    None => format!("; {} is not decided here", one.direction),
                });
                format!("allowed here{}", others.collect::<String>())
            }
        }
    }
}
