//! A model of the server, for the client's tests: the protocol's rules in their plainest form.
//!
//! A batch is appended if it is the next of its producer's epoch, or the first of a newer epoch or of
//! an unknown producer; the offsets of the last batches are remembered.

use std::collections::{HashMap, VecDeque};

use crate::wire::datagram::{
    self, AckEntry, ErrorCode, MAX_INFLIGHT_BATCHES, ProduceHeader, Request, WELCOME_LEN, Welcome,
};
use crate::wire::record_batch::{self, Records};

/// The topic's id in the model.
const TOPIC_ID: u32 = 77;

#[derive(Default)]
pub(super) struct Remembered {
    epoch: i16,
    pub(super) next_sequence: i32,
    window: VecDeque<(i32, i32, i64)>,
}

/// A batch in the model's log.
struct Stored {
    producer_id: i64,
    epoch: i16,
    base_sequence: i32,
    values: Vec<Vec<u8>>,
}

/// A partition: a log and what it says of its producers.
#[derive(Default)]
pub struct ModelPartition {
    batches: Vec<Stored>,
    end: i64,
    pub(super) producers: HashMap<i64, Remembered>,
}

impl ModelPartition {
    /// Number of batches.
    pub fn len(&self) -> usize {
        self.batches.len()
    }

    /// All values in the order of their offsets.
    pub fn values(&self) -> Vec<&[u8]> {
        let values = self.batches.iter().flat_map(|batch| &batch.values);
        values.map(Vec::as_slice).collect()
    }

    fn record(&mut self, batch: Stored) -> i64 {
        let count = batch.values.len() as i32;
        let offset = self.end;
        self.end += i64::from(count);
        let state = self.producers.entry(batch.producer_id).or_default();
        if state.epoch != batch.epoch {
            *state = Remembered {
                epoch: batch.epoch,
                ..Remembered::default()
            };
        }
        state.window.push_back((batch.base_sequence, count, offset));
        if state.window.len() > MAX_INFLIGHT_BATCHES {
            state.window.pop_front();
        }
        state.next_sequence = batch.base_sequence.wrapping_add(count) & i32::MAX;
        self.batches.push(batch);
        offset
    }

    fn judge(&mut self, batch: Stored) -> (ErrorCode, i64) {
        let Some(state) = self.producers.get(&batch.producer_id) else {
            return match batch.base_sequence {
                0 => (ErrorCode::None, self.record(batch)),
                _ => (ErrorCode::OutOfOrder, -1),
            };
        };
        if batch.epoch < state.epoch {
            return (ErrorCode::Fenced, -1);
        }
        let next = match batch.epoch > state.epoch {
            true => 0,
            false => state.next_sequence,
        };
        if batch.base_sequence == next {
            return (ErrorCode::None, self.record(batch));
        }
        if batch.epoch > state.epoch || batch.base_sequence > next {
            return (ErrorCode::OutOfOrder, -1);
        }
        let count = batch.values.len() as i32;
        let known = state
            .window
            .iter()
            .find(|&&(sequence, n, _)| (sequence, n) == (batch.base_sequence, count));
        (
            ErrorCode::Duplicate,
            known.map_or(-1, |&(_, _, offset)| offset),
        )
    }

    /// Forgets all batches from the `keep`th on.
    pub fn truncate(&mut self, keep: usize) {
        let kept: Vec<Stored> = self.batches.drain(..).take(keep).collect();
        *self = Self::default();
        for batch in kept {
            self.record(batch);
        }
    }
}

/// What the server says instead of storing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mood {
    /// It stores.
    Well,
    /// It refuses everything.
    Refusing(ErrorCode),
    /// It does not run.
    Down,
}

/// The model of a server.
pub struct ModelServer {
    /// Its partitions.
    pub partitions: Vec<ModelPartition>,
    /// Its state.
    pub mood: Mood,
    /// Its credit.
    pub credit: u32,
    /// Largest datagram it takes.
    pub max_datagram: u32,
}

impl ModelServer {
    /// A server with one topic.
    pub fn new(partitions: u32) -> Self {
        Self {
            partitions: (0..partitions).map(|_| ModelPartition::default()).collect(),
            mood: Mood::Well,
            credit: MAX_INFLIGHT_BATCHES as u32,
            max_datagram: 400,
        }
    }

    /// Answers one datagram; `None` where the protocol has no answer.
    pub fn answer(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        match Request::decode(bytes).expect("the client sends valid datagrams") {
            Request::Hello(hello) => {
                let mut out = vec![0; WELCOME_LEN];
                let known = hello.topic == "t";
                Welcome {
                    request_id: hello.request_id,
                    error: match known {
                        true => ErrorCode::None,
                        false => ErrorCode::UnknownPartition,
                    },
                    default_acks: -1,
                    topic_id: TOPIC_ID,
                    partitions: self.partitions.len() as u32,
                    credit: self.credit,
                    max_datagram: self.max_datagram,
                }
                .encode(&mut out);
                Some(out)
            }
            Request::Produce(header, batch) => {
                assert!(bytes.len() <= self.max_datagram as usize);
                let entry = self.produce(&header, batch);
                if header.acks == 0 {
                    return None;
                }
                let mut out = vec![0; datagram::ACK_HEADER_LEN + datagram::ACK_ENTRY_LEN];
                datagram::encode_ack_header(1, &mut out);
                entry.encode(&mut out[datagram::ACK_HEADER_LEN..]);
                Some(out)
            }
        }
    }

    fn produce(&mut self, header: &ProduceHeader, batch: &[u8]) -> AckEntry {
        let parsed =
            record_batch::validate_produced(batch).expect("the client sends valid batches");
        assert_eq!(header.topic_id, TOPIC_ID);
        let (error, base_offset) = match self.mood {
            Mood::Refusing(code) => (code, -1),
            _ => self.partitions[header.partition as usize].judge(Stored {
                producer_id: parsed.producer_id,
                epoch: parsed.producer_epoch,
                base_sequence: parsed.base_sequence,
                values: Records::new(batch)
                    .unwrap()
                    .map(|record| record.unwrap().value.unwrap_or_default().to_vec())
                    .collect(),
            }),
        };
        AckEntry {
            request_id: header.request_id,
            topic_id: header.topic_id,
            partition: header.partition,
            base_offset,
            base_sequence: parsed.base_sequence,
            producer_epoch: parsed.producer_epoch,
            error,
            credit: self.credit,
        }
    }
}
