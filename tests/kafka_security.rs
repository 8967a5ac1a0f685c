//! Real Kafka clients and what they must prove, may do, and how much of it.
//!
//! The clients are those of tests/kafka.rs; what Python's do is in tests/kafka/secure.py. Certificates are made for
//! each test; users' verifiers come from `taffrail user`.

mod support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use support::Server;

const PASSWORD: &str = "correct horse";

struct Secure {
    server: Server,
    /// SASL and TLS; SASL alone; TLS with clients' certificates.
    sasl_tls: String,
    sasl: String,
    tls: String,
    folder: tempfile::TempDir,
}

/// A [[kafka.user]], as the command prints it.
fn user(name: &str) -> String {
    let mut child = Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(["user", name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = child.stdin.take().unwrap();
    writeln!(input, "{PASSWORD}").unwrap();
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(!text.contains(PASSWORD));
    text
}

fn named(parts: &[(DnType, &str)]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for (kind, value) in parts {
        name.push(kind.clone(), *value);
    }
    name
}

/// A CA, the server's certificate and one for a client called `CN=machine,O=Us`.
fn certificates(folder: &Path) {
    let write = |name: &str, text: String| std::fs::write(folder.join(name), text).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    params.distinguished_name = named(&[(DnType::CommonName, "authority")]);
    let key = KeyPair::generate().unwrap();
    write("ca.pem", params.self_signed(&key).unwrap().pem());
    let issuer = Issuer::new(params, key);
    for (name, hosts) in [
        ("server", vec!["127.0.0.1", "localhost"]),
        ("client", vec![]),
    ] {
        let hosts: Vec<String> = hosts.into_iter().map(str::to_owned).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.use_authority_key_identifier_extension = true;
        params.distinguished_name = match name {
            "client" => named(&[
                (DnType::OrganizationName, "Us"),
                (DnType::CommonName, "machine"),
            ]),
            name => named(&[(DnType::CommonName, name)]),
        };
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        write(&format!("{name}.pem"), certificate.pem());
        write(&format!("{name}.key"), key.serialize_pem());
    }
}

impl Secure {
    fn start(users: &[&str], tables: &str) -> Self {
        Self::start_by(&support::transport("epoll"), users, tables)
    }

    fn start_by(transport: &str, users: &[&str], tables: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        certificates(folder.path());
        let free = || support::free_address().to_string();
        let (sasl_tls, sasl, tls) = (free(), free(), free());
        let file = |name: &str| folder.path().join(name).display().to_string();
        let (cert, key, ca) = (file("server.pem"), file("server.key"), file("ca.pem"));
        let users: String = users.iter().map(|name| user(name)).collect();
        let server = Server::start(
            folder.path(),
            None,
            "",
            &format!(
                r#"[kafka]
group_initial_rebalance_delay = "100ms"
{transport}super_users = ["root"]
[[kafka.listener]]
listen = "{sasl_tls}"
security = "sasl_tls"
tls = {{ cert = "{cert}", key = "{key}" }}
[[kafka.listener]]
listen = "{sasl}"
security = "sasl"
[[kafka.listener]]
listen = "{tls}"
security = "tls"
tls = {{ cert = "{cert}", key = "{key}", client_ca = "{ca}" }}
{users}
{tables}"#
            ),
        );
        Self {
            server,
            sasl_tls,
            sasl,
            tls,
            folder,
        }
    }

    fn file(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    fn kcat(&self, address: &str, config: &[&str], args: &[&str], input: &str) -> Output {
        let mut command = Command::new("timeout");
        command.args(["60", "kcat", "-b", address]);
        for pair in config {
            command.args(["-X", pair]);
        }
        let mut child = command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kcat is installed by scripts/install-deps.sh --test");
        // A client that was refused does not read its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// Lists topics as someone; gives all that kcat says.
    fn list(&self, address: &str, config: &[&str]) -> String {
        let output = self.kcat(address, config, &["-L", "-m", "10"], "");
        format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        )
    }

    /// Runs cases of tests/kafka/secure.py.
    fn script(&self, cases: &[&str]) {
        let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/kafka-clients");
        assert!(
            clients.join("installed").exists(),
            "run scripts/kafka-clients.sh"
        );
        let output = Command::new("timeout")
            .arg("300")
            .arg(clients.join("bin/python"))
            .arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/secure.py"))
            .arg(format!(
                "{},{},{}",
                self.sasl_tls,
                self.sasl,
                self.file("ca.pem")
            ))
            .args(cases)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(output.status.success(), "{text}\n{}", self.server.log());
        assert_eq!(
            text.matches("\nok ").count() + usize::from(text.starts_with("ok ")),
            cases.len(),
            "{text}"
        );
    }
}

#[test]
fn kcat_logs_in_with_each_mechanism_and_not_with_a_wrong_password() {
    let secure = Secure::start(&["root"], "");
    let ca = format!("ssl.ca.location={}", secure.file("ca.pem"));
    let login = |protocol: &str, mechanism: &str, password: &str| {
        vec![
            format!("security.protocol={protocol}"),
            format!("sasl.mechanisms={mechanism}"),
            "sasl.username=root".to_owned(),
            format!("sasl.password={password}"),
            ca.clone(),
        ]
    };
    let input: String = (0..2000)
        .map(|i| format!("value {i} {}\n", "x".repeat(200)))
        .collect();
    for (address, protocol) in [
        (&secure.sasl_tls, "SASL_SSL"),
        (&secure.sasl, "SASL_PLAINTEXT"),
    ] {
        for mechanism in ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] {
            let config = login(protocol, mechanism, PASSWORD);
            let config: Vec<&str> = config.iter().map(String::as_str).collect();
            let topic = format!("{protocol}-{mechanism}");
            let sent = secure.kcat(
                address,
                &config,
                &["-P", "-t", &topic, "-X", "batch.size=100000"],
                &input,
            );
            assert!(
                sent.status.success(),
                "{}",
                String::from_utf8_lossy(&sent.stderr)
            );
            let args = ["-C", "-t", &topic, "-e", "-q", "-o", "beginning"];
            let got = secure.kcat(address, &config, &args, "");
            assert_eq!(String::from_utf8_lossy(&got.stdout), input, "{topic}");

            let config = login(protocol, mechanism, "incorrect horse");
            let config: Vec<&str> = config.iter().map(String::as_str).collect();
            let said = secure.list(address, &config);
            assert!(said.contains("invalid credentials"), "{topic}: {said}");
        }
    }
    let said = secure.list(&secure.sasl_tls, &[]);
    assert!(!said.contains("topic \""), "{said}");
    let said = secure.list(&secure.sasl, &[]);
    assert!(!said.contains("topic \""), "{said}");
    let log = secure.server.log();
    assert!(
        log.contains("did not authenticate by SCRAM-SHA-512: wrong password"),
        "{log}"
    );
    assert!(!log.contains("horse"), "no password in the log");
}

#[test]
fn certificates_say_who_a_client_is() {
    for transport in ["epoll", "io_uring"] {
        certificates_by(&format!("transport = \"{transport}\"\n"));
    }
}

fn certificates_by(transport: &str) {
    let secure = Secure::start_by(
        transport,
        &["root"],
        "[[kafka.acl]]\nprincipal = \"CN=machine,O=Us\"\ntopic = { prefix = \"machine-\" }\nallow = [\"Write\", \"Read\", \"Create\"]\n",
    );
    let ca = format!("ssl.ca.location={}", secure.file("ca.pem"));
    let cert = format!("ssl.certificate.location={}", secure.file("client.pem"));
    let key = format!("ssl.key.location={}", secure.file("client.key"));
    let with = ["security.protocol=SSL", &ca, &cert, &key];
    let sent = secure.kcat(&secure.tls, &with, &["-P", "-t", "machine-1"], "a\nb\n");
    assert!(
        sent.status.success(),
        "{}",
        String::from_utf8_lossy(&sent.stderr)
    );
    let said = secure.list(&secure.tls, &with);
    assert!(
        said.contains("topic \"machine-1\" with 1 partitions"),
        "{said}"
    );
    let sent = secure.kcat(&secure.tls, &with, &["-P", "-t", "other"], "a\n");
    assert!(!sent.status.success());
    let said = String::from_utf8_lossy(&sent.stderr).into_owned();
    assert!(said.contains("authorization failed"), "{said}");
    let said = secure.list(&secure.tls, &["security.protocol=SSL", &ca]);
    assert!(!said.contains("topic \""), "without a certificate: {said}");
}

#[test]
fn python_clients_log_in() {
    Secure::start(&["root"], "").script(&[
        "confluent_logs_in_and_rebalances",
        "kafka_python_logs_in",
        "aiokafka_logs_in",
        "wrong_passwords_are_refused",
    ]);
}

#[test]
fn rules_refuse_as_kafka_does() {
    let rules = r#"
[[kafka.acl]]
principal = "writer"
topic = { prefix = "log-" }
allow = ["Write"]
[[kafka.acl]]
principal = "reader"
topic = "log-a"
allow = ["Read"]
[[kafka.acl]]
principal = "reader"
group = "readers"
allow = ["Read"]
[[kafka.acl]]
principal = "*"
topic = "log-secret"
deny = ["All"]
"#;
    Secure::start(&["root", "writer", "reader"], rules).script(&[
        "topics_that_are_not_allowed_are_hidden_and_refused",
        "groups_that_are_not_allowed_are_refused",
        "administration_is_refused",
    ]);
}

#[test]
fn who_sends_too_much_is_throttled() {
    let quota = "[[kafka.quota]]\nuser = \"writer\"\nproducer_byte_rate = \"200KB\"\nconsumer_byte_rate = \"200KB\"\n";
    let rules = "[[kafka.acl]]\nprincipal = \"writer\"\ntopic = \"*\"\nallow = [\"All\"]\n[[kafka.acl]]\nprincipal = \"writer\"\ngroup = \"*\"\nallow = [\"All\"]\n[[kafka.acl]]\nprincipal = \"writer\"\ncluster = true\nallow = [\"Create\"]\n";
    Secure::start(&["root", "writer"], &format!("{rules}{quota}")).script(&["quotas_throttle"]);
}

/// A request with its length, a header without client id, and a body.
fn frame(key: i16, version: i16, body: &[u8]) -> Vec<u8> {
    let mut request = [key.to_be_bytes(), version.to_be_bytes()].concat();
    request.extend_from_slice(&7i32.to_be_bytes());
    request.extend_from_slice(&(-1i16).to_be_bytes());
    request.extend_from_slice(body);
    let mut frame = (request.len() as i32).to_be_bytes().to_vec();
    frame.extend_from_slice(&request);
    frame
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = (text.len() as i16).to_be_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes
}

/// The next answer without its length; `None`: the server closed the connection.
fn answer(stream: &mut TcpStream) -> Option<Vec<u8>> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).ok()?;
    let mut answer = vec![0; i32::from_be_bytes(length) as usize];
    stream.read_exact(&mut answer).unwrap();
    Some(answer)
}

#[test]
fn nothing_is_served_before_a_client_has_logged_in() {
    let secure = Secure::start(&["root"], "");
    let connect = || {
        let stream = TcpStream::connect(&secure.sasl).unwrap();
        stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
        stream
    };
    let metadata = || frame(3, 1, &(-1i32).to_be_bytes());
    let token = |user: &str, password: &str| format!("\0{user}\0{password}").into_bytes();
    let authenticate = |token: &[u8]| {
        let mut body = (token.len() as i32).to_be_bytes().to_vec();
        body.extend_from_slice(token);
        frame(36, 1, &body)
    };

    // ApiVersions is answered, anything else is not.
    let mut stream = connect();
    stream.write_all(&frame(18, 0, &[])).unwrap();
    assert!(answer(&mut stream).is_some());
    stream.write_all(&metadata()).unwrap();
    assert_eq!(answer(&mut stream), None);

    // A large request is refused by its length.
    let mut stream = connect();
    stream.write_all(&(1i32 << 20).to_be_bytes()).unwrap();
    assert_eq!(answer(&mut stream), None);

    // A token without a handshake, and an unknown mechanism.
    let mut stream = connect();
    stream
        .write_all(&authenticate(&token("root", PASSWORD)))
        .unwrap();
    assert_eq!(answer(&mut stream).unwrap()[4..6], 34i16.to_be_bytes());
    assert_eq!(answer(&mut stream), None);
    let mut stream = connect();
    stream.write_all(&frame(17, 1, &text("GSSAPI"))).unwrap();
    assert_eq!(answer(&mut stream).unwrap()[4..6], 33i16.to_be_bytes());
    assert_eq!(answer(&mut stream), None);

    // Requests behind a failed login, sent with it, are not served.
    let mut stream = connect();
    let mut all = frame(17, 1, &text("PLAIN"));
    all.extend(authenticate(&token("root", "wrong password")));
    all.extend(metadata());
    stream.write_all(&all).unwrap();
    assert_eq!(answer(&mut stream).unwrap()[4..6], 0i16.to_be_bytes());
    assert_eq!(answer(&mut stream).unwrap()[4..6], 58i16.to_be_bytes());
    assert_eq!(answer(&mut stream), None);

    // Behind one that holds they are, and a second login is refused without an end.
    let mut stream = connect();
    let mut all = frame(17, 1, &text("PLAIN"));
    all.extend(authenticate(&token("root", PASSWORD)));
    all.extend(metadata());
    all.extend(frame(17, 1, &text("PLAIN")));
    all.extend(metadata());
    stream.write_all(&all).unwrap();
    for code in [Some(0i16), Some(0), None, Some(34), None] {
        let answer = answer(&mut stream).unwrap();
        if let Some(code) = code {
            assert_eq!(answer[4..6], code.to_be_bytes());
        }
    }

    // After SaslHandshake 0 tokens have no headers, and are shorter than any request.
    let mut stream = connect();
    stream.write_all(&frame(17, 0, &text("PLAIN"))).unwrap();
    assert_eq!(answer(&mut stream).unwrap()[4..6], 0i16.to_be_bytes());
    let short = b"\0a\0b";
    stream
        .write_all(&(short.len() as i32).to_be_bytes())
        .unwrap();
    stream.write_all(short).unwrap();
    assert_eq!(answer(&mut stream), None);
    let mut stream = connect();
    stream.write_all(&frame(17, 0, &text("PLAIN"))).unwrap();
    answer(&mut stream).unwrap();
    let token = token("root", PASSWORD);
    stream
        .write_all(&(token.len() as i32).to_be_bytes())
        .unwrap();
    stream.write_all(&token).unwrap();
    stream.write_all(&metadata()).unwrap();
    assert_eq!(answer(&mut stream).unwrap(), b"");
    assert!(answer(&mut stream).is_some());

    // What is no TLS ends its connection alone.
    let mut stream = TcpStream::connect(&secure.sasl_tls).unwrap();
    stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
    stream.write_all(&metadata()).unwrap();
    let mut rest = Vec::new();
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < 16, "an alert at most: {rest:?}");
    assert_eq!(secure.server.stats().imbalances(), Vec::<String>::new());
}

/// Who guesses passwords waits for each answer; nobody else does, on the same thread.
#[test]
fn a_failed_login_is_answered_late_and_holds_up_nobody() {
    const DELAY: Duration = Duration::from_secs(5);
    let folder = tempfile::tempdir().unwrap();
    let address = support::free_address();
    let server = Server::start(
        folder.path(),
        None,
        "",
        &format!(
            "[kafka]\nlisten = [\"{address}\"]\nthreads = 1\nsecurity = \"sasl\"\n\
             failed_authentication_delay = \"5s\"\n{}",
            user("root")
        ),
    );
    let login = |password: &str| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
        let token = format!("\0root\0{password}");
        let mut body = (token.len() as i32).to_be_bytes().to_vec();
        body.extend_from_slice(token.as_bytes());
        stream.write_all(&frame(17, 1, &text("PLAIN"))).unwrap();
        assert_eq!(answer(&mut stream).unwrap()[4..6], 0i16.to_be_bytes());
        stream.write_all(&frame(36, 1, &body)).unwrap();
        stream
    };
    let begun = Instant::now();
    let mut wrong = login("wrong password");
    let late = std::thread::spawn(move || {
        let code = answer(&mut wrong).unwrap()[4..6].to_vec();
        let answered = Instant::now();
        assert_eq!(code, 58i16.to_be_bytes());
        assert_eq!(answer(&mut wrong), None);
        answered
    });
    for _ in 0..3 {
        let mut right = login(PASSWORD);
        assert_eq!(answer(&mut right).unwrap()[4..6], 0i16.to_be_bytes());
        right
            .write_all(&frame(3, 1, &(-1i32).to_be_bytes()))
            .unwrap();
        assert!(answer(&mut right).is_some());
    }
    let served = Instant::now();
    let answered = late.join().unwrap();
    assert!(answered - begun >= DELAY);
    assert!(served < answered, "the thread waited, too");
    let closed = server.stats().kafka.unwrap().closed;
    assert_eq!(closed.get("authentication_failed"), Some(&1));
}

/// Users, rules and certificates change while the server runs: all that was written, or nothing.
#[test]
fn a_hang_up_reads_users_rules_and_certificates_again() {
    use kafka_protocol::messages::metadata_request::MetadataRequestTopic;
    use kafka_protocol::messages::{
        MetadataRequest, SaslAuthenticateRequest, SaslHandshakeRequest, TopicName,
    };
    use kafka_protocol::protocol::StrBytes;
    let secure = Secure::start(
        &["root", "alice"],
        "[[kafka.acl]]\nprincipal = \"alice\"\ngroup = \"*\"\nallow = [\"Read\"]\n",
    );
    let login = |user: &str, protocol: &str, ca: &str| {
        vec![
            format!("security.protocol={protocol}"),
            "sasl.mechanisms=SCRAM-SHA-256".to_owned(),
            format!("sasl.username={user}"),
            format!("sasl.password={PASSWORD}"),
            format!("ssl.ca.location={}", secure.file(ca)),
        ]
    };
    let list = |user: &str, ca: &str| {
        let config = login(user, "SASL_SSL", ca);
        let config: Vec<&str> = config.iter().map(String::as_str).collect();
        secure.list(&secure.sasl_tls, &config)
    };
    let config = login("root", "SASL_PLAINTEXT", "ca.pem");
    let config: Vec<&str> = config.iter().map(String::as_str).collect();
    let sent = secure.kcat(&secure.sasl, &config, &["-P", "-t", "orders"], "one\n");
    assert!(sent.status.success());

    // A connection that lives through all of it.
    let mut alice = support::kafka::Connection::open(secure.sasl.parse().unwrap()).unwrap();
    let plain = SaslHandshakeRequest::default().with_mechanism(StrBytes::from_static_str("PLAIN"));
    assert_eq!(alice.call(1, &plain).unwrap().error_code, 0);
    let token = format!("\0alice\0{PASSWORD}").into_bytes();
    let token = SaslAuthenticateRequest::default().with_auth_bytes(token.into());
    assert_eq!(alice.call(2, &token).unwrap().error_code, 0);
    let mut sees = || {
        let name = TopicName(StrBytes::from_static_str("orders"));
        let topic = MetadataRequestTopic::default().with_name(Some(name));
        let request = MetadataRequest::default().with_topics(Some(vec![topic]));
        match alice.call(9, &request).unwrap().topics[0].error_code {
            0 => true,
            29 => false,
            code => panic!("{code}"),
        }
    };
    assert!(!sees());

    let path = secure.server.config_path();
    let before = std::fs::read_to_string(path).unwrap();
    let rule = |operation: &str| {
        format!(
            "[[kafka.acl]]\nprincipal = \"alice\"\ntopic = \"orders\"\nallow = [\"{operation}\"]\n"
        )
    };
    let read_again = |text: &str, says: &str, times: usize| {
        std::fs::write(path, text).unwrap();
        secure.server.hang_up();
        support::wait_until(says, || secure.server.log().matches(says).count() == times);
    };
    // A mistake in the file, a certificate that is none: nothing changes, whatever else is right.
    read_again(&(before.clone() + &rule("Look")), "nothing was changed", 1);
    let fine = before.clone() + &rule("Read") + &user("bob");
    let certificate = std::fs::read(secure.file("server.pem")).unwrap();
    std::fs::write(secure.file("server.pem"), "nothing").unwrap();
    read_again(&fine, "nothing was changed", 2);
    let moved = fine.replace("security = \"sasl\"\n", "security = \"none\"\n");
    std::fs::write(secure.file("server.pem"), certificate).unwrap();
    read_again(&moved, "nothing was changed", 3);
    assert!(!sees());
    let said = list("bob", "ca.pem");
    assert!(said.contains("invalid credentials"), "{said}");
    assert!(list("root", "ca.pem").contains("topic \"orders\""));

    // All of it, with another authority.
    std::fs::rename(secure.file("ca.pem"), secure.file("old.pem")).unwrap();
    certificates(secure.folder.path());
    read_again(&fine, "certificates again", 1);
    assert!(sees());
    let said = list("bob", "ca.pem");
    assert!(said.contains("1 brokers"), "{said}");
    let said = list("bob", "old.pem");
    assert!(!said.contains("1 brokers"), "{said}");
    assert_eq!(secure.server.stats().imbalances(), Vec::<String>::new());
}

#[test]
fn an_open_address_must_be_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("t.toml");
    std::fs::write(
        &file,
        "[storage]\npath = \"/d\"\n[kafka]\nlisten = [\"0.0.0.0:9092\"]\n",
    )
    .unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_taffrail"))
        .args(["check", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success());
    assert!(
        said.contains("line 4: kafka.listen") && said.contains("security = \"none\""),
        "{said}"
    );
}
