//! How a reader holds a staging slot while it copies from it, without ever blocking the writer.
//!
//! One word a slot packs the LSN of the durable frame in the slot (in units of the frame alignment)
//! and the number of readers that hold it. Invariant: the writer writes to a slot only while the word
//! is 0; a reader reads only between a successful [`SlotPin::try_pin`] and its [`SlotPin::unpin`],
//! during which the word is not 0. The writer never waits: a slot that is held is passed over.
//! Checked with loom below.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};
#[cfg(not(loom))]
use std::sync::atomic::{AtomicU64, Ordering};

use super::frame::FRAME_ALIGN;

/// Bits that count readers; 48 remain for the place: 2^60 bytes of log.
const PIN_BITS: u32 = 16;
const PIN_MASK: u64 = (1 << PIN_BITS) - 1;

/// The word of one slot.
pub(crate) struct SlotPin(AtomicU64);

fn place(lsn: u64) -> u64 {
    lsn / FRAME_ALIGN as u64
}

impl SlotPin {
    /// A slot that belongs to the writer.
    pub(crate) fn new() -> SlotPin {
        SlotPin(AtomicU64::new(0))
    }

    /// Writer: the slot holds the durable frame of `lsn` (> 0) and may be read from now on.
    pub(crate) fn open_to_readers(&self, lsn: u64) {
        self.0.store(place(lsn) << PIN_BITS, Ordering::Release);
    }

    /// Writer: takes the slot back; false while a reader holds it.
    pub(crate) fn try_reclaim(&self) -> bool {
        let word = self.0.load(Ordering::Relaxed);
        // Acquire: what the last reader read happened before what is written next.
        word & PIN_MASK == 0
            && self
                .0
                .compare_exchange(word, 0, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }

    /// Reader: holds the slot if the frame of `lsn` is in it. Lock-free; a failed exchange means that
    /// another reader or the writer got on.
    pub(crate) fn try_pin(&self, lsn: u64) -> bool {
        let mut word = self.0.load(Ordering::Relaxed);
        loop {
            if word >> PIN_BITS != place(lsn) || word & PIN_MASK == PIN_MASK {
                return false;
            }
            match self
                .0
                .compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
    }

    /// Reader: lets go. Only after a successful [`SlotPin::try_pin`].
    pub(crate) fn unpin(&self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_held_slot_is_not_reclaimed() {
        let pin = SlotPin::new();
        assert!(pin.try_reclaim());
        assert!(!pin.try_pin(8192));
        pin.open_to_readers(8192);
        assert!(!pin.try_pin(4096), "another frame");
        assert!(pin.try_pin(8192));
        assert!(pin.try_pin(8192));
        assert!(!pin.try_reclaim());
        pin.unpin();
        assert!(!pin.try_reclaim());
        pin.unpin();
        assert!(pin.try_reclaim());
        assert!(!pin.try_pin(8192));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;

    struct Slot {
        pin: SlotPin,
        bytes: UnsafeCell<u64>,
    }

    // SAFETY: `bytes` is accessed under the pin protocol, which is what the model checks.
    unsafe impl Sync for Slot {}

    /// Two readers look for the frame at LSN 4096 while the writer replaces it by the one at 8192.
    /// loom's UnsafeCell reports any write that races with a read.
    #[test]
    fn loom_pin_protocol() {
        loom::model(|| {
            let slot = Arc::new(Slot {
                pin: SlotPin::new(),
                bytes: UnsafeCell::new(0),
            });
            slot.bytes.with_mut(|p| {
                // SAFETY: no other thread exists yet.
                unsafe { *p = 4096 }
            });
            slot.pin.open_to_readers(4096);
            let readers: Vec<_> = [4096, 8192]
                .into_iter()
                .map(|lsn| {
                    let slot = Arc::clone(&slot);
                    loom::thread::spawn(move || {
                        if slot.pin.try_pin(lsn) {
                            let seen = slot.bytes.with(|p| {
                                // SAFETY: pinned.
                                unsafe { *p }
                            });
                            assert_eq!(seen, lsn);
                            slot.pin.unpin();
                        }
                    })
                })
                .collect();
            if slot.pin.try_reclaim() {
                slot.bytes.with_mut(|p| {
                    // SAFETY: reclaimed.
                    unsafe { *p = 8192 }
                });
                slot.pin.open_to_readers(8192);
            }
            for reader in readers {
                reader.join().unwrap();
            }
        });
    }
}
