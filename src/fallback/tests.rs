//! A small length-prefixed protocol over the in-memory transport: order, limits, time-outs, ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::testing::Memory;
use super::*;

/// Requests are 4 bytes of length and a body; the first byte of the body says what happens.
#[derive(Default)]
pub(super) struct Echo {
    /// Requests taken and not yet answered, in order.
    late: Vec<(ConnectionId, Request)>,
    /// Whether late requests are answered in `poll`.
    pub(super) answer_late: bool,
    pub(super) closed: Vec<(ConnectionId, CloseReason)>,
    pub(super) open: usize,
}

pub(super) struct EchoConnection {
    owed: usize,
    ended: bool,
}

impl Service for Echo {
    type Connection = EchoConnection;

    fn accept(&mut self, _: ConnectionId, _: &Peer, _: Now) -> Option<EchoConnection> {
        self.open += 1;
        Some(EchoConnection {
            owed: 0,
            ended: false,
        })
    }

    fn received(
        &mut self,
        connection: &mut EchoConnection,
        id: ConnectionId,
        input: &mut Input<'_>,
        out: &mut Output,
        _: Now,
    ) -> Flow {
        loop {
            let bytes = input.bytes();
            let Some(length) = bytes.first_chunk::<4>() else {
                input.need(4);
                return Flow::Continue;
            };
            let len = 4 + u32::from_be_bytes(*length) as usize;
            if bytes.len() < len {
                input.need(len);
                return Flow::Continue;
            }
            match bytes.get(4) {
                // Answered later, by poll: the connection waits for it, so that order is kept.
                Some(b'l') => {
                    self.late.push((id, input.take(len)));
                    connection.owed += 1;
                    return Flow::Pause;
                }
                // Answered with a shared piece, sixteen times.
                Some(b's') => {
                    let shared: Arc<dyn AsRef<[u8]> + Send + Sync> =
                        Arc::new(bytes[..len].to_vec());
                    for _ in 0..16 {
                        out.push_shared(Arc::clone(&shared), 0..len);
                    }
                    input.consume(len);
                }
                Some(b'c') => return Flow::Close,
                Some(b'a') => return Flow::Abort,
                _ => {
                    out.push(bytes[..len].to_vec());
                    input.consume(len);
                }
            }
            if out.is_full() {
                return Flow::Continue;
            }
        }
    }

    fn ended(
        &mut self,
        connection: &mut EchoConnection,
        _: ConnectionId,
        _: End,
        _: &mut Output,
        _: Now,
    ) -> Flow {
        connection.ended = true;
        if connection.owed > 0 {
            Flow::Continue
        } else {
            Flow::Close
        }
    }

    fn poll(&mut self, connections: &mut Connections<EchoConnection>, _: Now) -> Next {
        if self.answer_late {
            for (id, request) in self.late.drain(..) {
                if let Some((connection, out)) = connections.get(id) {
                    out.push(request.to_vec());
                    connection.owed -= 1;
                    if connection.ended && connection.owed == 0 {
                        connections.close(id);
                    } else {
                        connections.resume(id);
                    }
                }
            }
        }
        Next::Event
    }

    fn closed(&mut self, id: ConnectionId, _: EchoConnection, reason: CloseReason) {
        self.open -= 1;
        self.closed.push((id, reason));
    }
}

/// A request with this body.
pub(super) fn request(body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

fn limits() -> Limits {
    Limits {
        connections: 50,
        connections_per_source: 40,
        request: 10_000,
        output: 2_000,
        in_flight: 3_000,
        memory: 200_000,
        ..Limits::default()
    }
}

fn echo(limits: Limits) -> Memory<Echo> {
    let service = Echo {
        answer_late: true,
        ..Echo::default()
    };
    Memory::new(service, limits)
}

/// What the server must answer.
fn answers(bodies: &[Vec<u8>]) -> Vec<u8> {
    let mut all = Vec::new();
    for body in bodies {
        let times = if body.first() == Some(&b's') { 16 } else { 1 };
        for _ in 0..times {
            all.extend(request(body));
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// However requests are cut, and however slowly the peer reads: all answers, in order, once; and
    /// memory stays within its limit.
    #[test]
    fn any_chunks_give_the_same_answers(
        bodies in prop::collection::vec(
            prop::collection::vec(prop::sample::select(b"xsl".to_vec()), 0..3000), 1..20),
        cuts in prop::collection::vec(1usize..4000, 1..40),
        window in prop::option::of(1usize..5000),
        half_close in any::<bool>(),
    ) {
        let mut net = echo(limits());
        let id = net.connect().unwrap();
        let bytes: Vec<u8> = bodies.iter().flat_map(|body| request(body)).collect();
        if let Some(window) = window {
            net.window(id, window);
        }
        let mut got = Vec::new();
        let (mut rest, mut i) = (&bytes[..], 0);
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(cuts[i % cuts.len()].min(rest.len()));
            net.send(id, piece);
            net.run();
            prop_assert!(net.endpoint.memory() <= 200_000 + 4000);
            if i % 3 == 0 {
                got.extend(net.take(id));
                net.drain();
            }
            (rest, i) = (after, i + 1);
        }
        if half_close {
            net.half_close(id);
        }
        for _ in 0..20_000 {
            net.run();
            let some = net.take(id);
            net.drain();
            if some.is_empty() && net.unread(id) == 0 && net.take(id).is_empty() && got.len() == answers(&bodies).len() {
                break;
            }
            got.extend(some);
        }
        prop_assert_eq!(&got, &answers(&bodies));
        prop_assert_eq!(net.is_closed(id), half_close);
        if half_close {
            prop_assert_eq!(&net.endpoint.service().closed, &[(id, CloseReason::Peer)]);
        }
        prop_assert_eq!(net.endpoint.memory(), 0);
    }
}

#[test]
fn a_request_in_many_parts_is_not_moved_again_when_taken() {
    let mut net = echo(limits());
    net.endpoint.service_mut().answer_late = false;
    let id = net.connect().unwrap();
    let bytes = request(&[b'l'; 2000]);
    net.send_pieces(id, bytes.chunks(7));
    let (_, taken) = &net.endpoint.service().late[0];
    assert_eq!(taken.bytes(), bytes);
    // One buffer of the next class is all that is held: no second copy.
    assert_eq!(net.endpoint.memory(), 2048);
}

#[test]
fn what_is_not_answered_stops_reading_and_outlives_its_connection() {
    let mut net = echo(limits());
    net.endpoint.service_mut().answer_late = false;
    let id = net.connect().unwrap();
    for _ in 0..10 {
        net.send(id, &request(&[b'l'; 1000]));
        net.run();
    }
    assert_eq!(
        net.endpoint.service().late.len(),
        1,
        "paused after the first"
    );
    assert!(net.unread(id) > 0, "the rest stays with the peer");
    net.reset(id);
    net.run();
    assert!(net.is_closed(id));
    assert_eq!(net.endpoint.service().closed, [(id, CloseReason::Reset)]);
    assert_eq!(net.endpoint.service().late[0].1.len(), 1004);
    net.endpoint.service_mut().late.clear();
    net.run();
    assert_eq!(net.endpoint.memory(), 0);
    let again = net.connect().unwrap();
    assert_eq!(again.slot, id.slot);
    assert_ne!(again, id);
}

#[test]
fn a_half_closed_peer_gets_late_answers() {
    let mut net = echo(limits());
    net.endpoint.service_mut().answer_late = false;
    let id = net.connect().unwrap();
    net.send(id, &request(b"late"));
    net.run();
    net.half_close(id);
    net.run();
    assert!(!net.is_closed(id));
    net.endpoint.service_mut().answer_late = true;
    net.run();
    assert_eq!(net.take(id), request(b"late"));
    assert!(net.is_closed(id));
}

#[test]
fn too_long_a_request_is_refused_before_it_comes() {
    let mut net = echo(limits());
    let id = net.connect().unwrap();
    net.send(id, &u32::MAX.to_be_bytes());
    net.run();
    assert!(net.is_closed(id));
    assert_eq!(
        net.endpoint.service().closed,
        [(id, CloseReason::RequestTooLarge)]
    );
}

#[test]
fn connections_are_limited_in_all_and_by_source() {
    let mut net = echo(limits());
    let local: Vec<_> = (0..45).filter_map(|_| net.connect()).collect();
    assert_eq!(local.len(), 40);
    let from = |i: u16| -> std::net::SocketAddr {
        format!("[2001:db8:0:{}::{i}]:1000", i % 2).parse().unwrap()
    };
    let others = (0..20).filter(|&i| net.connect_from(from(i)).is_some());
    assert_eq!(others.count(), 10);
    assert_eq!(net.counters.refused_source.get(), 5);
    assert_eq!(net.counters.refused.get(), 10);
    net.reset(local[0]);
    net.run();
    assert!(net.connect().is_some());
}

#[test]
fn the_silent_the_slow_and_the_trickling_are_closed() {
    let mut net = echo(Limits {
        idle: Duration::from_secs(100),
        slow_reader: Duration::from_secs(5),
        slow_request: Duration::from_secs(20),
        ..limits()
    });
    let [silent, reader, trickle, busy] = [(); 4].map(|()| net.connect().unwrap());
    net.window(reader, 0);
    net.send(reader, &request(b"x"));
    let long = request(&[b'x'; 5000]);
    let mut end = HashMap::new();
    for second in 0..110 {
        net.send(trickle, &long[second..=second]);
        net.send(busy, &request(b"y"));
        net.run();
        for _ in 0..8 {
            net.advance_time(Duration::from_millis(125));
            net.run();
        }
        for id in [silent, reader, trickle, busy] {
            if net.is_closed(id) {
                end.entry(id).or_insert(second);
            }
        }
    }
    let reasons: HashMap<_, _> = net.endpoint.service().closed.iter().copied().collect();
    assert_eq!(reasons[&silent], CloseReason::Idle);
    assert_eq!(reasons[&reader], CloseReason::SlowReader);
    assert_eq!(reasons[&trickle], CloseReason::SlowRequest);
    assert!(!net.is_closed(busy));
    for (id, at) in [(silent, 100), (reader, 5), (trickle, 20)] {
        assert!(
            (at - 1..=at + 2).contains(&end[&id]),
            "{} for {at}",
            end[&id]
        );
    }
}

#[test]
fn memory_in_all_is_bounded_and_comes_back() {
    let mut net = echo(Limits {
        in_flight: 1 << 20,
        memory: 20_000,
        slow_request: Duration::from_secs(5),
        ..limits()
    });
    let ids: Vec<_> = (0..30).map(|_| net.connect().unwrap()).collect();
    for &id in &ids {
        net.send(id, &request(&[b'x'; 3000])[..2000]);
        net.run();
        assert!(
            net.endpoint.memory() <= 20_000 * 5 / 4 + 4096,
            "{}",
            net.endpoint.memory()
        );
    }
    for _ in 0..160 {
        net.advance_time(Duration::from_millis(125));
        net.run();
    }
    assert_eq!(net.endpoint.memory(), 0);
    let closed = &net.endpoint.service().closed;
    assert!(
        closed
            .iter()
            .any(|(_, reason)| *reason == CloseReason::Memory)
    );
    let id = net.connect().unwrap();
    net.send(id, &request(b"works again"));
    net.run();
    assert_eq!(net.take(id), request(b"works again"));
}

#[test]
fn closing_sends_what_is_queued_and_aborting_does_not() {
    let mut net = echo(limits());
    let [a, b] = [(); 2].map(|()| net.connect().unwrap());
    for (id, last) in [(a, b"c"), (b, b"a")] {
        let mut bytes = request(b"x");
        bytes.extend(request(last));
        bytes.extend(request(b"never seen"));
        net.send(id, &bytes);
    }
    net.run();
    assert!(net.is_closed(a) && net.is_closed(b));
    assert_eq!((net.take(a), net.take(b)), (request(b"x"), vec![]));
    assert_eq!(net.endpoint.service().open, 0);
}

#[test]
fn stopping_answers_what_is_owed() {
    let mut net = echo(limits());
    net.endpoint.service_mut().answer_late = false;
    let [idle, owed] = [(); 2].map(|()| net.connect().unwrap());
    net.send(owed, &request(b"l"));
    net.run();
    net.endpoint.stop();
    net.run();
    assert!(net.connect().is_none());
    assert!(net.is_closed(idle) && !net.is_closed(owed));
    net.endpoint.service_mut().answer_late = true;
    net.run();
    assert!(net.is_closed(owed));
    assert_eq!(net.take(owed), request(b"l"));
    assert_eq!(
        net.endpoint.service().closed,
        [(idle, CloseReason::Stop), (owed, CloseReason::Stop)]
    );
}
