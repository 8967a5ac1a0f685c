//! What a service sees of connections: input, output, and the table of them.
//!
//! Invariant: a slot whose connection's input, output or flow changed is in `touched` until the
//! endpoint has settled it, once.

use std::collections::VecDeque;
use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::buffer::{Buffer, Pool};
use super::{CloseReason, ConnectionId, End, Request};

/// A part of an answer.
pub enum Piece {
    /// Owned bytes.
    Bytes(Vec<u8>),
    /// A range of bytes that others may hold too. `as_ref` must give the same bytes each time.
    Shared(Arc<dyn AsRef<[u8]> + Send + Sync>, Range<usize>),
}

impl Piece {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Shared(bytes, range) => &(**bytes).as_ref()[range.clone()],
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.len(),
            Self::Shared(_, range) => range.len(),
        }
    }

    fn owned(&self) -> usize {
        match self {
            Self::Bytes(bytes) => bytes.capacity(),
            Self::Shared(..) => 0,
        }
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "Bytes({})", bytes.len()),
            Self::Shared(_, range) => write!(f, "Shared({range:?})"),
        }
    }
}

/// Answers that wait to be sent, in order.
#[derive(Debug, Default)]
pub struct Output {
    queue: VecDeque<Piece>,
    /// Bytes in `queue`.
    queued: usize,
    /// Bytes that the transport has taken and not yet sent.
    pub(super) sending: usize,
    /// Capacity of owned pieces in `queue` and of those being sent.
    pub(super) owned: usize,
    /// [`Limits::output`](super::Limits::output).
    limit: usize,
}

impl Output {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// Appends owned bytes; empty ones are dropped.
    pub fn push(&mut self, bytes: Vec<u8>) {
        self.push_piece(Piece::Bytes(bytes));
    }

    /// Appends `range` of shared bytes.
    ///
    /// # Panics
    /// When the range is not within the bytes.
    pub fn push_shared(&mut self, bytes: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) {
        assert!(
            range.start <= range.end && range.end <= (*bytes).as_ref().len(),
            "a shared piece within its bytes"
        );
        self.push_piece(Piece::Shared(bytes, range));
    }

    fn push_piece(&mut self, piece: Piece) {
        if piece.len() > 0 {
            self.queued += piece.len();
            self.owned += piece.owned();
            self.queue.push_back(piece);
        }
    }

    /// Bytes not yet sent.
    pub fn len(&self) -> usize {
        self.queued + self.sending
    }

    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the limit is reached: a service should answer no more requests of this connection now.
    pub fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Bytes until [`is_full`](Self::is_full); a fetch may use it as a bound.
    pub fn room(&self) -> usize {
        self.limit.saturating_sub(self.len())
    }

    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Moves pieces to `into` until it has `max_pieces` or at least `max_bytes`; they count as
    /// being sent until [`sent`](Self::sent).
    pub(super) fn take_pieces(
        &mut self,
        into: &mut Vec<Piece>,
        max_pieces: usize,
        max_bytes: usize,
    ) {
        let mut bytes = 0;
        while into.len() < max_pieces && bytes < max_bytes {
            let Some(piece) = self.queue.pop_front() else {
                break;
            };
            bytes += piece.len();
            self.queued -= piece.len();
            into.push(piece);
        }
        self.sending += bytes;
        if self.queue.is_empty() && self.queue.capacity() > 4 {
            self.queue = VecDeque::new();
        }
    }

    /// The kernel took `bytes` of the pieces being sent.
    pub(super) fn sent(&mut self, bytes: usize) {
        self.sending -= bytes;
    }

    /// Pieces being sent that are done with.
    pub(super) fn finished(&mut self, pieces: &[Piece]) {
        self.owned -= pieces.iter().map(Piece::owned).sum::<usize>();
    }

    fn clear(&mut self) {
        self.owned -= self.queue.iter().map(Piece::owned).sum::<usize>();
        self.queue = VecDeque::new();
        self.queued = 0;
    }
}

/// The received bytes that are not yet consumed.
pub struct Input<'a> {
    pub(super) inbox: &'a mut Inbox,
    /// Where they lie when the inbox has none.
    pub(super) fresh: &'a [u8],
    pub(super) pool: &'a Rc<Pool>,
    pub(super) id: ConnectionId,
    /// Bytes consumed so far, in all of this call.
    pub(super) consumed: usize,
    /// Bytes of taken requests in this call.
    pub(super) taken: usize,
    /// What `need` was told.
    pub(super) needed: usize,
}

impl Input<'_> {
    /// The bytes, in one piece.
    pub fn bytes(&self) -> &[u8] {
        match &self.inbox.buffer {
            Some(buffer) => &buffer.bytes()[self.inbox.start..],
            None => self.fresh,
        }
    }

    /// Passes over the first `len` bytes.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn consume(&mut self, len: usize) {
        assert!(len <= self.bytes().len(), "consumes what is there");
        self.consumed += len;
        self.needed = 0;
        if self.inbox.buffer.is_some() {
            self.inbox.start += len;
            self.inbox.tidy();
        } else {
            self.fresh = &self.fresh[len..];
        }
    }

    /// Takes the first `len` bytes to own them; a request that came in several parts is not copied
    /// again.
    ///
    /// # Panics
    /// When there are not so many.
    pub fn take(&mut self, len: usize) -> Request {
        assert!(len <= self.bytes().len(), "takes what is there");
        self.taken += len;
        let start = self.inbox.start;
        if let Some(buffer) = self.inbox.buffer.take_if(|buffer| {
            start + len == buffer.bytes().len() && buffer.capacity() <= 2 * len.max(512)
        }) {
            self.inbox.start = 0;
            self.consumed += len;
            self.needed = 0;
            return Request::new(buffer, start..start + len, self.id);
        }
        let mut buffer = self.pool.get(len);
        buffer.append(&self.bytes()[..len]);
        self.consume(len);
        Request::new(buffer, 0..len, self.id)
    }

    /// Says that nothing can be done until [`bytes`](Self::bytes) has `len` bytes. Forgotten when
    /// something is consumed after.
    pub fn need(&mut self, len: usize) {
        self.needed = len;
    }
}

/// First size of a buffer for a request that is not complete: what its sender says of its length is
/// believed only so far, beyond that by what has come.
const FIRST_BUFFER: usize = 64 << 10;
/// How many times its received bytes a longer request's buffer may have; what is copied once more when
/// it grows is at most one in so many bytes.
const GROWTH: usize = 8;

/// Bytes of a connection that could not be consumed yet.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pub(super) buffer: Option<Buffer>,
    pub(super) start: usize,
    /// Length at which the service is called again.
    pub(super) need: usize,
}

impl Inbox {
    pub(super) fn len(&self) -> usize {
        match &self.buffer {
            Some(buffer) => buffer.bytes().len() - self.start,
            None => 0,
        }
    }

    /// Gives an empty buffer back.
    fn tidy(&mut self) {
        if self.len() == 0 {
            self.buffer = None;
            self.start = 0;
        }
    }

    /// Appends, with room for `need` bytes in all where that may be.
    pub(super) fn append(&mut self, bytes: &[u8], pool: &Rc<Pool>) {
        if bytes.is_empty() {
            return;
        }
        let fits = self
            .buffer
            .as_ref()
            .is_some_and(|buffer| buffer.room() >= bytes.len());
        if !fits {
            let all = self.len() + bytes.len();
            let hint = self.need.min(FIRST_BUFFER.max(all.saturating_mul(GROWTH)));
            let mut buffer = pool.get(all.max(hint));
            if let Some(old) = &self.buffer {
                buffer.append(&old.bytes()[self.start..]);
            }
            self.buffer = Some(buffer);
            self.start = 0;
        }
        if let Some(buffer) = &mut self.buffer {
            buffer.append(bytes);
        }
    }
}

/// How far the end of a connection's input has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// More may come.
    No,
    /// Nothing more will come; the service does not know yet.
    Pending(End),
    /// The service knows.
    Told(End),
}

/// A connection beside what its service keeps.
#[derive(Debug)]
pub(super) struct Io {
    pub(super) id: ConnectionId,
    pub(super) source: IpAddr,
    pub(super) inbox: Inbox,
    pub(super) out: Output,
    /// Bytes of taken requests that are not dropped.
    pub(super) in_flight: usize,
    /// `out.owned` as counted into the thread's memory.
    pub(super) counted: usize,
    pub(super) paused: bool,
    /// Whether the service was not called for a limit, when last looked at.
    pub(super) blocked: bool,
    /// Whether it is in the list of those that wait for the thread's memory.
    pub(super) starved: bool,
    pub(super) ended: Ended,
    /// Set once: why it is being closed.
    pub(super) closing: Option<CloseReason>,
    /// What is queued shall not be sent.
    pub(super) abort: bool,
    /// Monotonic nanoseconds of the last byte in or out.
    pub(super) active: u64,
    /// When the first byte of the incomplete request came.
    pub(super) request_since: Option<u64>,
    /// When output was queued or the peer last took some.
    pub(super) output_since: Option<u64>,
}

impl Io {
    pub(super) fn close(&mut self, reason: CloseReason, abort: bool) {
        if self.closing.is_none() {
            self.closing = Some(reason);
        }
        if abort {
            self.abort = true;
            self.out.clear();
        }
        self.inbox = Inbox::default();
        self.request_since = None;
    }
}

pub(super) struct Entry<C> {
    pub(super) state: C,
    pub(super) io: Io,
}

struct Slot<C> {
    generation: u32,
    touched: bool,
    entry: Option<Box<Entry<C>>>,
}

/// All connections of a loop.
pub struct Connections<C> {
    slots: Vec<Slot<C>>,
    free: Vec<u32>,
    touched: Vec<u32>,
    len: usize,
}

impl<C> Connections<C> {
    pub(super) fn new() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            touched: Vec::new(),
            len: 0,
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The service's state and the output of a connection that is open and not being closed.
    pub fn get(&mut self, id: ConnectionId) -> Option<(&mut C, &mut Output)> {
        self.touch(id);
        let entry = self.entry_mut(id)?;
        if entry.io.closing.is_some() {
            return None;
        }
        Some((&mut entry.state, &mut entry.io.out))
    }

    /// The service's state, only to look at.
    pub fn peek(&self, id: ConnectionId) -> Option<&C> {
        self.entry(id).map(|entry| &entry.state)
    }

    /// Ends [`Flow::Pause`](super::Flow::Pause): `received` is called again, with bytes left over too.
    pub fn resume(&mut self, id: ConnectionId) {
        self.touch(id);
        if let Some(entry) = self.entry_mut(id) {
            entry.io.paused = false;
            // What is left over may hold whole requests that the service did not want before.
            entry.io.inbox.need = 0;
        }
    }

    /// Sends what is queued, then closes.
    pub fn close(&mut self, id: ConnectionId) {
        self.touch(id);
        if let Some(entry) = self.entry_mut(id) {
            let reason = match entry.io.ended {
                Ended::No => CloseReason::Service,
                Ended::Pending(end) | Ended::Told(end) => end.reason(),
            };
            entry.io.close(reason, false);
        }
    }

    /// Closes at once.
    pub fn abort(&mut self, id: ConnectionId) {
        self.touch(id);
        if let Some(entry) = self.entry_mut(id) {
            entry.io.close(CloseReason::Service, true);
        }
    }

    /// Ids of all connections.
    pub fn ids(&self) -> impl Iterator<Item = ConnectionId> + '_ {
        self.slots
            .iter()
            .filter_map(|slot| Some(slot.entry.as_ref()?.io.id))
    }

    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }

    pub(super) fn id_in(&self, slot: usize) -> Option<ConnectionId> {
        Some(self.slots.get(slot)?.entry.as_ref()?.io.id)
    }

    pub(super) fn entry(&self, id: ConnectionId) -> Option<&Entry<C>> {
        let slot = self.slots.get(id.slot as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        slot.entry.as_deref()
    }

    pub(super) fn entry_mut(&mut self, id: ConnectionId) -> Option<&mut Entry<C>> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        if slot.generation != id.generation {
            return None;
        }
        slot.entry.as_deref_mut()
    }

    /// An id for a connection; a slot stays taken until [`insert`](Self::insert) or
    /// [`forget`](Self::forget).
    pub(super) fn reserve(&mut self) -> ConnectionId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                touched: false,
                entry: None,
            });
            (self.slots.len() - 1) as u32
        });
        ConnectionId {
            slot,
            generation: self.slots[slot as usize].generation,
        }
    }

    pub(super) fn insert(&mut self, id: ConnectionId, entry: Entry<C>) {
        self.slots[id.slot as usize].entry = Some(Box::new(entry));
        self.len += 1;
    }

    pub(super) fn forget(&mut self, id: ConnectionId) {
        let slot = &mut self.slots[id.slot as usize];
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(id.slot);
    }

    pub(super) fn remove(&mut self, id: ConnectionId) -> Option<Entry<C>> {
        self.entry(id)?;
        let entry = self.slots[id.slot as usize].entry.take()?;
        self.len -= 1;
        self.forget(id);
        Some(*entry)
    }

    pub(super) fn touch(&mut self, id: ConnectionId) {
        if let Some(slot) = self.slots.get_mut(id.slot as usize)
            && slot.generation == id.generation
            && !slot.touched
        {
            slot.touched = true;
            self.touched.push(id.slot);
        }
    }

    /// A touched connection, not touched any more.
    pub(super) fn pop_touched(&mut self) -> Option<ConnectionId> {
        while let Some(slot) = self.touched.pop() {
            let slot = &mut self.slots[slot as usize];
            slot.touched = false;
            if let Some(entry) = &slot.entry {
                return Some(entry.io.id);
            }
        }
        None
    }

    pub(super) fn has_touched(&self) -> bool {
        !self.touched.is_empty()
    }
}
