//! The types that a field of a message can have.
//!
//! Source: "The Kafka protocol guide", section protocol primitive types; KIP-482 for the flexible
//! (compact) forms. Invariant: memory is reserved only for elements that the remaining bytes can hold, so
//! that a message takes at most a constant times the bytes it came from. Strings and bytes are borrowed.

use std::borrow::Cow;

use super::{Malformed, Reader, Writer};

/// A type that a message's field can have. Messages themselves are structures of fields; those that
/// `message!` makes implement it.
pub trait Field<'a>: Sized {
    /// Reads one.
    fn read(reader: &mut Reader<'a>, version: i16) -> Result<Self, Malformed>;
    /// Writes it.
    fn write(&self, writer: &mut Writer, version: i16);
    /// The fewest bytes that one takes.
    fn min_len(flexible: bool, version: i16) -> usize;
}

macro_rules! plain_fields {
    ($($type:ty, $method:ident, $len:expr;)*) => {$(
        impl<'a> Field<'a> for $type {
            #[inline]
            fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, Malformed> {
                reader.$method()
            }
            #[inline]
            fn write(&self, writer: &mut Writer, _: i16) {
                writer.$method(*self);
            }
            #[inline]
            fn min_len(_flexible: bool, _: i16) -> usize {
                $len
            }
        }
    )*};
}

plain_fields! {
    bool, bool, 1;
    i8, i8, 1;
    i16, i16, 2;
    i32, i32, 4;
    i64, i64, 8;
}

macro_rules! length_fields {
    ($($type:ty, $classic:expr, $read:ident $(. $into:ident)?, $self:ident => $write:ident($value:expr);)*) => {$(
        impl<'a> Field<'a> for $type {
            #[inline]
            fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, Malformed> {
                reader.$read()$(.map(|value| value.$into(Cow::Borrowed)))?
            }
            #[inline]
            fn write(&$self, writer: &mut Writer, _: i16) {
                writer.$write($value);
            }
            #[inline]
            fn min_len(flexible: bool, _: i16) -> usize {
                if flexible { 1 } else { $classic }
            }
        }
    )*};
}

length_fields! {
    &'a str, 2, string, self => string(self);
    Option<&'a str>, 2, nullable_string, self => nullable_string(*self);
    Option<Cow<'a, str>>, 2, nullable_string.map, self => nullable_string(self.as_deref());
    &'a [u8], 4, bytes, self => bytes(self);
    Option<&'a [u8]>, 4, nullable_bytes, self => nullable_bytes(*self);
    Option<Cow<'a, [u8]>>, 4, nullable_bytes.map, self => nullable_bytes(self.as_deref());
}

impl<'a> Field<'a> for Cow<'a, str> {
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, Malformed> {
        reader.string().map(Cow::Borrowed)
    }
    fn write(&self, writer: &mut Writer, _: i16) {
        writer.string(self);
    }
    fn min_len(flexible: bool, version: i16) -> usize {
        <&str>::min_len(flexible, version)
    }
}

impl<'a> Field<'a> for Cow<'a, [u8]> {
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, Malformed> {
        reader.bytes().map(Cow::Borrowed)
    }
    fn write(&self, writer: &mut Writer, _: i16) {
        writer.bytes(self);
    }
    fn min_len(flexible: bool, version: i16) -> usize {
        <&[u8]>::min_len(flexible, version)
    }
}

fn read_elements<'a, T: Field<'a>>(
    reader: &mut Reader<'a>,
    version: i16,
    count: usize,
) -> Result<Vec<T>, Malformed> {
    // The count was checked against the remaining bytes.
    let mut elements = Vec::with_capacity(count);
    for _ in 0..count {
        elements.push(T::read(reader, version)?);
    }
    Ok(elements)
}

impl<'a, T: Field<'a>> Field<'a> for Vec<T> {
    fn read(reader: &mut Reader<'a>, version: i16) -> Result<Self, Malformed> {
        let count = reader.count(T::min_len(reader.is_flexible(), version))?;
        read_elements(reader, version, count)
    }
    fn write(&self, writer: &mut Writer, version: i16) {
        writer.count(self.len());
        for element in self {
            element.write(writer, version);
        }
    }
    fn min_len(flexible: bool, _: i16) -> usize {
        if flexible { 1 } else { 4 }
    }
}

impl<'a, T: Field<'a>> Field<'a> for Option<Vec<T>> {
    fn read(reader: &mut Reader<'a>, version: i16) -> Result<Self, Malformed> {
        match reader.nullable_count(T::min_len(reader.is_flexible(), version))? {
            Some(count) => read_elements(reader, version, count).map(Some),
            None => Ok(None),
        }
    }
    fn write(&self, writer: &mut Writer, version: i16) {
        match self {
            Some(elements) => elements.write(writer, version),
            None => writer.null_array(),
        }
    }
    fn min_len(flexible: bool, version: i16) -> usize {
        Vec::<T>::min_len(flexible, version)
    }
}
