//! Kafka's primitive types, read from a request's bytes and written into an answer's.
//!
//! Source: "The Kafka protocol guide", section protocol primitive types; KIP-482 for the flexible
//! (compact) forms. All integers are big-endian. Reader and writer know whether the message's version
//! is a flexible one, so that a message's code names a string once for both forms.
//!
//! Invariants: reading never goes behind the slice, never panics, and reserves memory only for
//! elements that the remaining bytes can hold, so that a decoded message takes at most a constant
//! times the bytes it came from. Strings and bytes are borrowed.

use std::borrow::Cow;

/// The longest string, in bytes, in either form: Kafka's own limit.
pub const STRING_MAX: usize = i16::MAX as usize;

/// Why bytes are no Kafka message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ends within a field.
    #[error("message is cut off at byte {at}: {need} more bytes needed, {have} left")]
    Truncated {
        /// Bytes read before.
        at: usize,
        /// Bytes that the field takes.
        need: usize,
        /// Bytes that are left.
        have: usize,
    },
    /// A negative or overlong length of a string or bytes.
    #[error("length {len} at byte {at} is impossible")]
    Length {
        /// Bytes read before.
        at: usize,
        /// As read.
        len: i64,
    },
    /// An array that cannot fit into the message.
    #[error("array of {count} elements at byte {at} does not fit the {have} bytes left")]
    Count {
        /// Bytes read before.
        at: usize,
        /// As read.
        count: i64,
        /// Bytes that are left.
        have: usize,
    },
    /// Null where a value must be.
    #[error("null at byte {at}, where a value must be")]
    Null {
        /// Bytes read before.
        at: usize,
    },
    /// A string that is no UTF-8.
    #[error("string at byte {at} is not UTF-8")]
    Utf8 {
        /// Bytes read before.
        at: usize,
    },
    /// A varint of more bits than its type.
    #[error("varint at byte {at} is too long")]
    Varint {
        /// Bytes read before.
        at: usize,
    },
    /// Bytes behind the last field.
    #[error("{extra} bytes behind the message")]
    Trailing {
        /// Bytes left over.
        extra: usize,
    },
}

/// A topic's id (and any other UUID): 16 bytes, all zero where there is none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// No id.
    pub const ZERO: Uuid = Uuid([0; 16]);

    /// Whether there is none.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }
}

impl std::fmt::Debug for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for Uuid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 4 | 6 | 8 | 10) {
                "-"
            } else {
                ""
            };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Reads primitives from the front of a slice.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    flexible: bool,
}

macro_rules! read_integers {
    ($($name:ident: $type:ty),*) => {$(
        /// Reads one, big-endian.
        #[inline]
        pub fn $name(&mut self) -> Result<$type, DecodeError> {
            Ok(<$type>::from_be_bytes(self.array()?))
        }
    )*};
}

impl<'a> Reader<'a> {
    /// A reader of `bytes`; `flexible` says which form strings, bytes and arrays have.
    pub fn new(bytes: &'a [u8], flexible: bool) -> Self {
        Self {
            bytes,
            at: 0,
            flexible,
        }
    }

    /// Whether the compact forms are read.
    pub fn is_flexible(&self) -> bool {
        self.flexible
    }

    /// Changes the form from here on.
    pub fn set_flexible(&mut self, flexible: bool) {
        self.flexible = flexible;
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes not yet read.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// Checks that nothing is left.
    pub fn finish(&self) -> Result<(), DecodeError> {
        match self.remaining() {
            0 => Ok(()),
            extra => Err(DecodeError::Trailing { extra }),
        }
    }

    /// Takes the next `len` bytes.
    #[inline]
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let have = self.remaining();
        if len > have {
            return Err(DecodeError::Truncated {
                at: self.at,
                need: len,
                have,
            });
        }
        let taken = &self.bytes[self.at..self.at + len];
        self.at += len;
        Ok(taken)
    }

    #[inline]
    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    read_integers!(int8: i8, uint8: u8, int16: i16, uint16: u16, int32: i32, uint32: u32, int64: i64, float64: f64);

    /// Reads a byte; all but 0 is true.
    pub fn boolean(&mut self) -> Result<bool, DecodeError> {
        Ok(self.uint8()? != 0)
    }

    /// Reads 16 bytes.
    pub fn uuid(&mut self) -> Result<Uuid, DecodeError> {
        Ok(Uuid(self.array()?))
    }

    /// Reads a varint of at most 32 bits, not zigzag.
    #[inline]
    pub fn uvarint(&mut self) -> Result<u32, DecodeError> {
        let at = self.at;
        let mut value = 0;
        for shift in (0..35).step_by(7) {
            let byte = self.uint8()?;
            let group = u32::from(byte & 0x7f);
            // The fifth byte holds the last four bits only.
            if shift == 28 && group > 0xf {
                break;
            }
            value |= group << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(DecodeError::Varint { at })
    }

    /// Reads a zigzag varint of at most 32 bits.
    pub fn varint(&mut self) -> Result<i32, DecodeError> {
        let raw = self.uvarint()?;
        Ok((raw >> 1) as i32 ^ -((raw & 1) as i32))
    }

    /// Reads a length or count as the form has it, `classic` for its own form; −1 is null.
    #[inline]
    fn length(
        &mut self,
        classic: fn(&mut Self) -> Result<i64, DecodeError>,
    ) -> Result<Option<usize>, DecodeError> {
        let at = self.at;
        let len = if self.flexible {
            i64::from(self.uvarint()?) - 1
        } else {
            classic(self)?
        };
        match len {
            -1 => Ok(None),
            0.. => Ok(Some(len as usize)),
            _ => Err(DecodeError::Length { at, len }),
        }
    }

    /// Reads a string or null.
    pub fn nullable_string(&mut self) -> Result<Option<&'a str>, DecodeError> {
        let at = self.at;
        let Some(len) = self.length(|reader| Ok(i64::from(reader.int16()?)))? else {
            return Ok(None);
        };
        if len > STRING_MAX {
            return Err(DecodeError::Length {
                at,
                len: len as i64,
            });
        }
        match std::str::from_utf8(self.take(len)?) {
            Ok(string) => Ok(Some(string)),
            Err(_) => Err(DecodeError::Utf8 { at }),
        }
    }

    /// Reads a string; null is an error.
    pub fn string(&mut self) -> Result<&'a str, DecodeError> {
        let at = self.at;
        self.nullable_string()?.ok_or(DecodeError::Null { at })
    }

    /// Reads bytes (or records) or null.
    #[inline]
    pub fn nullable_bytes(&mut self) -> Result<Option<&'a [u8]>, DecodeError> {
        match self.length(|reader| Ok(i64::from(reader.int32()?)))? {
            Some(len) => self.take(len).map(Some),
            None => Ok(None),
        }
    }

    /// Reads bytes; null is an error.
    pub fn bytes(&mut self) -> Result<&'a [u8], DecodeError> {
        let at = self.at;
        self.nullable_bytes()?.ok_or(DecodeError::Null { at })
    }

    /// Reads the count of an array whose elements take at least `element_min` bytes each (at least
    /// 1); `None` for null. A count that the remaining bytes cannot hold is an error.
    #[inline]
    pub fn nullable_count(&mut self, element_min: usize) -> Result<Option<usize>, DecodeError> {
        let at = self.at;
        let count = self.length(|reader| Ok(i64::from(reader.int32()?)))?;
        let have = self.remaining();
        match count {
            Some(count) if count > have / element_min.max(1) => Err(DecodeError::Count {
                at,
                count: count as i64,
                have,
            }),
            other => Ok(other),
        }
    }

    /// As [`Reader::nullable_count`]; null is an error.
    #[inline]
    pub fn count(&mut self, element_min: usize) -> Result<usize, DecodeError> {
        let at = self.at;
        self.nullable_count(element_min)?
            .ok_or(DecodeError::Null { at })
    }

    /// Skips the tagged fields that end every structure of a flexible version; reads nothing in the
    /// classic form.
    #[inline]
    pub fn tagged_fields(&mut self) -> Result<(), DecodeError> {
        if self.flexible {
            // Each takes at least two bytes, so that a false count ends with the bytes.
            for _ in 0..self.uvarint()? {
                self.uvarint()?;
                let len = self.uvarint()?;
                self.take(len as usize)?;
            }
        }
        Ok(())
    }
}

/// Writes primitives behind each other.
#[derive(Debug, Clone, Default)]
pub struct Writer {
    out: Vec<u8>,
    flexible: bool,
    gaps: Vec<Gap>,
    gaps_len: usize,
}

/// A place in written bytes where records belong that the writer does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The records follow this many of the written bytes.
    pub at: usize,
    /// Their length in bytes.
    pub len: usize,
}

macro_rules! write_integers {
    ($($name:ident: $type:ty),*) => {$(
        /// Writes one, big-endian.
        #[inline]
        pub fn $name(&mut self, value: $type) {
            self.out.extend_from_slice(&value.to_be_bytes());
        }
    )*};
}

impl Writer {
    /// An empty writer; `flexible` says which form strings, bytes and arrays take.
    pub fn new(flexible: bool) -> Self {
        Self::with_buffer(Vec::new(), flexible)
    }

    /// A writer that appends to `out`, which may have been used before.
    pub fn with_buffer(out: Vec<u8>, flexible: bool) -> Self {
        Self {
            out,
            flexible,
            gaps: Vec::new(),
            gaps_len: 0,
        }
    }

    /// Whether the compact forms are written.
    pub fn is_flexible(&self) -> bool {
        self.flexible
    }

    /// Changes the form from here on.
    pub fn set_flexible(&mut self, flexible: bool) {
        self.flexible = flexible;
    }

    /// Bytes written, gaps included.
    pub fn len(&self) -> usize {
        self.out.len() + self.gaps_len
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What was written, without gaps.
    pub fn as_bytes(&self) -> &[u8] {
        &self.out
    }

    /// The bytes, and where records are to be put in between, ascending.
    pub fn into_parts(self) -> (Vec<u8>, Vec<Gap>) {
        (self.out, self.gaps)
    }

    /// The bytes of a message without gaps.
    pub fn into_bytes(self) -> Vec<u8> {
        debug_assert!(self.gaps.is_empty());
        self.out
    }

    /// Overwrites four bytes at `at`, for a length that is known late.
    pub(crate) fn patch_int32(&mut self, at: usize, value: i32) {
        self.out[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    write_integers!(int8: i8, uint8: u8, int16: i16, uint16: u16, int32: i32, uint32: u32, int64: i64, float64: f64);

    /// Writes 0 or 1.
    pub fn boolean(&mut self, value: bool) {
        self.out.push(u8::from(value));
    }

    /// Writes 16 bytes.
    pub fn uuid(&mut self, value: &Uuid) {
        self.out.extend_from_slice(&value.0);
    }

    /// Writes bytes as they are, without a length.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Writes a varint that is not zigzag.
    #[inline]
    pub fn uvarint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.out.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    /// Writes a zigzag varint.
    pub fn varint(&mut self, value: i32) {
        self.uvarint(((value << 1) ^ (value >> 31)) as u32);
    }

    /// Writes a string or null. What is longer than [`STRING_MAX`] is cut at a character.
    pub fn nullable_string(&mut self, value: Option<&str>) {
        let value = value.map(|value| &value[..value.floor_char_boundary_at(STRING_MAX)]);
        let len = value.map_or(-1, |value| value.len() as i32);
        if self.flexible {
            self.uvarint((len + 1) as u32);
        } else {
            self.int16(len as i16);
        }
        self.raw(value.unwrap_or_default().as_bytes());
    }

    /// Writes a string.
    pub fn string(&mut self, value: &str) {
        self.nullable_string(Some(value));
    }

    /// Writes a count of elements, or the length of bytes; `None` for null.
    #[inline]
    pub fn nullable_count(&mut self, count: Option<usize>) {
        if self.flexible {
            self.uvarint(count.map_or(0, |count| count as u32 + 1));
        } else {
            self.int32(count.map_or(-1, |count| count as i32));
        }
    }

    /// Writes a count of elements; they follow.
    #[inline]
    pub fn count(&mut self, count: usize) {
        self.nullable_count(Some(count));
    }

    /// Writes bytes or null.
    pub fn nullable_bytes(&mut self, value: Option<&[u8]>) {
        self.nullable_count(value.map(<[u8]>::len));
        self.raw(value.unwrap_or_default());
    }

    /// Writes bytes.
    pub fn bytes(&mut self, value: &[u8]) {
        self.nullable_bytes(Some(value));
    }

    /// Writes the length of records and leaves a [`Gap`] for them.
    pub fn gap(&mut self, len: usize) {
        self.count(len);
        if len > 0 {
            self.gaps.push(Gap {
                at: self.out.len(),
                len,
            });
            self.gaps_len += len;
        }
    }

    /// Ends a structure: no tagged fields in a flexible version, nothing in the classic form.
    #[inline]
    pub fn tagged_fields(&mut self) {
        if self.flexible {
            self.out.push(0);
        }
    }
}

/// `str::floor_char_boundary`, younger than the compiler that is asked for.
trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, max: usize) -> usize;
}

impl FloorCharBoundary for str {
    fn floor_char_boundary_at(&self, max: usize) -> usize {
        let mut at = max.min(self.len());
        while !self.is_char_boundary(at) {
            at -= 1;
        }
        at
    }
}

/// A type that a message's field can have. Messages themselves are structures of fields; those that
/// `message!` makes implement it.
pub trait Field<'a>: Sized {
    /// Reads one.
    fn read(reader: &mut Reader<'a>, version: i16) -> Result<Self, DecodeError>;
    /// Writes it.
    fn write(&self, writer: &mut Writer, version: i16);
    /// The fewest bytes that one takes.
    fn min_len(flexible: bool, version: i16) -> usize;
}

macro_rules! plain_fields {
    ($($type:ty, $method:ident, $len:expr;)*) => {$(
        impl<'a> Field<'a> for $type {
            #[inline]
            fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, DecodeError> {
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
    bool, boolean, 1;
    i8, int8, 1;
    i16, int16, 2;
    u16, uint16, 2;
    i32, int32, 4;
    u32, uint32, 4;
    i64, int64, 8;
    f64, float64, 8;
}

macro_rules! length_fields {
    ($($type:ty, $classic:expr, $read:ident $(. $into:ident)?, $self:ident => $write:ident($value:expr);)*) => {$(
        impl<'a> Field<'a> for $type {
            #[inline]
            fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, DecodeError> {
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
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, DecodeError> {
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
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, DecodeError> {
        reader.bytes().map(Cow::Borrowed)
    }
    fn write(&self, writer: &mut Writer, _: i16) {
        writer.bytes(self);
    }
    fn min_len(flexible: bool, version: i16) -> usize {
        <&[u8]>::min_len(flexible, version)
    }
}

impl<'a> Field<'a> for Uuid {
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, DecodeError> {
        reader.uuid()
    }
    fn write(&self, writer: &mut Writer, _: i16) {
        writer.uuid(self);
    }
    fn min_len(_: bool, _: i16) -> usize {
        16
    }
}

fn read_elements<'a, T: Field<'a>>(
    reader: &mut Reader<'a>,
    version: i16,
    count: usize,
) -> Result<Vec<T>, DecodeError> {
    // The count was checked against the remaining bytes.
    let mut elements = Vec::with_capacity(count);
    for _ in 0..count {
        elements.push(T::read(reader, version)?);
    }
    Ok(elements)
}

impl<'a, T: Field<'a>> Field<'a> for Vec<T> {
    fn read(reader: &mut Reader<'a>, version: i16) -> Result<Self, DecodeError> {
        let count = reader.count(T::min_len(reader.flexible, version))?;
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
    fn read(reader: &mut Reader<'a>, version: i16) -> Result<Self, DecodeError> {
        match reader.nullable_count(T::min_len(reader.flexible, version))? {
            Some(count) => read_elements(reader, version, count).map(Some),
            None => Ok(None),
        }
    }
    fn write(&self, writer: &mut Writer, version: i16) {
        match self {
            Some(elements) => elements.write(writer, version),
            None => writer.nullable_count(None),
        }
    }
    fn min_len(flexible: bool, version: i16) -> usize {
        Vec::<T>::min_len(flexible, version)
    }
}

/// Record batches in a message: their bytes, or, in an answer that is sent in pieces, a [`Gap`] for
/// bytes that lie elsewhere.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Records<'a> {
    /// Null.
    Null,
    /// The bytes themselves.
    Bytes(&'a [u8]),
    /// A gap of this many bytes, filled by who sends the message.
    Gap(usize),
}

impl std::fmt::Debug for Records<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Records::Null => f.write_str("None"),
            Records::Bytes(bytes) => write!(f, "Some(b\"{}\")", bytes.escape_ascii()),
            Records::Gap(len) => write!(f, "Gap({len})"),
        }
    }
}

impl Default for Records<'_> {
    fn default() -> Self {
        Records::Bytes(&[])
    }
}

impl<'a> Field<'a> for Records<'a> {
    fn read(reader: &mut Reader<'a>, _: i16) -> Result<Self, DecodeError> {
        Ok(reader
            .nullable_bytes()?
            .map_or(Records::Null, Records::Bytes))
    }
    fn write(&self, writer: &mut Writer, _: i16) {
        match *self {
            Records::Null => writer.nullable_bytes(None),
            Records::Bytes(bytes) => writer.bytes(bytes),
            Records::Gap(len) => writer.gap(len),
        }
    }
    fn min_len(flexible: bool, version: i16) -> usize {
        <&[u8]>::min_len(flexible, version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_are_checked_before_memory_is_reserved() {
        let huge = [0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0];
        let mut reader = Reader::new(&huge, false);
        assert_eq!(
            Vec::<i32>::read(&mut reader, 0),
            Err(DecodeError::Count {
                at: 0,
                count: i64::from(i32::MAX),
                have: 4
            })
        );
        let huge = [0xff, 0xff, 0xff, 0xff, 0x0f, 0];
        let mut reader = Reader::new(&huge, true);
        assert!(matches!(reader.count(1), Err(DecodeError::Count { .. })));
        // Two elements of four bytes do not fit into seven.
        let mut reader = Reader::new(&[3, 0, 0, 0, 0, 0, 0, 0], true);
        assert!(matches!(reader.count(4), Err(DecodeError::Count { .. })));
    }

    #[test]
    fn impossible_lengths_are_errors() {
        let read = |bytes: &'static [u8], flexible| Reader::new(bytes, flexible).nullable_string();
        assert_eq!(read(&[0xff, 0xff], false), Ok(None));
        assert_eq!(read(&[0], true), Ok(None));
        assert_eq!(
            read(&[0xff, 0xfe], false),
            Err(DecodeError::Length { at: 0, len: -2 })
        );
        assert_eq!(read(&[0, 1, 0xff], false), Err(DecodeError::Utf8 { at: 0 }));
        assert!(matches!(
            read(&[0, 2, b'a'], false),
            Err(DecodeError::Truncated { .. })
        ));
        let long = vec![b'a'; STRING_MAX + 1];
        let mut writer = Writer::new(true);
        writer.bytes(&long);
        let mut reader = Reader::new(writer.as_bytes(), true);
        assert!(matches!(reader.string(), Err(DecodeError::Length { .. })));
        assert!(matches!(
            Reader::new(&[0xff; 6], true).uvarint(),
            Err(DecodeError::Varint { at: 0 })
        ));
        assert_eq!(
            Reader::new(&[0], true).string(),
            Err(DecodeError::Null { at: 0 })
        );
    }

    #[test]
    fn overlong_strings_are_cut_at_a_character() {
        let long = "ä".repeat(STRING_MAX);
        let mut writer = Writer::new(false);
        writer.string(&long);
        let mut reader = Reader::new(writer.as_bytes(), false);
        assert_eq!(reader.string().unwrap().len(), STRING_MAX - 1);
        assert_eq!(reader.finish(), Ok(()));
    }

    proptest! {
        #[test]
        fn round_trip(
            flexible: bool, byte: i8, short: i16, int: i32, long: i64, unsigned: u32, flag: bool,
            string in proptest::option::of(".{0,40}"), bytes: Option<Vec<u8>>,
            array: Option<Vec<i32>>, uuid: [u8; 16],
        ) {
            let mut writer = Writer::new(flexible);
            writer.int8(byte);
            writer.int16(short);
            writer.int32(int);
            writer.int64(long);
            writer.uvarint(unsigned);
            writer.varint(int);
            writer.boolean(flag);
            writer.nullable_string(string.as_deref());
            writer.nullable_bytes(bytes.as_deref());
            array.write(&mut writer, 0);
            writer.uuid(&Uuid(uuid));
            writer.tagged_fields();
            let written = writer.into_bytes();
            let mut reader = Reader::new(&written, flexible);
            prop_assert_eq!(reader.int8(), Ok(byte));
            prop_assert_eq!(reader.int16(), Ok(short));
            prop_assert_eq!(reader.int32(), Ok(int));
            prop_assert_eq!(reader.int64(), Ok(long));
            prop_assert_eq!(reader.uvarint(), Ok(unsigned));
            prop_assert_eq!(reader.varint(), Ok(int));
            prop_assert_eq!(reader.boolean(), Ok(flag));
            prop_assert_eq!(reader.nullable_string(), Ok(string.as_deref()));
            prop_assert_eq!(reader.nullable_bytes(), Ok(bytes.as_deref()));
            prop_assert_eq!(Option::<Vec<i32>>::read(&mut reader, 0), Ok(array));
            prop_assert_eq!(reader.uuid(), Ok(Uuid(uuid)));
            prop_assert_eq!(reader.tagged_fields(), Ok(()));
            prop_assert_eq!(reader.finish(), Ok(()));
        }

        #[test]
        fn tagged_fields_are_skipped(fields in proptest::collection::vec((0..99u32, "[a-z]{0,9}"), 0..4)) {
            let mut writer = Writer::new(true);
            writer.uvarint(fields.len() as u32);
            for (tag, value) in &fields {
                writer.uvarint(*tag);
                writer.uvarint(value.len() as u32);
                writer.raw(value.as_bytes());
            }
            writer.int8(7);
            let written = writer.into_bytes();
            let mut reader = Reader::new(&written, true);
            prop_assert_eq!(reader.tagged_fields(), Ok(()));
            prop_assert_eq!(reader.int8(), Ok(7));
        }
    }
}
