//! One connection's protocol state: requests framed out of its bytes, answered in the order they came.
//!
//! Source: Kafka's protocol guide: a request is a 4-byte length and as many bytes; a broker answers the
//! requests of a connection in their order. Produce requests are begun at once, so that those in flight
//! share a group commit; any other request is begun when all before it are answered, so that it sees
//! their effects, as on Kafka (which takes one request of a connection at a time).
//!
//! Invariants: answers leave in the order of their requests, whatever order they were completed in; no
//! more than [`Limits`] allows is in flight; what is not begun stays in the transport's receive buffer,
//! and so closes the connection's receive window.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

/// Bytes of the length before a request.
pub const LENGTH_LEN: usize = 4;
/// The fewest bytes a request has behind its length: API key, version and correlation id.
pub const REQUEST_MIN: usize = 8;
/// Characters kept of a client's name, software and version, for the log and quotas; they are the client's to
/// choose and memory that it can make the server hold.
const NAME_MAX: usize = 64;
/// Slots that an idle connection keeps: those of a client that waits for each answer.
const IDLE_SLOTS: usize = 4;

/// Bounds of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the largest request, its length not counted.
    pub request: usize,
    /// Requests begun and not answered.
    pub in_flight: usize,
    /// Bytes of those; one request may exceed it when nothing else is in flight.
    pub in_flight_bytes: usize,
    /// Bytes of answers that are not sent, with which no further request is begun: a client that sends requests and takes
    /// no answers is not to fill its thread's memory for them, which the others' fetches would then wait for.
    pub unsent: usize,
}

impl Default for Limits {
    /// A request holds several of the largest batches; 64 are more than any client has in flight (5 for
    /// idempotent producers; librdkafka without idempotence goes to a million, and then waits here).
    fn default() -> Self {
        Self {
            request: 16 << 20,
            in_flight: 64,
            in_flight_bytes: 16 << 20,
            unsent: 1 << 20,
        }
    }
}

/// What lies at the front of the received bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Framing<'a> {
    /// Part of a request; `need` bytes make it whole as far as is known, the length included.
    Partial {
        /// Bytes, those at hand included.
        need: usize,
    },
    /// A whole request, without its length.
    Request(&'a [u8]),
    /// A length that no request has: what comes is not Kafka's protocol, or too large.
    BadLength(i32),
}

/// Frames the first request in `input`, of a size among `sizes`.
pub fn frame(input: &[u8], sizes: RangeInclusive<usize>) -> Framing<'_> {
    let Some(length) = input.first_chunk::<LENGTH_LEN>() else {
        return Framing::Partial { need: LENGTH_LEN };
    };
    let length = i32::from_be_bytes(*length);
    match usize::try_from(length) {
        Ok(len) if sizes.contains(&len) => match input.get(LENGTH_LEN..LENGTH_LEN + len) {
            Some(request) => Framing::Request(request),
            None => Framing::Partial {
                need: LENGTH_LEN + len,
            },
        },
        _ => Framing::BadLength(length),
    }
}

/// Names a request of a session until it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

enum Slot<A> {
    Waiting,
    Answered(Option<A>),
}

struct Entry<A> {
    bytes: usize,
    slot: Slot<A>,
}

/// The order of a connection's requests; `A` is an encoded answer. About 100 bytes while nothing is in
/// flight.
pub struct Session<A> {
    queue: VecDeque<Entry<A>>,
    /// Number of the request at the front of the queue.
    first: u64,
    bytes: usize,
    waiting: usize,
    /// Bytes of answers that were not sent.
    unsent: usize,
    /// Client id, as the last request said.
    client_id: Option<Box<str>>,
    /// Software name and version, as ApiVersions said.
    software: Option<Box<str>>,
}

impl<A> Default for Session<A> {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            first: 0,
            bytes: 0,
            waiting: 0,
            unsent: 0,
            client_id: None,
            software: None,
        }
    }
}

impl<A> Session<A> {
    /// Whether a request of `bytes` bytes may be begun now: a produce request while there is room,
    /// any other (`alone`) when nothing waits; and none while too much of the answers is unsent.
    pub fn admits(&self, alone: bool, bytes: usize, limits: &Limits) -> bool {
        if self.unsent > limits.unsent {
            return false;
        }
        if self.queue.is_empty() {
            return true;
        }
        !(alone && self.waiting > 0)
            && self.queue.len() < limits.in_flight
            && self.bytes.saturating_add(bytes) <= limits.in_flight_bytes
    }

    /// Begins a request.
    pub fn begin(&mut self, bytes: usize) -> Ticket {
        self.queue.push_back(Entry {
            bytes,
            slot: Slot::Waiting,
        });
        self.bytes += bytes;
        self.waiting += 1;
        Ticket(self.first + self.queue.len() as u64 - 1)
    }

    /// Takes back the request that was begun last.
    pub fn undo(&mut self, ticket: Ticket) {
        if ticket.0 + 1 == self.first + self.queue.len() as u64
            && let Some(entry) = self.queue.pop_back()
        {
            self.bytes -= entry.bytes;
            self.waiting -= usize::from(matches!(entry.slot, Slot::Waiting));
        }
    }

    /// Completes a request with an answer of `bytes` bytes; `None`: it takes none (acks=0). A ticket that was
    /// answered before is ignored.
    pub fn answer(&mut self, ticket: Ticket, answer: Option<A>, bytes: usize) {
        let at = ticket.0.wrapping_sub(self.first);
        let entry = usize::try_from(at)
            .ok()
            .and_then(|at| self.queue.get_mut(at));
        if let Some(entry) = entry
            && matches!(entry.slot, Slot::Waiting)
        {
            entry.slot = Slot::Answered(answer);
            self.waiting -= 1;
            self.unsent += bytes;
        }
    }

    /// The next answer to be sent; `None`: the oldest request is not answered.
    pub fn next_answer(&mut self) -> Option<A> {
        while let Some(entry) = self.queue.front()
            && matches!(entry.slot, Slot::Answered(_))
        {
            let entry = self.queue.pop_front()?;
            self.first += 1;
            self.bytes -= entry.bytes;
            if self.queue.is_empty() && self.queue.capacity() > IDLE_SLOTS {
                // An idle connection holds no memory for a busy past.
                self.queue = VecDeque::new();
            }
            if let Slot::Answered(Some(answer)) = entry.slot {
                return Some(answer);
            }
        }
        None
    }

    /// So many bytes of the answers were sent.
    pub fn sent(&mut self, bytes: usize) {
        self.unsent = self.unsent.saturating_sub(bytes);
    }

    /// Requests begun whose answer was not taken.
    pub fn in_flight(&self) -> usize {
        self.queue.len()
    }

    /// Requests that are not completed.
    pub fn waiting(&self) -> usize {
        self.waiting
    }

    /// The client's id, empty where it said none.
    pub fn client_id(&self) -> &str {
        self.client_id.as_deref().unwrap_or_default()
    }

    /// The client's software, empty where it did not say.
    pub fn software(&self) -> &str {
        self.software.as_deref().unwrap_or_default()
    }

    /// Remembers the client id of a request.
    pub fn set_client_id(&mut self, id: Option<&str>) {
        if id.unwrap_or_default() != self.client_id() {
            self.client_id = id.map(|id| cut(id).into());
        }
    }

    /// Remembers what ApiVersions said of the client's software.
    pub fn set_software(&mut self, name: &str, version: &str) {
        self.software = Some(format!("{} {}", cut(name), cut(version)).into());
    }
}

fn cut(name: &str) -> &str {
    let mut end = name.len().min(NAME_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn requests_are_framed_whole_or_not_at_all() {
        let mut bytes = 9i32.to_be_bytes().to_vec();
        bytes.extend_from_slice(b"123456789rest");
        for cut in 0..LENGTH_LEN {
            assert_eq!(
                frame(&bytes[..cut], REQUEST_MIN..=100),
                Framing::Partial { need: 4 }
            );
        }
        for cut in LENGTH_LEN..13 {
            assert_eq!(
                frame(&bytes[..cut], REQUEST_MIN..=100),
                Framing::Partial { need: 13 }
            );
        }
        assert_eq!(
            frame(&bytes, REQUEST_MIN..=100),
            Framing::Request(b"123456789")
        );
        assert_eq!(frame(&bytes, REQUEST_MIN..=8), Framing::BadLength(9));
        for wrong in [-1, 0, 7, i32::MIN, i32::MAX] {
            assert_eq!(
                frame(&wrong.to_be_bytes(), REQUEST_MIN..=100),
                Framing::BadLength(wrong)
            );
        }
    }

    #[test]
    fn a_request_that_is_no_produce_waits_for_all_before_it() {
        let limits = Limits::default();
        let mut session = Session::default();
        assert!(session.admits(true, 10, &limits));
        let first = session.begin(10);
        assert!(session.admits(false, 10, &limits));
        assert!(!session.admits(true, 10, &limits));
        let second = session.begin(10);
        session.answer(second, Some('b'), 1);
        assert!(!session.admits(true, 10, &limits));
        session.answer(first, Some('a'), 1);
        assert!(session.admits(true, 10, &limits), "nothing waits");
        assert_eq!(session.next_answer(), Some('a'));
        assert_eq!(session.next_answer(), Some('b'));
        assert_eq!(session.next_answer(), None);
    }

    #[test]
    fn who_takes_no_answers_gets_no_more() {
        let limits = Limits {
            unsent: 100,
            ..Limits::default()
        };
        let mut session = Session::default();
        for _ in 0..2 {
            assert!(session.admits(true, 10, &limits));
            let ticket = session.begin(10);
            session.answer(ticket, Some(()), 60);
            // The transport has it, and does not get rid of it.
            assert_eq!(session.next_answer(), Some(()));
        }
        assert!(!session.admits(true, 10, &limits));
        assert!(!session.admits(false, 10, &limits));
        session.sent(19);
        assert!(!session.admits(false, 10, &limits));
        session.sent(1);
        assert!(session.admits(true, 10, &limits));
    }

    #[test]
    fn limits_hold_but_one_large_request_always_passes() {
        let limits = Limits {
            request: 1000,
            in_flight: 3,
            in_flight_bytes: 100,
            unsent: 1000,
        };
        let mut session = Session::<()>::default();
        assert!(session.admits(false, 1000, &limits));
        let large = session.begin(1000);
        assert!(!session.admits(false, 1, &limits));
        session.answer(large, None, 0);
        assert_eq!(session.next_answer(), None);
        for _ in 0..3 {
            assert!(session.admits(false, 10, &limits));
            session.begin(10);
        }
        assert!(!session.admits(false, 10, &limits));
    }

    #[test]
    fn names_are_cut_at_a_character() {
        let mut session = Session::<()>::default();
        session.set_client_id(Some(&"ä".repeat(63)));
        assert_eq!(session.client_id(), "ä".repeat(32));
        session.set_client_id(None);
        assert_eq!(session.client_id(), "");
        session.set_software("librdkafka", "2.0.2");
        assert_eq!(session.software(), "librdkafka 2.0.2");
    }

    proptest! {
        /// Answers completed in any order leave in the order of their requests.
        #[test]
        fn answers_keep_their_order(steps in prop::collection::vec((0u8..3, any::<u16>(), any::<bool>()), 1..200)) {
            let mut session = Session::default();
            let mut open: Vec<(Ticket, u32)> = Vec::new();
            let (mut begun, mut silent, mut sent) = (0u32, Vec::new(), Vec::new());
            for (step, pick, answered) in steps {
                match step {
                    0 => {
                        open.push((session.begin(usize::from(pick)), begun));
                        begun += 1;
                    }
                    1 if !open.is_empty() => {
                        let (ticket, number) = open.swap_remove(usize::from(pick) % open.len());
                        session.answer(ticket, answered.then_some(number), 1);
                        if !answered {
                            silent.push(number);
                        }
                        session.answer(ticket, Some(u32::MAX), 1);
                    }
                    _ => sent.extend(session.next_answer()),
                }
            }
            for (ticket, number) in open.drain(..) {
                session.answer(ticket, Some(number), 1);
            }
            while let Some(answer) = session.next_answer() {
                sent.push(answer);
            }
            let expected: Vec<u32> = (0..begun).filter(|n| !silent.contains(n)).collect();
            prop_assert_eq!(sent, expected);
            prop_assert_eq!((session.in_flight(), session.waiting(), session.bytes), (0, 0, 0));
        }
    }
}
