//! Sockets by epoll: it says when one is ready, and system calls move the bytes.
//!
//! Invariant: readiness is told once for what arrives (edge-triggered), so whoever is told reads and writes until the
//! kernel refuses.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use socket2::SockRef;

use super::{Event, Id, Socket};

/// Events taken at a time.
const EVENTS: usize = 1024;
const WAKE: Token = Token(usize::MAX);
/// Tokens from here on are listeners.
const LISTENERS: usize = usize::MAX - 1024;

/// What a thread waits for.
pub(super) struct Epoll {
    poll: Poll,
    events: Events,
    listeners: Vec<mio::net::TcpListener>,
}

impl Epoll {
    pub(super) fn new(wake: RawFd) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.registry()
            .register(&mut SourceFd(&wake), WAKE, Interest::READABLE)?;
        Ok(Self {
            poll,
            events: Events::with_capacity(EVENTS),
            listeners: Vec::new(),
        })
    }

    pub(super) fn listen(&mut self, listeners: Vec<std::net::TcpListener>) -> io::Result<()> {
        for listener in listeners {
            let mut listener = mio::net::TcpListener::from_std(listener);
            let token = Token(LISTENERS + self.listeners.len());
            self.poll
                .registry()
                .register(&mut listener, token, Interest::READABLE)?;
            self.listeners.push(listener);
        }
        Ok(())
    }

    pub(super) fn add(&mut self, stream: TcpStream, id: Id) -> io::Result<Socket> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        let fd = stream.as_raw_fd();
        // Its end closes the descriptor and so takes it out again.
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), Token(id as usize), interest)?;
        Ok(Socket { stream, key: 0 })
    }

    pub(super) fn stop_listening(&mut self) {
        self.listeners.clear();
    }

    pub(super) fn wait(&mut self, time: Duration, events: &mut Vec<Event>) -> io::Result<()> {
        match self.poll.poll(&mut self.events, Some(time)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        for event in &self.events {
            match event.token() {
                WAKE => {}
                Token(token) if token >= LISTENERS => {
                    accept(&self.listeners, token - LISTENERS, events);
                }
                Token(id) => events.push(Event::Ready {
                    id: id as Id,
                    readable: event.is_readable() || event.is_read_closed(),
                    writable: event.is_writable() || event.is_error(),
                }),
            }
        }
        Ok(())
    }
}

fn accept(listeners: &[mio::net::TcpListener], listener: usize, events: &mut Vec<Event>) {
    let Some(socket) = listeners.get(listener) else {
        return;
    };
    loop {
        match socket.accept() {
            Ok((stream, peer)) => events.push(Event::Accepted {
                listener,
                stream: stream.into(),
                peer,
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                // Such as no more descriptors: the listener stays readable, so it is asked again.
                events.push(Event::AcceptFailed(error));
                return;
            }
        }
    }
}

/// Appends what a socket has, `rest` bytes at most, to part of a request that lacks so many.
pub(super) fn fill(socket: &Socket, input: &mut Vec<u8>, rest: usize) -> io::Result<usize> {
    input.reserve_exact(rest);
    let len = SockRef::from(&socket.stream).recv(&mut input.spare_capacity_mut()[..rest])?;
    // SAFETY: recv has written that many bytes of the spare capacity.
    unsafe { input.set_len(input.len() + len) };
    Ok(len)
}
