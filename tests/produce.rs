//! The command `taffrail produce` as a whole process, against a model of the server on a loopback
//! socket.

use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use taffrail::wire;
use wire::datagram::ErrorCode;

#[path = "../src/client/model.rs"]
#[allow(dead_code)]
mod model;

use model::{ModelServer, Mood};

/// Runs `taffrail produce t` with `input` against `server`; gives back both.
fn produce(server: ModelServer, args: &[&str], input: &[u8]) -> (ModelServer, Output) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket
        .set_read_timeout(Some(Duration::from_millis(5)))
        .unwrap();
    let address: SocketAddr = socket.local_addr().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let mut server = server;
    let thread = std::thread::spawn(move || {
        let mut buf = vec![0; 65536];
        while !stopped.load(Ordering::Relaxed) {
            let Ok((len, peer)) = socket.recv_from(&mut buf) else {
                continue;
            };
            if let Some(answer) = server.answer(&buf[..len]) {
                let _ = socket.send_to(&answer, peer);
            }
        }
        server
    });
    let mut child = Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(["produce", "t", "--server", &address.to_string()])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command that generates its messages may be gone before it has read any.
    let _ = stdin.write_all(input);
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    stop.store(true, Ordering::Relaxed);
    (thread.join().unwrap(), output)
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn lines_are_stored_and_their_offsets_printed() {
    let (server, output) = produce(
        ModelServer::new(2),
        &["--partition", "1"],
        b"one\ntwo\nthree",
    );
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "partition 1 offsets 0-2\n");
    assert!(stderr(&output).contains("3 read, 3 acknowledged, 0 failed"));
    let values = server.partitions[1].values();
    assert_eq!(values, [&b"one"[..], b"two", b"three"]);
}

#[test]
fn generated_messages_give_latencies_as_json() {
    let (server, output) = produce(
        ModelServer::new(1),
        &[
            "--count", "200", "--size", "64", "--rate", "4000", "--acks", "all", "--quiet",
            "--format", "json",
        ],
        b"",
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    let summary: Value = serde_json::from_str(&text).unwrap();
    let summary = &summary["summary"];
    assert_eq!(summary["acknowledged"], 200);
    assert_eq!(summary["bytes"], 200 * 64);
    assert_eq!(summary["latency_us"]["count"], 200);
    assert!(summary["latency_us"]["p99"].as_u64() >= summary["latency_us"]["p50"].as_u64());
    let values = server.partitions[0].values();
    assert_eq!(values, vec![[b'x'; 64]; 200]);
}

#[test]
fn what_fails_is_named_and_the_exit_code_says_so() {
    let mut full = ModelServer::new(1);
    full.mood = Mood::Refusing(ErrorCode::StorageFull);
    let (server, output) = produce(full, &["--timeout", "200ms"], b"a\nb\n");
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(stdout(&output), "");
    let text = stderr(&output);
    assert!(text.contains("not stored"), "{text}");
    assert!(text.contains("the server's disk is full"), "{text}");
    assert!(text.contains("2 of 2 messages failed"), "{text}");
    assert_eq!(server.partitions[0].len(), 0);

    let long = vec![b'x'; 100_000];
    let (server, output) = produce(
        ModelServer::new(1),
        &["--format", "json"],
        &[&b"a\n"[..], &long, b"\nb\n"].concat(),
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("message 2: a message of"));
    // In one range or in two, as the lines came through the pipe.
    let lines = stdout(&output);
    let offsets: Vec<i64> = lines
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
        .filter(|line| line["partition"] == 0)
        .flat_map(|line| {
            line["first_offset"].as_i64().unwrap()..=line["last_offset"].as_i64().unwrap()
        })
        .collect();
    assert_eq!(offsets, [0, 1], "{lines}");
    assert_eq!(server.partitions[0].values(), [b"a", b"b"]);
}

#[test]
fn wrong_arguments_are_refused_with_what_is_allowed() {
    let refused = |args: &[&str]| {
        let (_, output) = produce(ModelServer::new(2), args, b"a\n");
        assert!(!output.status.success());
        stderr(&output)
    };
    assert!(refused(&["--partition", "2"]).contains("has 2 partitions"));
    assert!(refused(&["--producer-id", "4"]).contains("--epoch"));
    assert!(refused(&["--acks", "2"]).contains("[possible values: 0, 1, all]"));
}
