//! What the whole-process tests share: network namespaces joined by veth, and a server in one of
//! them.
//!
//! Everything has a name of its own (process id and a counter), so tests run side by side; everything
//! goes away when its value is dropped, also when a test panics.

#![allow(dead_code)] // each test binary uses a part

pub mod kafka;

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use taffrail::control::client::ControlClient;
use taffrail::control::protocol::{Position, Stats};
use taffrail::storage::lsm::codec;
use taffrail::wire::record_batch;

/// A guard against hangs, not a measurement.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A name that no other test of this machine has.
pub fn unique(prefix: &str) -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!(
        "{prefix}{}-{}",
        std::process::id(),
        COUNTER.fetch_add(1, Ordering::Relaxed)
    )
}

/// Runs a command and panics with its output if it fails.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A port of loopback that was free a moment ago; the server asks for it again at once, and after each restart.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

/// The line of `[kafka]` that chooses the transport: what TAFFRAIL_TEST_TRANSPORT says, so that everything can be run with
/// either, else `usual`.
pub fn transport(usual: &str) -> String {
    let chosen = std::env::var("TAFFRAIL_TEST_TRANSPORT");
    format!("transport = \"{}\"\n", chosen.as_deref().unwrap_or(usual))
}

/// Waits until `done` says so.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A network namespace.
pub struct Netns {
    pub name: String,
}

impl Netns {
    pub fn new() -> Self {
        let name = unique("tf");
        run("ip", &["netns", "add", &name]);
        run("ip", &["-n", &name, "link", "set", "lo", "up"]);
        Self { name }
    }

    /// Runs `work` on a thread inside the namespace: sockets that it opens belong there.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = std::fs::File::open(format!("/run/netns/{}", self.name)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                use std::os::fd::AsRawFd;
                // SAFETY: setns takes a valid descriptor and changes this thread alone.
                let result = unsafe { libc::setns(file.as_raw_fd(), libc::CLONE_NEWNET) };
                assert_eq!(result, 0, "setns: {}", std::io::Error::last_os_error());
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run inside the namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .output();
    }
}

/// Two hosts and the cable between them: a producer with the kernel's stack, and the box.
pub struct Network {
    pub producer: Netns,
    pub server: Netns,
    /// Interface of the server's end.
    pub interface: String,
}

/// Addresses of the two ends, inside their namespaces.
pub const PRODUCER_V4: &str = "10.77.0.1";
pub const SERVER_V4: &str = "10.77.0.2";
pub const PRODUCER_V6: &str = "fd77::1";
pub const SERVER_V6: &str = "fd77::2";

impl Network {
    /// Lets the producer learn the server's Ethernet address: what waits for that is sent out of order.
    pub fn resolve(&self, address: &str) {
        let producer = self.producer.name.as_str();
        run(
            "ip",
            &[
                "netns", "exec", producer, "ping", "-c", "1", "-W", "10", address,
            ],
        );
    }

    pub fn new() -> Self {
        let (producer, server) = (Netns::new(), Netns::new());
        let (p, s) = (producer.name.as_str(), server.name.as_str());
        run(
            "ip",
            &[
                "-n", p, "link", "add", "prod", "type", "veth", "peer", "name", "box", "netns", s,
            ],
        );
        // No host address on the server's end: the DPDK port alone speaks there.
        run(
            "ip",
            &[
                "netns",
                "exec",
                s,
                "sysctl",
                "-qw",
                "net.ipv6.conf.box.disable_ipv6=1",
            ],
        );
        run(
            "ip",
            &[
                "-n",
                p,
                "addr",
                "add",
                &format!("{PRODUCER_V4}/24"),
                "dev",
                "prod",
            ],
        );
        run(
            "ip",
            &[
                "-n",
                p,
                "addr",
                "add",
                &format!("{PRODUCER_V6}/64"),
                "dev",
                "prod",
                "nodad",
            ],
        );
        run("ip", &["-n", s, "link", "set", "box", "up"]);
        run("ip", &["-n", p, "link", "set", "prod", "up"]);
        run(
            "ip",
            &["-n", p, "route", "add", "224.0.0.0/4", "dev", "prod"],
        );
        Self {
            producer,
            server,
            interface: "box".to_owned(),
        }
    }

    /// The `[[port]]` table for the server's end, over AF_PACKET.
    pub fn port(&self) -> String {
        format!(
            "[[port]]\nname = \"p0\"\ndevice = \"net_af_packet0,iface={}\"\naddresses = [\"{SERVER_V4}/24\", \"{SERVER_V6}/64\"]\n",
            self.interface
        )
    }
}

/// A running `taffrail serve`, killed and cleared away when dropped.
pub struct Server {
    child: Option<Child>,
    pub folder: PathBuf,
    config: PathBuf,
    prefix: String,
    namespace: Option<String>,
    /// On tmpfs: it outlives a killed server and goes with the test.
    _staging: tempfile::TempDir,
}

impl Server {
    /// Starts a server in `namespace` whose files lie in `folder`. `tables` is the configuration
    /// beside `[eal]` and `[control]`; `storage` holds further keys of `[storage]`.
    pub fn start(folder: &Path, namespace: Option<&Netns>, storage: &str, tables: &str) -> Self {
        let mut server = Self::prepare(folder, namespace, Path::new("/dev/shm"), storage, tables);
        server.restart();
        server
    }

    /// As [`Server::start`], without starting it; its staging files will lie below `staging`.
    pub fn prepare(
        folder: &Path,
        namespace: Option<&Netns>,
        staging: &Path,
        storage: &str,
        tables: &str,
    ) -> Self {
        let prefix = unique("tf");
        let staging = tempfile::Builder::new()
            .prefix("taffrail-test-")
            .tempdir_in(staging)
            .unwrap();
        let mut text = String::new();
        writeln!(
            text,
            "[storage]\npath = \"{}\"\nstaging_dir = \"{}\"\n{storage}",
            folder.join("data").display(),
            staging.path().display()
        )
        .unwrap();
        for (key, value) in [
            ("segment_size", "\"8MiB\""),
            ("staging_size", "\"8MiB\""),
            ("commit_size", "\"256KiB\""),
            ("prepared_segments", "1"),
        ] {
            if !storage.contains(key) {
                writeln!(text, "{key} = {value}").unwrap();
            }
        }
        writeln!(text, "[eal]\nfile_prefix = \"{prefix}\"\nhugepages = false").unwrap();
        writeln!(
            text,
            "[control]\nsocket = \"{}\"\n{tables}",
            folder.join("control.sock").display()
        )
        .unwrap();
        let config = folder.join("taffrail.toml");
        std::fs::write(&config, text).unwrap();
        Self {
            child: None,
            folder: folder.to_owned(),
            config,
            prefix,
            namespace: namespace.map(|n| n.name.clone()),
            _staging: staging,
        }
    }

    /// The prefix of DPDK's run-time files.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Starts the process (again) and waits until it answers.
    pub fn restart(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Starts the process (again).
    pub fn spawn(&mut self) {
        assert!(self.child.is_none(), "the server runs already");
        let binary = env!("CARGO_BIN_EXE_taffrail");
        let mut command = match &self.namespace {
            Some(name) => {
                let mut command = Command::new("ip");
                command.args(["netns", "exec", name, binary]);
                command
            }
            None => Command::new(binary),
        };
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .unwrap();
        command.args(["serve", "--config"]).arg(&self.config);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until the process answers.
    pub fn wait_ready(&mut self) {
        let start = Instant::now();
        while ControlClient::connect(&self.socket()).is_err() {
            let child = self.child.as_mut().expect("the server was started");
            if let Some(status) = child.try_wait().unwrap() {
                self.child = None;
                panic!("the server ended with {status}:\n{}", self.log());
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the server does not answer:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    pub fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    pub fn config_path(&self) -> &Path {
        &self.config
    }

    fn log_path(&self) -> PathBuf {
        self.folder.join("server.log")
    }

    /// What the server wrote, over all its runs.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    pub fn client(&self) -> ControlClient {
        ControlClient::connect(&self.socket()).unwrap_or_else(|e| panic!("{e}\n{}", self.log()))
    }

    pub fn stats(&self) -> Stats {
        self.client().stats().unwrap()
    }

    /// Waits until nothing is in flight and `stored` messages are durable in all topics together,
    /// then checks that every account adds up.
    pub fn settled(&self, stored: u64) -> Stats {
        let mut last = Stats::default();
        wait_until(&format!("{stored} stored messages"), || {
            last = self.stats();
            let durable: i64 = last
                .topics
                .iter()
                .flat_map(|t| &t.partitions)
                .map(|p| p.high_watermark - p.start)
                .sum();
            durable as u64 >= stored && last.topics.iter().all(|t| t.in_flight == 0)
        });
        assert_eq!(last.imbalances(), Vec::<String>::new());
        last
    }

    /// Values of a partition from `offset` on, read from the running server.
    pub fn values(&self, topic: &str, partition: u32, offset: i64) -> Vec<(i64, Vec<u8>)> {
        let mut client = self.client();
        let mut values = Vec::new();
        let mut next = offset;
        let mut scratch = Vec::new();
        loop {
            let mut batches = Vec::new();
            let answer = client
                .read(
                    topic,
                    partition,
                    Position::Offset(next),
                    1 << 20,
                    &mut batches,
                )
                .unwrap();
            let mut rest = &batches[..];
            while !rest.is_empty() {
                let header = record_batch::parse_header(rest).unwrap();
                let (batch, behind) = rest.split_at(header.total_len());
                record_batch::validate(batch).unwrap();
                let plain = codec::plain(batch, &mut scratch).unwrap();
                for record in record_batch::Records::new(plain).unwrap() {
                    let record = record.unwrap();
                    if record.offset >= next {
                        values.push((record.offset, record.value.unwrap_or_default().to_vec()));
                    }
                }
                rest = behind;
            }
            let newest = values.last().map_or(offset, |(o, _)| o + 1);
            if newest >= answer.high_watermark || newest == next {
                return values;
            }
            next = newest;
        }
    }

    fn signal(&self, signal: i32) {
        let child = self.child.as_ref().expect("the server runs");
        // SAFETY: kill has no memory effects; `ip netns exec` replaces itself by the server, so the
        // child's id is the server's.
        unsafe { libc::kill(child.id() as i32, signal) };
    }

    /// SIGTERM, without waiting for the end.
    pub fn terminate(&self) {
        self.signal(libc::SIGTERM);
    }

    /// SIGSTOP: it does nothing until [`Server::go_on`].
    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        self.signal(libc::SIGCONT);
    }

    /// Waits until a process that was spawned has ended by itself.
    pub fn wait_end(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().expect("the server was started");
        let mut status = None;
        wait_until("the server's end", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// SIGHUP: the configuration is read again.
    pub fn hang_up(&self) {
        self.signal(libc::SIGHUP);
    }

    /// SIGTERM; returns once the server has ended well.
    pub fn stop(&mut self) {
        self.terminate();
        let mut child = self.child.take().unwrap();
        let start = Instant::now();
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                assert!(
                    status.success(),
                    "the server ended with {status}:\n{}",
                    self.log()
                );
                return;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the server does not stop:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        self.child.take().unwrap().wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("---- log of the server ----\n{}", self.log());
        }
        let _ = std::fs::remove_dir_all(format!("/var/run/dpdk/{}", self.prefix));
    }
}
