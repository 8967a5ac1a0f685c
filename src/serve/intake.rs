//! Memory of the requests that a Kafka thread's connections have sent in part.
//!
//! What has been read and belongs to a request that is not whole is *loose*; before more of that request is read, the
//! whole of it is *reserved*. Invariants: loose and reserved bytes each stay within their part of the thread's share, but
//! for one read and for a request that is alone; so every request that has a reservation can become whole, and what
//! waits for one finds it when another is through: nobody waits for ever for somebody who waits.

use crate::memory::budget::{Charge, Share};
use crate::memory::pool::Pool;

/// Of a thread's share three parts of so many are for reservations, and three for batches on their way to shards (the
/// worker's); one is for loose bytes, and half a one for buffers kept for the next request. The rest is for what exceeds
/// these: a buffer is up to a quarter larger than its request.
const EIGHTH: u64 = 8;

/// What one connection holds.
#[derive(Debug, Default)]
pub(super) struct Hold {
    bytes: u64,
    /// The size of its request, where that is reserved.
    reserved: u64,
}

impl Hold {
    /// Whether it has a reservation.
    pub(super) fn is_reserved(&self) -> bool {
        self.reserved > 0
    }
}

/// A thread's requests under way.
#[derive(Debug)]
pub(super) struct Intake {
    charge: Charge,
    loose: u64,
    loose_max: u64,
    reserved: u64,
    reserved_max: u64,
    pool: Pool,
    /// Somebody waits for a reservation, or is not read because of loose bytes.
    starved: bool,
}

impl Intake {
    /// Of a thread with this share.
    pub(super) fn new(memory: &Share) -> Intake {
        let eighth = memory.bytes() / EIGHTH;
        Intake {
            charge: memory.charge(),
            loose: 0,
            loose_max: eighth,
            reserved: 0,
            reserved_max: eighth * 3,
            pool: Pool::new(memory.account(), eighth / 2),
            starved: false,
        }
    }

    /// Whether a connection may be read on that has `input` of a request of `need` bytes; makes room for the request.
    pub(super) fn admits(&mut self, hold: &mut Hold, input: &mut Vec<u8>, need: usize) -> bool {
        let need = need as u64;
        let admitted = if input.is_empty() {
            self.loose < self.loose_max
        } else if need <= hold.reserved {
            true
        } else if self.others(hold) == 0 || self.others(hold) + need <= self.reserved_max {
            self.release(hold);
            if input.capacity() < need as usize {
                let mut buffer = self.pool.take(need as usize);
                buffer.extend_from_slice(input);
                self.pool.give(std::mem::replace(input, buffer));
            }
            hold.reserved = need.max(input.capacity() as u64);
            self.reserved += hold.reserved;
            self.settle(hold, input);
            true
        } else {
            false
        };
        if !admitted && !self.starved {
            self.starved = true;
            self.charge.account().refuse();
        }
        admitted
    }

    /// Reserved by others.
    fn others(&self, hold: &Hold) -> u64 {
        self.reserved - hold.reserved
    }

    fn release(&mut self, hold: &mut Hold) {
        match hold.reserved {
            0 => self.loose -= hold.bytes,
            reserved => self.reserved -= reserved,
        }
        (hold.bytes, hold.reserved) = (0, 0);
    }

    /// The request was begun, or some of it was read: the connection has `input` now.
    pub(super) fn renew(&mut self, hold: &mut Hold, input: &Vec<u8>) {
        self.release(hold);
        self.settle(hold, input);
    }

    /// As [`Intake::renew`], of the same request.
    pub(super) fn settle(&mut self, hold: &mut Hold, input: &Vec<u8>) {
        let bytes = (input.capacity() as u64).max(hold.reserved);
        match hold.reserved {
            0 => self.loose = self.loose + bytes - hold.bytes,
            reserved => {
                self.reserved = self.reserved + bytes - reserved;
                hold.reserved = bytes;
            }
        }
        hold.bytes = bytes;
        self.charge.set(self.loose + self.reserved);
    }

    /// Takes a buffer back that is not needed any more.
    pub(super) fn give(&mut self, buffer: Vec<u8>) {
        self.pool.give(buffer);
    }

    /// Whether connections are not read because of memory, since the last call.
    pub(super) fn take_starved(&mut self) -> bool {
        std::mem::take(&mut self.starved)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::budget::Part;

    fn intake(bytes: u64) -> (Share, Intake) {
        let share = Share::alone(Part::Requests, bytes);
        let intake = Intake::new(&share);
        (share, intake)
    }

    /// A connection that has read `len` bytes of a request.
    fn part(intake: &mut Intake, len: usize) -> (Hold, Vec<u8>) {
        let (mut hold, mut input) = (Hold::default(), Vec::new());
        assert!(intake.admits(&mut hold, &mut input, 4));
        input.reserve_exact(len);
        input.resize(len, 1);
        intake.settle(&mut hold, &input);
        (hold, input)
    }

    #[test]
    fn requests_wait_for_their_turn_and_have_it() {
        let (share, mut intake) = intake(800 << 10);
        let (mut a, mut a_in) = part(&mut intake, 1000);
        let (mut b, mut b_in) = part(&mut intake, 1000);
        assert_eq!(share.account().used(), 2000);
        assert!(intake.admits(&mut a, &mut a_in, 200 << 10));
        assert!(a_in.capacity() >= 200 << 10 && a_in.len() == 1000);
        assert!(a.is_reserved() && share.account().used() >= 201_000);
        // 300 KiB in all.
        assert!(!intake.admits(&mut b, &mut b_in, 200 << 10));
        assert!(intake.take_starved() && !intake.take_starved());
        assert!(intake.admits(&mut a, &mut a_in, 200 << 10), "as before");
        intake.give(std::mem::take(&mut a_in));
        intake.renew(&mut a, &a_in);
        assert!(intake.admits(&mut b, &mut b_in, 200 << 10));
        intake.renew(&mut b, &Vec::new());
        drop(intake);
        assert_eq!(share.account().used(), 0);
    }

    #[test]
    fn a_request_that_is_alone_always_passes() {
        let (_, mut intake) = intake(8 << 10);
        let (mut a, mut input) = part(&mut intake, 100);
        assert!(intake.admits(&mut a, &mut input, 1 << 20));
        assert!(input.capacity() >= 1 << 20);
    }

    #[test]
    fn nobody_new_is_read_while_too_much_is_loose() {
        let (_, mut intake) = intake(8 << 10);
        let (mut a, mut a_in) = part(&mut intake, 2000);
        assert!(!intake.admits(&mut Hold::default(), &mut Vec::new(), 4));
        // What is loose can become whole, and makes room.
        assert!(intake.admits(&mut a, &mut a_in, 2500));
        assert!(intake.admits(&mut Hold::default(), &mut Vec::new(), 4));
        intake.renew(&mut a, &Vec::new());
        assert_eq!((intake.loose, intake.reserved), (0, 0));
    }
}
