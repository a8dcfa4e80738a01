//! From a file's text to decoded objects: YAML with several documents, JSON, and `List`s unrolled.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::strict::Strict;
use crate::{
    decode::{self, Decoded},
    model::{Cause, Object, ObjectRef, Problem},
};

/// What a file says.
#[derive(Debug, Default)]
pub struct Parsed {
    pub entries: Vec<Entry>,
    pub problems: Vec<DocumentProblem>,
    /// A document could not be read far enough to tell which object it is.
    pub opaque: bool,
    pub ignored: BTreeMap<String, usize>,
}

/// An object in a file.
#[derive(Debug)]
pub struct Entry {
    pub document: usize,
    pub key: ObjectRef,
    /// `None`: it is refused.
    pub object: Option<Object>,
}

/// A problem and the document it is in.
#[derive(Debug)]
pub struct DocumentProblem {
    pub document: usize,
    /// Empty when it is not known.
    pub object: String,
    pub problem: Problem,
}

/// Parses the text of a file.
pub fn parse(text: &[u8], is_json: bool) -> Parsed {
    let mut parsed = Parsed::default();
    let Ok(text) = std::str::from_utf8(text) else {
        parsed.unreadable(1, "not UTF-8".to_owned());
        return parsed;
    };
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if is_json {
        for (i, value) in serde_json::Deserializer::from_str(text)
            .into_iter::<Strict>()
            .enumerate()
        {
            match value {
                Ok(Strict(value)) => parsed.add(i + 1, &value, ""),
                Err(error) => {
                    parsed.unreadable(i + 1, error.to_string());
                    break;
                }
            }
        }
        return parsed;
    }
    let mut number = 0;
    for (line, document) in split(text) {
        if document
            .lines()
            .all(|line| line.trim().is_empty() || line.starts_with(['#', '%']))
        {
            continue;
        }
        number += 1;
        if is_too_deep(document) {
            parsed.unreadable(number, format!("more than {NESTED_AT_MOST} open brackets"));
            continue;
        }
        match serde_norway::from_str(document) {
            Ok(Strict(Value::Null)) => {}
            Ok(Strict(value)) => parsed.add(number, &value, ""),
            Err(error) => parsed.unreadable(number, yaml_error(&error, line)),
        }
    }
    parsed
}

impl Parsed {
    fn unreadable(&mut self, document: usize, reason: String) {
        self.opaque = true;
        self.problems.push(DocumentProblem {
            document,
            object: String::new(),
            problem: Problem::new("", reason).because(Cause::Unreadable),
        });
    }

    fn add(&mut self, document: usize, value: &Value, at: &str) {
        if let Some((of, items)) = list(value) {
            let Some(items) = items else {
                self.opaque = true;
                self.problems.push(DocumentProblem {
                    document,
                    object: format!("{of}List"),
                    problem: Problem::new(format!("{at}items"), "not a list"),
                });
                return;
            };
            for (i, item) in items.iter().enumerate() {
                self.add(document, &typed(item, value, of), &format!("{at}items[{i}]."));
            }
            return;
        }
        let (key, object, problems) = match decode::decode(value) {
            Decoded::Ignored { kind } => {
                *self.ignored.entry(kind).or_default() += 1;
                return;
            }
            Decoded::Object {
                key,
                object,
                problems,
            } => (Some(key), Some(object), problems),
            Decoded::Failed { key, problems } => (key, None, problems),
        };
        let description = match &key {
            Some(key) => key.to_string(),
            None => value
                .get("kind")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned(),
        };
        self.problems
            .extend(problems.into_iter().map(|problem| DocumentProblem {
                document,
                object: description.clone(),
                problem: Problem {
                    field: format!("{at}{}", problem.field).trim_end_matches('.').to_owned(),
                    ..problem
                },
            }));
        match key {
            Some(key) => self.entries.push(Entry {
                document,
                key,
                object,
            }),
            None => self.opaque = true,
        }
    }

    /// Reports and drops the second of two objects with one name in one document (a `List`).
    pub fn drop_twins(&mut self) {
        let mut seen = HashSet::new();
        let mut twins = Vec::new();
        self.entries.retain(|entry| {
            let first = seen.insert((entry.document, entry.key.clone()));
            if !first {
                twins.push((entry.document, entry.key.to_string()));
            }
            first
        });
        self.problems
            .extend(twins.into_iter().map(|(document, object)| DocumentProblem {
                document,
                object,
                problem:
                    Problem::new("metadata.name", "stands twice in this document").because(Cause::Conflict),
            }));
    }
}

/// The items of a list, if they are such, and their kind, which is empty for a `List` of anything.
fn list(value: &Value) -> Option<(&str, Option<&[Value]>)> {
    let of = value.get("kind")?.as_str()?.strip_suffix("List")?;
    match value.get("items") {
        Some(Value::Array(items)) => Some((of, Some(items))),
        Some(Value::Null) => Some((of, Some(&[]))),
        Some(_) => Some((of, None)),
        None => of.is_empty().then_some((of, None)),
    }
}

/// Items of a typed list may leave out what the list says.
fn typed(item: &Value, list: &Value, of: &str) -> Value {
    let mut item = item.clone();
    if let Value::Object(fields) = &mut item
        && !of.is_empty()
    {
        fields.entry("kind").or_insert_with(|| of.into());
        if let Some(version) = list.get("apiVersion") {
            fields.entry("apiVersion").or_insert_with(|| version.clone());
        }
    }
    item
}

/// Brackets that may be open at once. The parser refuses depths far below, but takes time by their square first.
const NESTED_AT_MOST: usize = 4096;

fn is_too_deep(document: &str) -> bool {
    let mut depth = 0_usize;
    document.bytes().any(|byte| {
        match byte {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth > NESTED_AT_MOST
    })
}

/// The documents of a YAML text, each with the number of its first line, counted from 0. A `---` or `...` at the start
/// of a line ends a document wherever it stands, even in a block scalar (YAML 1.2, 9.1.2).
fn split(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut first_line, mut at) = (0, 0, 0);
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.strip_prefix("---").or_else(|| line.strip_prefix("..."));
        if marker.is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n'])) {
            documents.push((first_line, &text[start..at]));
            // What follows on the marker's own line belongs to the document: blank the marker out by starting behind it.
            start = at + 3;
            first_line = number;
        }
        at += line.len();
    }
    documents.push((first_line, &text[start..]));
    documents
}

fn yaml_error(error: &serde_norway::Error, first_line: usize) -> String {
    let text = error.to_string();
    match error.location() {
        Some(location) => {
            // The text ends in the place within the document; the place within the file is what helps.
            let text = text.split(" at line ").next().unwrap_or(&text);
            let line = first_line + location.line();
            format!("line {line} column {}: {text}", location.column())
        }
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_split_at_markers_only() {
        let text = "# licence\n---\na: 1\n--- # two\nb: '---x'\n---x: 1\n";
        let documents: Vec<_> = split(text).into_iter().map(|(line, _)| line).collect();
        assert_eq!(documents, [0, 1, 3]);
    }

    #[test]
    fn an_error_names_the_line_of_the_file() {
        let parsed = parse(b"a: 1\n---\nb: 1\nc: [\n", false);
        assert!(parsed.opaque);
        let problem = parsed.problems.last().unwrap();
        assert_eq!(problem.document, 2);
        assert!(
            problem.problem.reason.starts_with("line "),
            "{}",
            problem.problem.reason
        );
    }

    #[test]
    fn typed_lists_are_unrolled() {
        let parsed = parse(
            b"apiVersion: v1\nkind: NamespaceList\nitems:\n- metadata: {name: a}\n- metadata: {name: b}\n",
            false,
        );
        assert_eq!(parsed.entries.len(), 2);
    }
}
