//! Acknowledgements on their way: those that wait for the disk, and the rings back to the rx lcores.
//!
//! Invariant: an acknowledgement waits until the frame it stands for is durable and never longer
//! than frames before it; the queue is in the order of frames, so looking at its head is enough. A
//! ring that is full loses the acknowledgement, counted: the producer retransmits and is answered
//! as a duplicate, with the same offset.

use crate::memory::spsc;
use crate::shard::inbound::Ack;
use crate::telemetry::Counter;
use crate::wire::datagram::ErrorCode;

/// Acknowledgements handed to a ring in one go.
const RUN: usize = 64;

/// The rings back, by the index of the rx lcore.
pub(crate) struct Outlets {
    rings: Vec<spsc::Producer<Ack>>,
}

impl Outlets {
    pub fn new(rings: Vec<spsc::Producer<Ack>>) -> Self {
        Self { rings }
    }

    /// Hands over acknowledgements, keeping their order for each ring.
    pub fn send(&mut self, acks: &[Ack], sent: &Counter, lost: &Counter) {
        let mut rest = acks;
        while let Some(first) = rest.first() {
            let rx = first.reply.rx;
            let run = rest.iter().take_while(|ack| ack.reply.rx == rx).count();
            let taken = match self.rings.get_mut(usize::from(rx)) {
                Some(ring) => ring.push_burst(&rest[..run]),
                None => 0,
            };
            sent.add(taken as u64);
            lost.add((run - taken) as u64);
            rest = &rest[run..];
        }
    }
}

/// Acknowledgements that wait for their frame.
pub(crate) struct Pending {
    seqs: Box<[u64]>,
    acks: Vec<Ack>,
    first: u64,
    next: u64,
}

impl Pending {
    /// Room for `limit` acknowledgements, rounded up to a power of two; 112 bytes each.
    pub fn new(limit: usize) -> Self {
        let capacity = limit.next_power_of_two();
        Self {
            seqs: vec![0; capacity].into(),
            acks: Vec::with_capacity(capacity),
            first: 0,
            next: 0,
        }
    }

    #[inline]
    pub fn len(&self) -> usize {
        (self.next - self.first) as usize
    }

    #[inline]
    pub fn is_full(&self) -> bool {
        self.len() == self.seqs.len()
    }

    /// Adds one that waits for frame `seq`, not older than any before it.
    ///
    /// # Panics
    /// When it is full.
    pub fn push(&mut self, seq: u64, ack: Ack) {
        assert!(!self.is_full(), "more acknowledgements than room");
        let at = self.next as usize & (self.seqs.len() - 1);
        debug_assert!(self.len() == 0 || self.last_seq() <= seq);
        self.seqs[at] = seq;
        // The first turn fills the memory, later ones go over it again.
        if at == self.acks.len() {
            self.acks.push(ack);
        } else {
            self.acks[at] = ack;
        }
        self.next += 1;
    }

    fn last_seq(&self) -> u64 {
        self.seqs[(self.next - 1) as usize & (self.seqs.len() - 1)]
    }

    /// Hands on those whose frame is at most `seq`, each with the present `credit`, and with
    /// `failure` instead of its offset where the frame will never be durable; gives how many.
    pub fn settle(
        &mut self,
        seq: u64,
        credit: u32,
        failure: Option<ErrorCode>,
        mut send: impl FnMut(&[Ack]),
    ) -> usize {
        let mask = self.seqs.len() - 1;
        let start = self.first;
        while self.first < self.next {
            let at = self.first as usize & mask;
            let longest = self.len().min(RUN).min(self.seqs.len() - at);
            let run = self.seqs[at..at + longest]
                .iter()
                .take_while(|&&s| s <= seq)
                .count();
            if run == 0 {
                break;
            }
            let acks = &mut self.acks[at..at + run];
            for ack in acks.iter_mut() {
                ack.entry.credit = credit;
                if let Some(code) = failure {
                    ack.entry.error = code;
                    ack.entry.base_offset = -1;
                }
            }
            send(acks);
            self.first += run as u64;
        }
        (self.first - start) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::inbound::ReplyTo;
    use crate::wire::datagram::AckEntry;

    fn ack(rx: u8, id: u64) -> Ack {
        Ack {
            reply: ReplyTo {
                rx,
                ip_version: 4,
                port: 0,
                mac: [0; 6],
                vlan: ReplyTo::NO_VLAN,
                peer_ip: [0; 16],
                local_ip: [0; 16],
                peer_port: 1,
                local_port: 2,
                reserved: [0; 16],
            },
            entry: AckEntry {
                request_id: id,
                topic_id: 0,
                partition: 0,
                base_offset: id as i64,
                base_sequence: 0,
                producer_epoch: 0,
                error: ErrorCode::None,
                credit: 0,
            },
        }
    }

    #[test]
    fn leave_in_order_once_their_frame_is_durable() {
        let mut pending = Pending::new(5);
        let mut out = Vec::new();
        for turn in 0..40u64 {
            for i in 0..7 {
                pending.push(turn * 3 + i / 3, ack(0, turn * 7 + i));
            }
            assert_eq!(pending.len(), 7);
            let settled = pending.settle(turn * 3, 9, None, |acks| out.extend_from_slice(acks));
            assert_eq!(settled, 3);
            assert_eq!(
                pending.settle(turn * 3 + 2, 9, None, |acks| out.extend_from_slice(acks)),
                4
            );
        }
        assert!(out.iter().map(|ack| ack.entry.request_id).eq(0..280));
        assert!(
            out.iter()
                .all(|ack| ack.entry.credit == 9 && ack.entry.error == ErrorCode::None)
        );
    }

    #[test]
    fn a_failed_log_answers_everyone_with_the_failure() {
        let mut pending = Pending::new(4);
        for i in 0..4 {
            pending.push(i, ack(0, i));
        }
        assert!(pending.is_full());
        let mut out = Vec::new();
        pending.settle(u64::MAX, 1, Some(ErrorCode::StorageFailed), |acks| {
            out.extend_from_slice(acks)
        });
        assert_eq!(out.len(), 4);
        assert!(
            out.iter()
                .all(|ack| ack.entry.error == ErrorCode::StorageFailed
                    && ack.entry.base_offset == -1)
        );
    }

    #[test]
    fn a_full_or_missing_ring_is_counted() {
        let (tx0, mut rx0) = spsc::ring(2);
        let (tx1, mut rx1) = spsc::ring(8);
        let mut outlets = Outlets::new(vec![tx0, tx1]);
        let (sent, lost) = (Counter::new(), Counter::new());
        let acks: Vec<Ack> = [0, 0, 1, 0, 1, 7]
            .iter()
            .zip(0..)
            .map(|(&rx, id)| ack(rx, id))
            .collect();
        outlets.send(&acks, &sent, &lost);
        assert_eq!((sent.get(), lost.get()), (4, 2));
        let ids = |ring: &mut spsc::Consumer<Ack>| -> Vec<u64> {
            std::iter::from_fn(|| ring.pop())
                .map(|ack| ack.entry.request_id)
                .collect()
        };
        assert_eq!(ids(&mut rx0), [0, 1]);
        assert_eq!(ids(&mut rx1), [2, 4]);
    }
}
