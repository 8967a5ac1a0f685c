//! `taffrail inspect`: shows what a file of a store holds.
//!
//! What a file is its first bytes say, else its name. A file that is damaged is shown as far as it can be read; the
//! command then fails and names the byte. The log's end is no damage: see [`segment`].

mod json;
mod manifest;
mod segment;
mod sst;

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use super::{CliResult, rfc3339 as time};
use crate::storage::Catalog;
use crate::storage::lsm::manifest::MANIFEST_MAGIC;
use crate::storage::lsm::sst::format::SST_MAGIC;
use crate::storage::wal::segment::SEGMENT_MAGIC;
use crate::storage::wal::staging::STAGING_MAGIC;

/// Show what a file of a store holds: an SST, a manifest, a WAL segment, a staging file, the catalog
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The file, as shard-000/sst-0000000000000001.sst
    file: PathBuf,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
    /// Of a WAL segment: frames only, without their entries
    #[arg(long, conflicts_with = "json")]
    frames: bool,
    /// Also the blocks and batches of an SST, and what a WAL's snapshots hold
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Segment,
    Sst,
    Manifest,
    Staging,
    Json,
    Lock,
}

fn kind(path: &Path, first: &[u8], bytes: u64) -> Option<Kind> {
    let by_bytes = match first {
        _ if first == SEGMENT_MAGIC => Some(Kind::Segment),
        _ if first == SST_MAGIC => Some(Kind::Sst),
        _ if first == MANIFEST_MAGIC => Some(Kind::Manifest),
        _ if first == STAGING_MAGIC => Some(Kind::Staging),
        [b'{', ..] => Some(Kind::Json),
        _ => None,
    };
    let name = path.file_name()?.to_str()?;
    by_bytes.or_else(|| match name {
        _ if name.starts_with("wal-") => Some(Kind::Segment),
        _ if name.starts_with("sst-") => Some(Kind::Sst),
        _ if name.starts_with("manifest-") => Some(Kind::Manifest),
        _ if name.ends_with(".staging") => Some(Kind::Staging),
        "catalog.json" | "staging.json" => Some(Kind::Json),
        "lock" if bytes == 0 => Some(Kind::Lock),
        _ => None,
    })
}

/// Prints the file.
pub fn run(args: &Args) -> CliResult {
    let path = &args.file;
    let cannot = |error: std::io::Error| format!("cannot read {}: {error}", path.display());
    let mut file = File::open(path).map_err(cannot)?;
    let metadata = file.metadata().map_err(cannot)?;
    if !metadata.is_file() {
        return Err(format!(
            "{} is no file; for a whole store there is `taffrail verify`",
            path.display()
        )
        .into());
    }
    let mut first = Vec::new();
    (&mut file)
        .take(8)
        .read_to_end(&mut first)
        .map_err(cannot)?;
    drop(file);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let result = match kind(path, &first, metadata.len()) {
        Some(Kind::Segment) => segment::segment(args, &mut out),
        Some(Kind::Staging) => segment::staging(args, &mut out),
        Some(Kind::Sst) => sst::show(args, &catalog_near(path), &mut out),
        Some(Kind::Manifest) => manifest::show(args, &catalog_near(path), &mut out),
        Some(Kind::Json) => json::show(args, &mut out),
        Some(Kind::Lock) => writeln!(out, "a lock; it holds nothing").map_err(Into::into),
        None => Err(format!(
            "{} at byte 0: no file of a Taffrail store begins like this",
            path.display()
        )
        .into()),
    };
    out.flush()?;
    result
}

/// Names of topics, where the catalog of the file's store is to be found.
struct Names(Option<Catalog>);

/// The catalog of the store that the file lies in.
fn catalog_near(path: &Path) -> Names {
    let shard = path.canonicalize().ok();
    let store = shard
        .as_deref()
        .and_then(Path::parent)
        .and_then(Path::parent);
    Names(store.and_then(|dir| Catalog::open_read_only(dir).ok()))
}

impl Names {
    /// `topic 3 (orders)`, or `topic 3`.
    fn topic(&self, id: u32) -> String {
        match self.0.as_ref().and_then(|catalog| catalog.topic_by_id(id)) {
            Some(topic) => format!("topic {id} ({})", topic.name),
            None => format!("topic {id}"),
        }
    }
}

fn line(value: &serde_json::Value, out: &mut impl Write) -> CliResult {
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)?;
    Ok(())
}
