//! SCRAM: what is kept of a password, and the server's side of the exchange.
//!
//! Source: RFC 5802 and RFC 7677, as Kafka uses them (user names are not prepared by SASLprep; no channel
//! binding). A verifier is written as PostgreSQL writes it: `SCRAM-SHA-256$ITERATIONS:SALT$STORED:SERVER`,
//! the last three in base64. Invariants: a password cannot be had from a verifier but by guessing; whether a
//! user exists does not show in what is answered; secrets are compared in constant time.

use std::fmt;
use std::num::NonZeroU32;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rand::RngExt;
use ring::{digest, hmac, pbkdf2};
use subtle::ConstantTimeEq;

/// Iterations for new verifiers: Kafka's default, the least that RFC 7677 allows. Every attempt at PLAIN costs
/// the server as many.
pub const ITERATIONS: u32 = 4096;
/// Iterations that are taken: more would let one login hold up a thread for a second.
const MAX_ITERATIONS: u32 = 1_000_000;
/// Bytes of a new salt.
pub const SALT_LEN: usize = 24;
/// Bytes of a salt that is taken.
const MAX_SALT: usize = 1024;
/// Bytes of random numbers in the server's part of the nonce.
const NONCE_LEN: usize = 24;

/// The hash of a mechanism.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// SCRAM-SHA-256
    Sha256,
    /// SCRAM-SHA-512
    Sha512,
}

impl Hash {
    /// The mechanism's name.
    pub fn name(self) -> &'static str {
        match self {
            Hash::Sha256 => "SCRAM-SHA-256",
            Hash::Sha512 => "SCRAM-SHA-512",
        }
    }

    fn len(self) -> usize {
        self.digest().output_len()
    }

    fn digest(self) -> &'static digest::Algorithm {
        match self {
            Hash::Sha256 => &digest::SHA256,
            Hash::Sha512 => &digest::SHA512,
        }
    }

    fn hmac(self, key: &[u8], text: &[u8]) -> hmac::Tag {
        let algorithm = match self {
            Hash::Sha256 => hmac::HMAC_SHA256,
            Hash::Sha512 => hmac::HMAC_SHA512,
        };
        hmac::sign(&hmac::Key::new(algorithm, key), text)
    }

    /// What a verifier keeps of a password: stored key and server key.
    fn keys(self, password: &[u8], salt: &[u8], iterations: NonZeroU32) -> (Vec<u8>, Vec<u8>) {
        let algorithm = match self {
            Hash::Sha256 => pbkdf2::PBKDF2_HMAC_SHA256,
            Hash::Sha512 => pbkdf2::PBKDF2_HMAC_SHA512,
        };
        let mut salted = vec![0; self.len()];
        pbkdf2::derive(algorithm, iterations, salt, password, &mut salted);
        let client = self.hmac(&salted, b"Client Key");
        let stored = digest::digest(self.digest(), client.as_ref());
        let server = self.hmac(&salted, b"Server Key");
        (stored.as_ref().to_vec(), server.as_ref().to_vec())
    }
}

/// What is kept of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    hash: Hash,
    iterations: NonZeroU32,
    salt: Vec<u8>,
    stored_key: Vec<u8>,
    server_key: Vec<u8>,
}

/// Why a text is no verifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "is no verifier, which looks like SCRAM-SHA-256$4096:SALT$STORED:SERVER: `taffrail user NAME` makes one"
)]
pub struct NoVerifier;

impl Verifier {
    /// A new one, with a random salt.
    pub fn new(hash: Hash, password: &str) -> Self {
        let salt: [u8; SALT_LEN] = rand::rng().random();
        Self::with_salt(hash, password, &salt, ITERATIONS)
    }

    fn with_salt(hash: Hash, password: &str, salt: &[u8], iterations: u32) -> Self {
        let iterations = NonZeroU32::new(iterations).unwrap_or(NonZeroU32::MIN);
        let (stored_key, server_key) = hash.keys(password.as_bytes(), salt, iterations);
        Self {
            hash,
            iterations,
            salt: salt.to_vec(),
            stored_key,
            server_key,
        }
    }

    /// Reads one.
    pub fn parse(text: &str) -> Result<Self, NoVerifier> {
        let mut parts = text.split('$');
        let hash = match parts.next() {
            Some("SCRAM-SHA-256") => Hash::Sha256,
            Some("SCRAM-SHA-512") => Hash::Sha512,
            _ => return Err(NoVerifier),
        };
        let (iterations, salt) = parts
            .next()
            .and_then(|part| part.split_once(':'))
            .ok_or(NoVerifier)?;
        let (stored, server) = parts
            .next()
            .and_then(|part| part.split_once(':'))
            .ok_or(NoVerifier)?;
        let bytes = |text: &str| BASE64.decode(text).map_err(|_| NoVerifier);
        let iterations: u32 = iterations.parse().map_err(|_| NoVerifier)?;
        let verifier = Self {
            hash,
            iterations: NonZeroU32::new(iterations).ok_or(NoVerifier)?,
            salt: bytes(salt)?,
            stored_key: bytes(stored)?,
            server_key: bytes(server)?,
        };
        let fine = parts.next().is_none()
            && (ITERATIONS..=MAX_ITERATIONS).contains(&iterations)
            && (1..=MAX_SALT).contains(&verifier.salt.len())
            && verifier.stored_key.len() == hash.len()
            && verifier.server_key.len() == hash.len();
        fine.then_some(verifier).ok_or(NoVerifier)
    }

    /// One that no password fits, for a user that is not there: always the same for a name, so that it cannot be
    /// told from a real one. `secret` is the server's own.
    pub fn stand_in(hash: Hash, secret: &[u8], name: &str) -> Self {
        let part = |what: &str| {
            let text = format!("{what} {} {name}", hash.name());
            Hash::Sha512.hmac(secret, text.as_bytes()).as_ref().to_vec()
        };
        let cut = |mut bytes: Vec<u8>, len| {
            bytes.truncate(len);
            bytes
        };
        Self {
            hash,
            iterations: NonZeroU32::new(ITERATIONS).unwrap_or(NonZeroU32::MIN),
            salt: cut(part("salt"), SALT_LEN),
            stored_key: cut(part("stored"), hash.len()),
            server_key: cut(part("server"), hash.len()),
        }
    }

    /// Its hash.
    pub fn hash(&self) -> Hash {
        self.hash
    }

    /// Whether it is the verifier of this password. Costs as many iterations as it says.
    pub fn fits(&self, password: &[u8]) -> bool {
        let (stored, _) = self.hash.keys(password, &self.salt, self.iterations);
        stored.ct_eq(&self.stored_key).into()
    }
}

impl fmt::Display for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}${}:{}${}:{}",
            self.hash.name(),
            self.iterations,
            BASE64.encode(&self.salt),
            BASE64.encode(&self.stored_key),
            BASE64.encode(&self.server_key)
        )
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verifier({})", self.hash.name())
    }
}

/// Why a message of the client's is refused. Not told to it, but to the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// It is no message of SCRAM.
    #[error("a message is malformed")]
    Malformed,
    /// It wants what is not offered.
    #[error("channel binding, another identity or a delegation token is asked for")]
    NotOffered,
    /// The password is wrong, or there is no such user.
    #[error("wrong password or unknown user")]
    Wrong,
}

/// The client's first message.
#[derive(Debug, PartialEq, Eq)]
pub struct ClientFirst {
    gs2_header: String,
    bare: String,
    nonce: String,
    /// The user.
    pub user: String,
}

impl ClientFirst {
    /// Reads it.
    pub fn read(token: &[u8]) -> Result<Self, Refused> {
        let text = std::str::from_utf8(token).map_err(|_| Refused::Malformed)?;
        let mut parts = text.splitn(3, ',');
        let (binding, identity, bare) = match (parts.next(), parts.next(), parts.next()) {
            (Some(binding), Some(identity), Some(bare)) => (binding, identity, bare),
            _ => return Err(Refused::Malformed),
        };
        match binding {
            "n" | "y" => {}
            _ if binding.starts_with("p=") => return Err(Refused::NotOffered),
            _ => return Err(Refused::Malformed),
        }
        let mut fields = bare.split(',');
        let user = fields
            .next()
            .and_then(|field| field.strip_prefix("n="))
            .and_then(plain_name)
            .ok_or(Refused::Malformed)?;
        let nonce = fields
            .next()
            .and_then(|field| field.strip_prefix("r="))
            .filter(|nonce| !nonce.is_empty())
            .ok_or(Refused::Malformed)?;
        // The name of a delegation token is no user's name.
        if fields.any(|field| field == "tokenauth=true") {
            return Err(Refused::NotOffered);
        }
        if !identity.is_empty() {
            let wanted = identity.strip_prefix("a=").and_then(plain_name);
            if wanted.ok_or(Refused::Malformed)? != user {
                return Err(Refused::NotOffered);
            }
        }
        Ok(Self {
            gs2_header: format!("{binding},{identity},"),
            bare: bare.to_owned(),
            nonce: nonce.to_owned(),
            user,
        })
    }
}

/// A name as it is, `=2C` and `=3D` being its commas and equals signs.
fn plain_name(text: &str) -> Option<String> {
    let mut name = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once('=') {
        name.push_str(before);
        rest = if let Some(rest) = behind.strip_prefix("2C") {
            name.push(',');
            rest
        } else {
            name.push('=');
            behind.strip_prefix("3D")?
        };
    }
    name.push_str(rest);
    (!name.is_empty()).then_some(name)
}

/// An exchange that waits for the client's final message.
#[derive(Debug)]
pub struct Exchange {
    first: ClientFirst,
    verifier: Verifier,
    server_first: String,
    nonce: String,
}

impl Exchange {
    /// Begins one with the user's verifier.
    pub fn new(first: ClientFirst, verifier: Verifier) -> Self {
        let own: [u8; NONCE_LEN] = rand::rng().random();
        Self::with_nonce(first, verifier, &BASE64.encode(own))
    }

    fn with_nonce(first: ClientFirst, verifier: Verifier, own: &str) -> Self {
        let nonce = format!("{}{own}", first.nonce);
        let salt = BASE64.encode(&verifier.salt);
        let server_first = format!("r={nonce},s={salt},i={}", verifier.iterations);
        Self {
            first,
            verifier,
            server_first,
            nonce,
        }
    }

    /// The server's first message.
    pub fn server_first(&self) -> &str {
        &self.server_first
    }

    /// The mechanism's name.
    pub fn mechanism(&self) -> &'static str {
        self.verifier.hash.name()
    }

    /// The user.
    pub fn user(&self) -> &str {
        &self.first.user
    }

    /// Takes the client's final message; gives the server's.
    pub fn finish(&self, token: &[u8]) -> Result<String, Refused> {
        let text = std::str::from_utf8(token).map_err(|_| Refused::Malformed)?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(Refused::Malformed)?;
        let proof = BASE64.decode(proof).map_err(|_| Refused::Malformed)?;
        let mut fields = without_proof.split(',');
        let binding = fields.next().and_then(|field| field.strip_prefix("c="));
        let nonce = fields.next().and_then(|field| field.strip_prefix("r="));
        // librdkafka before 2.2 writes its own nonce twice; Kafka takes that, and it is no less fresh.
        let fresh = nonce.is_some_and(|nonce| nonce.ends_with(&self.nonce));
        if binding != Some(&BASE64.encode(&self.first.gs2_header)) || !fresh {
            return Err(Refused::Malformed);
        }
        let Verifier {
            hash,
            stored_key,
            server_key,
            ..
        } = &self.verifier;
        let message = format!("{},{},{without_proof}", self.first.bare, self.server_first);
        let signature = hash.hmac(stored_key, message.as_bytes());
        if proof.len() != hash.len() {
            return Err(Refused::Wrong);
        }
        let client_key: Vec<u8> = proof
            .iter()
            .zip(signature.as_ref())
            .map(|(a, b)| a ^ b)
            .collect();
        let stored = digest::digest(hash.digest(), &client_key);
        if !bool::from(stored.as_ref().ct_eq(stored_key)) {
            return Err(Refused::Wrong);
        }
        let server = hash.hmac(server_key, message.as_bytes());
        Ok(format!("v={}", BASE64.encode(server)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exchange of RFC 7677, section 3.
    #[test]
    fn the_rfcs_example_holds() {
        let salt = BASE64.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap();
        let verifier = Verifier::with_salt(Hash::Sha256, "pencil", &salt, 4096);
        let first = ClientFirst::read(b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO").unwrap();
        assert_eq!(first.user, "user");
        let exchange = Exchange::with_nonce(first, verifier, "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0");
        assert_eq!(
            exchange.server_first(),
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let last = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
        assert_eq!(
            exchange.finish(last.as_bytes()).unwrap(),
            "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4="
        );
        for (from, to, reason) in [
            ("p=dHzb", "p=dHza", Refused::Wrong),
            ("c=biws", "c=eSws", Refused::Malformed),
            ("r=rOpr", "r=sOpr", Refused::Malformed),
            (
                "p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
                "p=",
                Refused::Wrong,
            ),
            (",p=", ",q=", Refused::Malformed),
        ] {
            let changed = last.replace(from, to);
            assert_eq!(
                exchange.finish(changed.as_bytes()),
                Err(reason),
                "{changed}"
            );
        }
    }

    #[test]
    fn verifiers_are_written_and_read() {
        for hash in [Hash::Sha256, Hash::Sha512] {
            let verifier = Verifier::new(hash, "päss");
            let text = verifier.to_string();
            assert_eq!(Verifier::parse(&text), Ok(verifier.clone()));
            assert!(verifier.fits("päss".as_bytes()) && !verifier.fits(b"pass"));
            assert!(!format!("{verifier:?}").contains('$'), "no secret in logs");
            for wrong in [
                text.replace("4096", "1"),
                text.replace("4096", "99999999"),
                text.replace("SCRAM-SHA-", "SCRAM-MD-"),
                text[..text.len() - 8].to_owned(),
                format!("{text}$"),
                String::new(),
            ] {
                assert_eq!(Verifier::parse(&wrong), Err(NoVerifier), "{wrong}");
            }
        }
        // As PostgreSQL and other tools make them for user "user", password "pencil".
        let known = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        assert!(Verifier::parse(known).unwrap().fits(b"pencil"));
    }

    #[test]
    fn a_user_who_is_not_there_looks_like_one_who_is() {
        let of = |secret: &[u8], name| Verifier::stand_in(Hash::Sha256, secret, name).to_string();
        assert_eq!(of(b"secret", "a"), of(b"secret", "a"));
        assert_ne!(of(b"secret", "a"), of(b"secret", "b"));
        assert_ne!(of(b"secret", "a"), of(b"other", "a"));
        assert!(Verifier::parse(&of(b"secret", "a")).is_ok());
    }

    #[test]
    fn first_messages_are_read_or_refused() {
        let user = |text: &str| ClientFirst::read(text.as_bytes()).map(|first| first.user);
        assert_eq!(user("y,,n=a=2Cb=3D,r=x").as_deref(), Ok("a,b="));
        assert_eq!(user("n,a=me,n=me,r=x").as_deref(), Ok("me"));
        assert_eq!(user("n,a=you,n=me,r=x"), Err(Refused::NotOffered));
        assert_eq!(user("p=tls-unique,,n=me,r=x"), Err(Refused::NotOffered));
        assert_eq!(user("n,,n=me,r=x,tokenauth=true"), Err(Refused::NotOffered));
        for wrong in [
            "",
            "n",
            "n,,",
            "n,,n=,r=x",
            "n,,n=me",
            "n,,n=me,r=",
            "n,,n=a=b,r=x",
            "x,,n=me,r=x",
            "n,,m=1,n=me,r=x",
        ] {
            assert_eq!(user(wrong), Err(Refused::Malformed), "{wrong}");
        }
    }
}
