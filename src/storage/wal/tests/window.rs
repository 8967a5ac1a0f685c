//! Reading by windows: what they show, what they refuse, and what they keep.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::super::frame::FrameError;
use super::super::window::{AtHand, MOST, Windows};
use super::*;
use crate::storage::Pieces;
use crate::storage::frames::{Cursor, FetchError};

/// A log of `frames` frames with a batch of `size` bytes each, all durable, and where each begins: LSN and the base of
/// its segment.
fn written(
    place: &Place,
    frames: i64,
    size: usize,
) -> (WalWriter, Arc<WalShared>, Vec<(u64, u64)>) {
    let (mut writer, shared, _, _) = place.open();
    let mut model = Model::default();
    for _ in 0..frames {
        model.append_all(&mut writer, 1, size);
        writer.flush().unwrap();
    }
    let mut reader = FrameReader::live(Arc::clone(&shared));
    let mut cursor = Cursor::at_start(&reader.header(0).unwrap());
    let mut places = Vec::new();
    while cursor.lsn < shared.durable_lsn() {
        let at = (cursor.base, cursor.lsn);
        match cursor.step(&mut reader, |_, _| ()) {
            Ok(Some(())) => places.push(at),
            _ => cursor = cursor.next_segment(&mut reader).unwrap(),
        }
    }
    (writer, shared, places)
}

#[test]
fn windows_show_every_frame_wherever_it_lies() {
    let place = Place::new();
    let (writer, shared, places) = written(&place, 60, 9000);
    assert!(places.last().unwrap().0 > 0, "several segments");
    let mut at_hand = AtHand::default();
    // In order, and from anywhere.
    let orders = [1, 7, 11];
    for step in orders {
        for i in 0..places.len() {
            let (base, lsn) = places[i * step % places.len()];
            let frame = |at_hand: &mut AtHand| {
                let durable = shared.durable_lsn();
                shared.windows().frame(base, lsn, durable, at_hand).unwrap()
            };
            let (header, range) = frame(&mut at_hand);
            let bytes = at_hand.window().unwrap().bytes()[range].to_vec();
            let file = fs::File::open(segment_path(&place.shard(), base)).unwrap();
            let mut expected = vec![0; header.size()];
            file.read_exact_at(&mut expected, lsn - base).unwrap();
            assert_eq!((header.lsn, bytes), (lsn, expected));
        }
    }
    // Nothing behind what is durable.
    let (base, lsn) = *places.last().unwrap();
    let share = Share::alone(Part::LogWindows, MOST as u64);
    let fresh = Windows::new(&place.shard(), ID, &share);
    let behind = fresh.frame(base, lsn, lsn, &mut AtHand::default());
    assert!(matches!(
        behind,
        Err(FetchError::Frame {
            error: FrameError::Length { .. },
            ..
        })
    ));
    writer.close().unwrap();
}

#[test]
fn a_segment_that_became_another_shows_an_error_and_what_is_held_stays() {
    let place = Place::new();
    let (writer, shared, places) = written(&place, 30, 9000);
    let frame = |(base, lsn)| {
        let mut at_hand = AtHand::default();
        let durable = shared.durable_lsn();
        let found = shared.windows().frame(base, lsn, durable, &mut at_hand);
        found.map(|(_, range)| (at_hand, range))
    };
    let (at_hand, range) = frame(places[0]).unwrap();
    let before = at_hand.window().unwrap().bytes()[range.clone()].to_vec();
    // Another frame where the first one was, as when the file is used again.
    let path = segment_path(&place.shard(), 0);
    let file = fs::OpenOptions::new().read(true).write(true).open(path);
    let file = file.unwrap();
    let mut other = vec![0; before.len()];
    let (_, second) = places[1];
    file.read_exact_at(&mut other, second).unwrap();
    file.write_all_at(&other, places[0].1).unwrap();
    file.sync_all().unwrap();
    assert_eq!(at_hand.window().unwrap().bytes()[range], before);
    drop(at_hand);
    shared.windows().forget(0);
    let error = frame(places[0]).err().unwrap().to_string();
    assert!(error.contains("LSN"), "{error}");
    // And one whose bytes were damaged.
    file.write_all_at(&[!before[500]], places[2].1 + 500)
        .unwrap();
    shared.windows().forget(0);
    let error = frame(places[2]).err().unwrap().to_string();
    assert!(error.contains("CRC"), "{error}");
    drop(writer);
}

#[test]
fn answers_beyond_a_limit_hold_no_windows() {
    let place = Place::new();
    let (writer, shared, places) = written(&place, 200, 9000);
    let mut held = Vec::new();
    for &(base, lsn) in &places {
        // A window of its own each time.
        shared.windows().forget(base);
        let mut at_hand = AtHand::default();
        let durable = shared.durable_lsn();
        let found = shared.windows().frame(base, lsn, durable, &mut at_hand);
        found.unwrap();
        held.push(at_hand);
        if !shared.windows().may_share() {
            break;
        }
    }
    assert!(!shared.windows().may_share());
    let limit = held.len();
    let mut pieces = Pieces::default();
    let mut reader = LogReader::live(Arc::clone(&shared));
    let read = reader.read_pieces(key(0), 0, 1 << 20, &mut pieces).unwrap();
    assert!(read.batches > 10);
    assert_eq!(pieces.shared(), 0);
    drop(held);
    for (base, _) in places {
        shared.windows().forget(base);
    }
    assert!(shared.windows().may_share(), "{limit} were let go of");
    let mut pieces = Pieces::default();
    reader.read_pieces(key(0), 0, 1 << 20, &mut pieces).unwrap();
    assert!(pieces.shared() > 0);
    writer.close().unwrap();
}
