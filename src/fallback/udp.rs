//! Kernel UDP sockets of a thread: opened with what a receiver of datagrams wants of them, read and written in bursts.
//!
//! It knows nothing of what datagrams carry. Invariants: a socket takes datagrams to the address that it is bound to and to
//! the groups that it has joined, on the interfaces where it joined them, and no others (Linux gives a socket all groups
//! that anybody on the machine has joined unless told not to); an answer leaves from the address that was asked. What the
//! kernel dropped because a socket's buffer was full is counted, over the wraps of its 32-bit counter.
//!
//! Sources: `udp(7)`, `ip(7)`, `ipv6(7)`, RFC 3542, `recvmmsg(2)`, `sendmmsg(2)`.

use std::ffi::c_int;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use libc::{iovec, mmsghdr, socklen_t};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};

/// Datagrams that a system call takes or sends at most.
pub const BURST: usize = 64;
/// Bytes of a datagram that is sent at most: acknowledgements within an Ethernet frame.
pub const SEND_ROOM: usize = 2048;
/// Sockets that are told of at a time; the others are told of next.
const EVENTS: usize = 256;
const WAKE: Token = Token(usize::MAX);

/// A bound socket that does not block.
#[derive(Debug)]
pub struct UdpSocket {
    socket: Socket,
    address: SocketAddr,
    /// Bytes that the kernel gives to its receive buffer.
    buffer: usize,
    drops: Mutex<Drops>,
}

/// What the kernel dropped at a socket, as far as it was looked at.
#[derive(Debug, Default)]
struct Drops {
    seen: u32,
    total: u64,
}

impl Drops {
    fn add(&mut self, now: u32) -> u64 {
        self.total += u64::from(now.wrapping_sub(self.seen));
        self.seen = now;
        self.total
    }
}

impl UdpSocket {
    /// Binds to `address`, an address of this machine or a group. `buffer`: bytes wanted for the receive buffer; the
    /// kernel may give less ([`UdpSocket::buffer`]). `shared`: others may bind to it, too, as is usual for groups.
    pub fn bind(address: SocketAddr, shared: bool, buffer: usize) -> io::Result<Self> {
        let domain = Domain::for_address(address);
        let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_multicast_all_v6(false)?;
            set(&socket, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
        } else {
            socket.set_multicast_all_v4(false)?;
            set(&socket, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
        }
        socket.set_reuse_address(shared)?;
        let wanted = c_int::try_from(buffer).unwrap_or(c_int::MAX);
        // With CAP_NET_ADMIN beyond net.core.rmem_max; else up to that.
        if set(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, wanted).is_err() {
            socket.set_recv_buffer_size(buffer)?;
        }
        socket.bind(&address.into())?;
        Ok(Self {
            address,
            // The kernel says twice what it gives, for its own overhead (socket(7)).
            buffer: socket.recv_buffer_size()? / 2,
            socket,
            drops: Mutex::default(),
        })
    }

    /// Joins a group on the interface with this index; 0: on the one that the kernel's routes give.
    pub fn join(&self, group: IpAddr, interface: u32) -> io::Result<()> {
        match group {
            IpAddr::V4(group) => {
                let interface = InterfaceIndexOrAddress::Index(interface);
                self.socket.join_multicast_v4_n(&group, &interface)
            }
            IpAddr::V6(group) => self.socket.join_multicast_v6(&group, interface),
        }
    }

    /// What it is bound to.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes of its receive buffer.
    pub fn buffer(&self) -> usize {
        self.buffer
    }

    /// Datagrams for it that the kernel dropped: its buffer was full, or their checksum wrong. Costs a system call; to be
    /// called at least once in 2³² drops.
    pub fn dropped(&self) -> u64 {
        let mut info = [0u32; 9];
        let mut len = size_of_val(&info) as socklen_t;
        // SAFETY: the descriptor is open; the kernel writes at most `len` bytes into the array.
        let result = unsafe {
            libc::getsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_MEMINFO,
                info.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let mut drops = self.drops.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            0 => drops.add(info[libc::SK_MEMINFO_DROPS as usize]),
            _ => drops.total,
        }
    }
}

impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

fn set(socket: &Socket, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
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
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The index of the interface that has this address, if one has.
pub fn interface_of(address: IpAddr) -> io::Result<Option<u32>> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: on success the list is this function's until it is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let (mut entry, mut found) = (list, None);
    while !entry.is_null() && found.is_none() {
        // SAFETY: a non-null entry of the list is valid until the list is freed; its name is NUL-terminated, and its
        // address, where there is one, of the size that its family says.
        unsafe {
            if socket_ip((*entry).ifa_addr) == Some(address) {
                found = Some(libc::if_nametoindex((*entry).ifa_name));
            }
            entry = (*entry).ifa_next;
        }
    }
    // SAFETY: the list came from getifaddrs and is not used any more.
    unsafe { libc::freeifaddrs(list) };
    Ok(found.filter(|&index| index != 0))
}

/// # Safety
/// `address` is null or a socket address of the size that its family says.
unsafe fn socket_ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    if address.is_null() {
        return None;
    }
    // SAFETY: by contract.
    unsafe {
        match c_int::from((*address).sa_family) {
            libc::AF_INET => {
                let address = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(address.sin_addr.s_addr.to_ne_bytes()).into())
            }
            libc::AF_INET6 => {
                let address = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(address.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

/// The address to bind to; link-local ones belong to an interface.
pub fn socket_address(ip: IpAddr, port: u16, interface: u32) -> SocketAddr {
    match ip {
        IpAddr::V6(ip) if is_link_local(ip) => SocketAddrV6::new(ip, port, 0, interface).into(),
        ip => SocketAddr::new(ip, port),
    }
}

/// Whether an address, of a host or a group, is one of a single link.
pub fn is_link_local(ip: Ipv6Addr) -> bool {
    let octets = ip.octets();
    ip.is_unicast_link_local() || (octets[0] == 0xff && octets[1] & 0xf == 2)
}

/// Who sent a datagram, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// 4 or 6.
    pub ip_version: u8,
    /// The sender's address; IPv4 in the first four bytes.
    pub peer_ip: [u8; 16],
    /// The sender's port.
    pub peer_port: u16,
    /// The interface of a link-local IPv6 sender, else 0.
    pub scope: u32,
    /// The address it was sent to, in the same form.
    pub to: [u8; 16],
    /// This machine's address from which to answer; all zeroes: the kernel's choice.
    pub local_ip: [u8; 16],
}

/// A received datagram.
#[derive(Debug, Clone, Copy)]
pub struct Arrival {
    /// Bytes of payload.
    pub len: usize,
    /// It was longer than there was room, and is cut.
    pub cut: bool,
    /// Its addresses.
    pub way: Way,
}

/// Room for the control messages of a datagram: the larger of the two kinds of packet information.
const CONTROL: usize =
    // SAFETY: computes a size.
    unsafe { libc::CMSG_SPACE(size_of::<libc::in6_pktinfo>() as u32) } as usize;

/// As aligned as a control message must be.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

/// What the system calls of a burst are given besides payloads.
struct Headers {
    vectors: Vec<[iovec; 2]>,
    headers: Vec<mmsghdr>,
    /// Large enough for both families.
    names: Vec<libc::sockaddr_in6>,
    controls: Vec<Control>,
}

// SAFETY: the pointers in it are written anew before each system call, which is their only use.
unsafe impl Send for Headers {}

impl Headers {
    fn new() -> Self {
        // SAFETY: plain C structs, for which all zeroes is a valid value.
        let (header, name): (mmsghdr, libc::sockaddr_in6) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
        let vector = iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        Self {
            vectors: vec![[vector; 2]; BURST],
            headers: vec![header; BURST],
            names: vec![name; BURST],
            controls: vec![Control([0; CONTROL]); BURST],
        }
    }
}

/// Receives bursts. The beginning of each datagram goes to memory that the caller names; what does not fit there, to memory
/// of its own, which is used again in the next burst.
pub struct Receiver {
    calls: Headers,
    rest: Box<[u8]>,
    rest_room: usize,
}

impl Receiver {
    /// With room for `rest` bytes of each datagram beyond the caller's.
    pub fn new(rest: usize) -> Self {
        Self {
            calls: Headers::new(),
            rest: vec![0; rest * BURST].into(),
            rest_room: rest,
        }
    }

    /// Takes up to `count` datagrams, [`BURST`] at most; the first `room` bytes of number i go to `place(i)`. `WouldBlock`:
    /// there are none, and the socket will be told of when there are.
    ///
    /// # Safety
    /// Each `place(i)` is writable for `room` bytes until this returns, and nobody else uses that memory meanwhile.
    pub unsafe fn receive(
        &mut self,
        socket: &UdpSocket,
        count: usize,
        room: usize,
        place: impl Fn(usize) -> *mut u8,
    ) -> io::Result<usize> {
        let count = count.min(BURST);
        let Headers {
            vectors,
            headers,
            names,
            controls,
        } = &mut self.calls;
        let rest = self.rest.as_mut_ptr();
        for i in 0..count {
            vectors[i] = [
                iovec {
                    iov_base: place(i).cast(),
                    iov_len: room,
                },
                iovec {
                    iov_base: rest.wrapping_add(i * self.rest_room).cast(),
                    iov_len: self.rest_room,
                },
            ];
            let header = &mut headers[i].msg_hdr;
            header.msg_name = (&raw mut names[i]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_in6>() as socklen_t;
            header.msg_iov = vectors[i].as_mut_ptr();
            header.msg_iovlen = 2;
            header.msg_control = (&raw mut controls[i]).cast();
            header.msg_controllen = CONTROL as _;
            header.msg_flags = 0;
        }
        // SAFETY: `count` headers, each with a name, a control buffer and two vectors of its own; the vectors name the
        // caller's memory, which is writable (contract), and disjoint parts of `rest`; no timeout is given.
        let received = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                headers.as_mut_ptr(),
                count as u32,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    /// Datagram `i` of the last burst.
    ///
    /// # Panics
    /// When a burst has never so many.
    pub fn arrival(&self, i: usize) -> Arrival {
        let header = &self.calls.headers[i];
        let name = &self.calls.names[i];
        let mut way = Way {
            ip_version: 6,
            peer_ip: name.sin6_addr.s6_addr,
            peer_port: u16::from_be(name.sin6_port),
            scope: name.sin6_scope_id,
            to: [0; 16],
            local_ip: [0; 16],
        };
        if c_int::from(name.sin6_family) == libc::AF_INET {
            // SAFETY: an IPv4 socket address is shorter than an IPv6 one, and is what the kernel wrote there.
            let name = unsafe { *(&raw const *name).cast::<libc::sockaddr_in>() };
            way.ip_version = 4;
            way.peer_ip = v4(name.sin_addr);
            way.scope = 0;
        }
        // SAFETY: the kernel has filled header and control buffer, and nothing has changed since; the macros stay within the
        // length that it wrote, and what a message of a kind carries is of that kind's type.
        unsafe {
            let mut message = libc::CMSG_FIRSTHDR(&raw const header.msg_hdr);
            while !message.is_null() {
                let data = libc::CMSG_DATA(message);
                match ((*message).cmsg_level, (*message).cmsg_type) {
                    (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                        let info = data.cast::<libc::in_pktinfo>().read_unaligned();
                        way.to = v4(info.ipi_addr);
                        way.local_ip = v4(info.ipi_spec_dst);
                    }
                    (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                        let info = data.cast::<libc::in6_pktinfo>().read_unaligned();
                        way.to = info.ipi6_addr.s6_addr;
                        // A group cannot be the source of an answer.
                        if way.to[0] != 0xff {
                            way.local_ip = way.to;
                        }
                    }
                    _ => {}
                }
                message = libc::CMSG_NXTHDR(&raw const header.msg_hdr, message);
            }
        }
        Arrival {
            len: header.msg_len as usize,
            cut: header.msg_hdr.msg_flags & libc::MSG_TRUNC != 0,
            way,
        }
    }

    /// What of datagram `i` of the last burst did not fit into the caller's memory: its bytes from `room` on, up to its
    /// length.
    ///
    /// # Panics
    /// When that is more than there is room for.
    pub fn rest(&self, i: usize, len: usize) -> &[u8] {
        &self.rest[i * self.rest_room..][..self.rest_room][..len]
    }
}

fn v4(address: libc::in_addr) -> [u8; 16] {
    let mut ip = [0; 16];
    ip[..4].copy_from_slice(&address.s_addr.to_ne_bytes());
    ip
}

/// Datagrams that wait to be sent together.
pub struct Sender {
    calls: Headers,
    memory: Box<[u8]>,
    /// The socket of each, and its length.
    waiting: Vec<(usize, usize)>,
}

impl Default for Sender {
    fn default() -> Self {
        Self::new()
    }
}

impl Sender {
    /// None waits.
    pub fn new() -> Self {
        Self {
            calls: Headers::new(),
            memory: vec![0; SEND_ROOM * BURST].into(),
            waiting: Vec::with_capacity(BURST),
        }
    }

    /// Whether no further one fits.
    pub fn is_full(&self) -> bool {
        self.waiting.len() == BURST
    }

    /// Where the payload of the next is to be written.
    ///
    /// # Panics
    /// When it is full.
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.memory[self.waiting.len() * SEND_ROOM..][..SEND_ROOM]
    }

    /// The first `len` bytes of [`Sender::room`] go back by `way`, from `socket`, which is the caller's number.
    pub fn push(&mut self, socket: usize, way: &Way, len: usize) {
        let i = self.waiting.len();
        self.waiting.push((socket, len));
        let Headers {
            headers,
            names,
            controls,
            ..
        } = &mut self.calls;
        let header = &mut headers[i].msg_hdr;
        let port = way.peer_port.to_be();
        header.msg_namelen = if way.ip_version == 4 {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as _,
                sin_port: port,
                sin_addr: in_addr(&way.peer_ip),
                sin_zero: [0; 8],
            };
            // SAFETY: an IPv4 socket address is shorter than an IPv6 one and no stricter aligned.
            unsafe { (&raw mut names[i]).cast::<libc::sockaddr_in>().write(name) };
            size_of::<libc::sockaddr_in>() as socklen_t
        } else {
            names[i] = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as _,
                sin6_port: port,
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: way.peer_ip,
                },
                sin6_scope_id: way.scope,
            };
            size_of::<libc::sockaddr_in6>() as socklen_t
        };
        header.msg_controllen = match (way.local_ip, way.ip_version) {
            ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], _) => 0,
            (local, 4) => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: in_addr(&local),
                    ipi_addr: in_addr(&local),
                };
                control(&mut controls[i], libc::IPPROTO_IP, libc::IP_PKTINFO, info)
            }
            (local, _) => {
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: local },
                    ipi6_ifindex: way.scope as _,
                };
                let (level, kind) = (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO);
                control(&mut controls[i], level, kind, info)
            }
        } as _;
    }

    /// Sends what waits. `done` is told of each socket, how many of its datagrams the kernel took and how many it did not:
    /// those are given up.
    pub fn send<'a>(
        &mut self,
        socket: impl Fn(usize) -> &'a UdpSocket,
        mut done: impl FnMut(usize, u64, u64),
    ) {
        let Headers {
            vectors,
            headers,
            names,
            controls,
        } = &mut self.calls;
        for (i, &(_, len)) in self.waiting.iter().enumerate() {
            vectors[i][0] = iovec {
                iov_base: (&raw mut self.memory[i * SEND_ROOM]).cast(),
                iov_len: len,
            };
            let header = &mut headers[i].msg_hdr;
            header.msg_name = (&raw mut names[i]).cast();
            header.msg_iov = vectors[i].as_mut_ptr();
            header.msg_iovlen = 1;
            header.msg_control = match header.msg_controllen {
                0 => std::ptr::null_mut(),
                _ => (&raw mut controls[i]).cast(),
            };
            header.msg_flags = 0;
        }
        let mut at = 0;
        while at < self.waiting.len() {
            let number = self.waiting[at].0;
            let run = self.waiting[at..].iter();
            let run = run.take_while(|&&(other, _)| other == number).count();
            // SAFETY: `run` headers, each with a name, a vector and at most a control message of its own, which are read
            // only and live until the call returns.
            let sent = unsafe {
                libc::sendmmsg(
                    socket(number).as_raw_fd(),
                    headers[at..at + run].as_mut_ptr(),
                    run as u32,
                    (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as _,
                )
            };
            match usize::try_from(sent) {
                Ok(sent) if sent > 0 => {
                    done(number, sent as u64, 0);
                    at += sent;
                }
                // The first of them cannot be sent, or not now: who waits for it asks again.
                _ => {
                    done(number, 0, 1);
                    at += 1;
                }
            }
        }
        self.waiting.clear();
    }
}

fn in_addr(ip: &[u8; 16]) -> libc::in_addr {
    libc::in_addr {
        s_addr: u32::from_ne_bytes([ip[0], ip[1], ip[2], ip[3]]),
    }
}

/// Writes one control message; gives the length of the whole.
fn control<T>(buffer: &mut Control, level: c_int, kind: c_int, value: T) -> usize {
    // SAFETY: computes sizes.
    let (len, space) = unsafe {
        (
            libc::CMSG_LEN(size_of::<T>() as u32) as usize,
            libc::CMSG_SPACE(size_of::<T>() as u32) as usize,
        )
    };
    assert!(space <= CONTROL, "a control message without room");
    let start = buffer.0.as_mut_ptr();
    // SAFETY: the buffer is aligned as a header must be and has room for header and value, as just checked; the value lies
    // behind the header as CMSG_DATA says.
    unsafe {
        let header = start.cast::<libc::cmsghdr>();
        (*header).cmsg_len = len as _;
        (*header).cmsg_level = level;
        (*header).cmsg_type = kind;
        libc::CMSG_DATA(header).cast::<T>().write_unaligned(value);
    }
    space
}

/// Says which of a thread's sockets have datagrams, once for what arrives: a socket that was told of is to be read until it
/// says `WouldBlock`.
pub struct Readiness {
    poll: Poll,
    events: Events,
}

impl Readiness {
    /// Of no sockets yet; `wake` ends a wait, too.
    pub fn new(wake: RawFd) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.registry()
            .register(&mut SourceFd(&wake), WAKE, Interest::READABLE)?;
        Ok(Self {
            poll,
            events: Events::with_capacity(EVENTS),
        })
    }

    /// From now on `socket` is told of by this number.
    pub fn add(&mut self, socket: &UdpSocket, number: usize) -> io::Result<()> {
        let fd = socket.as_raw_fd();
        self.poll
            .registry()
            .register(&mut SourceFd(&fd), Token(number), Interest::READABLE)
    }

    /// Waits for `time` at most.
    pub fn wait(&mut self, time: Duration, mut ready: impl FnMut(usize)) -> io::Result<()> {
        match self.poll.poll(&mut self.events, Some(time)) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            result => result?,
        }
        for event in &self.events {
            if event.token() != WAKE {
                ready(event.token().0);
            }
        }
        Ok(())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::net::UdpSocket as Std;

    /// Bytes of a datagram that go to the caller's memory here.
    const ROOM: usize = 100;

    fn open(address: &str) -> UdpSocket {
        let free = Std::bind((address, 0)).unwrap().local_addr().unwrap();
        UdpSocket::bind(free, false, 1 << 20).unwrap()
    }

    /// Receives until `count` datagrams are there; gives payloads and ways.
    fn receive(socket: &UdpSocket, count: usize) -> Vec<(Vec<u8>, Way)> {
        let wake = crate::memory::wake::Wake::new().unwrap();
        let mut readiness = Readiness::new(wake.descriptor()).unwrap();
        readiness.add(socket, 7).unwrap();
        let mut receiver = Receiver::new(65_536 - ROOM);
        let (mut memory, mut got) = (vec![0u8; ROOM * BURST], Vec::new());
        while got.len() < count {
            let mut told = Vec::new();
            readiness
                .wait(Duration::from_secs(30), |number| told.push(number))
                .unwrap();
            assert_eq!(told, [7], "a datagram did not come");
            loop {
                let start = memory.as_mut_ptr();
                let place = |i| start.wrapping_add(i * ROOM);
                // SAFETY: disjoint parts of the memory, ROOM bytes each.
                let received = unsafe { receiver.receive(socket, BURST, ROOM, place) };
                let received = match received {
                    Ok(received) => received,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => panic!("{error}"),
                };
                for i in 0..received {
                    let arrival = receiver.arrival(i);
                    assert!(!arrival.cut);
                    let first = arrival.len.min(ROOM);
                    let mut payload = memory[i * ROOM..][..first].to_vec();
                    payload.extend_from_slice(receiver.rest(i, arrival.len - first));
                    got.push((payload, arrival.way));
                }
            }
        }
        got
    }

    #[test]
    fn bursts_of_any_length_come_whole_and_answers_leave_from_the_address_that_was_asked() {
        for (bound, asked) in [
            ("127.0.0.1", "127.0.0.1"),
            ("0.0.0.0", "127.0.0.9"),
            ("::1", "::1"),
            ("::", "::1"),
        ] {
            let socket = open(bound);
            let asked = SocketAddr::new(asked.parse().unwrap(), socket.address().port());
            let any = if asked.is_ipv4() {
                "0.0.0.0:0"
            } else {
                "[::]:0"
            };
            let client = Std::bind(any).unwrap();
            client
                .set_read_timeout(Some(Duration::from_secs(30)))
                .unwrap();
            // Connected: the kernel hands over nothing that comes from another address.
            client.connect(asked).unwrap();
            let longest = 65_507;
            let lengths = [0, 1, ROOM - 1, ROOM, ROOM + 1, 9000, longest];
            let sent: Vec<Vec<u8>> = lengths.iter().map(|&n| vec![n as u8 | 1; n]).collect();
            sent.iter()
                .for_each(|bytes| assert_eq!(client.send(bytes).unwrap(), bytes.len()));
            let got = receive(&socket, sent.len());
            let mut sender = Sender::new();
            for ((payload, way), expected) in got.iter().zip(&sent) {
                assert!(payload == expected, "{} bytes", expected.len());
                let port = client.local_addr().unwrap().port();
                assert_eq!(way.peer_port, port);
                let len = payload.len().min(1400);
                sender.room()[..len].copy_from_slice(&payload[..len]);
                sender.push(3, way, len);
            }
            let mut taken = 0;
            sender.send(
                |_| &socket,
                |number, sent, lost| {
                    assert_eq!((number, lost), (3, 0));
                    taken += sent;
                },
            );
            assert_eq!(taken, sent.len() as u64);
            for expected in &sent {
                let mut answer = [0; 2048];
                let len = client.recv(&mut answer).unwrap();
                assert_eq!(answer[..len], expected[..expected.len().min(1400)]);
            }
        }
    }

    #[test]
    fn what_overflows_is_counted() {
        let socket = open("127.0.0.1");
        assert_eq!(socket.dropped(), 0);
        let client = Std::bind("127.0.0.1:0").unwrap();
        let payload = [1; 1000];
        let count = 2 * socket.buffer() / payload.len();
        for _ in 0..count {
            client.send_to(&payload, socket.address()).unwrap();
        }
        let dropped = socket.dropped() as usize;
        assert!(dropped > 0 && dropped < count, "{dropped} of {count}");
        assert_eq!(receive(&socket, count - dropped).len(), count - dropped);
        assert_eq!(socket.dropped() as usize, dropped);
    }

    #[test]
    fn counts_go_on_over_a_wrap() {
        let mut drops = Drops::default();
        assert_eq!(drops.add(u32::MAX - 1), u64::from(u32::MAX) - 1);
        assert_eq!(drops.add(3), u64::from(u32::MAX) + 4);
    }

    #[test]
    fn what_cannot_be_sent_is_given_up_and_the_others_go() {
        let socket = open("127.0.0.1");
        let client = Std::bind("127.0.0.1:0").unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        client.send_to(b"x", socket.address()).unwrap();
        let (_, good) = receive(&socket, 1)[0];
        // Nobody may send to port 0.
        let bad = Way {
            peer_port: 0,
            ..good
        };
        let mut sender = Sender::new();
        for way in [good, bad, bad, good] {
            sender.room()[..2].copy_from_slice(b"ok");
            sender.push(0, &way, 2);
        }
        let mut sums = (0, 0);
        sender.send(
            |_| &socket,
            |_, sent, lost| sums = (sums.0 + sent, sums.1 + lost),
        );
        assert_eq!(sums, (2, 2));
        for _ in 0..2 {
            assert_eq!(client.recv(&mut [0; 16]).unwrap(), 2);
        }
    }

    #[test]
    fn addresses_have_interfaces_and_links() {
        let found = |ip: &str| interface_of(ip.parse().unwrap()).unwrap();
        assert!(found("127.0.0.1").is_some());
        assert_eq!(found("127.0.0.1"), found("::1"));
        assert_eq!(found("192.0.2.77"), None);
        assert!(is_link_local("ff02::7".parse().unwrap()));
        assert!(!is_link_local("ff15::7".parse().unwrap()));
        let local = socket_address("fe80::1".parse().unwrap(), 9, 3);
        assert_eq!(local.to_string(), "[fe80::1%3]:9");
    }
}
