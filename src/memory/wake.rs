//! Waking a thread that sleeps in the kernel, without a system call while it is awake.
//!
//! Invariant: a thread that arms, then looks at its rings once more, then sleeps on the descriptor, misses
//! nothing that was pushed before [`Wake::wake`]: arming and looking on one side, pushing and reading
//! the flag on the other, each with a sequentially consistent fence between (Dekker's pattern). Checked with
//! loom below.

use std::io;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, Ordering, fence};

#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, Ordering, fence};

/// One sleeper; any number of threads may wake it.
#[derive(Debug)]
pub struct Wake {
    armed: AtomicBool,
    event: Event,
}

impl Wake {
    /// A sleeper that is awake.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            armed: AtomicBool::new(false),
            event: Event::new()?,
        })
    }

    /// Becomes readable when the sleeper is woken.
    #[cfg(not(loom))]
    pub fn descriptor(&self) -> std::os::fd::RawFd {
        use std::os::fd::AsRawFd;
        self.event.0.as_raw_fd()
    }

    /// Says that the thread is about to sleep; it must look at its rings after this.
    pub fn arm(&self) {
        self.armed.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// Says that the thread is awake; takes back what made the descriptor readable.
    pub fn disarm(&self) {
        if !self.armed.swap(false, Ordering::AcqRel) {
            self.event.clear();
        }
    }

    /// Sleeps until it is woken or one of `others` is readable, for `time` at most; between arming and disarming.
    #[cfg(not(loom))]
    pub fn sleep(&self, others: &[std::os::fd::RawFd], time: std::time::Duration) {
        /// Descriptors that are looked at; who sleeps for more is woken by the time.
        const MOST: usize = 16;
        let mut descriptors = [libc::pollfd {
            fd: -1,
            events: libc::POLLIN,
            revents: 0,
        }; MOST];
        let all = std::iter::once(self.descriptor()).chain(others.iter().copied());
        for (entry, fd) in descriptors.iter_mut().zip(all) {
            entry.fd = fd;
        }
        let count = (others.len() + 1).min(MOST) as libc::nfds_t;
        let time = libc::timespec {
            tv_sec: time.as_secs() as libc::time_t,
            tv_nsec: time.subsec_nanos().into(),
        };
        // SAFETY: as many descriptors as said; the time is read only, and there is no signal mask. A failure ends
        // the sleep, as a signal does.
        unsafe { libc::ppoll(descriptors.as_mut_ptr(), count, &time, std::ptr::null()) };
    }

    /// Wakes the thread if it sleeps or is about to. To be called after pushing to its rings.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        self.wake_armed();
    }

    /// Wakes each of several threads, with one fence.
    #[inline]
    pub fn wake_all(sleepers: &[std::sync::Arc<Wake>]) {
        if !sleepers.is_empty() {
            fence(Ordering::SeqCst);
            sleepers.iter().for_each(|sleeper| sleeper.wake_armed());
        }
    }

    #[inline]
    fn wake_armed(&self) {
        if self.armed.load(Ordering::Relaxed) && self.armed.swap(false, Ordering::AcqRel) {
            self.event.set();
        }
    }
}

/// An eventfd.
#[cfg(not(loom))]
#[derive(Debug)]
struct Event(std::os::fd::OwnedFd);

#[cfg(not(loom))]
impl Event {
    fn new() -> io::Result<Self> {
        use std::os::fd::{FromRawFd, OwnedFd};
        // SAFETY: eventfd touches no memory; its result is checked before it is owned.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: just opened, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    #[cold]
    fn set(&self) {
        use std::os::fd::AsRawFd;
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes from 8; a count that is full is as readable as one more.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), 8) };
    }

    fn clear(&self) {
        use std::os::fd::AsRawFd;
        let mut count = [0u8; 8];
        // SAFETY: reads at most 8 bytes into 8; the descriptor does not block.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), 8) };
    }
}

/// Stands for the eventfd where loom looks at every order of events.
#[cfg(loom)]
#[derive(Debug)]
struct Event(AtomicBool);

#[cfg(loom)]
impl Event {
    fn new() -> io::Result<Self> {
        Ok(Self(AtomicBool::new(false)))
    }

    fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    fn clear(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;

    /// Two shards publish and wake; the thread never sleeps over what was published.
    #[test]
    fn loom_no_wake_up_is_lost() {
        loom::model(|| {
            let wake = Arc::new(Wake::new().unwrap());
            let rings: Vec<_> = (0..2).map(|_| Arc::new(AtomicUsize::new(0))).collect();
            let shards: Vec<_> = rings
                .iter()
                .map(|ring| {
                    let (wake, ring) = (Arc::clone(&wake), Arc::clone(ring));
                    loom::thread::spawn(move || {
                        ring.store(1, Ordering::Release);
                        wake.wake();
                    })
                })
                .collect();
            let look = || {
                rings
                    .iter()
                    .map(|r| r.load(Ordering::Acquire))
                    .sum::<usize>()
            };
            let mut seen = 0;
            for _ in 0..2 {
                wake.arm();
                seen = look();
                if seen == 2 {
                    break;
                }
                if seen == 0 {
                    break;
                }
                wake.disarm();
            }
            // It sleeps now, if it has not seen everything: then it must be woken.
            for shard in shards {
                shard.join().unwrap();
            }
            assert!(seen == look() || wake.event.is_set() || !wake.armed.load(Ordering::SeqCst));
            if seen < 2 && wake.armed.load(Ordering::SeqCst) {
                panic!("sleeps over {} of 2", 2 - seen);
            }
        });
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::memory::spsc;

    #[test]
    fn nothing_that_was_pushed_is_slept_over() {
        let wake = Wake::new().unwrap();
        let (mut out, mut input) = spsc::ring::<u64>(64);
        const COUNT: u64 = 3_000;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for i in 0..COUNT {
                    while out.push_burst(&[i]) == 0 {
                        std::thread::yield_now();
                    }
                    wake.wake();
                }
            });
            let (mut next, mut taken) = (0, Vec::with_capacity(64));
            while next < COUNT {
                wake.arm();
                if input.len() == 0 {
                    let mut poll = libc::pollfd {
                        fd: wake.descriptor(),
                        events: libc::POLLIN,
                        revents: 0,
                    };
                    // SAFETY: one entry, as said.
                    let ready = unsafe { libc::poll(&mut poll, 1, 30_000) };
                    assert_eq!(ready, 1, "slept over {next}");
                }
                wake.disarm();
                taken.clear();
                input.pop_into(&mut taken, 64);
                for value in &taken {
                    assert_eq!(*value, next);
                    next += 1;
                }
            }
        });
    }
}
