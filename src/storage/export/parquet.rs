//! A Parquet file of messages: a row a message, in the order of partition and offset.
//!
//! Columns: `partition` int32, `offset` int64, `timestamp` int64 (milliseconds, UTC), `key` and `value` binary, null
//! where the message has none, and `headers`, a list of (`key` string, `value` binary or null). Compressed with Zstandard.
//! Records of control batches (gaps) are no messages and are left out.
//!
//! The file has its name only when it is complete. Memory: the rows of a group, some 64 MiB.
//! Source: the Parquet format's LogicalTypes document, "Lists".

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int32Type, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;

use super::{ExportError, Exported};
use crate::storage::lsm::codec;
use crate::wire::record_batch::{self, Records};

const SCHEMA: &str = "
message messages {
  required int32 partition;
  required int64 offset;
  required int64 timestamp (TIMESTAMP(MILLIS,true));
  optional binary key;
  optional binary value;
  required group headers (LIST) {
    repeated group list {
      required group element {
        required binary key (STRING);
        optional binary value;
      }
    }
  }
}";
/// A row group ends at so many bytes of keys, values and headers: large enough to read and compress well …
const GROUP_BYTES: usize = 64 << 20;
/// … or rows, where they are small.
const GROUP_ROWS: usize = 1 << 20;

/// A file being written. Dropped without [`ParquetFile::finish`] it removes what it wrote.
pub struct ParquetFile {
    path: PathBuf,
    temporary: PathBuf,
    writer: Option<SerializedFileWriter<File>>,
    rows: Rows,
    done: Exported,
    scratch: Vec<u8>,
}

/// Rows by column, with Parquet's definition levels (how much of the path is there) and, of headers, repetition
/// levels (1: another header of the same row).
#[derive(Default)]
struct Rows {
    partitions: Vec<i32>,
    offsets: Vec<i64>,
    timestamps: Vec<i64>,
    keys: Optional,
    values: Optional,
    header_keys: Vec<ByteArray>,
    header_values: Vec<ByteArray>,
    header_key_levels: Vec<i16>,
    header_value_levels: Vec<i16>,
    header_repeats: Vec<i16>,
    bytes: usize,
}

#[derive(Default)]
struct Optional {
    values: Vec<ByteArray>,
    levels: Vec<i16>,
}

impl Optional {
    fn push(&mut self, value: Option<&[u8]>) {
        self.levels.push(i16::from(value.is_some()));
        self.values
            .extend(value.map(|bytes| ByteArray::from(bytes.to_vec())));
    }
}

impl Rows {
    fn push(&mut self, partition: u32, record: &record_batch::Record<'_>) {
        self.partitions.push(partition as i32);
        self.offsets.push(record.offset);
        self.timestamps.push(record.timestamp);
        self.keys.push(record.key);
        self.values.push(record.value);
        self.bytes += record.fields().len();
        let mut repeat = 0;
        for (key, value) in record.headers() {
            // Kafka's names of headers are text; what is not cannot be a string of Parquet's.
            let key = String::from_utf8_lossy(key).into_owned().into_bytes();
            self.header_keys.push(ByteArray::from(key));
            self.header_key_levels.push(1);
            self.header_value_levels
                .push(if value.is_some() { 2 } else { 1 });
            self.header_values
                .extend(value.map(|bytes| ByteArray::from(bytes.to_vec())));
            self.header_repeats.push(repeat);
            repeat = 1;
        }
        if repeat == 0 {
            self.header_key_levels.push(0);
            self.header_value_levels.push(0);
            self.header_repeats.push(0);
        }
    }

    fn write(&self, group: &mut SerializedRowGroupWriter<'_, File>) -> Result<(), ParquetError> {
        column::<Int32Type>(group, &self.partitions, None, None)?;
        column::<Int64Type>(group, &self.offsets, None, None)?;
        column::<Int64Type>(group, &self.timestamps, None, None)?;
        for optional in [&self.keys, &self.values] {
            column::<ByteArrayType>(group, &optional.values, Some(&optional.levels), None)?;
        }
        for (values, levels) in [
            (&self.header_keys, &self.header_key_levels),
            (&self.header_values, &self.header_value_levels),
        ] {
            column::<ByteArrayType>(group, values, Some(levels), Some(&self.header_repeats))?;
        }
        Ok(())
    }
}

/// Writes the group's next column.
fn column<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, File>,
    values: &[T::T],
    levels: Option<&[i16]>,
    repeats: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let Some(mut column) = group.next_column()? else {
        return Err(ParquetError::General(
            "the schema has no such column".into(),
        ));
    };
    column.typed::<T>().write_batch(values, levels, repeats)?;
    column.close()
}

impl ParquetFile {
    /// Begins the file that will be `path`, which must not exist.
    pub fn create(path: &Path) -> Result<ParquetFile, ExportError> {
        if path.exists() {
            return Err(ExportError::Exists {
                path: path.to_owned(),
            });
        }
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(".tmp");
        let mut file = ParquetFile {
            path: path.to_owned(),
            temporary: PathBuf::from(temporary),
            writer: None,
            rows: Rows::default(),
            done: Exported::default(),
            scratch: Vec::new(),
        };
        let out = File::create(&file.temporary).map_err(|source| ExportError::Io {
            what: "cannot create",
            path: file.temporary.clone(),
            source,
        })?;
        let begun = (|| {
            let properties = WriterProperties::builder()
                .set_compression(Compression::ZSTD(ZstdLevel::try_new(3)?))
                .set_created_by(concat!("taffrail ", env!("CARGO_PKG_VERSION")).to_owned())
                .build();
            let schema = Arc::new(parse_message_type(SCHEMA)?);
            SerializedFileWriter::new(out, schema, Arc::new(properties))
        })();
        file.writer = Some(begun.map_err(|error| file.failed(error))?);
        Ok(file)
    }

    fn failed(&self, error: ParquetError) -> ExportError {
        ExportError::Parquet {
            path: self.temporary.clone(),
            error,
        }
    }

    /// Adds the messages of a batch of `partition` with an offset from `from` on and before `end`. Cost: decompresses
    /// and copies; writes a group now and then.
    pub fn batch(
        &mut self,
        partition: u32,
        batch: &[u8],
        from: i64,
        end: i64,
    ) -> Result<(), ExportError> {
        let wrong = |error| ExportError::Batch { partition, error };
        let header = record_batch::validate(batch).map_err(wrong)?;
        let mut scratch = std::mem::take(&mut self.scratch);
        let added = (|| {
            let plain = codec::plain(batch, &mut scratch)
                .map_err(|error| ExportError::Codec { partition, error })?;
            for record in Records::new(plain).map_err(wrong)? {
                let record = record.map_err(wrong)?;
                if record.offset < from || record.offset >= end {
                    continue;
                }
                if header.is_control() {
                    self.done.control += 1;
                    continue;
                }
                self.rows.push(partition, &record);
                self.done.messages += 1;
            }
            Ok(())
        })();
        self.scratch = scratch;
        added?;
        if self.rows.bytes >= GROUP_BYTES || self.rows.offsets.len() >= GROUP_ROWS {
            self.write_group()?;
        }
        Ok(())
    }

    fn write_group(&mut self) -> Result<(), ExportError> {
        let rows = std::mem::take(&mut self.rows);
        let Some(writer) = self.writer.as_mut().filter(|_| !rows.offsets.is_empty()) else {
            return Ok(());
        };
        let written = (|| {
            let mut group = writer.next_row_group()?;
            rows.write(&mut group)?;
            group.close().map(drop)
        })();
        written.map_err(|error| self.failed(error))
    }

    /// Completes the file; it is on disk on return.
    pub fn finish(mut self) -> Result<Exported, ExportError> {
        self.write_group()?;
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| ExportError::Io { what, path, source }
        };
        if let Some(writer) = self.writer.take() {
            let file = writer.into_inner().map_err(|error| self.failed(error))?;
            file.sync_all()
                .map_err(io("cannot sync", &self.temporary))?;
            self.done.bytes = file
                .metadata()
                .map_err(io("cannot read", &self.temporary))?
                .len();
        }
        fs::rename(&self.temporary, &self.path).map_err(io("cannot rename", &self.temporary))?;
        self.done.files = 1;
        Ok(self.done)
    }
}

impl Drop for ParquetFile {
    fn drop(&mut self) {
        // After `finish` it is gone already.
        let _ = fs::remove_file(&self.temporary);
    }
}
