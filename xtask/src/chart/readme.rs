//! The chart's README: its head, and a table of values.yaml's keys, defaults and comments.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_norway::Value;

const HEAD: &str = include_str!("head.md");

/// The whole text.
pub fn write(values: &str) -> Result<String> {
    let comments = comments(values);
    let parsed: Value = serde_norway::from_str(values).context("failed to parse values.yaml")?;
    let mut text = format!("{HEAD}\n## Values\n\n| value | default | meaning |\n|---|---|---|\n");
    add(&mut text, "", &parsed, &comments)?;
    Ok(text)
}

fn add(text: &mut String, path: &str, value: &Value, comments: &BTreeMap<String, String>) -> Result<()> {
    let comment = comments.get(path).map_or("", String::as_str).replace('|', "\\|");
    match value {
        Value::Mapping(children) if !children.is_empty() => {
            if !path.is_empty() && !comment.is_empty() {
                writeln!(text, "| **{path}** | | {comment} |")?;
            }
            for (key, child) in children {
                let key = key.as_str().context("a key of values.yaml is no text")?;
                let path = if path.is_empty() {
                    key.to_owned()
                } else {
                    format!("{path}.{key}")
                };
                add(text, &path, child, comments)?;
            }
        }
        _ => {
            let default = serde_json::to_string(value).context("a default cannot be written")?;
            writeln!(text, "| `{path}` | `{default}` | {comment} |")?;
        }
    }
    Ok(())
}

/// The comment above each key, by its path. What stands above a key with another indentation, or behind an empty line, is none.
fn comments(values: &str) -> BTreeMap<String, String> {
    let mut comments = BTreeMap::new();
    let mut path: Vec<&str> = Vec::new();
    let mut above: (usize, Vec<&str>) = (0, Vec::new());
    for line in values.lines() {
        let content = line.trim_start();
        let depth = (line.len() - content.len()) / 2;
        if let Some(comment) = content.strip_prefix('#') {
            if above.0 != depth {
                above = (depth, Vec::new());
            }
            above.1.push(comment.trim());
            continue;
        }
        let key = content.split_once(':').map(|(key, _)| key);
        if let Some(key) = key.filter(|key| !key.starts_with(['-', '"'])) {
            path.truncate(depth);
            path.push(key);
            if above.0 == depth && !above.1.is_empty() {
                comments.insert(path.join("."), above.1.join(" "));
            }
        }
        above = (depth, Vec::new());
    }
    comments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_key_has_its_own_comment_and_default() {
        let values = "# One\n# thing.\na:\n  # Inner | outer.\n  b: 1\n  c: {}\n  # d: example\n\ne: [x]\n# Last.\nf: \"\"\n";
        let text = write(values).unwrap();
        let table = text.split_once("|---|---|---|\n").unwrap().1;
        assert_eq!(
            table,
            "| **a** | | One thing. |\n| `a.b` | `1` | Inner \\| outer. |\n| `a.c` | `{}` |  |\n| `e` | `[\"x\"]` |  |\n| `f` | `\"\"` | Last. |\n"
        );
    }
}
