//! For tests of full disks: a folder that is a small file system, for one thread and what it starts.

use std::ffi::CString;
use std::path::Path;

/// Runs `test` on a thread for which `folder` is an empty tmpfs of `kib` KiB. Nothing happens without root, and that is said.
pub(super) fn on_small_disk(folder: &Path, kib: u32, test: impl FnOnce() + Send + 'static) {
    // SAFETY: no pointers.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("skipped: needs root to mount a small file system");
        return;
    }
    let folder = CString::new(folder.to_str().unwrap()).unwrap();
    let size = CString::new(format!("size={kib}k")).unwrap();
    let tested = std::thread::spawn(move || {
        // SAFETY: a mount namespace of this thread alone (its children inherit it); strings are
        // NUL-terminated.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
            let none = std::ptr::null();
            let slash = c"/".as_ptr();
            assert_eq!(
                libc::mount(
                    none,
                    slash,
                    none,
                    libc::MS_REC | libc::MS_PRIVATE,
                    none.cast()
                ),
                0
            );
            assert_eq!(
                libc::mount(
                    c"tmpfs".as_ptr(),
                    folder.as_ptr(),
                    c"tmpfs".as_ptr(),
                    0,
                    size.as_ptr().cast()
                ),
                0
            );
        }
        test();
    });
    tested.join().unwrap();
}
