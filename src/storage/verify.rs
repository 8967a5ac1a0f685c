//! Checks a store's files: the manifest; every page, block and batch of the SSTs; every frame's place and CRC, the
//! chain over all segments, every record batch; and that each partition's offsets follow each other, from the
//! SSTs into the log. Reads only.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::PartitionKey;
use super::catalog::{Catalog, CatalogError};
use super::inspect::{EntryInfo, InspectError, Item, inspect};
use super::lsm::sst::SstReader;
use super::lsm::store::{list_files, sst_path};
use super::lsm::{StoreError, manifest};
use super::wal::frame::LogId;
use super::wal::segment::{SegmentError, list_segments, segment_path, shard_dir};

/// Why a store cannot be checked at all.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No usable catalog.
    #[error("{0}")]
    Catalog(#[from] CatalogError),
    /// The file system refused.
    #[error("cannot list {path}: {source}")]
    Io {
        /// The folder.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// What a killed server or a power cut leaves: the next start cuts it; nothing durable is lost.
    TornTail,
    /// Something durable is unreadable or wrong.
    Damage,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// Byte in the file.
    pub position: u64,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub what: String,
}

/// What was checked and found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Shards with a log.
    pub shards: u64,
    /// Segments in use.
    pub segments: u64,
    /// Prepared, unused segments.
    pub prepared: u64,
    /// Whole frames.
    pub frames: u64,
    /// Bytes of whole frames.
    pub bytes: u64,
    /// Record batches in them.
    pub batches: u64,
    /// Records in those.
    pub records: u64,
    /// SSTs.
    pub ssts: u64,
    /// Bytes of SSTs.
    pub sst_bytes: u64,
    /// Record batches in SSTs.
    pub sst_batches: u64,
    /// Records in those.
    pub sst_records: u64,
    /// Shards whose log was closed cleanly.
    pub clean: u64,
    /// In the order of the files.
    pub findings: Vec<Finding>,
}

impl VerifyReport {
    /// True when nothing durable is damaged.
    pub fn is_sound(&self) -> bool {
        self.findings.iter().all(|f| f.severity != Severity::Damage)
    }
}

/// How far the check has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// The file being read.
    pub path: &'a Path,
    /// Bytes read of all files.
    pub done: u64,
    /// Bytes of all files.
    pub total: u64,
}

/// Checks the store in `dir`. Cost: reads every segment once. While a server runs on the store the
/// newest frames may look torn.
pub fn verify(
    dir: &Path,
    mut progress: impl FnMut(Progress<'_>),
) -> Result<VerifyReport, VerifyError> {
    let catalog = Catalog::open_read_only(dir)?;
    let io = |path: &Path| {
        let path = path.to_owned();
        move |source| VerifyError::Io { path, source }
    };
    let mut shards = Vec::new();
    let mut total = 0;
    for entry in fs::read_dir(dir).map_err(io(dir))? {
        let entry = entry.map_err(io(dir))?;
        let Some(shard) = entry
            .file_name()
            .to_str()
            .and_then(|n| n.strip_prefix("shard-")?.parse::<u16>().ok())
        else {
            continue;
        };
        let path = shard_dir(dir, shard);
        let bases = list_segments(&path).map_err(io(&path))?;
        for &base in &bases {
            total += fs::metadata(segment_path(&path, base)).map_or(0, |m| m.len());
        }
        for number in list_files(&path).map_err(io(&path))? {
            total += fs::metadata(sst_path(&path, number)).map_or(0, |m| m.len());
        }
        shards.push((shard, path, bases));
    }
    shards.sort_unstable();
    let mut report = VerifyReport::default();
    let mut done = 0;
    for (shard, path, bases) in shards {
        let id = LogId {
            store: catalog.store_id(),
            shard,
        };
        let mut step = |file: &Path, step| {
            done += step;
            progress(Progress {
                path: file,
                done,
                total,
            });
        };
        let (flushed, ends) = verify_files(&path, id, &catalog, &mut report, &mut step);
        if bases.is_empty() {
            continue;
        }
        report.shards += 1;
        // What is flushed and still there goes on from what was flushed before.
        let ends = match bases.first() {
            Some(&base) if base >= flushed => ends,
            _ => HashMap::new(),
        };
        verify_shard(&path, id, &catalog, &bases, ends, &mut report, step);
    }
    Ok(report)
}

/// Checks the manifest of a shard and its SSTs. Returns up to where they hold the log, and where each partition ends in
/// them.
fn verify_files(
    dir: &Path,
    id: LogId,
    catalog: &Catalog,
    report: &mut VerifyReport,
    step: &mut impl FnMut(&Path, u64),
) -> (u64, HashMap<PartitionKey, i64>) {
    let mut ends = HashMap::new();
    let mut find = |path: PathBuf, position, severity, what| {
        report.findings.push(Finding {
            path,
            position,
            severity,
            what,
        });
    };
    let state = match manifest::load(dir, id) {
        Ok(None) => return (0, ends),
        Ok(Some(loaded)) => {
            if loaded.torn > 0 {
                let what = format!("{} bytes of an edit that was never completed", loaded.torn);
                find(loaded.path, loaded.len, Severity::TornTail, what);
            }
            loaded.state
        }
        Err(error) => {
            let (path, position) = match &error {
                StoreError::Manifest { path, position, .. } => (path.clone(), *position),
                _ => (dir.to_owned(), 0),
            };
            find(path, position, Severity::Damage, error.to_string());
            return (0, ends);
        }
    };
    let (mut ssts, mut bytes, mut batches, mut records) = (0, 0, 0, 0);
    for file in &state.files {
        let path = sst_path(dir, file.number);
        let reader = match SstReader::open(&path, id) {
            Ok(reader) => reader,
            Err(error) => {
                find(path, 0, Severity::Damage, error.to_string());
                continue;
            }
        };
        ssts += 1;
        bytes += reader.footer().file_bytes;
        let checked = reader.verify(|read| step(&path, read));
        batches += checked.batches;
        records += checked.records;
        for finding in checked.findings {
            let what = match finding.messages {
                Some((key, first, end)) => format!(
                    "{} partition {}, offsets {first} to {}: {}",
                    topic_name(catalog, key.topic),
                    key.partition,
                    end - 1,
                    finding.what
                ),
                None => finding.what,
            };
            find(path.clone(), finding.position, Severity::Damage, what);
        }
        for extent in checked.extents {
            if let Some(end) = ends.insert(extent.key, extent.end_offset)
                && end > extent.first_offset
            {
                let name = topic_name(catalog, extent.key.topic);
                let what = format!(
                    "{name} partition {}: offset {} where {end} or more comes next",
                    extent.key.partition, extent.first_offset
                );
                find(path.clone(), 0, Severity::Damage, what);
            }
        }
    }
    report.ssts += ssts;
    report.sst_bytes += bytes;
    report.sst_batches += batches;
    report.sst_records += records;
    (state.flushed_lsn, ends)
}

fn topic_name(catalog: &Catalog, id: u32) -> String {
    catalog
        .topic_by_id(id)
        .map_or(format!("topic {id}"), |topic| topic.name.clone())
}

/// A place where the chain broke; judged when it is known what lies behind.
struct Break {
    finding: Finding,
    /// The frame that is missing.
    seq: u64,
}

fn verify_shard(
    dir: &Path,
    id: LogId,
    catalog: &Catalog,
    bases: &[u64],
    mut offsets: HashMap<PartitionKey, i64>,
    report: &mut VerifyReport,
    mut step: impl FnMut(&Path, u64),
) {
    let mut breaks: Vec<Break> = Vec::new();
    let mut findings: Vec<Finding> = Vec::new();
    let mut next_seq: Option<u64> = None;
    let mut next_base: Option<u64> = None;
    let mut max_durable = 0;
    let mut clean = false;
    for &base in bases {
        let path = segment_path(dir, base);
        let damage = |position, what: String| Finding {
            path: path.clone(),
            position,
            severity: Severity::Damage,
            what,
        };
        if let Some(expected) = next_base
            && expected != base
        {
            findings.push(damage(
                0,
                format!(
                    "the segment before it is missing: {}",
                    segment_path(dir, expected).display()
                ),
            ));
        }
        let len = fs::metadata(&path).map_or(0, |m| m.len());
        let mut seen = 0;
        let mut first = true;
        let result = inspect(&path, |item| match item {
            Item::Progress { done, .. } => {
                step(&path, done - seen);
                seen = done;
            }
            Item::Damage { position, error } => {
                breaks.push(Break {
                    finding: damage(position, error.to_string()),
                    seq: next_seq.unwrap_or(1),
                });
            }
            Item::Frame(frame) => {
                if let Some(expected) = next_seq
                    && frame.seq != expected
                {
                    breaks.push(Break {
                        finding: damage(
                            frame.position,
                            format!("frame {} where {expected} comes next", frame.seq),
                        ),
                        seq: expected,
                    });
                }
                if std::mem::take(&mut first) {
                    report.segments += 1;
                }
                next_seq = Some(frame.seq.saturating_add(1));
                max_durable = max_durable.max(frame.durable);
                clean = frame.clean;
                report.frames += 1;
                report.bytes += frame.size as u64;
                for entry in &frame.entries {
                    let EntryInfo::Batch {
                        topic,
                        partition,
                        base_offset,
                        records,
                        error,
                        ..
                    } = entry
                    else {
                        continue;
                    };
                    report.batches += 1;
                    report.records += (*records).max(0) as u64;
                    let name = || topic_name(catalog, *topic);
                    if let Some(error) = error {
                        findings.push(damage(
                            frame.position,
                            format!("{} partition {partition}: {error}", name()),
                        ));
                        continue;
                    }
                    let key = PartitionKey {
                        topic: *topic,
                        partition: *partition,
                    };
                    let end = base_offset + i64::from(*records);
                    if let Some(expected) = offsets.insert(key, end)
                        && expected != *base_offset
                    {
                        findings.push(damage(
                            frame.position,
                            format!(
                                "{} partition {partition}: offset {base_offset} where {expected} comes next",
                                name()
                            ),
                        ));
                    }
                }
            }
        });
        step(&path, len.saturating_sub(seen));
        match result {
            Ok(header) => {
                if header.id != id || header.base != base {
                    findings.push(damage(0, SegmentError::Foreign.to_string()));
                }
                if header.size != len {
                    breaks.push(Break {
                        finding: damage(
                            len,
                            format!("the file has {len} bytes, its header says {}", header.size),
                        ),
                        seq: next_seq.unwrap_or(1),
                    });
                }
                next_base = Some(header.end());
            }
            Err(InspectError::Segment {
                error: SegmentError::Blank,
                ..
            }) => {
                report.prepared += 1;
                next_base = Some(base + len);
            }
            Err(error) => {
                breaks.push(Break {
                    finding: damage(0, error.to_string()),
                    seq: next_seq.unwrap_or(1),
                });
                next_base = Some(base + len);
            }
        }
    }
    // A missing frame that a later one knew to be durable is a loss; any other is a torn tail.
    for mut broken in breaks {
        if max_durable < broken.seq {
            broken.finding.severity = Severity::TornTail;
        }
        findings.push(broken.finding);
    }
    findings.sort_by(|a, b| (&a.path, a.position).cmp(&(&b.path, b.position)));
    report.findings.append(&mut findings);
    report.clean += u64::from(clean);
}
