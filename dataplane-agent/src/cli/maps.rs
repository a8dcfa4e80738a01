//! `maps`: what each pinned table is for, and what it takes.

use std::path::Path;

use anyhow::Context;

use super::{
    output::{Output, note, table},
    pinned,
};
use crate::attach::inspect::{self, TableInfo};

/// Prints the tables that are pinned under `bpffs`.
pub fn run(bpffs: &Path, output: Output) -> anyhow::Result<()> {
    let pins = pinned(bpffs)?;
    let tables = inspect::tables(&pins).context("failed to look at the pinned tables")?;
    for missing in inspect::unreadable(&pins) {
        note(format_args!("warning: {missing}"));
    }
    output.print(&tables, |tables| render(&pins.maps(), tables))
}

fn render(folder: &Path, tables: &[TableInfo]) -> String {
    let rows = tables.iter().map(|one| {
        vec![
            one.name.clone(),
            one.kind.to_owned(),
            one.entries
                .map_or_else(String::new, |entries| entries.to_string()),
            one.limit.to_string(),
            one.bytes.map_or_else(String::new, size),
            one.purpose.to_owned(),
        ]
    });
    let total = tables.iter().filter_map(|one| one.bytes).sum();
    let rows = table(&["TABLE", "TYPE", "ENTRIES", "LIMIT", "MEMORY", "PURPOSE"], rows);
    format!("{}: {}\n{rows}", folder.display(), size(total))
}

fn size(bytes: u64) -> String {
    match bytes {
        0..=10_239 => format!("{bytes} B"),
        10_240..=10_485_759 => format!("{} KiB", bytes >> 10),
        _ => format!("{} MiB", bytes >> 20),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_table_has_a_line_and_the_first_one_is_about_all() {
        let one = |name: &str, bytes| TableInfo {
            name: name.to_owned(),
            kind: "hash",
            purpose: "for a test",
            entries: Some(3),
            limit: 7,
            key_bytes: 4,
            value_bytes: 4,
            bytes,
        };
        let text = render(Path::new("/maps"), &[one("A", Some(20 << 20)), one("B", None)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "/maps: 20 MiB");
        assert_eq!(
            lines[3].split_whitespace().collect::<Vec<_>>()[..5],
            ["A", "hash", "3", "7", "20"]
        );
        assert_eq!(lines.len(), 5, "{text}");
    }
}
