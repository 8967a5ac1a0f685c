//! The files that are JSON: the catalog, checked as the server does, and the note of where the staging file lies.

use std::io::Write;

use super::{Args, line};
use crate::cli::CliResult;
use crate::storage::Catalog;

/// Prints the file.
pub(super) fn show(args: &Args, out: &mut impl Write) -> CliResult {
    let path = &args.file;
    let bytes =
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let value: serde_json::Value = serde_json::from_slice(&bytes).map_err(|error| {
        format!(
            "{} is damaged at byte {}: {error}",
            path.display(),
            byte_of(&bytes, error.line(), error.column())
        )
    })?;
    let is_catalog = path.file_name().is_some_and(|name| name == "catalog.json");
    if !is_catalog && value.get("topics").is_none() {
        if args.json {
            return line(&value, out);
        }
        writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
        return Ok(());
    }
    let catalog = Catalog::from_bytes(&bytes, path)?;
    if args.json {
        return line(&value, out);
    }
    writeln!(
        out,
        "catalog of store {:032x}: {} topics, the next one has id {}",
        catalog.store_id(),
        catalog.topics().len(),
        catalog.next_id()
    )?;
    for topic in catalog.topics() {
        writeln!(
            out,
            "topic {} ({}){}: {} partitions in shards {}",
            topic.id,
            topic.name,
            if topic.internal { ", internal" } else { "" },
            topic.partitions(),
            shards(&topic.shards)
        )?;
        for (name, value) in &topic.settings {
            writeln!(out, "  {name} = {value}")?;
        }
    }
    Ok(())
}

/// The shards of partitions in order, equal ones in a row as `3 × 12`.
fn shards(list: &[u16]) -> String {
    let runs = list.chunk_by(|a, b| a == b).map(|run| match run.len() {
        1 => run[0].to_string(),
        n => format!("{} × {n}", run[0]),
    });
    runs.collect::<Vec<_>>().join(", ")
}

/// The byte at a line and column, both from 1.
fn byte_of(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize = bytes
        .split_inclusive(|&b| b == b'\n')
        .take(line.saturating_sub(1))
        .map(<[u8]>::len)
        .sum();
    (before + column.saturating_sub(1)).min(bytes.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_in_lines_are_bytes() {
        assert_eq!(byte_of(b"ab\ncd\n", 2, 1), 3);
        assert_eq!(byte_of(b"ab\ncd\n", 1, 2), 1);
        assert_eq!(byte_of(b"", 1, 0), 0);
        assert_eq!(shards(&[0, 0, 0, 1, 2, 2]), "0 × 3, 1, 2 × 2");
    }
}
