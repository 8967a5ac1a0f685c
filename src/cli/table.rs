//! Tables for people.

use std::io::Write;

use comfy_table::{CellAlignment, Table, presets};

use super::CliResult;

/// An empty table; columns from `numbers` on are numbers, at the right.
pub(super) fn table(columns: &[&str], numbers: usize) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY)
        .set_header(columns);
    for column in table.column_iter_mut().skip(numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Prints a table.
pub(super) fn print(
    out: &mut impl Write,
    columns: &[&str],
    numbers: usize,
    rows: impl IntoIterator<Item = Vec<String>>,
) -> CliResult {
    let mut table = table(columns, numbers);
    for row in rows {
        table.add_row(row);
    }
    writeln!(out, "{table}")?;
    Ok(())
}

/// Bytes with a binary unit.
pub(super) fn bytes(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}
