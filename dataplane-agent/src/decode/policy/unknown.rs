//! Fields that an object has and our types do not: whatever a later version of the API means by them, it is not what is
//! understood without.

use serde::Serialize;
use serde_json::Value;

/// Paths of unknown fields, such as `spec.ingress[0].from[1].services`.
pub struct Unknown(Vec<String>);

impl Unknown {
    /// Compares a value with what was read of it.
    pub fn of<T: Serialize>(path: &str, value: &Value, read: &T) -> Self {
        let mut paths = Vec::new();
        let read = serde_json::to_value(read).unwrap_or_default();
        collect(path, value, &read, &mut paths);
        Self(paths)
    }

    /// Adds a field that is known, but not in this kind.
    pub fn extend_if(&mut self, is_there: bool, path: &str) {
        self.0.extend(is_there.then(|| path.to_owned()));
    }

    /// The first one at or below a path.
    pub fn within(&self, path: &str) -> Option<&str> {
        let mut paths = self.0.iter().map(String::as_str);
        paths.find(|found| {
            let rest = found.strip_prefix(path);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        })
    }

    /// The first one at or below a path that is not in one of these lists below it.
    pub fn within_but(&self, path: &str, lists: &[&str]) -> Option<&str> {
        let mut paths = self.0.iter().map(String::as_str);
        paths.find(|found| {
            let rest = found.strip_prefix(path);
            let rest = rest.filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']));
            rest.is_some_and(|rest| {
                let in_list = |list: &&str| {
                    let rest = rest.strip_prefix('.').and_then(|rest| rest.strip_prefix(*list));
                    rest.is_some_and(|rest| rest.starts_with('['))
                };
                !lists.iter().any(in_list)
            })
        })
    }
}

fn collect(path: &str, value: &Value, read: &Value, paths: &mut Vec<String>) {
    match (value, read) {
        (Value::Object(fields), Value::Object(known)) => {
            for (key, value) in fields {
                let path = format!("{path}.{key}");
                match known.get(key) {
                    Some(read) => collect(&path, value, read, paths),
                    None if value.is_null() => {}
                    None => paths.push(path),
                }
            }
        }
        (Value::Array(items), Value::Array(known)) => {
            for (i, (item, read)) in items.iter().zip(known).enumerate() {
                collect(&format!("{path}[{i}]"), item, read, paths);
            }
        }
        _ => {}
    }
}
