//! Sockets by io_uring: multishot accepts and receives into provided buffers, sends that are submitted together with the
//! wait for what comes next.
//!
//! Sources: io_uring(7), io_uring_enter(2). Invariants:
//!
//! - A slot of the table is used again only when the kernel has completed everything that was submitted for its
//!   connection, and its generation goes up each time: a late completion finds nobody.
//! - What the kernel may read or write (pieces, a request's buffer, provided buffers) is owned here until the completion
//!   that is the last one for it.
//! - A connection that is not read from has its receive cancelled when the first bytes arrive. Its bytes are copied out
//!   of the provided buffers up to [`Ring::memory`] in all; beyond that they keep their buffers, and when all are taken
//!   (ENOBUFS) nobody is received from before some come back.

use std::collections::VecDeque;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Flags};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};

use super::buffers::{BUFFER, Buffers, GROUP};
use super::outbox::PIECES;
use super::{Chunk, Event, Id, Origin, Socket};
use crate::storage::Piece;

/// Submissions between two system calls; more take one more call.
const SUBMISSIONS: u32 = 512;
/// Completions that wait to be looked at; the kernel keeps what is more.
const COMPLETIONS: u32 = 4096;
/// Bytes of a request that are waited for by one receive: whoever sends slowly is seen to send.
const FILL: usize = 256 << 10;
/// Messages kept to be used again.
const MESSAGES: usize = 64;
/// How long the end waits for the kernel to let go of memory, which takes microseconds.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// What a completion is of; with the slot's generation and its place it makes the name of a submission.
mod of {
    pub const WAKE: u64 = 1;
    pub const ACCEPT: u64 = 2;
    pub const RECEIVE: u64 = 3;
    pub const FILL: u64 = 4;
    pub const SEND: u64 = 5;
    pub const WRITABLE: u64 = 6;
    pub const CANCEL: u64 = 7;
}

/// Bits of a generation in a name.
const GENERATION: u32 = (1 << 24) - 1;

fn name(of: u64, generation: u32, key: u32) -> u64 {
    of << 56 | u64::from(generation & GENERATION) << 32 | u64::from(key)
}

/// Pieces on their way, and what the kernel needs to find them.
#[derive(Default)]
pub struct Message {
    pub(super) pieces: Vec<Piece>,
    slices: Vec<libc::iovec>,
    header: Option<libc::msghdr>,
}

// SAFETY: the pointers are to the message's own pieces and slices, or to nothing.
unsafe impl Send for Message {}

impl std::fmt::Debug for Message {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.pieces.fmt(f)
    }
}

/// What is received for a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receive {
    /// Nothing.
    Not,
    /// Whatever comes, into provided buffers.
    Ahead,
    /// That no longer, as soon as the kernel has said so.
    Cancelled,
    /// The rest of a request, where the request is.
    Rest,
}

struct Slot {
    generation: u32,
    id: Id,
    fd: RawFd,
    open: bool,
    /// When it is closed, until the kernel has completed everything.
    stream: Option<TcpStream>,
    receive: Receive,
    sending: Option<Box<Message>>,
    called_back: bool,
    /// Whether it is told when it is writable.
    polled: bool,
    /// The buffer that the rest of a request is received into.
    rest: Option<Vec<u8>>,
    /// Received and not read.
    unread: VecDeque<Chunk>,
    ended: bool,
    error: Option<i32>,
    /// The reader waits.
    wanted: bool,
    /// It waits for buffers.
    dry: bool,
    /// It is in the list of those whose unread bytes are looked at.
    listed: bool,
    /// Its last request was large: then one receive for its beginning is enough.
    large: bool,
}

impl Slot {
    /// Whether the kernel may still say something of it.
    fn is_busy(&self) -> bool {
        self.receive != Receive::Not || self.sending.is_some() || self.polled
    }
}

struct Listening {
    listener: TcpListener,
    armed: bool,
}

/// A thread's ring.
pub(super) struct Ring {
    ring: IoUring,
    buffers: Option<Buffers>,
    wake: RawFd,
    wake_armed: bool,
    listeners: Vec<Listening>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots that received something.
    received: Vec<u32>,
    /// Slots that wait for buffers.
    dry: Vec<u32>,
    /// Bytes copied out of provided buffers.
    copied: usize,
    sending: usize,
    // Boxes, as the kernel is told where a message's parts lie.
    #[allow(clippy::vec_box)]
    messages: Vec<Box<Message>>,
    completions: Vec<cqueue::Entry>,
}

fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

/// A completion's result.
fn result(code: i32) -> io::Result<usize> {
    usize::try_from(code).map_err(|_| io::Error::from_raw_os_error(-code))
}

impl Ring {
    pub(super) fn new(wake: RawFd, memory: usize) -> io::Result<Self> {
        let ring = IoUring::builder()
            // One thread uses it (`start` says which), and completions are made when it asks for them.
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_r_disabled()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)?;
        let params = ring.params();
        if !params.is_feature_ext_arg() || !params.is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // Half of it in provided buffers, half for what is copied out of them.
        let buffers = Buffers::new(&ring, memory / 2)?;
        Ok(Self {
            ring,
            buffers: Some(buffers),
            wake,
            wake_armed: false,
            listeners: Vec::new(),
            slots: Vec::new(),
            free: Vec::new(),
            received: Vec::new(),
            dry: Vec::new(),
            copied: 0,
            sending: 0,
            messages: Vec::new(),
            completions: Vec::new(),
        })
    }

    pub(super) fn listen(&mut self, listeners: Vec<TcpListener>) {
        let all = listeners.into_iter().map(|listener| Listening {
            listener,
            armed: false,
        });
        self.listeners.extend(all);
    }

    pub(super) fn start(&mut self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()
    }

    pub(super) fn memory(&self) -> usize {
        2 * self.provided()
    }

    /// Bytes of all provided buffers.
    fn provided(&self) -> usize {
        self.buffers.as_ref().map_or(0, Buffers::len) * BUFFER
    }

    pub(super) fn sending(&self) -> usize {
        self.sending
    }

    pub(super) fn is_dry(&self) -> bool {
        !self.dry.is_empty() && self.free() == 0
    }

    /// Provided buffers that the kernel has.
    fn free(&self) -> usize {
        self.buffers.as_ref().map_or(0, Buffers::free)
    }

    pub(super) fn add(&mut self, stream: TcpStream, id: Id) -> Socket {
        let key = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                id,
                fd: -1,
                open: false,
                stream: None,
                receive: Receive::Not,
                sending: None,
                called_back: false,
                polled: false,
                rest: None,
                unread: VecDeque::new(),
                ended: false,
                error: None,
                wanted: false,
                dry: false,
                listed: false,
                large: false,
            });
            self.slots.len() as u32 - 1
        });
        let slot = &mut self.slots[key as usize];
        (slot.id, slot.fd, slot.open) = (id, stream.as_raw_fd(), true);
        Socket { stream, key }
    }

    pub(super) fn close(&mut self, socket: Socket) {
        let Socket { stream, key } = socket;
        let slot = &mut self.slots[key as usize];
        slot.open = false;
        slot.stream = Some(stream);
        let unread = std::mem::take(&mut slot.unread);
        let generation = slot.generation;
        let receiving = match slot.receive {
            Receive::Ahead => Some(of::RECEIVE),
            Receive::Rest => Some(of::FILL),
            Receive::Not | Receive::Cancelled => None,
        };
        let sending = slot.sending.is_some().then_some(of::SEND);
        let polled = slot.polled.then_some(of::WRITABLE);
        // The kernel takes submissions in their order, so what was handed over is tried before it is cancelled.
        for of in [receiving, sending, polled].into_iter().flatten() {
            self.cancel(name(of, generation, key));
        }
        unread.into_iter().for_each(|chunk| self.forget(chunk));
        self.free_if_done(key);
    }

    pub(super) fn stop_listening(&mut self) {
        for (at, listening) in std::mem::take(&mut self.listeners).into_iter().enumerate() {
            if listening.armed {
                self.cancel(name(of::ACCEPT, 0, at as u32));
            }
        }
    }

    /// Lets a slot be used again when the kernel is through with it.
    fn free_if_done(&mut self, key: u32) {
        let slot = &mut self.slots[key as usize];
        if slot.open || slot.is_busy() {
            return;
        }
        if slot.stream.take().is_some() {
            slot.generation = slot.generation.wrapping_add(1);
            slot.unread = VecDeque::new();
            (slot.ended, slot.error, slot.wanted) = (false, None, false);
            (slot.large, slot.called_back) = (false, false);
            self.free.push(key);
        }
    }

    fn push(&mut self, entry: &Entry) {
        loop {
            // SAFETY: what the entry points to is owned by `self` until its last completion (see the invariants).
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return;
            }
            // It is full. What cannot be submitted now, as the kernel lacks memory, is tried until it has some.
            if self.ring.submit().is_err() {
                std::thread::yield_now();
            }
        }
    }

    fn cancel(&mut self, what: u64) {
        let entry = opcode::AsyncCancel::new(what)
            .build()
            .flags(Flags::SKIP_SUCCESS)
            .user_data(name(of::CANCEL, 0, 0));
        self.push(&entry);
    }

    /// Drops a chunk that nobody reads.
    fn forget(&mut self, chunk: Chunk) {
        match chunk.origin {
            Origin::Ring(number) => self.give(number, chunk.bytes),
            Origin::Heap => self.copied -= chunk.bytes.len(),
            Origin::Scratch => {}
        }
    }

    pub(super) fn give(&mut self, number: u16, bytes: Vec<u8>) {
        if let Some(buffers) = &mut self.buffers {
            buffers.give(number, bytes);
        }
    }

    /// Receives for a connection whose reader waits.
    fn receive(&mut self, key: u32) {
        let slot = &mut self.slots[key as usize];
        slot.wanted = true;
        if slot.receive != Receive::Not || slot.dry {
            return;
        }
        slot.receive = Receive::Ahead;
        let (name, fd) = (name(of::RECEIVE, slot.generation, key), Fd(slot.fd));
        let entry = if std::mem::take(&mut slot.large) {
            let receive = opcode::Recv::new(fd, std::ptr::null_mut(), 0).buf_group(GROUP);
            receive.build().flags(Flags::BUFFER_SELECT)
        } else {
            opcode::RecvMulti::new(fd, GROUP).build()
        };
        self.push(&entry.user_data(name));
    }

    /// What keeps a connection from being received from: its end, or an error.
    fn over(&mut self, key: u32) -> Option<io::Result<usize>> {
        let slot = &mut self.slots[key as usize];
        match slot.error {
            Some(code) => Some(Err(io::Error::from_raw_os_error(code))),
            None => slot.ended.then_some(Ok(0)),
        }
    }

    pub(super) fn read(&mut self, socket: &Socket) -> io::Result<Chunk> {
        let slot = &mut self.slots[socket.key as usize];
        if let Some(chunk) = slot.unread.pop_front() {
            if slot.unread.is_empty() {
                // An idle connection holds no memory for a busy past.
                slot.unread = VecDeque::new();
            }
            if matches!(chunk.origin, Origin::Heap) {
                self.copied -= chunk.bytes.len();
            }
            return Ok(chunk);
        }
        match self.over(socket.key) {
            Some(over) => over.map(|_| Chunk {
                bytes: Vec::new(),
                start: 0,
                end: 0,
                origin: Origin::Heap,
            }),
            None => {
                self.receive(socket.key);
                Err(would_block())
            }
        }
    }

    pub(super) fn copy(&mut self, socket: &Socket, into: &mut [u8]) -> io::Result<usize> {
        let mut chunk = self.read(socket)?;
        let len = chunk.len().min(into.len());
        into[..len].copy_from_slice(&chunk[..len]);
        chunk.start += len;
        if chunk.is_empty() {
            if let Origin::Ring(number) = chunk.origin {
                self.give(number, chunk.bytes);
            }
        } else {
            if matches!(chunk.origin, Origin::Heap) {
                self.copied += chunk.bytes.len();
            }
            self.slots[socket.key as usize].unread.push_front(chunk);
        }
        Ok(len)
    }

    pub(super) fn fill(
        &mut self,
        socket: &Socket,
        input: &mut Vec<u8>,
        rest: usize,
    ) -> io::Result<usize> {
        let key = socket.key;
        input.reserve_exact(rest);
        if !self.slots[key as usize].unread.is_empty() {
            let at = input.len();
            let more = rest.min(BUFFER);
            input.resize(at + more, 0);
            let copied = self.copy(socket, &mut input[at..]);
            input.truncate(at + *copied.as_ref().unwrap_or(&0));
            return copied;
        }
        if let Some(over) = self.over(key) {
            return over;
        }
        let slot = &mut self.slots[key as usize];
        slot.wanted = true;
        match slot.receive {
            Receive::Not => {}
            Receive::Ahead => {
                // What has arrived until it is cancelled comes first.
                slot.receive = Receive::Cancelled;
                let name = name(of::RECEIVE, slot.generation, key);
                self.cancel(name);
                return Err(would_block());
            }
            Receive::Cancelled | Receive::Rest => return Err(would_block()),
        }
        (slot.receive, slot.large) = (Receive::Rest, true);
        let mut buffer = std::mem::take(input);
        let len = rest.min(FILL);
        let room = buffer.spare_capacity_mut()[..len].as_mut_ptr().cast();
        slot.rest = Some(buffer);
        let entry = opcode::Recv::new(Fd(socket.as_raw_fd()), room, len as u32)
            .flags(libc::MSG_WAITALL)
            .build()
            .user_data(name(of::FILL, slot.generation, key));
        self.push(&entry);
        Err(would_block())
    }

    /// An empty message.
    pub(super) fn message(&mut self) -> Box<Message> {
        self.messages.pop().unwrap_or_default()
    }

    /// Takes an empty message back.
    pub(super) fn recycle(&mut self, message: Box<Message>) {
        if self.messages.len() < MESSAGES {
            self.messages.push(message);
        }
    }

    /// Sends a message's pieces, the first from byte `from` on; none of the connection's is on its way.
    pub(super) fn send(&mut self, socket: &Socket, mut message: Box<Message>, from: usize) {
        let slot = &mut self.slots[socket.key as usize];
        debug_assert!(slot.sending.is_none() && message.pieces.len() <= PIECES);
        let name = name(of::SEND, slot.generation, socket.key);
        let fd = Fd(socket.as_raw_fd());
        message.slices.clear();
        for (at, piece) in message.pieces.iter().enumerate() {
            let bytes = &piece[if at == 0 { from } else { 0 }..];
            message.slices.push(libc::iovec {
                iov_base: bytes.as_ptr().cast_mut().cast(),
                iov_len: bytes.len(),
            });
        }
        let entry = match &message.slices[..] {
            [one] => opcode::Send::new(fd, one.iov_base.cast(), one.iov_len as u32)
                .flags(libc::MSG_NOSIGNAL)
                .build(),
            _ => {
                // SAFETY: all zero is a header of no message.
                let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
                header.msg_iov = message.slices.as_mut_ptr();
                header.msg_iovlen = message.slices.len();
                let header: *const libc::msghdr = message.header.insert(header);
                opcode::SendMsg::new(fd, header)
                    .flags(libc::MSG_NOSIGNAL as u32)
                    .build()
            }
        };
        slot.sending = Some(message);
        self.sending += 1;
        self.push(&entry.user_data(name));
    }

    /// Tells when the socket takes something again.
    pub(super) fn poll_writable(&mut self, socket: &Socket) {
        let slot = &mut self.slots[socket.key as usize];
        if std::mem::replace(&mut slot.polled, true) {
            return;
        }
        let name = name(of::WRITABLE, slot.generation, socket.key);
        let entry = opcode::PollAdd::new(Fd(socket.as_raw_fd()), libc::POLLOUT as u32).build();
        self.push(&entry.user_data(name));
    }

    pub(super) fn call_back(&mut self, socket: &Socket) {
        let slot = &mut self.slots[socket.key as usize];
        if slot.sending.is_some() && !std::mem::replace(&mut slot.called_back, true) {
            let name = name(of::SEND, slot.generation, socket.key);
            self.cancel(name);
        }
    }

    /// Looks after what was received and is not read, and arms what has to be.
    fn settle(&mut self) {
        for key in std::mem::take(&mut self.received) {
            let slot = &mut self.slots[key as usize];
            slot.listed = false;
            if slot.unread.is_empty() {
                continue;
            }
            if slot.receive == Receive::Ahead {
                slot.receive = Receive::Cancelled;
                let name = name(of::RECEIVE, slot.generation, key);
                self.cancel(name);
            }
            let bound = self.provided();
            let mut unread = std::mem::take(&mut self.slots[key as usize].unread);
            for chunk in &mut unread {
                if matches!(chunk.origin, Origin::Ring(_)) && self.copied + chunk.len() <= bound {
                    let copy = Chunk {
                        bytes: chunk.to_vec(),
                        start: 0,
                        end: chunk.len(),
                        origin: Origin::Heap,
                    };
                    self.copied += copy.len();
                    let full = std::mem::replace(chunk, copy);
                    self.forget(full);
                }
            }
            self.slots[key as usize].unread = unread;
        }
        if !self.dry.is_empty() && self.free() > 0 {
            for key in std::mem::take(&mut self.dry) {
                let slot = &mut self.slots[key as usize];
                slot.dry = false;
                if slot.open && slot.wanted {
                    self.receive(key);
                }
            }
        }
        for at in 0..self.listeners.len() {
            let listening = &mut self.listeners[at];
            if !std::mem::replace(&mut listening.armed, true) {
                let fd = Fd(listening.listener.as_raw_fd());
                let entry = opcode::AcceptMulti::new(fd)
                    .flags(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)
                    .build()
                    .user_data(name(of::ACCEPT, 0, at as u32));
                self.push(&entry);
            }
        }
        if !std::mem::replace(&mut self.wake_armed, true) {
            let entry = opcode::PollAdd::new(Fd(self.wake), libc::POLLIN as u32)
                .multi(true)
                .build()
                .user_data(name(of::WAKE, 0, 0));
            self.push(&entry);
        }
    }

    pub(super) fn wait(&mut self, time: Duration, events: &mut Vec<Event>) -> io::Result<()> {
        self.settle();
        let submissions = self.ring.submission();
        let idle = submissions.is_empty() && !submissions.taskrun() && !submissions.cq_overflow();
        drop(submissions);
        let submitter = self.ring.submitter();
        let entered = if !time.is_zero() {
            let time = Timespec::from(time);
            submitter.submit_with_args(1, &SubmitArgs::new().timespec(&time))
        } else if idle {
            Ok(0)
        } else {
            submitter.submit()
        };
        match entered.map_err(|error| error.raw_os_error()) {
            // The time is over, there was a signal, or what has completed must be taken first.
            Ok(_) | Err(Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
            Err(code) => return Err(io::Error::from_raw_os_error(code.unwrap_or(libc::EIO))),
        }
        self.reap(events);
        Ok(())
    }

    /// Takes what has completed.
    fn reap(&mut self, events: &mut Vec<Event>) {
        let mut completions = std::mem::take(&mut self.completions);
        completions.extend(self.ring.completion());
        for completion in completions.drain(..) {
            self.completed(&completion, events);
        }
        self.completions = completions;
    }

    fn completed(&mut self, completion: &cqueue::Entry, events: &mut Vec<Event>) {
        let name = completion.user_data();
        let (of, generation, key) = (name >> 56, (name >> 32) as u32 & GENERATION, name as u32);
        let more = cqueue::more(completion.flags());
        let code = completion.result();
        match of {
            of::WAKE => self.wake_armed = more,
            of::ACCEPT => {
                let Some(listening) = self.listeners.get_mut(key as usize) else {
                    // Nobody listens any more.
                    if code >= 0 {
                        // SAFETY: the kernel has just made it for us.
                        drop(unsafe { TcpStream::from_raw_fd(code) });
                    }
                    return;
                };
                listening.armed = more;
                match result(code) {
                    Ok(_) => {
                        // SAFETY: as above.
                        let stream = unsafe { TcpStream::from_raw_fd(code) };
                        // Without an address it is gone already.
                        if let Ok(peer) = stream.peer_addr() {
                            let listener = key as usize;
                            events.push(Event::Accepted {
                                listener,
                                stream,
                                peer,
                            });
                        }
                    }
                    Err(error) => events.push(Event::AcceptFailed(error)),
                }
            }
            of::CANCEL => {}
            of => {
                let known = self
                    .slots
                    .get(key as usize)
                    .is_some_and(|slot| slot.generation & GENERATION == generation);
                debug_assert!(known, "a slot is used again when all is completed");
                if known {
                    self.slot_completed(of, key, completion, events);
                    self.free_if_done(key);
                }
            }
        }
    }

    fn slot_completed(
        &mut self,
        of: u64,
        key: u32,
        completion: &cqueue::Entry,
        events: &mut Vec<Event>,
    ) {
        let slot = &mut self.slots[key as usize];
        let (id, code) = (slot.id, completion.result());
        match of {
            of::RECEIVE => self.received(key, completion, events),
            of::FILL => {
                slot.receive = Receive::Not;
                let Some(mut input) = slot.rest.take() else {
                    return;
                };
                if let Ok(len) = result(code) {
                    // SAFETY: the kernel has written that many bytes of the spare capacity.
                    unsafe { input.set_len(input.len() + len) };
                }
                if slot.open {
                    let read = result(code);
                    events.push(Event::Filled { id, read, input });
                }
            }
            of::SEND => {
                let Some(mut message) = slot.sending.take() else {
                    return;
                };
                self.sending -= 1;
                let called_back = std::mem::take(&mut slot.called_back);
                if slot.open {
                    let sent = match result(code) {
                        Err(_) if called_back && code == -libc::ECANCELED => Ok(0),
                        sent => sent,
                    };
                    events.push(Event::Sent { id, sent, message });
                } else {
                    message.pieces.clear();
                    self.recycle(message);
                }
            }
            of::WRITABLE => {
                slot.polled = false;
                if slot.open {
                    events.push(Event::Ready {
                        id,
                        readable: false,
                        writable: true,
                    });
                }
            }
            _ => {}
        }
    }

    fn received(&mut self, key: u32, completion: &cqueue::Entry, events: &mut Vec<Event>) {
        let code = completion.result();
        let mut chunk = cqueue::buffer_select(completion.flags())
            .zip(self.buffers.as_mut())
            .map(|(number, buffers)| Chunk {
                bytes: buffers.take(number),
                start: 0,
                end: 0,
                origin: Origin::Ring(number),
            });
        let slot = &mut self.slots[key as usize];
        let cancelled = slot.receive == Receive::Cancelled;
        if !cqueue::more(completion.flags()) {
            slot.receive = Receive::Not;
        }
        if slot.open {
            match (code, chunk.take()) {
                (1.., Some(mut full)) => {
                    full.end = code as usize;
                    slot.unread.push_back(full);
                    if !std::mem::replace(&mut slot.listed, true) {
                        self.received.push(key);
                    }
                }
                (0, empty) => {
                    slot.ended = true;
                    chunk = empty;
                }
                (code, empty) => {
                    chunk = empty;
                    match -code {
                        libc::ENOBUFS => {
                            if !std::mem::replace(&mut slot.dry, true) {
                                self.dry.push(key);
                            }
                        }
                        // It was cancelled, or is to be tried again.
                        libc::ECANCELED if cancelled => {}
                        libc::EINTR | libc::EAGAIN => {}
                        error => slot.error = Some(error),
                    }
                }
            }
            if std::mem::take(&mut slot.wanted) {
                events.push(Event::Ready {
                    id: slot.id,
                    readable: true,
                    writable: false,
                });
            }
        }
        if let Some(chunk) = chunk {
            self.forget(chunk);
        }
    }
}

#[cfg(all(test, not(loom)))]
impl Ring {
    /// Bytes received and not read: copied, and in provided buffers.
    pub(super) fn held(&self) -> (usize, usize) {
        let buffers = self.buffers.as_ref().unwrap();
        (self.copied, (buffers.len() - buffers.free()) * BUFFER)
    }

    /// Connections that it has had at a time.
    pub(super) fn slots(&self) -> usize {
        self.slots.len()
    }
}

impl Drop for Ring {
    /// Waits until the kernel uses none of what is dropped; what it does not let go of stays.
    fn drop(&mut self) {
        for key in 0..self.slots.len() as u32 {
            let slot = &mut self.slots[key as usize];
            slot.open = false;
            let generation = slot.generation;
            if slot.is_busy() {
                for of in [of::RECEIVE, of::FILL, of::SEND, of::WRITABLE] {
                    self.cancel(name(of, generation, key));
                }
            }
        }
        let until = Instant::now() + END_PATIENCE;
        let mut events = Vec::new();
        while self.slots.iter().any(Slot::is_busy) {
            let time = Timespec::from(Duration::from_millis(10));
            let args = SubmitArgs::new().timespec(&time);
            // The end of its time is no failure, and what is one shows by what stays busy.
            let _ = self.ring.submitter().submit_with_args(1, &args);
            self.reap(&mut events);
            events.clear();
            if Instant::now() > until {
                std::mem::forget(std::mem::take(&mut self.slots));
                std::mem::forget(self.buffers.take());
                return;
            }
        }
    }
}
