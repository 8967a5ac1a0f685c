//! What a connection has to send: pieces in order, as far as the socket takes them.
//!
//! Large stretches of SSTs go from the page cache to the socket by `sendfile`, everything else by one vectored
//! write; TLS takes copies of both. Invariants: bytes go out in order, each once, however little the socket takes at
//! a time; what belongs to others (windows of the log, files) is held for [`HOLD`] at most, then the rest is copied, so
//! that a consumer that does not read keeps neither memory beyond its unsent bytes nor files that were deleted.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::tls::Transport;
use crate::storage::Piece;

/// Pieces handed to the kernel in one call.
const PIECES: usize = 64;
/// Bytes from which on a file is sent by `sendfile`: a call costs some µs, and copying less costs less.
const SENDFILE: usize = 32 << 10;
/// How long a piece that belongs to others is held at most: a consumer that takes what it asked for does so in much
/// less.
const HOLD: Duration = Duration::from_secs(5);

/// The pieces of a connection.
#[derive(Default)]
pub(super) struct Outbox {
    pieces: VecDeque<Piece>,
    /// Bytes of the first piece that were sent.
    sent: usize,
    unsent: usize,
    /// When the oldest piece that belongs to others came.
    held: Option<Instant>,
    /// The file system does not send.
    no_sendfile: bool,
}

impl Outbox {
    /// Bytes that are not sent.
    pub(super) fn unsent(&self) -> usize {
        self.unsent
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Appends an answer.
    pub(super) fn push(&mut self, answer: Vec<Piece>) {
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

    /// Makes what was held for too long its own memory.
    pub(super) fn let_go(&mut self, now: Instant) {
        if self
            .held
            .is_none_or(|since| now.duration_since(since) < HOLD)
        {
            return;
        }
        for (at, piece) in self.pieces.iter_mut().enumerate() {
            if !piece.is_owned() {
                piece.own(if at == 0 {
                    std::mem::take(&mut self.sent)
                } else {
                    0
                });
            }
        }
        self.held = None;
    }

    /// Sends what one system call takes; gives the bytes. There is something to send.
    pub(super) fn write(&mut self, stream: &mut Transport) -> io::Result<usize> {
        let len = match self.send_file(stream) {
            Some(sent) => sent?,
            None => self.write_pieces(stream)?,
        };
        if len == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.took(len);
        Ok(len)
    }

    /// Where the first piece is a large stretch of a file, sends of it what one call takes.
    fn send_file(&mut self, stream: &Transport) -> Option<io::Result<usize>> {
        let Transport::Plain(socket) = stream else {
            return None;
        };
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

    fn write_pieces(&self, stream: &mut Transport) -> io::Result<usize> {
        let plain = matches!(stream, Transport::Plain(_));
        let mut slices = [IoSlice::new(&[]); PIECES];
        let (mut count, mut more) = (0, false);
        for (slice, piece) in slices.iter_mut().zip(&self.pieces) {
            let by_file = plain && !self.no_sendfile && piece.len() >= SENDFILE;
            if count > 0 && by_file && piece.file().is_some() {
                more = true;
                break;
            }
            let from = if count == 0 { self.sent } else { 0 };
            *slice = IoSlice::new(&piece[from..]);
            count += 1;
        }
        stream.write_vectored(&slices[..count], more)
    }

    fn took(&mut self, mut len: usize) {
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
        self.held = None;
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

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    use rand::rngs::StdRng;
    use rand::{Rng, RngExt, SeedableRng};

    use super::*;
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

    /// Both ends of a connection whose sender takes little at a time and does not wait.
    fn pair() -> (Transport, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let receiver = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (sender, _) = listener.accept().unwrap();
        sender.set_nonblocking(true).unwrap();
        let socket = socket2::SockRef::from(&sender);
        socket.set_send_buffer_size(20_000).unwrap();
        let sender = mio::net::TcpStream::from_std(sender);
        (Transport::new(sender, None).unwrap(), receiver)
    }

    #[test]
    fn whatever_the_socket_takes_everything_arrives_once_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut random = StdRng::seed_from_u64(7);
        let store = store(dir.path(), 120, &mut random);
        let (mut stream, mut receiver) = pair();
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
        let (mut outbox, mut sent, mut files) = (Outbox::default(), 0, 0);
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
            outbox.push(answer);
            assert_eq!(outbox.unsent(), expected.len() - sent);
            while !outbox.is_empty() {
                match outbox.write(&mut stream) {
                    Ok(len) => sent += len,
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                        if random.random_ratio(1, 20) {
                            // As if it had not taken anything for long.
                            outbox.let_go(Instant::now() + HOLD);
                            assert!(outbox.pieces.iter().all(Piece::is_owned));
                        }
                        // Answers queue up, too.
                        if random.random_ratio(1, 4) {
                            break;
                        }
                        std::thread::yield_now();
                    }
                }
                assert_eq!(outbox.unsent(), expected.len() - sent);
            }
        }
        while !outbox.is_empty() {
            match outbox.write(&mut stream) {
                Ok(len) => sent += len,
                Err(_) => std::thread::yield_now(),
            }
        }
        assert_eq!((sent, outbox.unsent()), (expected.len(), 0));
        assert!(files >= 60, "{files} pieces of files");
        drop(stream);
        assert_eq!(received.join().unwrap(), expected);
    }

    #[test]
    fn a_file_that_was_merged_away_is_sent_and_then_goes() {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), 60, &mut StdRng::seed_from_u64(9));
        let (mut stream, mut receiver) = pair();
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
        let mut outbox = Outbox::default();
        outbox.push(pieces.into_list());
        outbox.write(&mut stream).unwrap();
        let view = store.view();
        let (number, path) = (view.files[0].meta.number, view.files[0].path().to_owned());
        drop(view);
        let (remove, add) = (vec![number], Vec::new());
        store.commit(&Edit::Replace { remove, add }).unwrap();
        assert!(path.exists(), "it is being sent");
        // The consumer takes nothing.
        outbox.let_go(Instant::now() + HOLD);
        assert!(!path.exists());
        let received = std::thread::spawn(move || {
            let mut all = Vec::new();
            receiver.read_to_end(&mut all).unwrap();
            all
        });
        while !outbox.is_empty() {
            if outbox.write(&mut stream).is_err() {
                std::thread::yield_now();
            }
        }
        drop(stream);
        assert!(received.join().unwrap() == expected);
    }
}
