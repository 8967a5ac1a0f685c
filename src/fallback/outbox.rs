//! What a connection has to send: pieces in order, as far as the socket takes them.
//!
//! Large stretches of SSTs go from the page cache to the socket by `sendfile`, everything else by vectored
//! writes, on a ring by such as are submitted with others'; TLS takes copies of both. Invariants: bytes go out in order,
//! each once, however little the socket takes at a time; what belongs to others (windows of the log, files) is held for
//! [`HOLD`] at most, then the rest is copied, so that a consumer that does not read keeps neither memory beyond its
//! unsent bytes nor files that were deleted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::ring::Message;
use super::{Socket, Sockets};
use crate::storage::Piece;

/// Pieces handed to the kernel in one call.
pub(super) const PIECES: usize = 64;
/// Bytes from which on a file is sent by `sendfile`: a call costs some µs, and copying less costs less.
const SENDFILE: usize = 32 << 10;
/// How long a piece that belongs to others is held at most: a consumer that takes what it asked for does so in much
/// less.
const HOLD: Duration = Duration::from_secs(5);

/// The pieces of a connection.
#[derive(Default)]
pub struct Outbox {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    sent: usize,
    unsent: usize,
    /// When the oldest piece that belongs to others came.
    held: Option<Instant>,
    /// The file system does not send.
    no_sendfile: bool,
    /// The first pieces are on their way through a ring.
    away: bool,
    /// They were held for too long.
    overdue: bool,
}

impl Outbox {
    /// Bytes that are not sent, those on their way included.
    pub fn unsent(&self) -> usize {
        self.unsent
    }

    /// Whether all is sent.
    pub fn is_empty(&self) -> bool {
        self.unsent == 0
    }

    /// Appends an answer.
    pub fn push(&mut self, answer: Vec<Piece>) {
        for piece in answer {
            self.unsent += piece.len();
            if self.held.is_none() && !piece.is_owned() {
                self.held = Some(Instant::now());
            }
            if !piece.is_empty() {
                self.pieces.push_back(piece);
            }
        }
    }

    /// Makes what was held for too long its own memory. True: part of it is on its way, and is to be called back
    /// ([`Sockets::call_back`]).
    pub fn let_go(&mut self, now: Instant) -> bool {
        if self
            .held
            .is_none_or(|since| now.duration_since(since) < HOLD)
        {
            return false;
        }
        if self.away {
            self.overdue = true;
            return true;
        }
        self.own();
        false
    }

    fn own(&mut self) {
        for (at, piece) in self.pieces.iter_mut().enumerate() {
            if !piece.is_owned() {
                piece.own(if at == 0 {
                    std::mem::take(&mut self.sent)
                } else {
                    0
                });
            }
        }
        (self.held, self.overdue) = (None, false);
    }

    /// Sends what one system call takes; gives the bytes. There is something to send.
    ///
    /// # Errors
    /// The connection's; `WouldBlock`: it takes nothing now, or what it takes will be told.
    pub fn send(&mut self, sockets: &mut Sockets, socket: &Socket) -> io::Result<usize> {
        if self.away {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let result = match self.send_file(socket) {
            Some(result) => result,
            None => self.send_pieces(sockets, socket),
        };
        match result {
            Ok(0) => Err(io::ErrorKind::WriteZero.into()),
            Ok(len) => {
                self.took(len);
                Ok(len)
            }
            Err(error) => {
                if error.kind() == io::ErrorKind::WouldBlock
                    && !self.away
                    && let Some(ring) = sockets.ring()
                {
                    ring.poll_writable(socket);
                }
                Err(error)
            }
        }
    }

    /// Where the first piece is a large stretch of a file, sends of it what one call takes.
    fn send_file(&mut self, socket: &Socket) -> Option<io::Result<usize>> {
        let piece = self.pieces.front()?;
        let len = piece.len() - self.sent;
        if len < SENDFILE || self.no_sendfile {
            return None;
        }
        let (file, at) = piece.file()?;
        match sendfile(socket.as_raw_fd(), file, at + self.sent as u64, len) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
                self.no_sendfile = true;
                None
            }
            result => Some(result),
        }
    }

    fn send_pieces(&mut self, sockets: &mut Sockets, socket: &Socket) -> io::Result<usize> {
        let by_file =
            |piece: &Piece| !self.no_sendfile && piece.len() >= SENDFILE && piece.file().is_some();
        let first = self.pieces.iter().take(PIECES);
        let count = 1 + first.skip(1).take_while(|piece| !by_file(piece)).count();
        // What follows at once shares packets with it.
        let more = count < PIECES && count < self.pieces.len();
        if !more && let Some(ring) = sockets.ring() {
            let mut message = ring.message();
            message
                .pieces
                .extend(self.pieces.drain(..count.min(self.pieces.len())));
            ring.send(socket, message, self.sent);
            self.away = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut slices = [IoSlice::new(&[]); PIECES];
        let count = self.slices(&mut slices[..count]);
        let flags = libc::MSG_NOSIGNAL | if more { libc::MSG_MORE } else { 0 };
        SockRef::from(&socket.stream).send_vectored_with_flags(&slices[..count], flags)
    }

    /// The first bytes, as far as there are slices; gives how many of them are used.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            let from = if count == 0 { self.sent } else { 0 };
            *slice = IoSlice::new(&piece[from..]);
            count += 1;
        }
        count
    }

    /// What was on its way comes back, so many bytes of it sent.
    pub fn sent(&mut self, sockets: &mut Sockets, mut message: Box<Message>, sent: usize) {
        for piece in message.pieces.drain(..).rev() {
            self.pieces.push_front(piece);
        }
        if let Some(ring) = sockets.ring() {
            ring.recycle(message);
        }
        self.away = false;
        self.took(sent);
        if self.overdue {
            self.own();
        }
    }

    /// The first bytes were sent.
    pub fn took(&mut self, mut len: usize) {
        self.unsent -= len;
        while let Some(piece) = self.pieces.front() {
            let left = piece.len() - self.sent;
            if len < left {
                self.sent += len;
                return;
            }
            len -= left;
            self.sent = 0;
            self.pieces.pop_front();
        }
        // Nothing is kept of a busy past.
        self.pieces = VecDeque::new();
        (self.held, self.overdue) = (None, false);
    }
}

/// Sends up to `len` bytes of a file, from byte `at` on.
fn sendfile(socket: i32, file: &File, at: u64, len: usize) -> io::Result<usize> {
    let mut at = at as libc::off_t;
    // SAFETY: both descriptors are open over the call, and `at` is a place to write to.
    match unsafe { libc::sendfile(socket, file.as_raw_fd(), &mut at, len) } {
        ..0 => Err(io::Error::last_os_error()),
        sent => Ok(sent as usize),
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    use rand::rngs::StdRng;
    use rand::{Rng, RngExt, SeedableRng};

    use super::super::tests::KINDS;
    use super::super::{Event, Kind};
    use super::*;
    use crate::memory::wake::Wake;
    use crate::storage::lsm::Store;
    use crate::storage::lsm::manifest::{Edit, FileMeta, NEVER_COMPACTED};
    use crate::storage::lsm::sst::{SstInfo, SstWriter};
    use crate::storage::wal::LogId;
    use crate::storage::{Outcome, PartitionKey, Pieces};
    use crate::wire::record_batch::BatchWriter;

    const ID: LogId = LogId { store: 5, shard: 0 };
    const KEY: PartitionKey = PartitionKey {
        topic: 1,
        partition: 0,
    };

    /// A store of one SST with a partition of `batches` batches of up to 60 KB.
    fn store(dir: &std::path::Path, batches: usize, random: &mut StdRng) -> Arc<Store> {
        let store = Store::open(dir, ID).unwrap();
        let (number, path) = store.next_file();
        let info = SstInfo {
            id: ID,
            number,
            lsn_start: 0,
            lsn_end: 1 << 20,
            created_ms: 0,
        };
        let mut writer = SstWriter::create(&path, info).unwrap();
        for offset in 0..batches as i64 {
            let mut value = vec![0; random.random_range(0..60_000)];
            random.fill_bytes(&mut value);
            let mut batch = vec![0; value.len() + 200];
            let mut records = BatchWriter::new(&mut batch, 1000);
            records.push(1000, None, Some(&value)).unwrap();
            let len = records.finish(offset);
            writer.batch(KEY, &batch[..len], 1000).unwrap();
        }
        let made = writer.finish().unwrap();
        let meta = FileMeta {
            number,
            lsn_start: 0,
            lsn_end: 1 << 20,
            bytes: made.file_bytes,
            records: made.records,
            data_bytes: made.data_bytes,
            min_time: made.min_time,
            max_time: made.max_time,
            merges: 0,
            due: NEVER_COMPACTED,
        };
        let add = vec![meta];
        let flushed_lsn = 1 << 20;
        store.commit(&Edit::Flush { add, flushed_lsn }).unwrap();
        store
    }

    /// A connection whose sender takes little at a time.
    struct Sender {
        sockets: Sockets,
        _wake: Wake,
        socket: Option<Socket>,
        outbox: Outbox,
        sent: usize,
        writable: bool,
    }

    impl Sender {
        fn new(kind: Kind) -> (Self, TcpStream) {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let receiver = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (sender, _) = listener.accept().unwrap();
            sender.set_nonblocking(true).unwrap();
            SockRef::from(&sender).set_send_buffer_size(20_000).unwrap();
            let wake = Wake::new().unwrap();
            let mut sockets = Sockets::new(kind, wake.descriptor(), 0).unwrap();
            sockets.start().unwrap();
            let sender = Self {
                socket: Some(sockets.add(sender, 1).unwrap()),
                sockets,
                _wake: wake,
                outbox: Outbox::default(),
                sent: 0,
                writable: true,
            };
            (sender, receiver)
        }

        /// Sends what the socket takes; then looks at what has happened.
        fn turn(&mut self) {
            let socket = self.socket.as_ref().unwrap();
            while self.writable && !self.outbox.is_empty() {
                match self.outbox.send(&mut self.sockets, socket) {
                    Ok(len) => self.sent += len,
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                        self.writable = false;
                    }
                }
            }
            let mut events = Vec::new();
            let time = Duration::from_millis(10);
            self.sockets.wait(time, &mut events).unwrap();
            for event in events {
                match event {
                    Event::Ready { writable, .. } => self.writable |= writable,
                    Event::Sent { sent, message, .. } => {
                        let sent = sent.unwrap();
                        self.outbox.sent(&mut self.sockets, message, sent);
                        self.sent += sent;
                        self.writable = true;
                    }
                    other => panic!("{other:?}"),
                }
            }
        }

        /// As if the peer had not taken anything for long.
        fn let_go(&mut self) {
            if self.outbox.let_go(Instant::now() + HOLD) {
                let socket = self.socket.as_ref().unwrap();
                self.sockets.call_back(socket);
                while self.outbox.away {
                    self.turn();
                }
            }
            assert!(self.outbox.pieces.iter().all(Piece::is_owned));
        }

        fn close(&mut self) {
            self.sockets.close(self.socket.take().unwrap());
            self.sockets.wait(Duration::ZERO, &mut Vec::new()).unwrap();
        }
    }

    #[test]
    fn whatever_the_socket_takes_everything_arrives_once_and_in_order() {
        for kind in KINDS {
            everything_arrives(kind);
        }
    }

    fn everything_arrives(kind: Kind) {
        let dir = tempfile::tempdir().unwrap();
        let mut random = StdRng::seed_from_u64(7);
        let store = store(dir.path(), 120, &mut random);
        let (mut sender, mut receiver) = Sender::new(kind);
        let received = std::thread::spawn(move || {
            let (mut all, mut random) = (Vec::new(), StdRng::seed_from_u64(8));
            let mut buffer = vec![0; 100_000];
            loop {
                let room = random.random_range(1..buffer.len());
                match receiver.read(&mut buffer[..room]).unwrap() {
                    0 => return all,
                    len => all.extend_from_slice(&buffer[..len]),
                }
            }
        });
        let mut expected = Vec::new();
        let mut files = 0;
        for round in 0..60 {
            let mut head = vec![0; random.random_range(0..50_000)];
            random.fill_bytes(&mut head);
            let mut pieces = Pieces::default();
            let mut outcome = Outcome {
                bytes: 0,
                batches: 0,
                next_offset: random.random_range(0..120),
                end: 120,
            };
            let max = random.random_range(1..400_000);
            store
                .read_pieces(KEY, max, &mut outcome, &mut pieces)
                .unwrap();
            let mut answer = vec![Piece::from(head)];
            answer.extend(pieces.into_list());
            answer.push(Piece::from(vec![round; round as usize]));
            files += answer.iter().filter(|piece| piece.file().is_some()).count();
            expected.extend_from_slice(&answer.concat());
            sender.outbox.push(answer);
            assert_eq!(sender.outbox.unsent(), expected.len() - sender.sent);
            while !sender.outbox.is_empty() {
                sender.turn();
                assert_eq!(sender.outbox.unsent(), expected.len() - sender.sent);
                if random.random_ratio(1, 20) {
                    sender.let_go();
                }
                // Answers queue up, too.
                if random.random_ratio(1, 4) {
                    break;
                }
            }
        }
        while !sender.outbox.is_empty() {
            sender.turn();
        }
        assert_eq!(sender.sent, expected.len());
        assert!(files >= 60, "{files} pieces of files");
        sender.close();
        assert!(received.join().unwrap() == expected);
    }

    #[test]
    fn a_file_that_was_merged_away_is_sent_and_then_goes() {
        for kind in KINDS {
            a_file_goes(kind);
        }
    }

    fn a_file_goes(kind: Kind) {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), 60, &mut StdRng::seed_from_u64(9));
        let (mut sender, mut receiver) = Sender::new(kind);
        let mut pieces = Pieces::default();
        let mut outcome = Outcome {
            bytes: 0,
            batches: 0,
            next_offset: 0,
            end: 60,
        };
        store
            .read_pieces(KEY, 1 << 20, &mut outcome, &mut pieces)
            .unwrap();
        let mut expected = Vec::new();
        pieces.copy_to(&mut expected);
        sender.outbox.push(pieces.into_list());
        sender.turn();
        assert!(sender.sent > 0 && !sender.outbox.is_empty());
        let view = store.view();
        let (number, path) = (view.files[0].meta.number, view.files[0].path().to_owned());
        drop(view);
        let (remove, add) = (vec![number], Vec::new());
        store.commit(&Edit::Replace { remove, add }).unwrap();
        assert!(path.exists(), "it is being sent");
        // The consumer takes nothing.
        sender.let_go();
        assert!(!path.exists());
        let received = std::thread::spawn(move || {
            let mut all = Vec::new();
            receiver.read_to_end(&mut all).unwrap();
            all
        });
        while !sender.outbox.is_empty() {
            sender.turn();
        }
        sender.close();
        assert!(received.join().unwrap() == expected);
    }
}
