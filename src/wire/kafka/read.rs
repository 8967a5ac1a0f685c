//! Reading primitive types.

/// The bytes are no request of this version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("request is malformed at byte {at}")]
pub struct Malformed {
    /// Bytes read before.
    pub at: usize,
}

/// Elements of an array that are reserved for at once; longer ones grow as they are read.
const RESERVE: usize = 1024;

/// Reads a request's fields in order. `flexible` versions have compact lengths and tagged fields.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    flexible: bool,
}

macro_rules! integer {
    ($name:ident, $type:ty) => {
        /// A big-endian integer.
        #[inline]
        pub fn $name(&mut self) -> Result<$type, Malformed> {
            const N: usize = size_of::<$type>();
            let bytes = self.take(N)?;
            let mut array = [0; N];
            array.copy_from_slice(bytes);
            Ok(<$type>::from_be_bytes(array))
        }
    };
}

impl<'a> Reader<'a> {
    /// Over the bytes of a request.
    pub fn new(bytes: &'a [u8], flexible: bool) -> Self {
        Self {
            bytes,
            at: 0,
            flexible,
        }
    }

    /// Says whether the fields that follow are of a flexible version.
    pub fn set_flexible(&mut self, flexible: bool) {
        self.flexible = flexible;
    }

    /// Whether the fields that follow are of a flexible version.
    pub fn is_flexible(&self) -> bool {
        self.flexible
    }

    /// Bytes read.
    pub fn position(&self) -> usize {
        self.at
    }

    /// Bytes not read.
    pub fn remaining(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The bytes not read.
    pub fn rest(&self) -> &'a [u8] {
        &self.bytes[self.at..]
    }

    fn error(&self) -> Malformed {
        Malformed { at: self.at }
    }

    /// So many bytes.
    #[inline]
    pub fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(len).ok_or(self.error())?;
        let taken = self.bytes.get(self.at..end).ok_or(self.error())?;
        self.at = end;
        Ok(taken)
    }

    integer!(i8, i8);
    integer!(i16, i16);
    integer!(i32, i32);
    integer!(i64, i64);

    /// One byte; whatever is not 0 is true.
    pub fn bool(&mut self) -> Result<bool, Malformed> {
        Ok(self.i8()? != 0)
    }

    /// 16 bytes.
    pub fn uuid(&mut self) -> Result<u128, Malformed> {
        let mut array = [0; 16];
        array.copy_from_slice(self.take(16)?);
        Ok(u128::from_be_bytes(array))
    }

    /// An unsigned varint of at most 32 bits.
    pub fn uvarint(&mut self) -> Result<u32, Malformed> {
        let mut value = 0u64;
        for shift in (0..35).step_by(7) {
            let byte = self.i8()? as u8;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).map_err(|_| self.error());
            }
        }
        Err(self.error())
    }

    /// A length, `None`: null; `wide`: 4 bytes where it is not compact, else 2.
    fn length(&mut self, wide: bool) -> Result<Option<usize>, Malformed> {
        let length = if self.flexible {
            i64::from(self.uvarint()?) - 1
        } else if wide {
            i64::from(self.i32()?)
        } else {
            i64::from(self.i16()?)
        };
        match length {
            -1 => Ok(None),
            length => usize::try_from(length)
                .ok()
                .filter(|&len| len <= self.remaining())
                .map(Some)
                .ok_or(self.error()),
        }
    }

    /// A string or null.
    pub fn nullable_string(&mut self) -> Result<Option<&'a str>, Malformed> {
        let Some(len) = self.length(false)? else {
            return Ok(None);
        };
        let at = self.at;
        std::str::from_utf8(self.take(len)?)
            .map(Some)
            .map_err(|_| Malformed { at })
    }

    /// A string.
    pub fn string(&mut self) -> Result<&'a str, Malformed> {
        self.nullable_string()?.ok_or(self.error())
    }

    /// Bytes or null.
    pub fn nullable_bytes(&mut self) -> Result<Option<&'a [u8]>, Malformed> {
        match self.length(true)? {
            None => Ok(None),
            Some(len) => self.take(len).map(Some),
        }
    }

    /// Bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], Malformed> {
        self.nullable_bytes()?.ok_or(self.error())
    }

    /// The count of an array whose elements take at least `element_min` bytes each; `None`: null. More than the
    /// remaining bytes can hold is an error.
    pub fn nullable_count(&mut self, element_min: usize) -> Result<Option<usize>, Malformed> {
        let at = self.at;
        match self.length(true)? {
            Some(count) if count > self.remaining() / element_min.max(1) => Err(Malformed { at }),
            count => Ok(count),
        }
    }

    /// As [`Reader::nullable_count`]; null is an error.
    pub fn count(&mut self, element_min: usize) -> Result<usize, Malformed> {
        self.nullable_count(element_min)?.ok_or(self.error())
    }

    /// An array or null, its elements read by `read`, each of which takes at least one byte.
    pub fn nullable_array<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Option<Vec<T>>, Malformed> {
        let Some(len) = self.nullable_count(1)? else {
            return Ok(None);
        };
        let mut list = Vec::with_capacity(len.min(RESERVE));
        for _ in 0..len {
            list.push(read(self)?);
        }
        Ok(Some(list))
    }

    /// An array.
    pub fn array<T>(
        &mut self,
        read: impl FnMut(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        self.nullable_array(read)?.ok_or(self.error())
    }

    /// The end of a structure: in flexible versions tagged fields, none of which is known here.
    pub fn end(&mut self) -> Result<(), Malformed> {
        if self.flexible {
            for _ in 0..self.uvarint()? {
                self.uvarint()?;
                let len = self.uvarint()?;
                self.take(len as usize)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn counts_are_checked_against_the_bytes_that_remain() {
        let mut reader = Reader::new(&[0x7f, 0xff, 0xff, 0xff, 1, 2], false);
        assert!(reader.array(|r| r.i8()).is_err());
        let mut reader = Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x0f, 1], true);
        assert!(reader.array(|r| r.i8()).is_err());
        let mut reader = Reader::new(&[0xff, 0xff, 0xff, 0xff], false);
        assert_eq!(reader.nullable_array(|r| r.i8()), Ok(None));
        let mut reader = Reader::new(&[0xff, 0xff, 0xff, 0xff, 0x7f], true);
        assert!(reader.uvarint().is_err(), "more than 32 bits");
        // Two elements of four bytes do not fit into seven.
        let mut reader = Reader::new(&[3, 0, 0, 0, 0, 0, 0, 0], true);
        assert_eq!(reader.count(4), Err(Malformed { at: 0 }));
    }

    #[test]
    fn tagged_fields_are_skipped() {
        let mut reader = Reader::new(&[2, 5, 1, 9, 7, 2, 8, 8, 42], true);
        reader.end().unwrap();
        assert_eq!(reader.i8(), Ok(42));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..100), flexible: bool) {
            let mut reader = Reader::new(&bytes, flexible);
            let _ = reader.nullable_string();
            let _ = reader.nullable_bytes();
            let _ = reader.nullable_array(|r| { r.string()?; r.end() });
            let _ = reader.end();
        }
    }
}
