//! TLS of the listeners, and connections with or without it.
//!
//! Invariants: a connection holds at most rustls' own bounds of bytes (64 KiB of what is to be sent, 16 KiB of
//! what was received, a handshake's messages), whatever its peer sends or does not take; what was handed over
//! for sending goes out in order.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

use crate::config::kafka::Tls as Files;
use crate::fallback::{Chunk, Message, Outbox, Socket, Sockets};

/// Pieces encrypted at a time; rustls takes 64 KiB of them at most.
const SLICES: usize = 64;

/// Reads a listener's files.
pub(super) fn load(files: &Files) -> Result<Arc<ServerConfig>, String> {
    let certificates = |path: &std::path::Path| -> Result<Vec<CertificateDer<'static>>, String> {
        let list = CertificateDer::pem_file_iter(path)
            .and_then(|list| list.collect::<Result<Vec<_>, _>>())
            .map_err(|e| format!("kafka.tls: {}: {e}", path.display()))?;
        match list.is_empty() {
            true => Err(format!(
                "kafka.tls: {} holds no certificate in PEM",
                path.display()
            )),
            false => Ok(list),
        }
    };
    let chain = certificates(&files.cert)?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|e| format!("kafka.tls: {}: {e}", files.key.display()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|e| format!("kafka.tls: {e}"))?;
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let named = |e: &dyn std::fmt::Display| format!("kafka.tls: {}: {e}", path.display());
            let mut roots = RootCertStore::empty();
            for authority in certificates(path)? {
                roots.add(authority).map_err(|e| named(&e))?;
            }
            let roots = Arc::new(roots);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|e| named(&e))?)
        }
    };
    let config = builder.with_single_cert(chain, key).map_err(|e| {
        format!(
            "kafka.tls: {} with {}: {e}",
            files.cert.display(),
            files.key.display()
        )
    })?;
    Ok(Arc::new(config))
}

/// A connection's bytes.
pub(super) enum Stream {
    /// As they are.
    Plain(Socket),
    /// Encrypted.
    Tls(Box<Encrypted>),
}

pub(super) struct Encrypted {
    socket: Socket,
    tls: ServerConnection,
    /// Encrypted bytes that wait to be sent, where a socket does not take them at once.
    out: Outbox,
}

impl Stream {
    /// Of a connection that was accepted.
    pub(super) fn new(socket: Socket, tls: Option<ServerConnection>) -> Self {
        match tls {
            None => Stream::Plain(socket),
            Some(tls) => Stream::Tls(Box::new(Encrypted {
                socket,
                tls,
                out: Outbox::default(),
            })),
        }
    }

    /// Whether its handshake is not over.
    pub(super) fn handshaking(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(encrypted) => encrypted.tls.is_handshaking(),
        }
    }

    /// Who the peer's certificate, which was verified, is for: its name as Kafka has it, such as `CN=me,O=us`.
    pub(super) fn principal(&self) -> Option<String> {
        match self {
            Stream::Plain(_) => None,
            Stream::Tls(encrypted) => {
                let certificate = encrypted.tls.peer_certificates()?.first()?;
                let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
                Some(distinguished_name(parsed.subject()))
            }
        }
    }

    /// Reads what has arrived; an empty chunk: there will be no more.
    pub(super) fn read(&mut self, sockets: &mut Sockets) -> io::Result<Chunk> {
        match self {
            Stream::Plain(socket) => sockets.read(socket),
            Stream::Tls(encrypted) => {
                let mut chunk = sockets.blank();
                match encrypted.read(sockets, chunk.room()) {
                    Ok(len) => {
                        chunk.set_len(len);
                        Ok(chunk)
                    }
                    Err(error) => {
                        sockets.give(chunk);
                        Err(error)
                    }
                }
            }
        }
    }

    /// Takes bytes of an outbox to send, and gives how many.
    pub(super) fn send(&mut self, sockets: &mut Sockets, out: &mut Outbox) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => out.send(sockets, socket),
            Stream::Tls(encrypted) => {
                let mut slices = [IoSlice::new(&[]); SLICES];
                let count = out.slices(&mut slices);
                let taken = encrypted.write_vectored(sockets, &slices[..count])?;
                if taken == 0 {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                out.took(taken);
                Ok(taken)
            }
        }
    }

    /// What was on its way comes back, so many bytes of it sent; gives how many of the outbox's these are.
    pub(super) fn sent(
        &mut self,
        sockets: &mut Sockets,
        out: &mut Outbox,
        message: Box<Message>,
        sent: usize,
    ) -> usize {
        match self {
            Stream::Plain(_) => {
                out.sent(sockets, message, sent);
                sent
            }
            Stream::Tls(encrypted) => {
                encrypted.out.sent(sockets, message, sent);
                0
            }
        }
    }

    /// Asks for pieces back that were handed over to be sent.
    pub(super) fn call_back(&mut self, sockets: &mut Sockets) {
        if let Stream::Plain(socket) = self {
            sockets.call_back(socket);
        }
    }

    /// Sends what was taken; false: the socket does not take all of it now.
    pub(super) fn flush(&mut self, sockets: &mut Sockets) -> io::Result<bool> {
        match self {
            Stream::Plain(_) => Ok(true),
            Stream::Tls(encrypted) => encrypted.push(sockets),
        }
    }

    /// Whether bytes that were taken are not sent.
    pub(super) fn unsent(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(encrypted) => encrypted.tls.wants_write() || !encrypted.out.is_empty(),
        }
    }

    /// Closes it, and says so as far as the socket takes it.
    pub(super) fn close(self, sockets: &mut Sockets) {
        match self {
            Stream::Plain(socket) => sockets.close(socket),
            Stream::Tls(mut encrypted) => {
                encrypted.tls.send_close_notify();
                // The peer sees the end of the connection in any case.
                let _ = encrypted.push(sockets);
                sockets.close(encrypted.socket);
            }
        }
    }
}

/// An encrypted connection's socket, as rustls wants it.
struct Raw<'a> {
    sockets: &'a mut Sockets,
    socket: &'a Socket,
    out: &'a mut Outbox,
}

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.sockets.copy(self.socket, buffer)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.sockets.write(self.socket, slices, self.out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Encrypted {
    fn read(&mut self, sockets: &mut Sockets, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.tls.reader().read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
            let mut raw = Raw {
                sockets,
                socket: &self.socket,
                out: &mut self.out,
            };
            if self.tls.read_tls(&mut raw)? == 0 {
                return Ok(0);
            }
            let processed = self.tls.process_new_packets();
            // Of the handshake, or an alert that says what is wrong.
            let pushed = self.push(sockets);
            processed.map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            pushed?;
        }
    }

    fn write_vectored(
        &mut self,
        sockets: &mut Sockets,
        slices: &[IoSlice<'_>],
    ) -> io::Result<usize> {
        if !self.push(sockets)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let taken = self.tls.writer().write_vectored(slices)?;
        self.push(sockets)?;
        Ok(taken)
    }

    /// Hands encrypted bytes to the socket; false: it does not take all.
    fn push(&mut self, sockets: &mut Sockets) -> io::Result<bool> {
        while !self.out.is_empty() {
            match self.out.send(sockets, &self.socket) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        while self.tls.wants_write() {
            let mut raw = Raw {
                sockets,
                socket: &self.socket,
                out: &mut self.out,
            };
            match self.tls.write_tls(&mut raw) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(self.out.is_empty())
    }
}

/// A certificate's name by RFC 2253, the last part first, as Java and so Kafka writes it.
fn distinguished_name(name: &X509Name<'_>) -> String {
    let parts: Vec<String> = name
        .iter_rdn()
        .map(|part| {
            let attributes = part.iter().map(|attribute| {
                let oid = attribute.attr_type().to_id_string();
                let key = match oid.as_str() {
                    "2.5.4.3" => "CN",
                    "2.5.4.6" => "C",
                    "2.5.4.7" => "L",
                    "2.5.4.8" => "ST",
                    "2.5.4.9" => "STREET",
                    "2.5.4.10" => "O",
                    "2.5.4.11" => "OU",
                    "0.9.2342.19200300.100.1.1" => "UID",
                    "0.9.2342.19200300.100.1.25" => "DC",
                    other => other,
                };
                format!("{key}={}", escaped(attribute.as_str().unwrap_or_default()))
            });
            attributes.collect::<Vec<_>>().join("+")
        })
        .collect();
    parts.into_iter().rev().collect::<Vec<_>>().join(",")
}

fn escaped(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let last = value.chars().count().saturating_sub(1);
    for (at, c) in value.chars().enumerate() {
        let edge = c == ' ' && (at == 0 || at == last) || c == '#' && at == 0;
        if edge || matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};

    #[test]
    fn names_are_written_as_kafka_has_them() {
        let mut name = DistinguishedName::new();
        name.push(DnType::CountryName, "CH");
        name.push(DnType::OrganizationName, "Us, Inc.");
        name.push(DnType::CommonName, "#me");
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.distinguished_name = name;
        let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let (_, parsed) = X509Certificate::from_der(certificate.der()).unwrap();
        assert_eq!(
            distinguished_name(parsed.subject()),
            "CN=\\#me,O=Us\\, Inc.,C=CH"
        );
    }

    #[test]
    fn files_that_do_not_serve_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(path("cert"), certificate.pem()).unwrap();
        std::fs::write(path("key"), key.serialize_pem()).unwrap();
        std::fs::write(path("other"), KeyPair::generate().unwrap().serialize_pem()).unwrap();
        std::fs::write(path("empty"), "").unwrap();
        let with = |cert: &str, key: &str, ca: Option<&str>| {
            load(&Files {
                cert: path(cert),
                key: path(key),
                client_ca: ca.map(path),
            })
        };
        assert!(with("cert", "key", None).is_ok());
        assert!(with("cert", "key", Some("cert")).is_ok());
        for (cert, key, ca, named) in [
            ("missing", "key", None, "missing"),
            ("empty", "key", None, "empty"),
            ("cert", "empty", None, "empty"),
            ("cert", "other", None, "other"),
            ("cert", "key", Some("empty"), "empty"),
        ] {
            let message = with(cert, key, ca).unwrap_err();
            assert!(message.contains(named), "{message}");
        }
    }
}
