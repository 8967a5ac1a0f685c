//! Writing primitive types.

/// Writes an answer's fields in order, behind 4 bytes for its length.
#[derive(Debug)]
pub struct Writer {
    out: Vec<u8>,
    flexible: bool,
}

macro_rules! integer {
    ($name:ident, $type:ty) => {
        /// A big-endian integer.
        #[inline]
        pub fn $name(&mut self, value: $type) {
            self.out.extend_from_slice(&value.to_be_bytes());
        }
    };
}

impl Writer {
    /// An answer to the request `correlation`; `flexible_header`: its header has tagged fields.
    pub fn answer(correlation: i32, flexible: bool, flexible_header: bool) -> Self {
        let mut writer = Self {
            out: Vec::with_capacity(64),
            flexible: flexible_header,
        };
        writer.i32(0);
        writer.i32(correlation);
        writer.end();
        writer.flexible = flexible;
        writer
    }

    /// Fields alone, without a length: the body of a request or a stored value.
    pub fn fields(flexible: bool) -> Self {
        Self {
            out: Vec::new(),
            flexible,
        }
    }

    integer!(i8, i8);
    integer!(i16, i16);
    integer!(i32, i32);
    integer!(i64, i64);

    /// One byte.
    pub fn bool(&mut self, value: bool) {
        self.i8(i8::from(value));
    }

    /// 16 bytes.
    pub fn uuid(&mut self, value: u128) {
        self.out.extend_from_slice(&value.to_be_bytes());
    }

    /// An unsigned varint.
    pub fn uvarint(&mut self, mut value: u32) {
        while value >= 0x80 {
            self.out.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.out.push(value as u8);
    }

    fn length(&mut self, length: Option<usize>, wide: bool) {
        // An answer is shorter than its length field can say; a string as long as that is cut off by its
        // writer.
        let length = length.map_or(-1, |len| len as i64);
        if self.flexible {
            self.uvarint((length + 1) as u32);
        } else if wide {
            self.i32(length as i32);
        } else {
            self.i16(length as i16);
        }
    }

    /// A string or null; longer ones than 32,767 bytes are cut.
    pub fn nullable_string(&mut self, text: Option<&str>) {
        let text = text.map(|text| {
            let mut end = text.len().min(i16::MAX as usize);
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            &text[..end]
        });
        self.length(text.map(str::len), false);
        self.out
            .extend_from_slice(text.unwrap_or_default().as_bytes());
    }

    /// A string.
    pub fn string(&mut self, text: &str) {
        self.nullable_string(Some(text));
    }

    /// Bytes or null.
    pub fn nullable_bytes(&mut self, bytes: Option<&[u8]>) {
        self.length(bytes.map(<[u8]>::len), true);
        self.out.extend_from_slice(bytes.unwrap_or_default());
    }

    /// Bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.nullable_bytes(Some(bytes));
    }

    /// The length of bytes that the caller sends behind what is written so far.
    pub fn bytes_length(&mut self, len: usize) {
        self.length(Some(len), true);
    }

    /// The count of an array; as many elements are to follow.
    pub fn count(&mut self, len: usize) {
        self.length(Some(len), true);
    }

    /// A null array.
    pub fn null_array(&mut self) {
        self.length(None, true);
    }

    /// An array, its elements written by `write`.
    pub fn array<T>(
        &mut self,
        list: impl ExactSizeIterator<Item = T>,
        mut write: impl FnMut(&mut Self, T),
    ) {
        self.count(list.len());
        for element in list {
            write(self, element);
        }
    }

    /// The end of a structure: in flexible versions no tagged fields.
    pub fn end(&mut self) {
        if self.flexible {
            self.out.push(0);
        }
    }

    /// Bytes written.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// What was written since the last call, as it is.
    pub fn split(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    /// The whole answer, its length in front.
    pub fn finish(mut self) -> Vec<u8> {
        let len = (self.out.len() - 4) as i32;
        self.out[..4].copy_from_slice(&len.to_be_bytes());
        self.out
    }

    /// The fields as they are.
    pub fn into_fields(self) -> Vec<u8> {
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Field, Reader};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read() {
        for flexible in [false, true] {
            let mut writer = Writer::fields(flexible);
            writer.string("hällo");
            writer.nullable_string(None);
            writer.bytes(&[7; 200]);
            writer.array([1i32, 2, 3].iter(), |w, &n| {
                w.i32(n);
                w.end();
            });
            writer.null_array();
            writer.uuid(77);
            writer.end();
            let bytes = writer.into_fields();
            let mut reader = Reader::new(&bytes, flexible);
            assert_eq!(reader.string(), Ok("hällo"));
            assert_eq!(reader.nullable_string(), Ok(None));
            assert_eq!(reader.bytes(), Ok(&[7; 200][..]));
            let list = reader.array(|r| {
                let n = r.i32()?;
                r.end()?;
                Ok(n)
            });
            assert_eq!(list, Ok(vec![1, 2, 3]));
            assert_eq!(reader.nullable_array(|r| r.i32()), Ok(None));
            assert_eq!(reader.uuid(), Ok(77));
            reader.end().unwrap();
            assert_eq!(reader.remaining(), 0);
        }
    }

    #[test]
    fn overlong_strings_are_cut_at_a_character() {
        let mut writer = Writer::fields(false);
        writer.string(&"ä".repeat(i16::MAX as usize));
        let bytes = writer.into_fields();
        let mut reader = Reader::new(&bytes, false);
        assert_eq!(reader.string().unwrap().len(), i16::MAX as usize - 1);
        assert_eq!(reader.remaining(), 0);
    }

    proptest! {
        #[test]
        fn any_values_are_read_as_written(
            flexible: bool, byte: i8, short: i16, int: i32, long: i64, unsigned: u32, flag: bool,
            string in proptest::option::of(".{0,40}"), bytes: Option<Vec<u8>>,
            array: Option<Vec<i32>>, uuid: u128,
        ) {
            let mut writer = Writer::fields(flexible);
            writer.i8(byte);
            writer.i16(short);
            writer.i32(int);
            writer.i64(long);
            writer.uvarint(unsigned);
            writer.bool(flag);
            writer.nullable_string(string.as_deref());
            writer.nullable_bytes(bytes.as_deref());
            array.write(&mut writer, 0);
            writer.uuid(uuid);
            writer.end();
            let written = writer.into_fields();
            let mut reader = Reader::new(&written, flexible);
            prop_assert_eq!(reader.i8(), Ok(byte));
            prop_assert_eq!(reader.i16(), Ok(short));
            prop_assert_eq!(reader.i32(), Ok(int));
            prop_assert_eq!(reader.i64(), Ok(long));
            prop_assert_eq!(reader.uvarint(), Ok(unsigned));
            prop_assert_eq!(reader.bool(), Ok(flag));
            prop_assert_eq!(reader.nullable_string(), Ok(string.as_deref()));
            prop_assert_eq!(reader.nullable_bytes(), Ok(bytes.as_deref()));
            prop_assert_eq!(Option::<Vec<i32>>::read(&mut reader, 0), Ok(array));
            prop_assert_eq!(reader.uuid(), Ok(uuid));
            prop_assert_eq!(reader.end(), Ok(()));
            prop_assert_eq!(reader.remaining(), 0);
        }
    }

    #[test]
    fn an_answer_has_its_length_in_front() {
        let mut writer = Writer::answer(9, true, true);
        writer.i16(3);
        writer.end();
        assert_eq!(writer.finish(), [0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 3, 0]);
    }
}
