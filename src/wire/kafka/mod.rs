//! The Kafka protocol, sans-io: a frame's bytes in, plain structures out, and back.
//!
//! Source: "The Kafka protocol guide" and Kafka's message definitions, whose names the fields keep
//! (in snake case), so that either can be read beside the other. Every message is a structure made by
//! `message!`: `decode(reader, version)` takes what a peer sent, `encode(writer, version)` writes it.
//! Fields that a version lacks get their default when read and are left out when written. Tagged
//! fields are skipped when read; none is written, for all of them are optional.
//!
//! The coordinator's messages ([`groups`]) are such structures. What is walked where it lies, or written
//! piece by piece, is read and written field by field by whoever answers it ([`crate::broker`]).
//! [`api`] holds the APIs, the versions that are served, and the headers; [`error`] the error codes.
//!
//! Invariants: nothing reads behind its slice; a count or length from outside is checked against the bytes
//! that remain before anything is reserved, so a request makes the server hold no more memory than a small
//! multiple of its own size.

pub mod api;
pub mod error;
mod field;
pub mod groups;
#[cfg(test)]
mod oracle;
mod read;
mod write;

pub use api::{Api, RequestHeader};
pub use error::Code;
pub use field::Field;
pub use read::{Malformed, Reader};
pub use write::Writer;

/// Declares messages: structures whose fields are read and written in order.
///
/// `name: Type` is in every version; `name: Type [2..=5]` in these only; `name: Type [2..; -1]` has
/// the default −1 (otherwise its type's) where the version lacks it. Every structure ends with tagged
/// fields where the version is flexible.
macro_rules! message {
    (@one [$life:lifetime] $meta:tt $name:ident $body:tt) => {
        message! { @struct $life $life [<$life>] $meta $name $body }
    };
    (@one [] $meta:tt $name:ident $body:tt) => {
        message! { @struct 'r '_ [] $meta $name $body }
    };
    (@struct $life:lifetime $read:lifetime [$($generics:tt)*] [$($meta:tt)*] $name:ident {
        $($(#[$about:meta])* $field:ident: $type:ty $([$versions:expr $(; $default:expr)?])?,)*
    }) => {
        $($meta)*
        #[derive(Debug, Clone, PartialEq)]
        pub struct $name $($generics)* {
            $($(#[$about])* pub $field: $type,)*
        }

        impl $($generics)* Default for $name $($generics)* {
            fn default() -> Self {
                Self {
                    $($field: message!(@default $($($default)?)?),)*
                }
            }
        }

        impl<$life> $crate::wire::kafka::Field<$life> for $name $($generics)* {
            fn read(
                reader: &mut $crate::wire::kafka::Reader<$life>,
                version: i16,
            ) -> Result<Self, $crate::wire::kafka::Malformed> {
                let message = Self {
                    $($field: if message!(@has version $($versions)?) {
                        $crate::wire::kafka::Field::read(reader, version)?
                    } else {
                        message!(@default $($($default)?)?)
                    },)*
                };
                reader.end()?;
                Ok(message)
            }

            fn write(&self, writer: &mut $crate::wire::kafka::Writer, version: i16) {
                $(if message!(@has version $($versions)?) {
                    $crate::wire::kafka::Field::write(&self.$field, writer, version);
                })*
                writer.end();
            }

            fn min_len(flexible: bool, version: i16) -> usize {
                let mut len = usize::from(flexible);
                $(if message!(@has version $($versions)?) {
                    len += <$type as $crate::wire::kafka::Field>::min_len(flexible, version);
                })*
                len
            }
        }

        impl $($generics)* $name $($generics)* {
            /// Reads one, up to and with its tagged fields; what follows is left to the caller.
            pub fn decode(
                reader: &mut $crate::wire::kafka::Reader<$read>,
                version: i16,
            ) -> Result<Self, $crate::wire::kafka::Malformed> {
                $crate::wire::kafka::Field::read(reader, version)
            }

            /// Writes it.
            pub fn encode(&self, writer: &mut $crate::wire::kafka::Writer, version: i16) {
                $crate::wire::kafka::Field::write(self, writer, version);
            }
        }
    };
    (@has $version:ident) => { true };
    (@has $version:ident $versions:expr) => { ($versions).contains(&$version) };
    (@default) => { Default::default() };
    (@default $default:expr) => { $default };
    ($($(#[$meta:meta])* pub struct $name:ident $(<$life:lifetime>)? { $($body:tt)* })*) => {
        $(message! { @one [$($life)?] [$(#[$meta])*] $name { $($body)* } })*
    };
}
pub(crate) use message;
