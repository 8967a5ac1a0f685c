//! Clients over the kernel's own TCP stack: the sockets of a thread, by epoll or by io_uring. `udp.rs` has the kernel's UDP.
//!
//! [`Sockets`] moves bytes and knows nothing of protocols. One value belongs to one thread; nothing here is shared
//! between threads. Both ways keep one contract, so that whoever serves connections does not ask which it has:
//!
//! 1. [`Sockets::wait`] submits what was asked for, sleeps until something happens, and says what as [`Event`]s.
//! 2. An event carries the name that its connection was given by [`Sockets::add`]; none comes for a connection after
//!    [`Sockets::close`] but those of the same `wait`, so names must not be given again.
//! 3. [`Sockets::read`] and [`Sockets::fill`] are called until they fail with `WouldBlock`; then there will be an event
//!    ([`Event::Ready`], [`Event::Filled`]) when there is more. A connection that is not read from receives a bounded number
//!    of bytes at most, and then its peer waits.
//! 4. The same holds for [`Outbox::send`]: `WouldBlock` means that [`Event::Ready`] or [`Event::Sent`] follows.
//! 5. Memory that the kernel may still read or write is owned by the [`Sockets`] until it no longer may, also beyond the
//!    end of its connection.
//!
//! epoll (`epoll.rs`) says when a socket is ready and system calls move the bytes; io_uring (`ring.rs`)
//! receives into buffers ahead of the reader, and sends everything that a turn of the loop has to send by the one
//! system call that waits for the next events.

mod buffers;
mod epoll;
mod outbox;
mod ring;
#[cfg(all(test, not(loom)))]
mod tests;
pub mod udp;

use std::io::{self, IoSlice, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use epoll::Epoll;
pub use outbox::Outbox;
pub use ring::Message;
use ring::Ring;

/// Bytes read at a time: several requests of a usual producer, one read for a whole fetch request.
pub const READ: usize = 128 << 10;

/// How a thread is told of its sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// epoll and a system call for each read and write.
    Epoll,
    /// io_uring.
    IoUring,
}

impl Kind {
    /// Its name in the configuration and the log.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Epoll => "epoll",
            Kind::IoUring => "io_uring",
        }
    }
}

/// Names a connection for the life of its thread.
pub type Id = u64;

/// An open connection, of the [`Sockets`] that it was added to.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    /// Its place in the ring's table.
    key: u32,
}

impl Socket {
    /// The address that the client reached.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.stream.local_addr()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A client came.
    Accepted {
        /// The listener that it came by, by its place among those given to [`Sockets::listen`].
        listener: usize,
        /// Its connection, which does not block.
        stream: TcpStream,
        /// Its address.
        peer: SocketAddr,
    },
    /// A client could not be accepted, such as for lack of descriptors; it is tried again.
    AcceptFailed(io::Error),
    /// A connection may have bytes, or take some.
    Ready {
        /// Whose.
        id: Id,
        /// [`Sockets::read`] may give something.
        readable: bool,
        /// [`Outbox::send`] may send something.
        writable: bool,
    },
    /// What an outbox handed over was sent in part or as a whole; it gets the rest back by [`Outbox::sent`].
    Sent {
        /// Whose.
        id: Id,
        /// Bytes, or why none.
        sent: io::Result<usize>,
        /// What was handed over.
        message: Box<Message>,
    },
    /// A request's buffer, taken by [`Sockets::fill`], comes back with more bytes.
    Filled {
        /// Whose.
        id: Id,
        /// How many; 0: there will be no more.
        read: io::Result<usize>,
        /// The buffer.
        input: Vec<u8>,
    },
}

#[derive(Debug)]
enum Origin {
    /// The thread's own buffer.
    Scratch,
    /// A buffer of the ring, by its number.
    Ring(u16),
    /// A copy.
    Heap,
}

/// Received bytes; to be given back by [`Sockets::give`].
#[derive(Debug)]
pub struct Chunk {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    origin: Origin,
}

impl Chunk {
    /// Where to put bytes.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    /// Says how many were put.
    pub fn set_len(&mut self, len: usize) {
        (self.start, self.end) = (0, len);
    }
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }
}

enum Engine {
    Epoll(Epoll),
    Ring(Box<Ring>),
}

/// All sockets of a thread.
pub struct Sockets {
    engine: Engine,
    scratch: Vec<u8>,
}

impl Sockets {
    /// No sockets yet; `wake` ends a sleep when it is readable. `memory` is what may be received ahead of its readers,
    /// in bytes; only io_uring takes it.
    ///
    /// # Errors
    /// What the kernel says: without io_uring, or with one older than Linux 6.1, [`Kind::IoUring`] fails here.
    pub fn new(kind: Kind, wake: RawFd, memory: usize) -> io::Result<Self> {
        let engine = match kind {
            Kind::Epoll => Engine::Epoll(Epoll::new(wake)?),
            Kind::IoUring => Engine::Ring(Box::new(Ring::new(wake, memory)?)),
        };
        Ok(Self {
            engine,
            scratch: Vec::new(),
        })
    }

    /// Which way it is.
    pub fn kind(&self) -> Kind {
        match &self.engine {
            Engine::Epoll(_) => Kind::Epoll,
            Engine::Ring(_) => Kind::IoUring,
        }
    }

    /// Accepts whoever comes by `listeners`, which do not block.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen(&mut self, listeners: Vec<TcpListener>) -> io::Result<()> {
        match &mut self.engine {
            Engine::Epoll(epoll) => epoll.listen(listeners),
            Engine::Ring(ring) => {
                ring.listen(listeners);
                Ok(())
            }
        }
    }

    /// Bytes that are held for what is received ahead of its readers, at most.
    pub fn memory(&self) -> usize {
        match &self.engine {
            Engine::Epoll(_) => 0,
            Engine::Ring(ring) => ring.memory(),
        }
    }

    /// From now on the calling thread is the only one that uses it.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(&mut self) -> io::Result<()> {
        match &mut self.engine {
            Engine::Epoll(_) => Ok(()),
            Engine::Ring(ring) => ring.start(),
        }
    }

    /// Takes a connection that was accepted.
    ///
    /// # Errors
    /// The kernel's; the connection is then closed.
    pub fn add(&mut self, stream: TcpStream, id: Id) -> io::Result<Socket> {
        match &mut self.engine {
            Engine::Epoll(epoll) => epoll.add(stream, id),
            Engine::Ring(ring) => Ok(ring.add(stream, id)),
        }
    }

    /// Closes a connection: what was handed over and the socket takes at once is sent.
    pub fn close(&mut self, socket: Socket) {
        match &mut self.engine {
            Engine::Epoll(_) => drop(socket),
            Engine::Ring(ring) => ring.close(socket),
        }
    }

    /// Accepts nobody any more.
    pub fn stop_listening(&mut self) {
        match &mut self.engine {
            Engine::Epoll(epoll) => epoll.stop_listening(),
            Engine::Ring(ring) => ring.stop_listening(),
        }
    }

    /// Submits, sleeps for `time` at most, and appends what happened.
    ///
    /// # Errors
    /// The kernel's.
    pub fn wait(&mut self, time: Duration, events: &mut Vec<Event>) -> io::Result<()> {
        match &mut self.engine {
            Engine::Epoll(epoll) => epoll.wait(time, events),
            Engine::Ring(ring) => ring.wait(time, events),
        }
    }

    /// How many outboxes wait for an [`Event::Sent`].
    pub fn sending(&self) -> usize {
        match &self.engine {
            Engine::Epoll(_) => 0,
            Engine::Ring(ring) => ring.sending(),
        }
    }

    /// Whether connections wait for buffers that others' unread bytes take. Those whose request has memory of its own are
    /// read by [`Sockets::fill`] all the same.
    pub fn is_dry(&self) -> bool {
        match &self.engine {
            Engine::Epoll(_) => false,
            Engine::Ring(ring) => ring.is_dry(),
        }
    }

    /// An empty chunk with room for [`READ`] bytes.
    pub fn blank(&mut self) -> Chunk {
        let mut bytes = std::mem::take(&mut self.scratch);
        if bytes.is_empty() {
            bytes = vec![0; READ];
        }
        Chunk {
            bytes,
            start: 0,
            end: 0,
            origin: Origin::Scratch,
        }
    }

    /// Takes what has arrived; an empty chunk: there will be no more.
    ///
    /// # Errors
    /// The connection's; `WouldBlock`: nothing has arrived.
    pub fn read(&mut self, socket: &Socket) -> io::Result<Chunk> {
        match &mut self.engine {
            Engine::Ring(ring) => ring.read(socket),
            Engine::Epoll(_) => {
                let mut chunk = self.blank();
                match io::Read::read(&mut &socket.stream, chunk.room()) {
                    Ok(len) => {
                        chunk.set_len(len);
                        Ok(chunk)
                    }
                    Err(error) => {
                        self.give(chunk);
                        Err(error)
                    }
                }
            }
        }
    }

    /// Takes a chunk back.
    pub fn give(&mut self, chunk: Chunk) {
        match (chunk.origin, &mut self.engine) {
            (Origin::Scratch, _) => self.scratch = chunk.bytes,
            (Origin::Ring(number), Engine::Ring(ring)) => ring.give(number, chunk.bytes),
            (Origin::Ring(_), Engine::Epoll(_)) | (Origin::Heap, _) => {}
        }
    }

    /// Copies what has arrived; 0: there will be no more.
    ///
    /// # Errors
    /// As [`Sockets::read`].
    pub fn copy(&mut self, socket: &Socket, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.engine {
            Engine::Epoll(_) => io::Read::read(&mut &socket.stream, into),
            Engine::Ring(ring) => ring.copy(socket, into),
        }
    }

    /// Appends what has arrived of a request that lacks `rest` bytes to its buffer, without a copy between where that can
    /// be; gives how much, 0: there will be no more.
    ///
    /// # Errors
    /// As [`Sockets::read`]; with `WouldBlock` the buffer may be taken until [`Event::Filled`].
    pub fn fill(&mut self, socket: &Socket, input: &mut Vec<u8>, rest: usize) -> io::Result<usize> {
        match &mut self.engine {
            Engine::Epoll(_) => epoll::fill(socket, input, rest),
            Engine::Ring(ring) => ring.fill(socket, input, rest),
        }
    }

    /// Sends bytes that are copied where they cannot be sent at once: for what was made to be sent, such as encrypted
    /// records. Gives how many were taken; `waiting` holds those that are not sent, and none more is taken before it is
    /// empty.
    ///
    /// # Errors
    /// The connection's; `WouldBlock`: none is taken now.
    pub fn write(
        &mut self,
        socket: &Socket,
        slices: &[IoSlice<'_>],
        waiting: &mut Outbox,
    ) -> io::Result<usize> {
        if matches!(self.engine, Engine::Epoll(_)) {
            return (&socket.stream).write_vectored(slices);
        }
        if !waiting.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let len = slices.iter().map(|slice| slice.len()).sum();
        let mut bytes = Vec::with_capacity(len);
        for slice in slices {
            bytes.extend_from_slice(slice);
        }
        waiting.push(vec![bytes.into()]);
        match waiting.send(self, socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(len),
        }
    }

    /// Asks for an outbox's pieces back, sent or not: there will be an [`Event::Sent`].
    pub fn call_back(&mut self, socket: &Socket) {
        if let Engine::Ring(ring) = &mut self.engine {
            ring.call_back(socket);
        }
    }

    fn ring(&mut self) -> Option<&mut Ring> {
        match &mut self.engine {
            Engine::Epoll(_) => None,
            Engine::Ring(ring) => Some(ring),
        }
    }
}
