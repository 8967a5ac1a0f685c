//! Merges successive record batches of one partition into larger ones, compressed.
//!
//! Producers send small batches; compression works on large ones. Batches that say more than their records
//! do stay as they are: control batches, transactional ones, unknown attributes, and what a producer
//! compressed, unless it is small. Where compression does nothing for a partition (`effect`) its batches are merged as they
//! are, and those that are large enough are not even copied.
//!
//! Compaction by key thins batches out on the way ([`Rebatcher::push_thinned`]).
//!
//! Invariant: what comes out holds the same records in the same order, each with its offset, timestamp,
//! key, value and headers, and ends at the same offset; gaps between offsets stay. Only who produced a
//! record, and with which sequence number, is not kept.

use super::codec::{self, Codec, CodecError, Compressor, Decompressor};
use super::effect::Effect;
use crate::wire::record_batch::{
    self, BatchError, BatchHeader, CODEC_MASK, DELETE_HORIZON, Encoded, HEADER_LEN,
    LOG_APPEND_TIME, MAGIC, Record, Records,
};
use crate::wire::varint;

/// Bytes of records, uncompressed, in a merged batch. Larger ones gain a few percent on disk (docs/performance.md,
/// "The store"), and whoever wants one record reads and decompresses them whole.
pub const DEFAULT_TARGET: usize = 8 << 10;
/// A batch that its producer compressed is merged with others if its bytes are at most this part of the
/// target and it decompresses to at most the target: a lone one gains nothing from being recompressed.
const SMALL_PART: usize = 8;
/// A batch that lacks at most this part of the target is not merged any more.
const DONE_PART: usize = 4;
/// Bytes of a record before its fields: length, attributes, timestamp delta, offset delta.
const PREFIX_MAX: usize = 2 * varint::MAX_LEN + 1 + varint::MAX_LEN;

/// Why a batch was not taken; nothing of it was then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RebatchError {
    /// It is not valid.
    #[error("{0}")]
    Batch(#[from] BatchError),
    /// It cannot be decompressed.
    #[error("{0}")]
    Codec(#[from] CodecError),
    /// It lies before the end of the batch that came before it.
    #[error("record batch with offset {offset} where {expected} or more comes next")]
    Order {
        /// Its base offset.
        offset: i64,
        /// The least that is allowed.
        expected: i64,
    },
    /// Offsets that are negative or beyond what 63 bits hold.
    #[error("record batch with impossible offsets, from {0} on")]
    Offset(i64),
}

/// What is gathered, beside the records.
#[derive(Debug, Clone, Copy)]
struct Run {
    base_offset: i64,
    /// Offset behind the last record, or behind the gap that follows it.
    next_offset: i64,
    base_timestamp: i64,
    max_timestamp: i64,
    append_time: Option<i64>,
    /// Until when its tombstones are kept; the base timestamp is the same then.
    horizon: Option<i64>,
    count: i32,
}

/// Merges and compresses. Memory: the target and one largest record, twice over with the
/// compressor's output; nothing is allocated for a record.
pub struct Rebatcher {
    compressor: Compressor,
    decompressor: Decompressor,
    target: usize,
    /// Room for a header, then the records of `run`, to before byte `used`.
    gathered: Vec<u8>,
    used: usize,
    run: Option<Run>,
    /// Where the next batch may begin.
    expected: i64,
    plain: Vec<u8>,
    /// What `run` consists of, where that is one compressed batch and nothing else: it need not be compressed again.
    lone: Vec<u8>,
    effect: Effect,
}

impl Rebatcher {
    /// Merges up to `target` bytes of uncompressed records (see [`DEFAULT_TARGET`]); a record that is
    /// larger gets a batch of its own.
    pub fn new(codec: Codec, target: usize) -> Self {
        Self {
            compressor: Compressor::new(codec),
            decompressor: Decompressor::default(),
            target,
            gathered: vec![0; HEADER_LEN],
            used: HEADER_LEN,
            run: None,
            expected: i64::MIN,
            plain: Vec::new(),
            lone: Vec::new(),
            effect: Effect::default(),
        }
    }

    /// A partition begins where compression did this of late.
    pub(super) fn begin(&mut self, effect: Effect) {
        self.effect = effect;
    }

    /// What it does now.
    pub(super) fn effect(&self) -> Effect {
        self.effect
    }

    /// With what it compresses.
    pub fn codec(&self) -> Codec {
        self.compressor.codec()
    }

    /// Takes the partition's next batch; `out` gets each batch that is complete with it: whole, its CRC
    /// right, in order. An error leaves everything as it was.
    ///
    /// Cost: validates the batch, copies its records once and compresses what is full.
    pub fn push(&mut self, batch: &[u8], out: &mut impl FnMut(&[u8])) -> Result<(), RebatchError> {
        let header = self.next(batch)?;
        let horizon = header.delete_horizon();
        let known = header.attributes & !(CODEC_MASK | LOG_APPEND_TIME | DELETE_HORIZON) == 0;
        let merged = known
            && match header.codec() {
                0 if self.is_done(batch.len(), out) => false,
                0 => {
                    self.gather(&header, batch, horizon, out)?;
                    true
                }
                _ => {
                    self.unpack(batch) && {
                        let plain = std::mem::take(&mut self.plain);
                        let gathered = self.gather(&header, &plain, horizon, out);
                        self.plain = plain;
                        gathered?;
                        self.keep_lone(&header, batch);
                        true
                    }
                }
            };
        if !merged {
            self.emit(out);
            out(batch);
        }
        self.expected = header.next_offset();
        Ok(())
    }

    /// As [`Rebatcher::push`], of a batch that can be decompressed, with those records only that `keep` wants, and with
    /// `horizon` as the time until when tombstones among them are kept. Always merges. What is dropped behind the
    /// last record that is kept stays as a gap.
    pub fn push_thinned(
        &mut self,
        batch: &[u8],
        horizon: Option<i64>,
        keep: impl FnMut(&Record) -> bool,
        out: &mut impl FnMut(&[u8]),
    ) -> Result<(), RebatchError> {
        let header = self.next(batch)?;
        let mut plain = std::mem::take(&mut self.plain);
        let result = (|| {
            self.decompressor
                .decompress(batch, codec::MAX_PLAIN, &mut plain)?;
            self.gather_some(&header, &plain, horizon, keep, out)?;
            self.expected = header.next_offset();
            Ok(())
        })();
        self.plain = plain;
        result
    }

    /// Checks that a batch is valid and comes in order.
    fn next(&self, batch: &[u8]) -> Result<BatchHeader, RebatchError> {
        let header = record_batch::validate(batch)?;
        if header.base_offset < 0 || header.next_offset() == i64::MAX {
            return Err(RebatchError::Offset(header.base_offset));
        }
        if header.base_offset < self.expected {
            return Err(RebatchError::Order {
                offset: header.base_offset,
                expected: self.expected,
            });
        }
        Ok(header)
    }

    /// Whether a plain batch is what merging would make of it.
    fn is_done(&mut self, len: usize, out: &mut impl FnMut(&[u8])) -> bool {
        let records = len - HEADER_LEN;
        if records > self.target || records < self.done() {
            return false;
        }
        if self.compressor.codec() == Codec::None {
            return true;
        }
        self.effect.is_vain() && {
            // What was gathered has its turn first.
            self.emit(out);
            self.effect.passes(records)
        }
    }

    /// Bytes of records from which on a batch is not merged any more.
    fn done(&self) -> usize {
        self.target / DONE_PART * (DONE_PART - 1)
    }

    /// Hands out what is gathered; the next batch may be another partition's.
    pub fn finish(&mut self, out: &mut impl FnMut(&[u8])) {
        self.emit(out);
        self.expected = i64::MIN;
    }

    /// Keeps a batch that was just gathered, where it is all there is and has the codec that it would get.
    fn keep_lone(&mut self, header: &BatchHeader, batch: &[u8]) {
        let alone = self.run.is_some_and(|run| {
            (run.base_offset, run.count) == (header.base_offset, header.records_count)
        });
        if alone && header.codec() == self.compressor.codec().id() {
            self.lone.extend_from_slice(batch);
        }
    }

    /// Decompresses a small batch; false where it is to stay as it is.
    fn unpack(&mut self, batch: &[u8]) -> bool {
        if self.compressor.codec() == Codec::None || batch.len() > self.target / SMALL_PART {
            return false;
        }
        // Merged before, and small since it compressed well.
        let done = self.done();
        if codec::plain_size(batch).is_some_and(|size| size >= done as u64) {
            return false;
        }
        let limit = HEADER_LEN.saturating_add(self.target);
        // What cannot be read, or is too large, is its readers' affair.
        let plain = self
            .decompressor
            .decompress(batch, limit, &mut self.plain)
            .is_ok();
        // LZ4 does not say its size.
        plain && self.plain.len() - HEADER_LEN < done
    }

    /// Appends the records of a plain, validated batch.
    fn gather(
        &mut self,
        header: &BatchHeader,
        batch: &[u8],
        horizon: Option<i64>,
        out: &mut impl FnMut(&[u8]),
    ) -> Result<(), BatchError> {
        let mut records = Records::new(batch)?;
        self.begin_batch(header, horizon, out);
        // The first record of a batch that begins a run takes the batch's base offset, so that a gap
        // before it is kept.
        let mut base_offset = Some(header.base_offset);
        for index in 0..header.records_count {
            let record = records.encoded().ok_or(BatchError::Record { index })?;
            let base = base_offset.take().unwrap_or(record.offset);
            self.add(&record, base, header, horizon, out);
        }
        self.end_batch(header);
        Ok(())
    }

    /// As [`Rebatcher::gather`], of those records that `keep` wants.
    fn gather_some(
        &mut self,
        header: &BatchHeader,
        batch: &[u8],
        horizon: Option<i64>,
        mut keep: impl FnMut(&Record) -> bool,
        out: &mut impl FnMut(&[u8]),
    ) -> Result<(), BatchError> {
        let records = Records::new(batch)?;
        self.begin_batch(header, horizon, out);
        let mut base_offset = Some(header.base_offset);
        for record in records {
            let record = record?;
            if !keep(&record) {
                base_offset = None;
                continue;
            }
            let base = base_offset.take().unwrap_or(record.offset);
            self.add(&record.encoded(), base, header, horizon, out);
        }
        self.end_batch(header);
        Ok(())
    }

    /// Makes way for a batch that does not fit the run.
    fn begin_batch(
        &mut self,
        header: &BatchHeader,
        horizon: Option<i64>,
        out: &mut impl FnMut(&[u8]),
    ) {
        let fits = self.run.is_some_and(|run| {
            run.append_time == header.append_time()
                // Tombstones would have to wait for later ones beside them.
                && (horizon.is_none() || run.horizon == horizon)
                && header.next_offset() - 1 - run.base_offset <= i64::from(i32::MAX)
        });
        if !fits {
            self.emit(out);
        }
    }

    /// Appends a record; a run that begins with it begins at `base`.
    #[inline(always)]
    fn add(
        &mut self,
        record: &Encoded<'_>,
        base: i64,
        header: &BatchHeader,
        horizon: Option<i64>,
        out: &mut impl FnMut(&[u8]),
    ) {
        let most = PREFIX_MAX + record.fields.len();
        if most > (HEADER_LEN + self.target).saturating_sub(self.used) {
            self.emit(out);
        }
        let run = self.run.get_or_insert(Run {
            base_offset: base,
            next_offset: base,
            base_timestamp: horizon.unwrap_or(record.timestamp),
            max_timestamp: record.timestamp,
            append_time: header.append_time(),
            horizon,
            count: 0,
        });
        let timestamp_delta = record.timestamp.wrapping_sub(run.base_timestamp);
        let offset_delta = record.offset - run.base_offset;
        let body =
            1 + varint::len(timestamp_delta) + varint::len(offset_delta) + record.fields.len();
        if self.gathered.len() < self.used + most {
            self.gathered.resize(self.used + most, 0);
        }
        let room = &mut self.gathered[self.used..self.used + most];
        let mut at = varint::put(room, body as i64);
        room[at] = 0; // attributes: none are defined
        at += 1;
        at += varint::put(&mut room[at..], timestamp_delta);
        at += varint::put(&mut room[at..], offset_delta);
        room[at..][..record.fields.len()].copy_from_slice(record.fields);
        self.used += at + record.fields.len();
        self.lone.clear();
        run.next_offset = record.offset + 1;
        run.max_timestamp = run.max_timestamp.max(record.timestamp);
        run.count += 1;
    }

    /// A gap behind the last record is kept, too.
    fn end_batch(&mut self, header: &BatchHeader) {
        if let Some(run) = &mut self.run
            && run.next_offset != header.next_offset()
        {
            run.next_offset = header.next_offset();
            self.lone.clear();
        }
    }

    fn emit(&mut self, out: &mut impl FnMut(&[u8])) {
        let Some(run) = self.run.take() else {
            return;
        };
        let header = BatchHeader {
            base_offset: run.base_offset,
            batch_length: 0,
            partition_leader_epoch: 0,
            magic: MAGIC,
            crc: 0,
            attributes: run.append_time.map_or(0, |_| LOG_APPEND_TIME)
                | run.horizon.map_or(0, |_| DELETE_HORIZON),
            // At most `i32::MAX`: more `gather` does not let in.
            last_offset_delta: (run.next_offset - run.base_offset - 1) as i32,
            base_timestamp: run.base_timestamp,
            max_timestamp: run.max_timestamp,
            producer_id: -1,
            producer_epoch: -1,
            base_sequence: -1,
            records_count: run.count,
        };
        let gathered = &mut self.gathered[..self.used];
        let records = gathered.len() - HEADER_LEN;
        if !self.lone.is_empty() {
            out(&self.lone);
            self.lone.clear();
        } else if self.compressor.codec() != Codec::None && self.effect.passes(records) {
            out(codec::uncompressed(&header, gathered));
        } else {
            let batch = self.compressor.batch(&header, gathered);
            self.effect
                .tried(records, batch.len() < HEADER_LEN + records);
            out(batch);
        }
        self.used = HEADER_LEN;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::lsm::codec;
    use proptest::prelude::*;

    const TRANSACTIONAL: i16 = 1 << 4;
    const CONTROL: i16 = 1 << 5;

    type Header = (Vec<u8>, Option<Vec<u8>>);

    /// A record without its offset.
    #[derive(Debug, Clone)]
    struct Message {
        timestamp: i64,
        /// Offsets skipped before it.
        skip: u8,
        key: Option<Vec<u8>>,
        value: Option<Vec<u8>>,
        headers: Vec<Header>,
    }

    /// How its producer, or compaction, left a batch.
    #[derive(Debug, Clone)]
    struct Source {
        messages: Vec<Message>,
        /// Offsets skipped behind the last record, and between this batch and the one before it.
        skip_after: u8,
        skip_before: u8,
        attributes: i16,
        codec: Codec,
    }

    fn field(out: &mut Vec<u8>, bytes: Option<&[u8]>) {
        let mut len = [0; varint::MAX_LEN];
        let taken = varint::put(&mut len, bytes.map_or(-1, |b| b.len() as i64));
        out.extend_from_slice(&len[..taken]);
        out.extend_from_slice(bytes.unwrap_or_default());
    }

    fn number(out: &mut Vec<u8>, value: i64) {
        let mut bytes = [0; varint::MAX_LEN];
        let taken = varint::put(&mut bytes, value);
        out.extend_from_slice(&bytes[..taken]);
    }

    /// Encodes a batch record by record; shares nothing with the code under test but varints and the
    /// header.
    fn encode(source: &Source, base_offset: i64) -> Vec<u8> {
        let base_timestamp = source.messages[0].timestamp;
        let mut batch = vec![0; HEADER_LEN];
        let mut delta = 0;
        for message in &source.messages {
            delta += i64::from(message.skip);
            let mut body = vec![0];
            number(&mut body, message.timestamp.wrapping_sub(base_timestamp));
            number(&mut body, delta);
            field(&mut body, message.key.as_deref());
            field(&mut body, message.value.as_deref());
            number(&mut body, message.headers.len() as i64);
            for (name, value) in &message.headers {
                field(&mut body, Some(name));
                field(&mut body, value.as_deref());
            }
            number(&mut batch, body.len() as i64);
            batch.extend_from_slice(&body);
            delta += 1;
        }
        let header = BatchHeader {
            base_offset,
            batch_length: 0,
            partition_leader_epoch: 3,
            magic: MAGIC,
            crc: 0,
            attributes: source.attributes,
            last_offset_delta: (delta - 1) as i32 + i32::from(source.skip_after),
            base_timestamp,
            max_timestamp: source.messages.iter().map(|m| m.timestamp).max().unwrap(),
            producer_id: 5,
            producer_epoch: 1,
            base_sequence: 8,
            records_count: source.messages.len() as i32,
        };
        Compressor::new(source.codec)
            .batch(&header, &mut batch)
            .to_vec()
    }

    /// The batches with their offsets.
    fn encode_all(sources: &[Source], first: i64) -> Vec<Vec<u8>> {
        let mut next = first;
        sources
            .iter()
            .map(|source| {
                let batch = encode(source, next + i64::from(source.skip_before));
                next = record_batch::validate(&batch).unwrap().next_offset();
                batch
            })
            .collect()
    }

    type Seen = (i64, i64, Option<Vec<u8>>, Option<Vec<u8>>, Vec<Header>);

    /// Every record of every batch.
    fn records(batches: &[Vec<u8>]) -> Vec<Seen> {
        let mut seen = Vec::new();
        for batch in batches {
            let mut scratch = Vec::new();
            for record in Records::new(codec::plain(batch, &mut scratch).unwrap()).unwrap() {
                let record = record.unwrap();
                seen.push((
                    record.offset,
                    record.timestamp,
                    record.key.map(<[u8]>::to_vec),
                    record.value.map(<[u8]>::to_vec),
                    record
                        .headers()
                        .map(|(name, value)| (name.to_vec(), value.map(<[u8]>::to_vec)))
                        .collect(),
                ));
            }
        }
        seen
    }

    fn rebatched(codec: Codec, target: usize, batches: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let mut rebatcher = Rebatcher::new(codec, target);
        let mut out = Vec::new();
        let mut take = |batch: &[u8]| out.push(batch.to_vec());
        for batch in batches {
            rebatcher.push(batch, &mut take).unwrap();
        }
        rebatcher.finish(&mut take);
        out
    }

    fn source(values: &[&str]) -> Source {
        Source {
            messages: values
                .iter()
                .map(|value| Message {
                    timestamp: 1000,
                    skip: 0,
                    key: None,
                    value: Some(value.as_bytes().to_vec()),
                    headers: Vec::new(),
                })
                .collect(),
            skip_after: 0,
            skip_before: 0,
            attributes: 0,
            codec: Codec::None,
        }
    }

    #[test]
    fn small_batches_become_one() {
        let sources = vec![source(&["status ok, status ok", "status ok"]); 50];
        let batches = encode_all(&sources, 700);
        let merged = rebatched(Codec::default(), DEFAULT_TARGET, &batches);
        assert_eq!(merged.len(), 1);
        let header = record_batch::validate(&merged[0]).unwrap();
        assert_eq!((header.base_offset, header.next_offset()), (700, 800));
        assert_eq!((header.records_count, header.codec()), (100, codec::ZSTD));
        assert_eq!(
            (
                header.producer_id,
                header.producer_epoch,
                header.base_sequence
            ),
            (-1, -1, -1)
        );
        assert_eq!(records(&merged), records(&batches));
    }

    #[test]
    fn the_target_bounds_a_batch_also_inside_a_source() {
        let text = "x".repeat(100);
        let batches = encode_all(&[source(&vec![text.as_str(); 1000])], 0);
        let merged = rebatched(Codec::None, 8192, &batches);
        assert!(merged.len() > 12, "{}", merged.len());
        assert!(merged.iter().all(|b| b.len() <= HEADER_LEN + 8192));
        assert!(merged[..merged.len() - 1].iter().all(|b| b.len() > 8000));
        assert_eq!(records(&merged), records(&batches));
        // A record above the target has a batch of its own.
        let large = "y".repeat(20_000);
        let batches = encode_all(&[source(&["a", &large, "b"])], 0);
        let merged = rebatched(Codec::None, 8192, &batches);
        assert_eq!(merged.len(), 3);
        assert_eq!(records(&merged), records(&batches));
    }

    #[test]
    fn batches_that_say_more_than_their_records_pass_unchanged_and_in_order() {
        let with = |attributes| Source {
            attributes,
            ..source(&["marker"])
        };
        let large = "compressed by its producer ".repeat(2000);
        let mut noise = String::new();
        let mut state = 1u64;
        for _ in 0..4000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            noise.push(char::from(b' ' + (state >> 57) as u8 % 90));
        }
        let sources = [
            source(&["a"]),
            with(CONTROL),
            source(&["b"]),
            with(TRANSACTIONAL),
            with(1 << 7),
            source(&["c"]),
            // Too large when decompressed, too large as it is.
            Source {
                codec: Codec::Lz4,
                ..source(&[&large])
            },
            Source {
                codec: Codec::default(),
                ..source(&[&noise])
            },
            source(&["d"]),
        ];
        let mut batches = encode_all(&sources, 10);
        // Compressed with what is not read here.
        let mut foreign = batches[0].clone();
        let header = BatchHeader {
            base_offset: batches.len() as i64 + 10,
            attributes: codec::SNAPPY,
            ..record_batch::parse_header(&foreign).unwrap()
        };
        record_batch::write_header(&mut foreign, &header);
        batches.push(foreign);
        let merged = rebatched(Codec::Zstd { level: 3 }, 16 << 10, &batches);
        assert_eq!(merged.len(), batches.len());
        for (i, (before, after)) in batches.iter().zip(&merged).enumerate() {
            let header = record_batch::validate(after).unwrap();
            assert_eq!(header.base_offset, 10 + i as i64);
            assert_eq!(before == after, ![0, 2, 5, 8].contains(&i), "{i}");
        }
    }

    #[test]
    fn small_compressed_batches_are_merged_unless_nothing_is_to_be_compressed() {
        let text = "small and compressed by its producer ".repeat(10);
        let sources: Vec<Source> = [Codec::Lz4, Codec::default(), Codec::None, Codec::Lz4]
            .into_iter()
            .map(|codec| Source {
                codec,
                ..source(&[&text, "x"])
            })
            .collect();
        let batches = encode_all(&sources, 0);
        let merged = rebatched(Codec::default(), DEFAULT_TARGET, &batches);
        assert_eq!(merged.len(), 1);
        assert_eq!(records(&merged), records(&batches));
        let kept = rebatched(Codec::None, DEFAULT_TARGET, &batches);
        assert_eq!(kept.len(), 4);
        assert_eq!(kept[0], batches[0]);
        assert_eq!(records(&kept), records(&batches));
    }

    /// A batch of one value that no codec makes smaller.
    fn noise(seed: u64, len: usize) -> Source {
        let mut state = seed * 2 + 1;
        let value = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        });
        let value = value.take(len).collect();
        let mut source = source(&["x"]);
        source.messages[0].value = Some(value);
        source
    }

    fn codec_of(batch: &[u8]) -> i16 {
        record_batch::validate(batch).unwrap().codec()
    }

    #[test]
    fn what_begins_to_get_smaller_is_compressed_again() {
        let text = "status ok, status ok ".repeat(20);
        for codec in [Codec::Lz4, Codec::default()] {
            let mut sources: Vec<Source> = (0..2000).map(|n| noise(n, 1000)).collect();
            sources.extend(vec![source(&[&text, &text]); 2000]);
            sources.extend((0..200).map(|n| noise(n, 1000)));
            let batches = encode_all(&sources, 0);
            let merged = rebatched(codec, 4096, &batches);
            assert_eq!(records(&merged), records(&batches));
            let codecs: Vec<i16> = merged.iter().map(|batch| codec_of(batch)).collect();
            let first = codecs.iter().position(|&id| id == codec.id()).unwrap();
            let change = record_batch::parse_header(&merged[first]).unwrap();
            // 32 batches of 4 KiB, with two messages of 430 bytes to a source.
            let late = change.base_offset - 2000;
            assert!((0..33 * 10).contains(&late), "{late} messages late");
            let last = codecs.iter().rposition(|&id| id == codec.id()).unwrap();
            assert!(codecs[first..=last].iter().all(|&id| id == codec.id()));
            assert!(last - first > 300 && last + 30 < codecs.len());
            // Merged again nothing changes, but that the late ones may be found now.
            let again = rebatched(codec, 4096, &merged);
            assert_eq!(records(&again), records(&batches));
            assert_eq!(again.len(), merged.len());
            assert_eq!(again[first..=last], merged[first..=last]);
        }
    }

    #[test]
    fn full_batches_that_do_not_get_smaller_are_mostly_not_touched() {
        let sources: Vec<Source> = (0..200).map(|n| noise(n, 3500)).collect();
        let batches = encode_all(&sources, 0);
        let merged = rebatched(Codec::default(), 4096, &batches);
        assert_eq!(records(&merged), records(&batches));
        // Those that were tried have lost their producer.
        let same = merged.iter().zip(&batches).filter(|(a, b)| a == b).count();
        assert!(same >= 188, "{same}");
    }

    #[test]
    fn what_is_compressed_and_stays_by_itself_is_not_compressed_again() {
        let text = "compressed before ".repeat(300);
        let packed = |codec, text: &str| Source {
            codec,
            ..source(&[text])
        };
        for codec in [Codec::Lz4, Codec::default()] {
            // Small when compressed, and full.
            let full = packed(codec, &text[..4000]);
            // Small, with full ones around it.
            let small = packed(codec, &text[..1000]);
            let sources = [full.clone(), small.clone(), full.clone(), small];
            let batches = encode_all(&sources, 0);
            assert!(batches.iter().all(|b| b.len() < 4096 / SMALL_PART));
            assert_eq!(rebatched(codec, 4096, &batches), batches);
            // With a second small one it is merged; another codec is not kept for it alone.
            let sources = [full.clone(), packed(codec, &text[..1000]), source(&["b"])];
            let batches = encode_all(&sources, 0);
            let merged = rebatched(codec, 4096, &batches);
            assert_eq!(merged.len(), 2);
            assert_eq!(records(&merged), records(&batches));
            let other = match codec {
                Codec::Lz4 => Codec::default(),
                _ => Codec::Lz4,
            };
            let batches = encode_all(&[packed(codec, &text[..1000])], 0);
            assert_eq!(codec_of(&rebatched(other, 4096, &batches)[0]), other.id());
        }
    }

    #[test]
    fn append_times_are_kept_apart() {
        let at = |time| Source {
            attributes: LOG_APPEND_TIME,
            messages: vec![
                Message {
                    timestamp: time,
                    ..source(&["v"]).messages[0].clone()
                };
                3
            ],
            ..source(&["v"])
        };
        let batches = encode_all(&[at(5), at(5), at(6), source(&["w"]), at(6)], 0);
        let merged = rebatched(Codec::Lz4, DEFAULT_TARGET, &batches);
        assert_eq!(merged.len(), 4);
        assert_eq!(records(&merged), records(&batches));
    }

    #[test]
    fn offsets_that_go_back_or_cannot_be_are_refused() {
        let mut rebatcher = Rebatcher::new(Codec::None, DEFAULT_TARGET);
        let mut out = Vec::new();
        let mut take = |batch: &[u8]| out.push(batch.to_vec());
        let mut batch = encode(&source(&["a", "b"]), 5);
        rebatcher.push(&batch, &mut take).unwrap();
        for offset in [5, 6] {
            record_batch::set_base_offset(&mut batch, offset);
            assert_eq!(
                rebatcher.push(&batch, &mut take),
                Err(RebatchError::Order {
                    offset,
                    expected: 7
                })
            );
        }
        for offset in [-1, i64::MAX, i64::MAX - 1] {
            record_batch::set_base_offset(&mut batch, offset);
            assert_eq!(
                rebatcher.push(&batch, &mut take),
                Err(RebatchError::Offset(offset))
            );
        }
        // The largest gap still goes into one batch, the next one does not.
        let far = 5 + i64::from(i32::MAX) - 1;
        record_batch::set_base_offset(&mut batch, far);
        rebatcher.push(&batch, &mut take).unwrap();
        record_batch::set_base_offset(&mut batch, far + 2);
        rebatcher.push(&batch, &mut take).unwrap();
        // Another partition begins anew.
        rebatcher.finish(&mut take);
        record_batch::set_base_offset(&mut batch, 0);
        rebatcher.push(&batch, &mut take).unwrap();
        rebatcher.finish(&mut take);
        let offsets: Vec<_> = records(&out).iter().map(|r| r.0).collect();
        assert_eq!(offsets, [5, 6, far, far + 1, far + 2, far + 3, 0, 1]);
        let counts: Vec<_> = out
            .iter()
            .map(|b| record_batch::validate(b).unwrap().records_count)
            .collect();
        assert_eq!(counts, [4, 2, 2]);
    }

    fn bytes(len: usize) -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..len),
            (any::<u8>(), 0..len).prop_map(|(byte, len)| vec![byte; len]),
        ]
    }

    fn message() -> impl Strategy<Value = Message> {
        (
            prop_oneof![4 => 1_700_000_000_000i64..1_700_000_100_000, 1 => any::<i64>()],
            prop_oneof![8 => Just(0u8), 1 => any::<u8>()],
            prop::option::of(bytes(30)),
            prop::option::of(bytes(600)),
            prop::collection::vec((bytes(10), prop::option::of(bytes(20))), 0..3),
        )
            .prop_map(|(timestamp, skip, key, value, headers)| Message {
                timestamp,
                skip,
                key,
                value,
                headers,
            })
    }

    fn any_codec() -> impl Strategy<Value = Codec> {
        prop_oneof![
            2 => Just(Codec::None),
            1 => Just(Codec::Lz4),
            1 => (-7i32..=9).prop_filter("0 is none of them", |l| *l != 0).prop_map(|level| Codec::Zstd { level }),
        ]
    }

    fn any_source() -> impl Strategy<Value = Source> {
        (
            prop::collection::vec(message(), 1..12),
            prop_oneof![6 => Just(0u8), 1 => any::<u8>()],
            prop_oneof![6 => Just(0u8), 1 => any::<u8>()],
            prop_oneof![
                8 => Just(0i16),
                2 => Just(LOG_APPEND_TIME),
                1 => Just(CONTROL),
                1 => Just(TRANSACTIONAL),
                1 => Just(TRANSACTIONAL | CONTROL),
            ],
            any_codec(),
        )
            .prop_map(
                |(messages, skip_after, skip_before, attributes, codec)| Source {
                    messages,
                    skip_after,
                    skip_before,
                    attributes,
                    codec,
                },
            )
    }

    proptest! {
        #[test]
        fn what_went_in_comes_out(
            sources in prop::collection::vec(any_source(), 1..25),
            first in 0i64..(1 << 50),
            codec in any_codec(),
            target in prop_oneof![Just(0usize), 100usize..2000, Just(DEFAULT_TARGET)],
        ) {
            let batches = encode_all(&sources, first);
            let merged = rebatched(codec, target, &batches);
            prop_assert_eq!(records(&merged), records(&batches));
            let mut scratch = Vec::new();
            let mut next = i64::MIN;
            for batch in &merged {
                let header = record_batch::validate(batch).unwrap();
                prop_assert!(codec::verify(batch, &mut scratch).is_ok());
                prop_assert!(header.base_offset >= next);
                next = header.next_offset();
                // Readers find batches by the largest time.
                let plain = codec::plain(batch, &mut scratch).unwrap();
                let max = Records::new(plain).unwrap().map(|r| r.unwrap().timestamp).max();
                prop_assert_eq!(Some(header.max_timestamp), max);
            }
            // The ends of the log are the same, gaps included.
            let first = |batches: &[Vec<u8>]| record_batch::parse_header(&batches[0]).unwrap().base_offset;
            prop_assert_eq!(first(&merged), first(&batches));
            let last = record_batch::parse_header(batches.last().unwrap()).unwrap();
            prop_assert_eq!(next, last.next_offset());
        }

        #[test]
        fn any_bytes_are_refused_or_taken_without_panic(
            mut bytes in prop::collection::vec(any::<u8>(), HEADER_LEN..300),
            attributes in 0i16..64,
            count in 1i32..20,
        ) {
            let header = BatchHeader {
                attributes,
                records_count: count,
                last_offset_delta: count,
                batch_length: 49,
                ..record_batch::parse_header(&encode(&source(&["x"]), 0)).unwrap()
            };
            record_batch::write_header(&mut bytes, &header);
            let mut rebatcher = Rebatcher::new(Codec::default(), 4096);
            let mut take = |batch: &[u8]| assert!(record_batch::validate(batch).is_ok());
            let _ = rebatcher.push(&bytes, &mut take);
            rebatcher.finish(&mut take);
        }
    }
}
