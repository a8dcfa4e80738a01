//! `--filter`: a comma list of ids, tags or globs, where `!` leaves out what it matches.

use anyhow::{Result, bail};

/// A parsed filter expression.
#[derive(Debug, Default)]
pub struct Filter {
    wanted: Vec<String>,
    unwanted: Vec<String>,
}

impl Filter {
    pub fn parse(expression: &str) -> Result<Self> {
        let mut filter = Self::default();
        for item in expression.split(',').map(str::trim) {
            let (list, pattern) = match item.strip_prefix('!') {
                Some(rest) => (&mut filter.unwanted, rest.trim()),
                None => (&mut filter.wanted, item),
            };
            if pattern.is_empty() {
                bail!("the filter {expression:?} has an empty item");
            }
            list.push(pattern.to_owned());
        }
        Ok(filter)
    }

    /// Whether something with these names (id, name, tags) is chosen. Without a wanted item everything is wanted.
    pub fn matches(&self, names: &[&str]) -> bool {
        let any = |patterns: &[String]| {
            patterns
                .iter()
                .any(|pattern| names.iter().any(|name| glob(pattern, name)))
        };
        (self.wanted.is_empty() || any(&self.wanted)) && !any(&self.unwanted)
    }
}

/// `*` stands for any text, `?` for one character.
fn glob(pattern: &str, name: &str) -> bool {
    let mut rest = pattern.chars();
    match rest.next() {
        None => name.is_empty(),
        Some('*') => {
            let rest = rest.as_str();
            name.char_indices().any(|(at, _)| glob(rest, &name[at..])) || glob(rest, "")
        }
        Some(expected) => {
            let mut own = name.chars();
            own.next()
                .is_some_and(|found| expected == '?' || expected == found)
                && glob(rest.as_str(), own.as_str())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_add_and_exclamation_marks_take_away() {
        let chosen = |expression: &str, names: &[&str]| Filter::parse(expression).unwrap().matches(names);
        assert!(chosen("s018", &["s018", "nodeport-cluster", "nodeport"]));
        assert!(chosen("nodeport", &["s018", "nodeport-cluster", "nodeport"]));
        assert!(chosen("s01*,x", &["s018"]));
        assert!(chosen("s?18", &["s018"]));
        assert!(!chosen("s02", &["s018"]));
        assert!(chosen("!udp", &["s018", "tcp"]));
        assert!(!chosen("s*,!udp", &["s018", "udp"]));
        assert!(Filter::parse("a,,b").is_err());
    }
}
