//! The producer over a kernel UDP socket: a thin driver of the [`Machine`].
//!
//! Invariant: each datagram that the machine chose is offered to the socket in order, before the
//! machine is asked for more; what the network does not take counts as lost on the way.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::machine::{Machine, Now, Stats, Transmit};
use super::partitioner::Target;
use super::udp::{self, BURST, Receiver};
use super::{Acks, ConnectError, Event, FlushError, ProducerConfig, SendError, Ticket};

/// `send` looks at the socket after this many bytes of messages, so that a caller that only sends
/// keeps the window moving: some full datagrams.
const DRIVE_BYTES: usize = 16 * 1400;
/// Rounds of receiving and sending before a poll returns, so that it ends under any load.
const MAX_ROUNDS: usize = 16;
/// How long to wait at once for a socket that takes nothing.
const BLOCKED: Duration = Duration::from_millis(5);

/// Sends messages to one topic; see the [module](super).
///
/// Dropping it forgets what is not acknowledged: [`Producer::close`] it instead.
#[derive(Debug)]
pub struct Producer {
    machine: Machine,
    socket: UdpSocket,
    server: SocketAddr,
    receiver: Receiver,
    transmits: Vec<Transmit>,
    clock: Instant,
    delivery_timeout: Duration,
    undriven: usize,
    last_error: Option<io::Error>,
}

impl Producer {
    /// Greets the servers in turn until one answers; waits up to
    /// [`ProducerConfig::connect_timeout`] for all of them together.
    pub fn connect(config: ProducerConfig) -> Result<Self, ConnectError> {
        config.check()?;
        let mut addresses = Vec::new();
        for server in &config.servers {
            let failed = |source| ConnectError::Server {
                server: server.clone(),
                source,
            };
            addresses.extend(server.to_socket_addrs().map_err(failed)?);
        }
        if addresses.is_empty() {
            return Err(ConnectError::Config("no server name has an address"));
        }
        let share = config.connect_timeout / addresses.len() as u32;
        let mut failure = None;
        for &server in &addresses {
            match Self::greet(&config, server, share) {
                Ok(Some(producer)) => return Ok(producer),
                Ok(None) => {}
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| ConnectError::NoAnswer {
            servers: config.servers.join(", "),
            seconds: config.connect_timeout.as_secs_f64(),
        }))
    }

    fn greet(
        config: &ProducerConfig,
        server: SocketAddr,
        timeout: Duration,
    ) -> Result<Option<Self>, ConnectError> {
        let failed = |source| ConnectError::Server {
            server: server.to_string(),
            source,
        };
        let (socket, max_datagram) = udp::connect(server).map_err(failed)?;
        let clock = Instant::now();
        let now = at(clock);
        let mut producer = Self {
            machine: Machine::new(config, max_datagram, rand::random(), now),
            socket,
            server,
            receiver: Receiver::new(),
            transmits: Vec::with_capacity(BURST),
            clock,
            delivery_timeout: config.delivery_timeout,
            undriven: 0,
            last_error: None,
        };
        while clock.elapsed() < timeout {
            producer.drive().map_err(failed)?;
            if producer.machine.connected()? {
                return Ok(Some(producer));
            }
            producer
                .sleep(timeout.saturating_sub(clock.elapsed()))
                .map_err(failed)?;
        }
        Ok(None)
    }

    /// Takes a message: copies it into the open batch of its partition. Sends or receives only now
    /// and then, so call [`Producer::poll`] as well. Returns [`SendError::Full`] at once when the
    /// buffers are full.
    #[inline]
    pub fn send(
        &mut self,
        target: Target,
        key: Option<&[u8]>,
        value: &[u8],
    ) -> Result<Ticket, SendError> {
        self.send_record(target, key, Some(value))
    }

    /// As [`Producer::send`]; without a value it is a tombstone, which deletes the key in a
    /// compacted topic.
    pub fn send_record(
        &mut self,
        target: Target,
        key: Option<&[u8]>,
        value: Option<&[u8]>,
    ) -> Result<Ticket, SendError> {
        self.undriven += 16 + key.map_or(0, <[u8]>::len) + value.map_or(0, <[u8]>::len);
        if self.undriven >= DRIVE_BYTES {
            self.drive()?;
        }
        match self.machine.send(self.now(), target, key, value) {
            Err(SendError::Full) => {
                self.drive()?;
                self.machine.send(self.now(), target, key, value)
            }
            result => result,
        }
    }

    /// As [`Producer::send`], but waits while the buffers are full. The events must be taken now and
    /// then: after the delivery timeout without room it gives up with [`SendError::Full`].
    pub fn send_wait(
        &mut self,
        target: Target,
        key: Option<&[u8]>,
        value: &[u8],
    ) -> Result<Ticket, SendError> {
        let mut since = None;
        loop {
            match self.send(target, key, value) {
                Err(SendError::Full) => {}
                result => return result,
            }
            let since = *since.get_or_insert_with(Instant::now);
            if since.elapsed() > self.delivery_timeout {
                return Err(SendError::Full);
            }
            self.sleep(BLOCKED)?;
        }
    }

    /// Receives, retransmits and sends; then, if no event is there, waits for one up to `timeout`.
    /// Returns whether one is there. An error is the socket's own; the network's errors (nobody
    /// listens, no route) count as loss, see [`Producer::network_error`].
    pub fn poll(&mut self, timeout: Duration) -> io::Result<bool> {
        let end = Instant::now().checked_add(timeout);
        loop {
            self.drive()?;
            if self.machine.has_events() {
                return Ok(true);
            }
            let left = end.map_or(Duration::MAX, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Ok(false);
            }
            self.sleep(left)?;
        }
    }

    /// The next thing that became of messages.
    pub fn next_event(&mut self) -> Option<Event> {
        self.machine.next_event()
    }

    /// Sends all that is waiting and waits until everything is acknowledged or failed; events stay
    /// to be taken.
    pub fn flush(&mut self, timeout: Duration) -> Result<(), FlushError> {
        let end = Instant::now().checked_add(timeout);
        self.machine.flush();
        loop {
            self.drive()?;
            let outstanding = self.machine.outstanding();
            if outstanding == 0 {
                return Ok(());
            }
            let left = end.map_or(Duration::MAX, |end| {
                end.saturating_duration_since(Instant::now())
            });
            if left.is_zero() {
                return Err(FlushError::Timeout { outstanding });
            }
            self.sleep(left)?;
        }
    }

    /// Flushes; what is not acknowledged within `timeout` fails. Returns the events that were not
    /// taken yet, and the final counts.
    pub fn close(mut self, timeout: Duration) -> (Vec<Event>, Stats) {
        // Whatever went wrong shows in the events.
        let _ = self.flush(timeout);
        self.machine.abort();
        let events = std::iter::from_fn(|| self.machine.next_event()).collect();
        (events, *self.machine.stats())
    }

    /// Messages taken and not yet acknowledged or failed.
    pub fn outstanding(&self) -> u64 {
        self.machine.outstanding()
    }

    /// Counts so far.
    pub fn stats(&self) -> &Stats {
        self.machine.stats()
    }

    /// The smoothed time from a datagram to its acknowledgement.
    pub fn round_trip(&self) -> Option<Duration> {
        self.machine.round_trip_ns().map(Duration::from_nanos)
    }

    /// Number of partitions of the topic.
    pub fn partitions(&self) -> u32 {
        self.machine.partitions()
    }

    /// The acknowledgement level in use.
    pub fn acks(&self) -> Acks {
        self.machine.acks()
    }

    /// The server that answered.
    pub fn server(&self) -> SocketAddr {
        self.server
    }

    /// Key and value of a message may have this many bytes together.
    pub fn max_message(&self) -> usize {
        self.machine.max_message()
    }

    /// The highest epoch that was used.
    pub fn epoch(&self) -> i16 {
        self.machine.identity().1
    }

    /// The last error that the network gave, which explains a timeout.
    pub fn network_error(&self) -> Option<&io::Error> {
        self.last_error.as_ref()
    }

    #[inline]
    fn now(&self) -> Now {
        at(self.clock)
    }

    /// Receives and sends until there is nothing to do at once.
    fn drive(&mut self) -> io::Result<()> {
        self.undriven = 0;
        for _ in 0..MAX_ROUNDS {
            let received = self.receive()?;
            let now = self.now();
            if self.machine.deadline().is_some_and(|at| at <= now.mono_ns) {
                self.machine.tick(now);
            }
            let sent = self.transmit()?;
            if received < BURST && !sent {
                break;
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<usize> {
        let Self {
            machine,
            receiver,
            socket,
            clock,
            ..
        } = self;
        let result = receiver.receive(socket, |datagram| machine.receive(at(*clock), datagram));
        match result {
            Ok(received) => Ok(received),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => self.network(error).map(|()| 0),
        }
    }

    /// Returns whether anything was sent.
    fn transmit(&mut self) -> io::Result<bool> {
        let now = self.now();
        self.transmits.clear();
        self.machine.poll_transmit(now, BURST, &mut self.transmits);
        if self.transmits.is_empty() {
            return Ok(false);
        }
        let transmits = std::mem::take(&mut self.transmits);
        let result = self.offer(&transmits);
        self.transmits = transmits;
        result.map(|()| true)
    }

    fn offer(&mut self, transmits: &[Transmit]) -> io::Result<()> {
        let mut datagrams: [&[u8]; BURST] = [&[]; BURST];
        let mut count = 0;
        for datagram in transmits.iter().filter_map(|&t| self.machine.datagram(t)) {
            datagrams[count] = datagram;
            count += 1;
        }
        let mut rest = &datagrams[..count];
        let mut last_error = None;
        let mut refused = 0;
        while !rest.is_empty() {
            match udp::send(&self.socket, rest) {
                Ok(sent) => rest = &rest[sent..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    udp::wait(&self.socket, true, BLOCKED)?;
                }
                Err(error) if is_network(&error) => {
                    // Of an earlier datagram's ICMP error the first call only tells; one that fails
                    // again by itself is lost.
                    refused += 1;
                    if refused > 1 {
                        rest = &rest[1..];
                        refused = 0;
                    }
                    last_error = Some(error);
                }
                Err(error) => return Err(error),
            }
        }
        if last_error.is_some() {
            self.last_error = last_error;
        }
        Ok(())
    }

    fn network(&mut self, error: io::Error) -> io::Result<()> {
        if is_network(&error) {
            self.last_error = Some(error);
            Ok(())
        } else {
            Err(error)
        }
    }

    /// Waits for a datagram, the machine's next deadline or `timeout`.
    fn sleep(&mut self, timeout: Duration) -> io::Result<()> {
        let mono_ns = self.now().mono_ns;
        let until = match self.machine.deadline() {
            Some(at) => Duration::from_nanos(at.saturating_sub(mono_ns)),
            None => timeout,
        };
        if self.machine.has_transmits() && until.is_zero() {
            return Ok(());
        }
        udp::wait(&self.socket, false, until.min(timeout))
    }
}

/// Errors that say something of the network or of an earlier datagram, not of the socket.
fn is_network(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNREFUSED
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::ENETDOWN
                | libc::EHOSTDOWN
                | libc::ENOBUFS
                | libc::EPERM
                | libc::EACCES
                | libc::EMSGSIZE
                | libc::EINTR
        )
    )
}

#[inline]
fn at(clock: Instant) -> Now {
    Now {
        mono_ns: clock.elapsed().as_nanos() as u64,
        unix_ms: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_millis() as i64),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::JoinHandle;

    use super::super::model::ModelServer;
    use super::super::{FailReason, Fate};
    use super::*;

    /// The model behind a real socket, until it is stopped.
    struct Served {
        address: SocketAddr,
        stop: Arc<AtomicBool>,
        thread: Option<JoinHandle<ModelServer>>,
    }

    /// Drops every `drop_every`th datagram (0 for none).
    fn serve(address: &str, mut server: ModelServer, drop_every: u64) -> Served {
        let socket = UdpSocket::bind(address).unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(5)))
            .unwrap();
        let address = socket.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut buf = vec![0; 65536];
            let mut count = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                let Ok((len, peer)) = socket.recv_from(&mut buf) else {
                    continue;
                };
                count += 1;
                if drop_every > 0 && count.is_multiple_of(drop_every) {
                    continue;
                }
                if let Some(answer) = server.answer(&buf[..len]) {
                    let _ = socket.send_to(&answer, peer);
                }
            }
            server
        });
        Served {
            address,
            stop,
            thread: Some(thread),
        }
    }

    impl Served {
        fn stop(mut self) -> ModelServer {
            self.stop.store(true, Ordering::Relaxed);
            self.thread.take().unwrap().join().unwrap()
        }
    }

    impl Drop for Served {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
        }
    }

    fn config(server: &Served) -> ProducerConfig {
        ProducerConfig::new(server.address.to_string(), "t")
    }

    #[test]
    fn messages_arrive_once_and_in_order_though_datagrams_are_lost() {
        let server = serve("127.0.0.1:0", ModelServer::new(2), 7);
        let mut producer = Producer::connect(config(&server)).unwrap();
        assert_eq!(producer.partitions(), 2);
        assert_eq!(producer.acks(), Acks::Durable);
        for i in 0..3000u32 {
            producer
                .send_wait(Target::Partition(i % 2), None, &i.to_be_bytes())
                .unwrap();
        }
        producer.flush(Duration::from_secs(60)).unwrap();
        let (events, stats) = producer.close(Duration::ZERO);
        assert_eq!((stats.delivered, stats.failed), (3000, 0));
        assert!(stats.retransmissions > 0);
        assert!(events.iter().all(|event| matches!(
            event,
            Event::Delivered {
                base_offset: Some(_),
                ..
            }
        )));
        let server = server.stop();
        for (partition, log) in server.partitions.iter().enumerate() {
            let expected: Vec<[u8; 4]> = (0..3000u32)
                .filter(|i| *i as usize % 2 == partition)
                .map(u32::to_be_bytes)
                .collect();
            assert_eq!(log.values(), expected);
        }
    }

    #[test]
    fn a_restarted_server_is_found_again_over_ipv6() {
        let server = serve("[::1]:0", ModelServer::new(1), 0);
        let address = server.address.to_string();
        let mut producer = Producer::connect(config(&server)).unwrap();
        producer.send(Target::Auto, None, b"a").unwrap();
        producer.flush(Duration::from_secs(30)).unwrap();
        let state = server.stop();
        // Nobody listens: the network says so, and the message waits.
        producer.send(Target::Auto, None, b"b").unwrap();
        assert!(producer.flush(Duration::from_millis(100)).is_err());
        assert!(producer.network_error().is_some());
        assert_eq!(producer.outstanding(), 1);
        let server = serve(&address, state, 0);
        producer.flush(Duration::from_secs(30)).unwrap();
        assert_eq!(producer.stats().delivered, 2);
        assert_eq!(server.stop().partitions[0].values(), [b"a", b"b"]);
    }

    #[test]
    fn what_is_not_acknowledged_fails_on_close() {
        let server = serve("127.0.0.1:0", ModelServer::new(1), 0);
        let mut producer = Producer::connect(config(&server)).unwrap();
        server.stop();
        producer.send(Target::Auto, Some(b"k"), b"v").unwrap();
        let (events, stats) = producer.close(Duration::from_millis(30));
        assert_eq!(stats.failed, 1);
        assert_eq!(
            events,
            [Event::Failed {
                partition: 0,
                messages: 0..1,
                reason: FailReason::Closed,
                fate: Fate::Unknown,
            }]
        );
    }

    #[test]
    fn connecting_says_why_it_fails() {
        let server = serve("127.0.0.1:0", ModelServer::new(1), 0);
        let mut wrong = config(&server);
        wrong.topic = "nope".into();
        let error = Producer::connect(wrong).unwrap_err().to_string();
        assert_eq!(error, "topic nope: there is no such topic or partition");
        let mut silent = config(&server);
        server.stop();
        silent.connect_timeout = Duration::from_millis(50);
        let error = Producer::connect(silent.clone()).unwrap_err().to_string();
        assert!(error.starts_with("no answer from 127.0.0.1:"), "{error}");
        silent.servers = vec!["not an address".into()];
        assert!(matches!(
            Producer::connect(silent),
            Err(ConnectError::Server { .. })
        ));
    }

    #[test]
    fn the_second_server_is_tried_when_the_first_is_silent() {
        let silent = serve("127.0.0.1:0", ModelServer::new(1), 1);
        let server = serve("127.0.0.1:0", ModelServer::new(3), 0);
        let mut both = config(&silent);
        both.servers.push(server.address.to_string());
        both.connect_timeout = Duration::from_secs(4);
        let producer = Producer::connect(both).unwrap();
        assert_eq!(producer.server(), server.address);
        assert_eq!(producer.partitions(), 3);
    }

    #[test]
    fn a_message_beyond_a_datagram_is_refused() {
        let server = serve("127.0.0.1:0", ModelServer::new(1), 0);
        let mut producer = Producer::connect(config(&server)).unwrap();
        let limit = producer.max_message();
        let value = vec![1; limit + 1];
        assert!(matches!(
            producer.send(Target::Auto, None, &value),
            Err(SendError::TooLarge { .. })
        ));
        producer.send(Target::Auto, None, &value[1..]).unwrap();
        producer.flush(Duration::from_secs(30)).unwrap();
        assert_eq!(producer.stats().delivered, 1);
    }
}
