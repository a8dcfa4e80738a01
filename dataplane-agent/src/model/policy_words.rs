//! Peers and ports of policies in words, for people.

use std::fmt::{self, Display, Formatter};

use super::policy::{IpBlock, NamespaceSet, Operator, Peer, PodSet, PortMatch, Requirement, Selector};

impl Display for Peer {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Pods(pods) => pods.fmt(f),
            Peer::Block(block) => block.fmt(f),
            Peer::Nodes(nodes) if nodes.requirements.is_empty() => f.write_str("nodes"),
            Peer::Nodes(nodes) => write!(f, "nodes with {nodes}"),
        }
    }
}

impl Display for PodSet {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("pods")?;
        if !self.pods.requirements.is_empty() {
            write!(f, " with {}", self.pods)?;
        }
        match &self.namespaces {
            NamespaceSet::One(name) => write!(f, " in {name}"),
            NamespaceSet::Labelled(all) if all.requirements.is_empty() => f.write_str(" in all namespaces"),
            NamespaceSet::Labelled(namespaces) => write!(f, " in namespaces with {namespaces}"),
        }
    }
}

impl Display for IpBlock {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        self.range.fmt(f)?;
        if !self.except.is_empty() {
            f.write_str(" except ")?;
            list(f, &self.except, ", ")?;
        }
        Ok(())
    }
}

/// As `kubectl` writes and reads selectors.
impl Display for Selector {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        list(f, &self.requirements, ",")
    }
}

impl Display for Requirement {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let key = &self.key;
        let (word, values) = match &self.operator {
            Operator::Exists => return write!(f, "{key}"),
            Operator::DoesNotExist => return write!(f, "!{key}"),
            Operator::In(values) => match values.first() {
                Some(value) if values.len() == 1 => return write!(f, "{key}={value}"),
                _ => ("in", values),
            },
            Operator::NotIn(values) => match values.first() {
                Some(value) if values.len() == 1 => return write!(f, "{key}!={value}"),
                _ => ("notin", values),
            },
        };
        write!(f, "{key} {word} (")?;
        list(f, values, ",")?;
        f.write_str(")")
    }
}

impl Display for PortMatch {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            PortMatch::Protocol(protocol) => f.write_str(protocol.as_str()),
            PortMatch::Range(protocol, first, last) if first == last => {
                write!(f, "{first}/{}", protocol.as_str())
            }
            PortMatch::Range(protocol, first, last) => write!(f, "{first}-{last}/{}", protocol.as_str()),
            PortMatch::Named(Some(protocol), name) => write!(f, "{name}/{}", protocol.as_str()),
            PortMatch::Named(None, name) => name.fmt(f),
        }
    }
}

fn list<T: Display>(f: &mut Formatter<'_>, parts: impl IntoIterator<Item = T>, between: &str) -> fmt::Result {
    for (number, part) in parts.into_iter().enumerate() {
        if number > 0 {
            f.write_str(between)?;
        }
        part.fmt(f)?;
    }
    Ok(())
}

/// A rule's peers or ports: `any` where it names none, `none` where its list is empty.
pub fn one_of<T: Display>(parts: Option<&[T]>) -> String {
    match parts {
        None => "any".to_owned(),
        Some([]) => "none".to_owned(),
        Some(parts) => parts
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join("; "),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::model::Protocol;

    fn selector(requirements: &[(&str, Operator)]) -> Selector {
        let requirements = requirements.iter().map(|(key, operator)| Requirement {
            key: (*key).into(),
            operator: operator.clone(),
        });
        Selector {
            requirements: requirements.collect(),
        }
    }

    fn values(values: &[&str]) -> BTreeSet<std::sync::Arc<str>> {
        values.iter().map(|value| (*value).into()).collect()
    }

    #[test]
    fn peers_and_ports_read_as_people_write_them() {
        let web = selector(&[("app", Operator::In(values(&["web"])))]);
        let all = selector(&[
            ("old", Operator::DoesNotExist),
            ("team", Operator::In(values(&["a", "b"]))),
            ("tier", Operator::NotIn(values(&["x"]))),
            ("zone", Operator::Exists),
        ]);
        let pods = |namespaces, pods: &Selector| {
            Peer::Pods(PodSet {
                namespaces,
                pods: pods.clone(),
            })
        };
        let block = Peer::Block(IpBlock {
            range: "10.0.0.0/8".parse().unwrap(),
            except: vec!["10.1.0.0/16".parse().unwrap(), "10.2.0.0/16".parse().unwrap()],
        });
        for (peer, text) in [
            (
                pods(NamespaceSet::One("shop".into()), &web),
                "pods with app=web in shop",
            ),
            (
                pods(NamespaceSet::Labelled(all), &Selector::default()),
                "pods in namespaces with !old,team in (a,b),tier!=x,zone",
            ),
            (
                pods(NamespaceSet::Labelled(Selector::default()), &Selector::default()),
                "pods in all namespaces",
            ),
            (block, "10.0.0.0/8 except 10.1.0.0/16, 10.2.0.0/16"),
            (Peer::Nodes(web), "nodes with app=web"),
            (Peer::Nodes(Selector::default()), "nodes"),
        ] {
            assert_eq!(peer.to_string(), text);
        }
        let ports = [
            PortMatch::Range(Protocol::Tcp, 80, 80),
            PortMatch::Range(Protocol::Udp, 1, 9),
            PortMatch::Protocol(Protocol::Sctp),
            PortMatch::Named(Some(Protocol::Tcp), "http".into()),
            PortMatch::Named(None, "dns".into()),
        ];
        assert_eq!(one_of(Some(&ports)), "80/TCP; 1-9/UDP; SCTP; http/TCP; dns");
        assert_eq!(one_of::<Peer>(None), "any");
        assert_eq!(one_of::<Peer>(Some(&[])), "none");
    }
}
