//! Pages of the key index: sorted byte strings with a number each, prefixes shared with the entry before.
//!
//! 4096 bytes, little-endian: CRC-32C of the rest u32, kind u8, 0 u8, number of entries u16, bytes of entries
//! u16, six zeros; the entries from byte 16; the positions of every 16th entry as u16, the last at the page's end.
//! Such an entry shares nothing with the one before, so that a search halves by them first.
//!
//! Invariant: whatever the bytes are, nothing here reads outside the page or panics.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes before the entries.
pub(super) const HEADER: usize = 16;
/// Entries from one that is stored whole to the next.
const RESTART: usize = 16;
/// Bytes of the longest string: three fit a page, which makes a tree of pages.
pub(super) const MAX_STRING: usize = 1024;

/// What a page holds. Kinds 1 to 3 are those of the block index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// Keys and offsets.
    Leaf = 4,
    /// Separators and child pages.
    Inner = 5,
    /// Blocks of the bloom filter.
    Bloom = 6,
    /// The description of the section.
    End = 7,
}

pub(super) fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        if shift == 63 && byte > 1 {
            return None;
        }
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

/// Fills in a page's header around its content.
pub(super) fn seal(page: &mut [u8; PAGE], kind: Kind, count: u16, bytes: u16) {
    page[4] = kind as u8;
    page[6..8].copy_from_slice(&count.to_le_bytes());
    page[8..10].copy_from_slice(&bytes.to_le_bytes());
    let crc = crc32c::crc32c(&page[4..]);
    page[..4].copy_from_slice(&crc.to_le_bytes());
}

/// Compares the CRC.
pub(super) fn check_crc(page: &[u8; PAGE]) -> Result<(), &'static str> {
    if page[..4] != crc32c::crc32c(&page[4..]).to_le_bytes() {
        return Err("a page's CRC is wrong");
    }
    Ok(())
}

/// Compares the kind.
pub(super) fn check_kind(page: &[u8; PAGE], kind: Kind) -> Result<(), &'static str> {
    if page[4] != kind as u8 {
        return Err("a page is of another kind than its place");
    }
    Ok(())
}

/// A page being filled.
#[derive(Default)]
pub(super) struct PageBuilder {
    entries: Vec<u8>,
    restarts: Vec<u16>,
    count: usize,
    last: Vec<u8>,
}

impl PageBuilder {
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds an entry; false: the page is full.
    pub(super) fn push(&mut self, string: &[u8], value: u64) -> bool {
        let restart = self.count.is_multiple_of(RESTART);
        let shared = if restart {
            0
        } else {
            common(&self.last, string)
        };
        let before = self.entries.len();
        put_varint(&mut self.entries, shared as u64);
        put_varint(&mut self.entries, (string.len() - shared) as u64);
        self.entries.extend_from_slice(&string[shared..]);
        put_varint(&mut self.entries, value);
        let restarts = self.restarts.len() + usize::from(restart);
        if HEADER + self.entries.len() + 2 * restarts > PAGE {
            self.entries.truncate(before);
            return false;
        }
        if restart {
            self.restarts.push((HEADER + before) as u16);
        }
        self.count += 1;
        self.last.clear();
        self.last.extend_from_slice(string);
        true
    }

    /// The page; the builder is empty afterwards.
    pub(super) fn finish(&mut self, kind: Kind) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        page[HEADER..HEADER + self.entries.len()].copy_from_slice(&self.entries);
        for (i, restart) in self.restarts.iter().enumerate() {
            let at = PAGE - 2 * (self.restarts.len() - i);
            page[at..at + 2].copy_from_slice(&restart.to_le_bytes());
        }
        seal(
            &mut page,
            kind,
            self.count as u16,
            self.entries.len() as u16,
        );
        self.entries.clear();
        self.restarts.clear();
        self.count = 0;
        page
    }
}

/// A walk over a page's entries. Holds the current string; allocates nothing.
#[derive(Clone)]
pub(super) struct Walk<'a> {
    page: &'a [u8; PAGE],
    at: usize,
    end: usize,
    left: usize,
    string: [u8; MAX_STRING],
    len: usize,
    value: u64,
}

const MALFORMED: &str = "a page's entries are malformed";

impl<'a> Walk<'a> {
    /// Before the first entry of a page whose CRC and kind were checked.
    pub(super) fn new(page: &'a [u8; PAGE]) -> Result<Walk<'a>, &'static str> {
        let count = usize::from(u16::from_le_bytes([page[6], page[7]]));
        let end = HEADER + usize::from(u16::from_le_bytes([page[8], page[9]]));
        if count == 0 || end + 2 * count.div_ceil(RESTART) > PAGE {
            return Err(MALFORMED);
        }
        Ok(Walk {
            page,
            at: HEADER,
            end,
            left: count,
            string: [0; MAX_STRING],
            len: 0,
            value: 0,
        })
    }

    /// Steps to the next entry; false: there is none.
    pub(super) fn step(&mut self) -> Result<bool, &'static str> {
        if self.left == 0 {
            return Ok(false);
        }
        self.entry().ok_or(MALFORMED)?;
        self.left -= 1;
        Ok(true)
    }

    fn entry(&mut self) -> Option<()> {
        let bytes = &self.page[..self.end];
        let shared = usize::try_from(varint(bytes, &mut self.at)?).ok()?;
        let rest = usize::try_from(varint(bytes, &mut self.at)?).ok()?;
        let string = bytes.get(self.at..self.at.checked_add(rest)?)?;
        let len = shared.checked_add(rest)?;
        if shared > self.len {
            return None;
        }
        self.string.get_mut(shared..len)?.copy_from_slice(string);
        self.at += rest;
        self.len = len;
        self.value = varint(bytes, &mut self.at)?;
        Some(())
    }

    pub(super) fn string(&self) -> &[u8] {
        &self.string[..self.len]
    }

    pub(super) fn value(&self) -> u64 {
        self.value
    }

    /// Moves from the page's start to before the last whole entry that is less than `string`.
    pub(super) fn skip_to(&mut self, string: &[u8]) -> Result<(), &'static str> {
        let count = self.left;
        let restarts = count.div_ceil(RESTART);
        let place = |i: usize| {
            let at = PAGE - 2 * (restarts - i);
            usize::from(u16::from_le_bytes([self.page[at], self.page[at + 1]]))
        };
        let (mut from, mut to) = (0, restarts);
        while from < to {
            let middle = (from + to) / 2;
            let mut at = place(middle);
            let whole = (|| {
                let bytes = &self.page[..self.end];
                if varint(bytes, &mut at)? != 0 {
                    return None;
                }
                let len = usize::try_from(varint(bytes, &mut at)?).ok()?;
                bytes.get(at..at.checked_add(len)?)
            })()
            .ok_or(MALFORMED)?;
            if whole < string {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        let index = from.saturating_sub(1);
        self.at = place(index);
        self.left = count - index * RESTART;
        self.len = 0;
        Ok(())
    }
}
