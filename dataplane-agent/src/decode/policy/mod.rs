//! Network policies of every kind.
//!
//! A policy that the API server would never accept is refused, so that its last good version stays in force. One that it
//! accepts and that says something we do not know, such as a field of a later version, fails closed: what would allow is
//! left out, what would deny or pass denies everything, and the policy selects its pods all the same.

/// Declares types of the API with optional fields only: what has to be there is checked where it is read.
macro_rules! api {
    ($($name:ident { $($field:ident: $type:ty,)+ })+) => {$(
        #[derive(Deserialize, Serialize)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            $(#[serde(skip_serializing_if = "Option::is_none")] $field: Option<$type>,)+
        }
    )+};
}

mod cluster;
mod cluster_ports;
mod namespaced;
#[cfg(test)]
mod tests;
mod unknown;

use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use serde_json::Value;

use super::{ProtocolField, Refused, parse_cidr, parse_port, parse_protocol};
use crate::model::{
    Kind, ObjectRef, Problem, Protocol,
    policy::{Operator, Policy, PortMatch, Requirement, Selector},
};
use unknown::Unknown;

/// The annotation of a policy, or of a Namespace for its `NetworkPolicy` objects, that makes it report and not enforce.
pub const DRY_RUN: &str = "dataplane/dry-run";

/// What the annotation says; a value that is not understood leaves policies enforced.
pub fn dry_run(annotation: Option<&str>, problems: &mut Vec<Problem>) -> bool {
    match annotation {
        None | Some("false") => false,
        Some("true") => true,
        Some(other) => {
            let reason = format!("`{other}` is neither `true` nor `false`: policies are meant in earnest");
            problems.push(Problem::new(format!("metadata.annotations[{DRY_RUN}]"), reason));
            false
        }
    }
}

pub fn decode(key: &ObjectRef, value: &Value, problems: &mut Vec<Problem>) -> Result<Policy, Refused> {
    let mut findings = Findings {
        refused: Vec::new(),
        problems,
    };
    let mut policy = match key.kind {
        Kind::NetworkPolicy => namespaced::decode(key, value, &mut findings)?,
        _ => cluster::decode(key, value, &mut findings)?,
    };
    let annotation = value
        .pointer("/metadata/annotations")
        .and_then(|all| all.get(DRY_RUN));
    policy.dry_run = dry_run(annotation.and_then(Value::as_str), findings.problems);
    let Findings { refused, .. } = findings;
    if refused.is_empty() {
        Ok(policy)
    } else {
        Err(refused)
    }
}

/// What is found on the way.
struct Findings<'a> {
    refused: Refused,
    problems: &'a mut Vec<Problem>,
}

impl Findings<'_> {
    fn refuse(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.refused.push(Problem::new(field, reason));
    }

    /// Accepted by the API server, and not known here.
    fn unknown(&mut self, field: impl Into<String>, reason: impl Into<String>) {
        self.problems.push(Problem::new(field, reason));
    }

    /// Reads what the API server does not look into: what is wrong there is in force, and not understood.
    fn unchecked<T>(&mut self, read: impl FnOnce(&mut Self) -> T) -> T {
        let before = self.refused.len();
        let value = read(self);
        self.problems.extend(self.refused.drain(before..));
        value
    }

    /// Takes what is right.
    fn check<T>(&mut self, result: Result<T, Problem>) -> Option<T> {
        result.map_err(|problem| self.refused.push(problem)).ok()
    }
}

/// A label selector: what `matchLabels` and `matchExpressions` say together.
fn selector(selector: Option<&LabelSelector>, field: &str, findings: &mut Findings<'_>) -> Selector {
    let mut requirements = Vec::new();
    let labels = selector.and_then(|selector| selector.match_labels.as_ref());
    for (key, value) in labels.into_iter().flatten() {
        requirements.push(Requirement {
            key: key.as_str().into(),
            operator: Operator::In([Arc::from(value.as_str())].into()),
        });
    }
    let expressions = selector.and_then(|selector| selector.match_expressions.as_deref());
    for (i, expression) in expressions.unwrap_or_default().iter().enumerate() {
        let at = format!("{field}.matchExpressions[{i}]");
        let values = expression.values.iter().flatten();
        let values: std::collections::BTreeSet<Arc<str>> =
            values.map(|value| Arc::from(value.as_str())).collect();
        let needs_values = matches!(&*expression.operator, "In" | "NotIn");
        if needs_values == values.is_empty() {
            let reason = format!(
                "`{}` takes {}",
                expression.operator,
                if needs_values { "values" } else { "none" }
            );
            findings.refuse(format!("{at}.values"), reason);
        }
        if expression.key.is_empty() {
            findings.refuse(format!("{at}.key"), "missing");
        }
        let operator = match &*expression.operator {
            "In" => Operator::In(values),
            "NotIn" => Operator::NotIn(values),
            "Exists" => Operator::Exists,
            "DoesNotExist" => Operator::DoesNotExist,
            other => {
                findings.refuse(
                    format!("{at}.operator"),
                    format!("`{other}` is no operator of a selector"),
                );
                continue;
            }
        };
        requirements.push(Requirement {
            key: expression.key.as_str().into(),
            operator,
        });
    }
    requirements.sort();
    requirements.dedup();
    Selector { requirements }
}

/// A protocol; `None`: it is not known here, which has been said.
fn protocol(
    text: Option<&str>,
    field: impl FnOnce() -> String,
    findings: &mut Findings<'_>,
) -> Option<Protocol> {
    match parse_protocol(text, field) {
        ProtocolField::Served(proto) => Some(proto),
        ProtocolField::NotYet(_) => Some(Protocol::Sctp),
        ProtocolField::Unknown(problem) => {
            findings.problems.push(problem);
            None
        }
    }
}

/// A port, or ports from the first to the last.
fn ports(
    proto: Protocol,
    (first, first_field): (i32, &str),
    last: Option<(i32, &str)>,
    findings: &mut Findings<'_>,
) -> Option<PortMatch> {
    let first = findings.check(parse_port(first, || first_field.to_owned()))?;
    let Some((last, last_field)) = last else {
        return Some(PortMatch::Range(proto, first, first));
    };
    let last = findings.check(parse_port(last, || last_field.to_owned()))?;
    if last < first {
        findings.refuse(
            last_field,
            format!("{last} is less than {first}, where the range starts"),
        );
        return None;
    }
    Some(PortMatch::Range(proto, first, last))
}

/// An address range. IPv4 written as IPv6 (`::ffff:10.0.0.0/104`) is the IPv4 range.
fn cidr(text: &str, field: &str, findings: &mut Findings<'_>) -> Option<IpNet> {
    let mapped = text.parse::<Ipv6Net>().ok().and_then(|range| {
        let addr = range.network().to_ipv4_mapped()?;
        Ipv4Net::new(addr, range.prefix_len().checked_sub(96)?).ok()
    });
    if let Some(range) = mapped {
        return Some(range.trunc().into());
    }
    findings.check(parse_cidr(text).map_err(|reason| Problem::new(field, reason)))
}
