//! Compression of record batches as Kafka defines it: codec 3 is an LZ4 frame (magic 2: standard header
//! checksum), codec 4 a Zstandard frame, both over all records of the batch; the header stays plain.
//!
//! LZ4 frames are written as Kafka's own producer writes them (independent blocks of 64 KiB, no
//! checksums, no content size), since its Java reader takes no dependent blocks. Zstandard frames carry their
//! content size. Gzip (1) and Snappy (2) are known by name but not read.
//!
//! Invariants: what [`decompress`] returns was checked against the batch's CRC first, fits the limit, and
//! validates as an uncompressed batch; whatever the input claims of its size, no more than the limit
//! and one LZ4 block (8 MiB at most) is allocated.

use std::cell::RefCell;
use std::fmt;
use std::io::{self, BufRead, Cursor, Read, Write};
use std::str::FromStr;

use lz4_flex::block;
use lz4_flex::frame::{BlockMode, BlockSize, FrameDecoder, FrameEncoder, FrameInfo};
use twox_hash::XxHash32;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, zstd_sys::ZSTD_ErrorCode};

use super::effect::WORTH_PART;
use crate::wire::record_batch::{self, BatchError, BatchHeader, CODEC_MASK, HEADER_LEN, Records};

/// Kafka's number of gzip.
pub const GZIP: i16 = 1;
/// Kafka's number of Snappy.
pub const SNAPPY: i16 = 2;
/// Kafka's number of LZ4.
pub const LZ4: i16 = 3;
/// Kafka's number of Zstandard.
pub const ZSTD: i16 = 4;

/// The level of "zstd" without one. On telemetry of 200 bytes a message level 1 is both faster and
/// smaller than level 3 (docs/performance.md, "The store").
pub const DEFAULT_ZSTD_LEVEL: i32 = 1;
/// Bytes of the shortest match at that level, where Zstandard would take 5: fewer and longer matches are found and put back
/// faster, and JSON gets 5% smaller; text and binary messages 4% larger (docs/performance.md, "The store").
const MIN_MATCH: u32 = 6;
/// Levels that the configuration takes, 0 excepted (it is Zstandard's word for its own default). Above
/// 19 the memory grows to hundreds of megabytes; below −7 nothing is gained.
pub const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = -7..=19;
/// The most bytes that a reader of this crate decompresses one batch to. What Taffrail itself compresses has
/// at most a few MiB; this is room for what producers compress.
pub const MAX_PLAIN: usize = 64 << 20;
/// First guess of how far a Zstandard frame that does not say its size expands.
const ZSTD_GUESS: usize = 8;

/// How batches are compressed. In text: "none", "lz4", "zstd" (at [`DEFAULT_ZSTD_LEVEL`]), "zstd:LEVEL".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Codec {
    /// Not at all.
    None,
    /// LZ4: less work than Zstandard, and less effect.
    Lz4,
    /// Zstandard.
    Zstd {
        /// One of [`ZSTD_LEVELS`].
        level: i32,
    },
}

impl Codec {
    /// Kafka's number: the lowest bits of a batch's attributes.
    pub fn id(self) -> i16 {
        match self {
            Codec::None => 0,
            Codec::Lz4 => LZ4,
            Codec::Zstd { .. } => ZSTD,
        }
    }
}

impl Default for Codec {
    fn default() -> Self {
        Codec::Zstd {
            level: DEFAULT_ZSTD_LEVEL,
        }
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::None => f.write_str("none"),
            Codec::Lz4 => f.write_str("lz4"),
            Codec::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

/// A text that names no codec.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not allowed; \"none\", \"lz4\", \"zstd\" and \"zstd:LEVEL\" with a level from {first} to {last}, but not 0, are",
    first = ZSTD_LEVELS.start(),
    last = ZSTD_LEVELS.end()
)]
pub struct UnknownCodec(String);

impl FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        match text {
            "none" => Ok(Codec::None),
            "lz4" => Ok(Codec::Lz4),
            "zstd" => Ok(Codec::default()),
            _ => text
                .strip_prefix("zstd:")
                .and_then(|level| level.parse().ok())
                .filter(|level| *level != 0 && ZSTD_LEVELS.contains(level))
                .map(|level| Codec::Zstd { level })
                .ok_or_else(|| UnknownCodec(text.to_owned())),
        }
    }
}

/// Kafka's name of a codec number.
pub fn name(id: i16) -> &'static str {
    match id {
        0 => "none",
        GZIP => "gzip",
        SNAPPY => "snappy",
        LZ4 => "lz4",
        ZSTD => "zstd",
        _ => "unknown codec",
    }
}

/// Why a batch cannot be decompressed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// The batch, or what it holds when decompressed, is not valid.
    #[error("{0}")]
    Batch(#[from] BatchError),
    /// A codec that is not read here.
    #[error("record batch is compressed with {}, which is not supported; lz4 and zstd are", name(*.0))]
    Unsupported(i16),
    /// It holds more than the reader takes.
    #[error("record batch decompresses to more than {limit} bytes")]
    TooLarge {
        /// The reader's limit.
        limit: usize,
    },
    /// Not what the codec's format says, although the batch's CRC fits: so the producer made it.
    #[error("record batch's {codec} data is malformed: {reason}")]
    Malformed {
        /// The codec's name.
        codec: &'static str,
        /// What the decompressor said.
        reason: String,
    },
}

/// Compresses batches with one codec. Keeps its contexts and its output buffer: no allocation a batch
/// once they have grown. Memory: the largest batch's bound, and a context of 16 KiB (LZ4) to about
/// 1 MiB (Zstandard at level 1, batches of up to 1 MiB; more at higher levels).
pub struct Compressor {
    codec: Codec,
    engine: Engine,
    out: Vec<u8>,
}

enum Engine {
    None,
    Lz4(Box<FrameEncoder<Vec<u8>>>),
    Zstd(CCtx<'static>),
}

impl Compressor {
    /// A compressor of this kind. A level outside [`ZSTD_LEVELS`] becomes the nearest that is inside.
    pub fn new(codec: Codec) -> Self {
        let engine = match codec {
            Codec::None => Engine::None,
            Codec::Lz4 => {
                let info = FrameInfo::new()
                    .block_mode(BlockMode::Independent)
                    .block_size(BlockSize::Max64KB);
                Engine::Lz4(Box::new(FrameEncoder::with_frame_info(info, Vec::new())))
            }
            Codec::Zstd { level } => {
                let mut context = CCtx::create();
                let level = level.clamp(*ZSTD_LEVELS.start(), *ZSTD_LEVELS.end());
                context
                    .set_parameter(CParameter::CompressionLevel(level))
                    .expect("Zstandard knows all levels within its bounds");
                if level == DEFAULT_ZSTD_LEVEL {
                    context
                        .set_parameter(CParameter::MinMatch(MIN_MATCH))
                        .expect("Zstandard knows matches of 3 to 7 bytes");
                }
                Engine::Zstd(context)
            }
        };
        Self {
            codec,
            engine,
            out: Vec::new(),
        }
    }

    /// With what it compresses.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Makes a batch of records that begin at [`HEADER_LEN`] in `plain`, with the fields of `header`;
    /// codec, length and CRC are set here. Where compression does not take away a tenth of it, it stays plain.
    ///
    /// # Panics
    /// When `plain` is shorter than a header or longer than a batch can be (2 GiB).
    pub fn batch<'a>(&'a mut self, header: &BatchHeader, plain: &'a mut [u8]) -> &'a [u8] {
        let compressed = self.compress(&plain[HEADER_LEN..]);
        if compressed && self.out.len() <= plain.len() - plain.len() / WORTH_PART {
            return with_codec(header, &mut self.out, self.codec.id());
        }
        uncompressed(header, plain)
    }

    /// Leaves room for a header and the compressed records in `out`; false where nothing is compressed.
    fn compress(&mut self, records: &[u8]) -> bool {
        self.out.clear();
        match &mut self.engine {
            Engine::None => false,
            Engine::Lz4(encoder) => {
                self.out.resize(HEADER_LEN, 0);
                std::mem::swap(encoder.get_mut(), &mut self.out);
                let written = encoder
                    .write_all(records)
                    .map_err(|e| e.to_string())
                    .and_then(|()| encoder.try_finish().map_err(|e| e.to_string()));
                std::mem::swap(encoder.get_mut(), &mut self.out);
                debug_assert_eq!(written, Ok(()), "a Vec takes what is written");
                written.is_ok()
            }
            Engine::Zstd(context) => {
                self.out
                    .reserve(HEADER_LEN + zstd_safe::compress_bound(records.len()));
                self.out.resize(HEADER_LEN, 0);
                let mut out = Cursor::new(&mut self.out);
                out.set_position(HEADER_LEN as u64);
                let written = context.compress2(&mut out, records);
                debug_assert!(written.is_ok(), "the buffer has the bound's size");
                written.is_ok()
            }
        }
    }
}

/// As [`Compressor::batch`], without trying.
pub(super) fn uncompressed<'a>(header: &BatchHeader, plain: &'a mut [u8]) -> &'a [u8] {
    with_codec(header, plain, 0)
}

/// Writes the header of a batch whose records are as codec `id` has them.
fn with_codec<'a>(header: &BatchHeader, batch: &'a mut [u8], id: i16) -> &'a [u8] {
    let header = BatchHeader {
        attributes: header.attributes & !CODEC_MASK | id,
        ..*header
    };
    record_batch::write_header(batch, &header);
    batch
}

/// Bytes of a compressed batch's records when decompressed, where the compressed data says it: a Zstandard frame mostly
/// does. Not checked.
pub(super) fn plain_size(batch: &[u8]) -> Option<u64> {
    let header = record_batch::parse_header(batch).ok()?;
    match header.codec() {
        ZSTD => zstd_safe::get_frame_content_size(batch.get(HEADER_LEN..)?).ok()?,
        _ => None,
    }
}

/// Decompresses batches; keeps its context.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<DCtx<'static>>,
    /// One block of an LZ4 frame, as long as the largest was.
    block: Vec<u8>,
}

impl Decompressor {
    /// Replaces `out` by the same batch as codec none: header and plain records. Checks the CRC first and
    /// walks the records afterwards, so that the result validates. `limit` bounds the whole result,
    /// in bytes.
    pub fn decompress(
        &mut self,
        batch: &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let header = record_batch::validate(batch)?;
        out.clear();
        if limit < HEADER_LEN {
            return Err(CodecError::TooLarge { limit });
        }
        out.extend_from_slice(&batch[..HEADER_LEN]);
        self.append(&header, &batch[HEADER_LEN..], limit, out)?;
        if header.codec() == 0 {
            return Ok(());
        }
        record_batch::validate_records(&header, &out[HEADER_LEN..])?;
        let header = BatchHeader {
            attributes: header.attributes & !CODEC_MASK,
            ..header
        };
        record_batch::write_header(out, &header);
        Ok(())
    }

    /// Replaces `out` by the records of a whole batch, plain, without its header. Neither the batch's CRC nor that the
    /// records are what the header says is checked: for those who compared a CRC over the batch and look at each
    /// record's place as they walk. `limit` as in [`Decompressor::decompress`].
    pub(super) fn records(
        &mut self,
        header: &BatchHeader,
        batch: &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        out.clear();
        self.append(header, &batch[HEADER_LEN..], limit, out)
    }

    /// Appends what `data` is when decompressed; `out` then has at most `limit` bytes.
    fn append(
        &mut self,
        header: &BatchHeader,
        data: &[u8],
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        // A batch's length has 31 bits.
        let limit = limit.min(i32::MAX as usize);
        match header.codec() {
            0 if data.len() > limit.saturating_sub(out.len()) => {
                Err(CodecError::TooLarge { limit })
            }
            0 => {
                out.extend_from_slice(data);
                Ok(())
            }
            LZ4 => match OnlyBlock::of(data) {
                Some(block) => self.lz4_block(&block, limit, out),
                None => lz4(data, limit, out),
            },
            ZSTD => self.zstd(data, limit, out),
            other => Err(CodecError::Unsupported(other)),
        }
    }

    fn lz4_block(
        &mut self,
        block: &OnlyBlock,
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let malformed = |reason: &str| CodecError::Malformed {
            codec: name(LZ4),
            reason: reason.to_owned(),
        };
        let plain = match block.compressed {
            false if block.data.len() > LZ4_BLOCK => {
                return Err(malformed("a block is larger than the frame says"));
            }
            false => block.data,
            true => {
                self.block.resize(LZ4_BLOCK, 0);
                let len = block::decompress_into(block.data, &mut self.block)
                    .map_err(|e| malformed(&e.to_string()))?;
                &self.block[..len]
            }
        };
        if plain.len() > limit - out.len() {
            return Err(CodecError::TooLarge { limit });
        }
        out.extend_from_slice(plain);
        Ok(())
    }

    fn zstd(&mut self, data: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), CodecError> {
        let malformed = |reason: &str| CodecError::Malformed {
            codec: name(ZSTD),
            reason: reason.to_owned(),
        };
        let room = limit - out.len();
        // One pass into a buffer that is large enough needs no window. The size of the first frame, if it
        // says one, is all there is in practice; else the buffer grows up to the limit.
        let said =
            zstd_safe::get_frame_content_size(data).map_err(|_| malformed("no Zstandard frame"))?;
        let mut guess = match said {
            Some(size) => match usize::try_from(size) {
                Ok(size) if size <= room => size,
                _ => return Err(CodecError::TooLarge { limit }),
            },
            None => data.len().saturating_mul(ZSTD_GUESS).min(room),
        };
        let context = self.zstd.get_or_insert_with(DCtx::create);
        let start = out.len();
        loop {
            out.truncate(start);
            out.reserve(guess);
            let mut target = Cursor::new(&mut *out);
            target.set_position(start as u64);
            match context.decompress(&mut target, data) {
                // The buffer may have been larger than the limit from earlier use.
                Ok(_) if out.len() > limit => return Err(CodecError::TooLarge { limit }),
                Ok(_) => return Ok(()),
                Err(code)
                    if zstd_safe::is_error_kind(
                        code,
                        ZSTD_ErrorCode::ZSTD_error_dstSize_tooSmall,
                    ) =>
                {
                    if guess == room {
                        return Err(CodecError::TooLarge { limit });
                    }
                    guess = guess.max(1 << 10).saturating_mul(4).min(room);
                }
                Err(code) => return Err(malformed(zstd_safe::get_error_name(code))),
            }
        }
    }
}

/// What a small batch's LZ4 frame is in practice: a single block of at most 64 KiB, without checksums. Of such a frame the
/// decoder's buffers, made and zeroed for each, would take longer than the block.
struct OnlyBlock<'a> {
    data: &'a [u8],
    compressed: bool,
}

impl<'a> OnlyBlock<'a> {
    /// `None`: another frame, or none.
    fn of(frame: &'a [u8]) -> Option<OnlyBlock<'a>> {
        // Magic; version 1 with neither block checksums, the content's size or checksum, nor a dictionary; blocks of 64 KiB.
        let [0x04, 0x22, 0x4d, 0x18, flags, 0x40, check, rest @ ..] = frame else {
            return None;
        };
        if flags & !0x20 != 0x40 || *check != (XxHash32::oneshot(0, &[*flags, 0x40]) >> 8) as u8 {
            return None;
        }
        let (size, rest) = rest.split_first_chunk::<4>()?;
        let size = u32::from_le_bytes(*size);
        let len = (size & !STORED) as usize;
        let (data, end) = rest.split_at_checked(len)?;
        (len > 0 && end == [0; 4]).then_some(OnlyBlock {
            data,
            compressed: size & STORED == 0,
        })
    }
}

/// The bit of a block's size in an LZ4 frame that says that it is not compressed.
const STORED: u32 = 1 << 31;
/// Bytes of the largest block of an [`OnlyBlock`]'s frame.
const LZ4_BLOCK: usize = 64 << 10;

fn lz4(data: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let malformed = |reason: String| CodecError::Malformed {
        codec: name(LZ4),
        reason,
    };
    let mut decoder = FrameDecoder::new(Exact {
        rest: data,
        short: false,
    });
    loop {
        let block = decoder.fill_buf().map_err(|e| malformed(e.to_string()))?;
        if block.is_empty() {
            break;
        }
        if block.len() > limit - out.len() {
            return Err(CodecError::TooLarge { limit });
        }
        out.extend_from_slice(block);
        let taken = block.len();
        decoder.consume(taken);
    }
    match decoder.get_ref() {
        Exact { short: true, .. } => Err(malformed("the frame is cut off".to_owned())),
        Exact { rest: [], .. } => Ok(()),
        Exact { rest, .. } => Err(malformed(format!("{} bytes behind the frame", rest.len()))),
    }
}

/// A reader that knows whether it was asked for more than there was: the decoder takes the end of its input
/// for the end of the frame.
struct Exact<'a> {
    rest: &'a [u8],
    short: bool,
}

impl Read for Exact<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.short |= buf.len() > self.rest.len();
        self.rest.read(buf)
    }
}

thread_local! {
    static DECOMPRESSOR: RefCell<Decompressor> = RefCell::default();
}

/// As [`Decompressor::decompress`], with a context that this thread keeps.
pub fn decompress(batch: &[u8], limit: usize, out: &mut Vec<u8>) -> Result<(), CodecError> {
    DECOMPRESSOR.with_borrow_mut(|decompressor| decompressor.decompress(batch, limit, out))
}

/// The records of a whole batch, to be walked until the one that is wanted: for readers that have compared a CRC over the
/// batch. As [`Decompressor::records`], into `scratch` where they are compressed, up to [`MAX_PLAIN`] bytes.
pub(super) fn unchecked_records<'a>(
    batch: &'a [u8],
    scratch: &'a mut Vec<u8>,
) -> Result<Records<'a>, CodecError> {
    let header = record_batch::parse_whole(batch)?;
    if header.codec() == 0 {
        return Ok(Records::over(&header, &batch[HEADER_LEN..]));
    }
    DECOMPRESSOR.with_borrow_mut(|d| d.records(&header, batch, MAX_PLAIN, scratch))?;
    Ok(Records::over(&header, scratch))
}

/// The batch so that [`record_batch::Records`] can walk it: itself where it is not compressed (its CRC
/// is not checked then), else decompressed into `scratch`, up to [`MAX_PLAIN`] bytes.
pub fn plain<'a>(batch: &'a [u8], scratch: &'a mut Vec<u8>) -> Result<&'a [u8], CodecError> {
    if record_batch::parse_header(batch)?.codec() == 0 {
        return Ok(batch);
    }
    decompress(batch, MAX_PLAIN, scratch)?;
    Ok(scratch)
}

/// Checks all of a batch that can be checked: as [`record_batch::validate`], and inside the compression,
/// too, where the codec is read here and the content is not above [`MAX_PLAIN`] bytes.
pub fn verify(batch: &[u8], scratch: &mut Vec<u8>) -> Result<BatchHeader, CodecError> {
    let header = record_batch::validate(batch)?;
    match plain(batch, scratch) {
        Ok(_) | Err(CodecError::Unsupported(_) | CodecError::TooLarge { .. }) => Ok(header),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::record_batch::BatchWriter;

    /// A plain batch of `count` values that compress well.
    fn plain_batch(count: usize) -> Vec<u8> {
        let mut buf = vec![0; HEADER_LEN + count * 120];
        let mut writer = BatchWriter::new(&mut buf, 1_700_000_000_000).with_producer(9, 1, 4);
        for i in 0..count {
            let value = format!(
                "{{\"device\":\"pump-{}\",\"state\":\"running\",\"n\":{i}}}",
                i % 7
            );
            writer
                .push(
                    1_700_000_000_000 + i as i64,
                    Some(b"k"),
                    Some(value.as_bytes()),
                )
                .unwrap();
        }
        let len = writer.finish(77);
        buf.truncate(len);
        buf
    }

    /// `plain` with its records replaced by `data`, marked as compressed with codec `id`.
    fn packed(plain: &[u8], id: i16, data: &[u8]) -> Vec<u8> {
        let header = record_batch::parse_header(plain).unwrap();
        let mut batch = plain[..HEADER_LEN].to_vec();
        batch.extend_from_slice(data);
        let header = BatchHeader {
            attributes: id,
            ..header
        };
        record_batch::write_header(&mut batch, &header);
        batch
    }

    fn lz4_frame(info: FrameInfo, data: &[u8]) -> Vec<u8> {
        let mut encoder = FrameEncoder::with_frame_info(info, Vec::new());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn compressed(codec: Codec, plain: &[u8]) -> Vec<u8> {
        let header = record_batch::parse_header(plain).unwrap();
        Compressor::new(codec)
            .batch(&header, &mut plain.to_vec())
            .to_vec()
    }

    #[test]
    fn every_codec_gives_back_the_batch() {
        for count in [1, 40, 5000] {
            let plain = plain_batch(count);
            for codec in [
                Codec::None,
                Codec::Lz4,
                Codec::default(),
                Codec::Zstd { level: -7 },
                Codec::Zstd { level: 19 },
            ] {
                let batch = compressed(codec, &plain);
                let header = record_batch::validate(&batch).unwrap();
                if count > 1 {
                    assert_eq!(header.codec(), codec.id());
                    assert!(codec == Codec::None || 2 * batch.len() < plain.len());
                }
                let mut out = vec![1; 3];
                decompress(&batch, plain.len(), &mut out).unwrap();
                assert_eq!(out, plain);
                assert_eq!(verify(&batch, &mut out), Ok(header));
            }
        }
    }

    #[test]
    fn a_compressor_serves_many_batches() {
        for codec in [Codec::Lz4, Codec::default()] {
            let mut compressor = Compressor::new(codec);
            for count in [5000, 3, 1, 900, 5000] {
                let plain = plain_batch(count);
                let header = record_batch::parse_header(&plain).unwrap();
                let batch = compressor.batch(&header, &mut plain.clone()).to_vec();
                assert_eq!(batch, compressed(codec, &plain));
            }
        }
    }

    #[test]
    fn what_does_not_shrink_stays_plain() {
        let mut buf = [0; 300];
        let noise: Vec<u8> = (0..200u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let mut writer = BatchWriter::new(&mut buf, 0);
        writer.push(0, None, Some(&noise)).unwrap();
        let len = writer.finish(0);
        for codec in [Codec::Lz4, Codec::default()] {
            assert_eq!(compressed(codec, &buf[..len]), &buf[..len]);
        }
    }

    #[test]
    fn lz4_is_written_as_kafka_reads_it() {
        let batch = compressed(Codec::Lz4, &plain_batch(40));
        // Magic; version 1, independent blocks, nothing else; 64 KiB blocks; the header's checksum.
        assert_eq!(
            batch[HEADER_LEN..][..7],
            [0x04, 0x22, 0x4d, 0x18, 0x60, 0x40, 0x82]
        );
    }

    #[test]
    fn frames_of_other_writers_are_read() {
        let plain = plain_batch(3000);
        let records = &plain[HEADER_LEN..];
        let info = || FrameInfo::new().block_mode(BlockMode::Independent);
        let lz4 = [
            info().content_size(Some(records.len() as u64)),
            info().content_checksum(true).block_checksums(true),
            info().block_size(BlockSize::Max4MB),
            info().block_mode(BlockMode::Linked),
        ]
        .map(|info| packed(&plain, LZ4, &lz4_frame(info, records)));
        // As Java's stream writes it: without the content size.
        let mut streamed = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
        streamed.write_all(records).unwrap();
        let streamed = streamed.finish().unwrap();
        assert!(matches!(
            zstd_safe::get_frame_content_size(&streamed),
            Ok(None)
        ));
        let (first, second) = records.split_at(1000);
        let two = [first, second]
            .map(|part| zstd::bulk::compress(part, 1).unwrap())
            .concat();
        let zstd = [&streamed, &two].map(|data| packed(&plain, ZSTD, data));
        let mut out = Vec::new();
        for batch in lz4.iter().chain(&zstd) {
            decompress(batch, plain.len(), &mut out).unwrap();
            assert_eq!(out, plain);
        }
    }

    #[test]
    fn the_short_way_through_a_frame_gives_what_the_decoder_gives() {
        let noise: Vec<u8> = (0..900u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        let text = plain_batch(20);
        let mut short = 0;
        for records in [&text[..], &noise, b"", &[7; LZ4_BLOCK], &[7; LZ4_BLOCK + 1]] {
            for mode in [BlockMode::Independent, BlockMode::Linked] {
                let info = FrameInfo::new().block_mode(mode);
                let frame = lz4_frame(info.block_size(BlockSize::Max64KB), records);
                let places = (0..frame.len()).chain([0]);
                for (n, place) in places.enumerate() {
                    let mut frame = frame.clone();
                    // Every byte in turn, and last nothing, is changed.
                    if n < frame.len() {
                        frame[place] ^= 1 << (n % 8);
                    }
                    let Some(block) = OnlyBlock::of(&frame) else {
                        continue;
                    };
                    short += 1;
                    for limit in [1 << 20, records.len() / 2] {
                        let (mut ours, mut theirs) = (b"before".to_vec(), b"before".to_vec());
                        let mut decompressor = Decompressor::default();
                        let result = decompressor.lz4_block(&block, limit + 6, &mut ours);
                        match (result, lz4(&frame, limit + 6, &mut theirs)) {
                            (Ok(()), Ok(())) => assert_eq!(ours, theirs),
                            (Err(_), Err(_)) => {}
                            other => panic!("{other:?}, byte {place}"),
                        }
                    }
                }
            }
        }
        assert!(short > 1000, "{short} of the frames had a single block");
    }

    #[test]
    fn a_bomb_is_refused() {
        let plain = plain_batch(1);
        let zeros = vec![0; 32 << 20];
        let limit = 1 << 20;
        let mut unsized_frame = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
        unsized_frame.write_all(&zeros).unwrap();
        // A frame whose header says 2^62 bytes.
        let mut liar = vec![0x28, 0xb5, 0x2f, 0xfd, 0xe0];
        liar.extend_from_slice(&(1u64 << 62).to_le_bytes());
        liar.extend_from_slice(&[1, 0, 0]);
        for batch in [
            packed(&plain, LZ4, &lz4_frame(FrameInfo::new(), &zeros)),
            packed(&plain, ZSTD, &zstd::bulk::compress(&zeros, 1).unwrap()),
            packed(&plain, ZSTD, &unsized_frame.finish().unwrap()),
            packed(&plain, ZSTD, &liar),
        ] {
            let mut out = Vec::new();
            assert_eq!(
                Decompressor::default().decompress(&batch, limit, &mut out),
                Err(CodecError::TooLarge { limit })
            );
            assert!(out.capacity() <= limit + (64 << 10), "{}", out.capacity());
        }
        assert_eq!(
            decompress(&plain, plain.len() - 1, &mut Vec::new()),
            Err(CodecError::TooLarge {
                limit: plain.len() - 1
            })
        );
    }

    #[test]
    fn damage_and_false_contents_are_refused() {
        let plain = plain_batch(50);
        let mut out = Vec::new();
        for codec in [Codec::Lz4, Codec::default()] {
            let batch = compressed(codec, &plain);
            let mut damaged = batch.clone();
            *damaged.last_mut().unwrap() ^= 1;
            assert!(matches!(
                decompress(&damaged, MAX_PLAIN, &mut out),
                Err(CodecError::Batch(BatchError::Crc { .. }))
            ));
            // The CRC fits, but the frame is cut off, or has something behind it.
            let data = &batch[HEADER_LEN..];
            for cut in 0..data.len() {
                let cut_off = packed(&plain, codec.id(), &data[..cut]);
                assert!(
                    decompress(&cut_off, MAX_PLAIN, &mut out).is_err(),
                    "{codec} {cut}"
                );
                assert!(verify(&cut_off, &mut out).is_err());
            }
            let longer = [data, b"more"].concat();
            assert!(decompress(&packed(&plain, codec.id(), &longer), MAX_PLAIN, &mut out).is_err());
        }
        // One record fewer than the header counts.
        let fewer = compressed(Codec::Lz4, &plain_batch(49));
        let batch = packed(&plain, LZ4, &fewer[HEADER_LEN..]);
        assert!(matches!(
            decompress(&batch, MAX_PLAIN, &mut out),
            Err(CodecError::Batch(BatchError::Record { index: 49 }))
        ));
        for id in [GZIP, SNAPPY, 5, 6, 7] {
            let batch = packed(&plain, id, b"whatever");
            let error = decompress(&batch, MAX_PLAIN, &mut out).unwrap_err();
            assert_eq!(error, CodecError::Unsupported(id));
            assert!(error.to_string().contains(name(id)), "{error}");
            assert!(verify(&batch, &mut out).is_ok());
        }
    }

    #[test]
    fn readers_see_the_records_either_way() {
        let uncompressed = plain_batch(20);
        let packed = compressed(Codec::default(), &uncompressed);
        let mut scratch = Vec::new();
        let values = |batch| -> Vec<Vec<u8>> {
            Records::new(batch)
                .unwrap()
                .map(|r| r.unwrap().value.unwrap().to_vec())
                .collect()
        };
        assert_eq!(
            values(plain(&packed, &mut scratch).unwrap()),
            values(&uncompressed)
        );
        assert!(std::ptr::eq(
            plain(&uncompressed, &mut Vec::new()).unwrap(),
            &uncompressed[..]
        ));
    }

    #[test]
    fn names_are_read_and_written() {
        for (text, codec) in [
            ("none", Codec::None),
            ("lz4", Codec::Lz4),
            ("zstd:3", Codec::Zstd { level: 3 }),
            ("zstd:-7", Codec::Zstd { level: -7 }),
        ] {
            assert_eq!(text.parse(), Ok(codec));
            assert_eq!(codec.to_string(), text);
        }
        assert_eq!("zstd".parse(), Ok(Codec::default()));
        for wrong in [
            "", "gzip", "zstd:", "zstd:0", "zstd:20", "zstd:-8", "zstd:1x", "LZ4", "lz4:1",
        ] {
            let error = wrong.parse::<Codec>().unwrap_err().to_string();
            assert!(error.contains("-7 to 19"), "{error}");
        }
    }
}
