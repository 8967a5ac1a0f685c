//! A connected kernel UDP socket that sends and receives in bursts.
//!
//! Invariant: datagrams are never fragmented on the way (the server takes no fragments): the socket
//! forbids it, and the largest payload comes from the path's MTU.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use libc::{c_int, c_void, iovec, mmsghdr, socklen_t};

/// Datagrams a system call sends or takes at most.
pub const BURST: usize = 64;
/// Bytes kept for a received datagram: the longest is an ACK, which a server keeps within its MTU;
/// jumbo frames have at most this.
const RECEIVE_LEN: usize = 9216;
/// Socket buffers, so that a burst of a full window to many partitions fits; the system may give
/// less.
const SOCKET_BUFFER: c_int = 4 << 20;
/// IPv4 and UDP headers.
const HEADERS_V4: usize = 28;
/// IPv6 and UDP headers.
const HEADERS_V6: usize = 48;

/// A socket to `server` that does not block, and the largest payload its path takes, in bytes.
pub fn connect(server: SocketAddr) -> io::Result<(UdpSocket, usize)> {
    let (local, v4): (SocketAddr, bool) = match server {
        SocketAddr::V4(_) => ((Ipv4Addr::UNSPECIFIED, 0).into(), true),
        SocketAddr::V6(_) => ((Ipv6Addr::UNSPECIFIED, 0).into(), false),
    };
    let socket = UdpSocket::bind(local)?;
    let (level, discover, always, mtu, headers) = if v4 {
        (
            libc::IPPROTO_IP,
            libc::IP_MTU_DISCOVER,
            libc::IP_PMTUDISC_DO,
            libc::IP_MTU,
            HEADERS_V4,
        )
    } else {
        (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_DO,
            libc::IPV6_MTU,
            HEADERS_V6,
        )
    };
    set_option(&socket, level, discover, always)?;
    // Less than asked for is no error, it only costs retransmissions.
    let _ = set_option(&socket, libc::SOL_SOCKET, libc::SO_SNDBUF, SOCKET_BUFFER);
    let _ = set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUF, SOCKET_BUFFER);
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    let mtu = usize::try_from(option(&socket, level, mtu)?).unwrap_or(0);
    Ok((socket, mtu.saturating_sub(headers)))
}

fn set_option(socket: &UdpSocket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open and the kernel reads an int from a live one.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<c_int>() as socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn option(socket: &UdpSocket, level: c_int, name: c_int) -> io::Result<c_int> {
    let mut value: c_int = 0;
    let mut len = size_of::<c_int>() as socklen_t;
    // SAFETY: the descriptor is open; the kernel writes at most `len` bytes, an int.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if result == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sends the datagrams in order, up to [`BURST`], with one system call; returns how many were taken.
pub fn send(socket: &UdpSocket, datagrams: &[&[u8]]) -> io::Result<usize> {
    let count = datagrams.len().min(BURST);
    // SAFETY: both are plain C structs, for which all zeroes (null, 0) is a valid value.
    let (mut vectors, mut headers): ([iovec; BURST], [mmsghdr; BURST]) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    for i in 0..count {
        vectors[i] = iovec {
            iov_base: datagrams[i].as_ptr().cast::<c_void>().cast_mut(),
            iov_len: datagrams[i].len(),
        };
        headers[i].msg_hdr.msg_iov = &raw mut vectors[i];
        headers[i].msg_hdr.msg_iovlen = 1;
    }
    // SAFETY: the first `count` headers name one vector each, these name slices that outlive the
    // call and are only read.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count as u32,
            libc::MSG_DONTWAIT,
        )
    };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Memory for received datagrams.
#[derive(Debug)]
pub struct Receiver {
    memory: Box<[u8]>,
}

impl Receiver {
    /// For [`BURST`] datagrams.
    pub fn new() -> Self {
        Self {
            memory: vec![0; BURST * RECEIVE_LEN].into_boxed_slice(),
        }
    }

    /// Takes what has come, up to [`BURST`] datagrams, with one system call, and hands each to
    /// `each`; returns how many. What was longer than any answer may be is skipped.
    pub fn receive(
        &mut self,
        socket: &UdpSocket,
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<usize> {
        // SAFETY: both are plain C structs, for which all zeroes (null, 0) is a valid value.
        let (mut vectors, mut headers): ([iovec; BURST], [mmsghdr; BURST]) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        for (i, memory) in self.memory.chunks_exact_mut(RECEIVE_LEN).enumerate() {
            vectors[i] = iovec {
                iov_base: memory.as_mut_ptr().cast(),
                iov_len: RECEIVE_LEN,
            };
            headers[i].msg_hdr.msg_iov = &raw mut vectors[i];
            headers[i].msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: BURST headers name one vector each, these name disjoint parts of `memory`, which
        // is borrowed mutably here; no timeout is given.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                BURST as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
        for (header, memory) in headers[..received]
            .iter()
            .zip(self.memory.chunks_exact(RECEIVE_LEN))
        {
            if header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0 {
                each(&memory[..(header.msg_len as usize).min(RECEIVE_LEN)]);
            }
        }
        Ok(received)
    }
}

/// Waits until a datagram is there (one can be sent, if `writable`) or the time is over.
pub fn wait(socket: &UdpSocket, writable: bool, timeout: Duration) -> io::Result<()> {
    let mut descriptor = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: if writable {
            libc::POLLOUT
        } else {
            libc::POLLIN
        },
        revents: 0,
    };
    let timeout = libc::timespec {
        tv_sec: timeout.as_secs().min(3600) as libc::time_t,
        tv_nsec: libc::c_long::from(timeout.subsec_nanos() as i32),
    };
    // SAFETY: one descriptor and the timeout live across the call; the signal mask may be null.
    let result =
        unsafe { libc::ppoll(&raw mut descriptor, 1, &raw const timeout, std::ptr::null()) };
    match result {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
    }
}
