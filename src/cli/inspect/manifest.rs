//! A manifest: its edits in order, each with its byte, and the state that they make.

use std::io::Write;

use serde_json::{Value, json};

use super::{Args, Names, line, time};
use crate::cli::CliResult;
use crate::storage::PartitionKey;
use crate::storage::lsm::manifest::{
    COMPACTED, Edit, FileMeta, NEVER_COMPACTED, Record, State, read_header, records,
};

/// Prints the file; fails at the first damage, after what lies before.
pub(super) fn show(args: &Args, names: &Names, out: &mut impl Write) -> CliResult {
    let path = &args.file;
    let bytes =
        std::fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let damaged = |(position, what): (u64, &str)| {
        format!(
            "{} is damaged at byte {position}: {what}; `taffrail repair` makes a new one from the files",
            path.display()
        )
    };
    let (id, number) = read_header(&bytes).map_err(damaged)?;
    if args.json {
        let value = json!({
            "kind": "manifest", "store": format!("{:032x}", id.store), "shard": id.shard, "number": number,
            "bytes": bytes.len(),
        });
        line(&value, out)?;
    } else {
        writeln!(
            out,
            "manifest {number} of shard {} of store {:032x}: {} bytes",
            id.shard,
            id.store,
            bytes.len()
        )?;
    }
    let mut state = State::default();
    let mut result: CliResult = Ok(());
    let read = records(&bytes, &mut |position, len, record| {
        match record {
            Record::Snapshot(snapshot) => state = snapshot.clone(),
            Record::Edit(edit) => state.apply(edit),
        }
        if result.is_err() {
            return;
        }
        result = if args.json {
            let mut value = record_json(record);
            value["position"] = position.into();
            value["bytes"] = len.into();
            line(&value, out)
        } else {
            writeln!(out, "byte {position}: {}", record_text(record, names)).map_err(Into::into)
        };
    });
    result?;
    let whole = read.map_err(damaged)?;
    let torn = bytes.len() as u64 - whole;
    if args.json {
        let mut value = state_json(&state);
        value["kind"] = "state".into();
        value["torn_bytes"] = torn.into();
        return line(&value, out);
    }
    if torn > 0 {
        writeln!(
            out,
            "byte {whole}: {torn} bytes of a record that was never completed; the next start cuts them off"
        )?;
    }
    writeln!(out, "{}", state_text(&state))?;
    for file in &state.files {
        let quarantined = state.quarantined.contains(&file.number);
        writeln!(
            out,
            "  {}, {} to {}{}",
            file_text(file),
            time(file.min_time),
            time(file.max_time),
            if quarantined { ", QUARANTINED" } else { "" }
        )?;
    }
    for (key, start) in &state.starts {
        writeln!(out, "  {}", start_text(*key, *start, names))?;
    }
    Ok(())
}

fn file_text(file: &FileMeta) -> String {
    let compacted = match file.due {
        NEVER_COMPACTED => String::new(),
        COMPACTED => ", compacted".to_owned(),
        due => format!(", compacted, again from {} on", time(i64::from(due) * 1000)),
    };
    format!(
        "sst-{:016x}.sst: LSN {} to {}, {} records, {} bytes, {} merges{compacted}",
        file.number, file.lsn_start, file.lsn_end, file.records, file.bytes, file.merges
    )
}

fn start_text(key: PartitionKey, start: i64, names: &Names) -> String {
    format!(
        "{} partition {} begins at offset {start}",
        names.topic(key.topic),
        key.partition
    )
}

fn state_text(state: &State) -> String {
    format!(
        "{} SSTs, the log flushed up to LSN {}, the next file is {}, first offsets of {} partitions, {} files quarantined",
        state.files.len(),
        state.flushed_lsn,
        state.next_number,
        state.starts.len(),
        state.quarantined.len()
    )
}

fn record_text(record: &Record, names: &Names) -> String {
    let files = |files: &[FileMeta]| -> Vec<String> { files.iter().map(file_text).collect() };
    match record {
        Record::Snapshot(state) => format!("snapshot: {}", state_text(state)),
        Record::Edit(Edit::Flush { add, flushed_lsn }) => match &add[..] {
            [] => format!("flush up to LSN {flushed_lsn}, nothing was to be kept"),
            add => format!(
                "flush up to LSN {flushed_lsn} into {}",
                files(add).join("; ")
            ),
        },
        Record::Edit(Edit::Replace { remove, add }) => {
            let gone: Vec<String> = remove.iter().map(|n| format!("sst-{n:016x}.sst")).collect();
            match &add[..] {
                [] => format!("removes {}", gone.join(", ")),
                add => format!("replaces {} by {}", gone.join(", "), files(add).join("; ")),
            }
        }
        Record::Edit(Edit::Trim(starts)) => {
            let list: Vec<String> = starts
                .iter()
                .map(|&(key, start)| start_text(key, start, names))
                .collect();
            format!("trim: {}", list.join("; "))
        }
        Record::Edit(Edit::Quarantine(number)) => format!("quarantines sst-{number:016x}.sst"),
    }
}

fn start_json((key, start): (PartitionKey, i64)) -> Value {
    json!({"topic": key.topic, "partition": key.partition, "start": start})
}

fn state_json(state: &State) -> Value {
    let starts: Vec<Value> = state
        .starts
        .iter()
        .map(|(&k, &s)| start_json((k, s)))
        .collect();
    json!({
        "next_number": state.next_number, "flushed_lsn": state.flushed_lsn, "files": state.files,
        "starts": starts, "quarantined": state.quarantined,
    })
}

fn record_json(record: &Record) -> Value {
    match record {
        Record::Snapshot(state) => {
            let mut value = state_json(state);
            value["kind"] = "snapshot".into();
            value
        }
        Record::Edit(Edit::Flush { add, flushed_lsn }) => {
            json!({"kind": "flush", "flushed_lsn": flushed_lsn, "add": add})
        }
        Record::Edit(Edit::Replace { remove, add }) => {
            json!({"kind": "replace", "remove": remove, "add": add})
        }
        Record::Edit(Edit::Trim(starts)) => {
            let starts: Vec<Value> = starts.iter().map(|&start| start_json(start)).collect();
            json!({"kind": "trim", "starts": starts})
        }
        Record::Edit(Edit::Quarantine(number)) => json!({"kind": "quarantine", "number": number}),
    }
}
