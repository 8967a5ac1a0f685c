//! How a connection proves who it is: SaslHandshake and SaslAuthenticate.
//!
//! Source: Kafka's protocol guide (SASL authentication sequence), RFC 4616 for PLAIN. Invariant: a connection
//! that has to prove itself gets nothing but ApiVersions, SaslHandshake and SaslAuthenticate before it has.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rand::RngExt;
use ring::hmac;
use subtle::ConstantTimeEq;

use super::scram::{ClientFirst, Exchange, Hash, Refused, Verifier};
use crate::wire::kafka::{Api, Code, Malformed, Reader, RequestHeader};

/// Bytes of a request before its connection has proved who it is; a message of SCRAM has some hundred.
pub const MAX_UNPROVED_REQUEST: usize = 64 << 10;
/// Bytes of a password with PLAIN.
const MAX_PASSWORD: usize = 1024;

/// A way to prove who one is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mechanism {
    /// SCRAM with a hash.
    Scram(Hash),
    /// The password itself.
    Plain,
}

impl Mechanism {
    const ALL: [Mechanism; 3] = [
        Mechanism::Scram(Hash::Sha256),
        Mechanism::Scram(Hash::Sha512),
        Mechanism::Plain,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Mechanism::Scram(hash) => hash.name(),
            Mechanism::Plain => "PLAIN",
        }
    }
}

/// The users and what is kept of their passwords.
pub struct Users {
    verifiers: HashMap<String, Vec<Verifier>>,
    /// Of this process, for what must look like a secret.
    secret: [u8; 32],
    /// Of passwords that fit, keyed by the secret: PLAIN sends the password with every connection, and the
    /// iterations are for those who guess.
    known: Mutex<HashMap<String, [u8; 32]>>,
}

impl Users {
    /// These, by name.
    pub fn new(users: impl IntoIterator<Item = (String, Vec<Verifier>)>) -> Self {
        Self {
            verifiers: users.into_iter().collect(),
            secret: rand::rng().random(),
            known: Mutex::new(HashMap::new()),
        }
    }

    fn verifier(&self, user: &str, hash: Hash) -> Verifier {
        self.verifiers
            .get(user)
            .and_then(|list| list.iter().find(|v| v.hash() == hash))
            .cloned()
            .unwrap_or_else(|| Verifier::stand_in(hash, &self.secret, user))
    }

    fn password_fits(&self, user: &str, password: &[u8]) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.secret);
        let tag = hmac::sign(&key, password);
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(fitted) = known.get(user)
            && bool::from(fitted[..].ct_eq(tag.as_ref()))
        {
            return true;
        }
        drop(known);
        let verifier = match self.verifiers.get(user).and_then(|list| list.first()) {
            Some(verifier) => verifier.clone(),
            None => Verifier::stand_in(Hash::Sha256, &self.secret, user),
        };
        let fits = verifier.fits(password);
        if fits && let Some(tag) = tag.as_ref().first_chunk() {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.insert(user.to_owned(), *tag);
        }
        fits
    }
}

/// How far a connection has come.
#[derive(Debug, Default)]
pub enum Stage {
    /// It may ask for anything that its principal is allowed.
    #[default]
    Proved,
    /// It has to choose a mechanism.
    Handshake,
    /// It has chosen; `raw`: tokens come and go without Kafka's headers, as after SaslHandshake 0.
    Chosen {
        /// The mechanism.
        mechanism: Mechanism,
        /// Without headers.
        raw: bool,
    },
    /// The server's first message was sent.
    Final {
        /// What is known so far.
        exchange: Box<Exchange>,
        /// Without headers.
        raw: bool,
    },
}

/// What a token led to.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// The client is to answer this.
    Continue(Vec<u8>),
    /// It is this user.
    Proved {
        /// The user.
        user: String,
        /// The last token.
        token: Vec<u8>,
    },
    /// It is not; the mechanism and why, which is for the log.
    Failed(&'static str, Refused),
    /// There was no handshake.
    OutOfTurn,
}

impl Stage {
    /// Whether it has proved who it is, or need not.
    pub fn is_proved(&self) -> bool {
        matches!(self, Stage::Proved)
    }

    /// Whether the next frame is a token without a header.
    pub fn is_raw(&self) -> bool {
        matches!(
            self,
            Stage::Chosen { raw: true, .. } | Stage::Final { raw: true, .. }
        )
    }

    /// Takes a token of the client's.
    pub fn token(&mut self, users: &Users, token: &[u8]) -> Step {
        match std::mem::replace(self, Stage::Handshake) {
            Stage::Chosen {
                mechanism: Mechanism::Plain,
                ..
            } => match plain(users, token) {
                Ok(user) => {
                    *self = Stage::Proved;
                    Step::Proved {
                        user,
                        token: Vec::new(),
                    }
                }
                Err(reason) => Step::Failed(Mechanism::Plain.name(), reason),
            },
            Stage::Chosen {
                mechanism: Mechanism::Scram(hash),
                raw,
            } => match ClientFirst::read(token) {
                Ok(first) => {
                    let verifier = users.verifier(&first.user, hash);
                    let exchange = Box::new(Exchange::new(first, verifier));
                    let answer = exchange.server_first().as_bytes().to_vec();
                    *self = Stage::Final { exchange, raw };
                    Step::Continue(answer)
                }
                Err(reason) => Step::Failed(hash.name(), reason),
            },
            Stage::Final { exchange, .. } => match exchange.finish(token) {
                Ok(answer) => {
                    *self = Stage::Proved;
                    Step::Proved {
                        user: exchange.user().to_owned(),
                        token: answer.into_bytes(),
                    }
                }
                Err(reason) => Step::Failed(exchange.mechanism(), reason),
            },
            other => {
                *self = other;
                Step::OutOfTurn
            }
        }
    }
}

/// Who a token of PLAIN is.
fn plain(users: &Users, token: &[u8]) -> Result<String, Refused> {
    let text = std::str::from_utf8(token).map_err(|_| Refused::Malformed)?;
    let mut parts = text.split('\0');
    let (Some(identity), Some(user), Some(password), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(Refused::Malformed);
    };
    if user.is_empty() || password.is_empty() || password.len() > MAX_PASSWORD {
        return Err(Refused::Malformed);
    }
    if !identity.is_empty() && identity != user {
        return Err(Refused::NotOffered);
    }
    match users.password_fits(user, password.as_bytes()) {
        true => Ok(user.to_owned()),
        false => Err(Refused::Wrong),
    }
}

/// The answer to SaslHandshake; `plain`: the password itself may be sent. False: the connection is to be closed.
pub fn handshake(
    header: &RequestHeader<'_>,
    body: &mut Reader<'_>,
    stage: &mut Stage,
    plain: bool,
) -> Result<(Vec<u8>, bool), Malformed> {
    let wanted = body.string()?;
    body.end()?;
    let offered = || {
        Mechanism::ALL
            .into_iter()
            .filter(move |&mechanism| plain || mechanism != Mechanism::Plain)
    };
    let code = match stage {
        Stage::Handshake => match offered().find(|mechanism| mechanism.name() == wanted) {
            Some(mechanism) => {
                let raw = header.version == 0;
                *stage = Stage::Chosen { mechanism, raw };
                Code::None
            }
            None => Code::UnsupportedSaslMechanism,
        },
        _ => Code::IllegalSaslState,
    };
    let names: Vec<&str> = offered().map(Mechanism::name).collect();
    let mut out = Api::SaslHandshake.answer(header.version, header.correlation);
    out.i16(code as i16);
    out.array(names.iter(), |out, name| out.string(name));
    Ok((out.finish(), code == Code::None || stage.is_proved()))
}

/// The token of a SaslAuthenticate request.
pub fn token<'a>(body: &mut Reader<'a>) -> Result<&'a [u8], Malformed> {
    let token = body.bytes()?;
    body.end()?;
    Ok(token)
}

/// The answer to SaslAuthenticate.
pub fn answer(header: &RequestHeader<'_>, step: &Step) -> Vec<u8> {
    let (code, message, token) = match step {
        Step::Continue(token) | Step::Proved { token, .. } => (Code::None, None, &token[..]),
        // Kafka's words: some clients show them.
        Step::Failed(mechanism, _) => (
            Code::SaslAuthenticationFailed,
            Some(format!(
                "Authentication failed during authentication due to invalid credentials with SASL mechanism {mechanism}"
            )),
            &[][..],
        ),
        Step::OutOfTurn => (
            Code::IllegalSaslState,
            Some("SaslAuthenticate without a SaslHandshake before it".to_owned()),
            &[][..],
        ),
    };
    let mut out = Api::SaslAuthenticate.answer(header.version, header.correlation);
    out.i16(code as i16);
    out.nullable_string(message.as_deref());
    out.bytes(token);
    if header.version >= 1 {
        out.i64(0); // the session ends with its connection
    }
    out.end();
    out.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users() -> Users {
        Users::new([(
            "me".to_owned(),
            vec![
                Verifier::new(Hash::Sha512, "right"),
                Verifier::new(Hash::Sha256, "right"),
            ],
        )])
    }

    #[test]
    fn plain_takes_the_password_and_nothing_else() {
        let users = users();
        let of = |token: &[u8]| plain(&users, token);
        for _ in ["derived", "known"] {
            assert_eq!(of(b"\0me\0right").as_deref(), Ok("me"));
        }
        assert_eq!(of(b"me\0me\0right").as_deref(), Ok("me"));
        assert_eq!(of(b"\0me\0wrong"), Err(Refused::Wrong));
        assert_eq!(of(b"\0you\0right"), Err(Refused::Wrong));
        assert_eq!(of(b"you\0me\0right"), Err(Refused::NotOffered));
        for wrong in [
            &b""[..],
            b"\0",
            b"\0me\0",
            b"\0\0right",
            b"\0me\0right\0",
            b"\xff\0me\0right",
        ] {
            assert_eq!(of(wrong), Err(Refused::Malformed));
        }
    }

    #[test]
    fn a_connection_proves_itself_in_order() {
        let users = users();
        let mut stage = Stage::Handshake;
        assert_eq!(stage.token(&users, b"\0me\0right"), Step::OutOfTurn);
        let shake = |stage: &mut Stage, name: &str, version, plain| {
            let mut out = crate::wire::kafka::Writer::fields(false);
            out.string(name);
            let bytes = out.into_fields();
            let header = RequestHeader {
                key: Api::SaslHandshake as i16,
                version,
                correlation: 1,
                client_id: None,
            };
            handshake(&header, &mut Reader::new(&bytes, false), stage, plain).unwrap()
        };
        let (answer, goes_on) = shake(&mut stage, "PLAIN", 1, false);
        assert!(!goes_on && !stage.is_proved());
        assert_eq!(
            answer[8..10],
            (Code::UnsupportedSaslMechanism as i16).to_be_bytes()
        );
        assert!(!answer.windows(5).any(|w| w == b"PLAIN"));
        assert!(shake(&mut stage, "SCRAM-SHA-256", 0, true).1 && stage.is_raw());
        let Step::Continue(first) = stage.token(&users, b"n,,n=me,r=abc") else {
            panic!("the server's first message");
        };
        assert!(first.starts_with(b"r=abc") && stage.is_raw() && !stage.is_proved());
        let failed = stage.token(&users, b"c=biws,r=abc,p=AAAA");
        assert_eq!(failed, Step::Failed("SCRAM-SHA-256", Refused::Malformed));
        assert!(!stage.is_proved());
        assert!(shake(&mut stage, "PLAIN", 1, true).1 && !stage.is_raw());
        assert!(
            matches!(stage.token(&users, b"\0me\0right"), Step::Proved { user, .. } if user == "me")
        );
        assert!(stage.is_proved());
        let (answer, goes_on) = shake(&mut stage, "PLAIN", 1, true);
        assert_eq!(answer[8..10], (Code::IllegalSaslState as i16).to_be_bytes());
        assert!(goes_on && stage.is_proved());
    }
}
