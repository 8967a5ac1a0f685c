//! A heap buffer that O_DIRECT accepts.
//!
//! Invariant: address and capacity are multiples of the frame alignment.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use super::frame::{FRAME_ALIGN, align_frame};

/// An aligned, zeroed, owned buffer of fixed size.
pub(crate) struct AlignedBuf {
    ptr: NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer is owned memory, as a Vec<u8> is.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads, as with a Vec<u8>.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// At least `len` zero bytes (rounded up to the alignment; at least one block).
    pub(crate) fn zeroed(len: usize) -> AlignedBuf {
        let len = align_frame(len.max(1));
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let ptr = unsafe { alloc_zeroed(layout) };
        let Some(ptr) = NonNull::new(ptr) else {
            handle_alloc_error(layout)
        };
        AlignedBuf { ptr, len }
    }

    fn layout(len: usize) -> Layout {
        Layout::from_size_align(len, FRAME_ALIGN).expect("a buffer below isize::MAX")
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes were allocated and zeroed; the borrow is tied to self.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with the same layout.
        unsafe { dealloc(self.ptr.as_ptr(), Self::layout(self.len)) }
    }
}
