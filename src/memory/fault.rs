//! SIGBUS on guest memory: the front-end truncated a file that we have mapped.
//!
//! What it is: a handler that puts an anonymous page over the fault, so that
//! the faulting load or store finishes, and latches the region as lost; the
//! control thread then drops that front-end. The kernel's own accesses answer
//! EFAULT instead and never come here.
//!
//! What it is not: a cure for bugs. A SIGBUS anywhere else aborts.
//!
//! Invariant: the handler only reads atomics and calls mmap and write, which
//! are safe in a signal handler.
#![expect(unsafe_code, reason = "a signal handler that maps pages over a fault")]

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// Regions that can be watched at once: a few whole tables of 509.
const CAPACITY: usize = 2048;

#[derive(Debug)]
struct Entry {
    taken: AtomicBool,
    start: AtomicUsize,
    /// 0 while the entry is being filled in or is free: matches no address.
    end: AtomicUsize,
    page: AtomicUsize,
    lost: AtomicBool,
}

static ENTRIES: [Entry; CAPACITY] = [const {
    Entry {
        taken: AtomicBool::new(false),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
    }
}; CAPACITY];

/// Some region was lost since the start: a cheap first look.
static ANY_LOST: AtomicBool = AtomicBool::new(false);

/// False: no region of any table was ever lost.
#[must_use]
pub fn any_lost() -> bool {
    ANY_LOST.load(Ordering::Acquire)
}

/// True if this address is in a watched range of which a page was missing when it was touched.
#[must_use]
pub fn is_lost_at(addr: usize) -> bool {
    let holds = |entry: &&Entry| {
        (entry.start.load(Ordering::Acquire)..entry.end.load(Ordering::Acquire)).contains(&addr)
    };
    any_lost() && ENTRIES.iter().filter(holds).any(|entry| entry.lost.load(Ordering::Acquire))
}

/// The eventfd that the handler writes to; -1 before [`install`].
static NOTIFY: AtomicI32 = AtomicI32::new(-1);

/// One watched range; forgotten on drop.
#[derive(Debug)]
pub struct Watch(usize);

impl Watch {
    /// Watches `[addr, addr + len)`, whose pages have `page` bytes. `None` when
    /// the table is full: then a truncated file ends the daemon, as without us.
    #[must_use]
    pub fn new(addr: usize, len: usize, page: usize) -> Option<Self> {
        let at = ENTRIES.iter().position(|e| !e.taken.swap(true, Ordering::AcqRel))?;
        let entry = &ENTRIES[at];
        entry.lost.store(false, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.start.store(addr, Ordering::Relaxed);
        entry.end.store(addr + len, Ordering::Release);
        Some(Self(at))
    }

    /// True once a page of the range was missing when it was touched.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        ENTRIES[self.0].lost.load(Ordering::Acquire)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let entry = &ENTRIES[self.0];
        entry.end.store(0, Ordering::Release);
        entry.taken.store(false, Ordering::Release);
    }
}

/// Installs the handler; `notify` is an eventfd that gets 1 for every lost page.
/// It stays open as long as the process lives.
///
/// # Errors
/// What sigaction(2) says.
pub fn install(notify: OwnedFd) -> std::io::Result<()> {
    NOTIFY.store(notify.into_raw_fd(), Ordering::Release);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
    // SAFETY: an all-zero sigaction is a valid value; each field that matters is
    // set below. The handler has the signature that SA_SIGINFO asks for. Threads
    // of the standard library have an alternate stack already.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo, and SIGBUS sets its si_addr.
    let addr = unsafe { (*info).si_addr() }.addr();
    if !cover(addr) {
        // SAFETY: abort is safe in a signal handler and does not return.
        unsafe { libc::abort() }
    }
}

/// Puts an anonymous page over a fault at `addr`; false when it is not ours.
fn cover(addr: usize) -> bool {
    for entry in &ENTRIES {
        let end = entry.end.load(Ordering::Acquire);
        if addr < entry.start.load(Ordering::Relaxed) || addr >= end {
            continue;
        }
        let page = entry.page.load(Ordering::Relaxed);
        let at = addr / page * page;
        // Before the page is there: a reader of its zeroes can know.
        entry.lost.store(true, Ordering::SeqCst);
        ANY_LOST.store(true, Ordering::SeqCst);
        // SAFETY: MAP_FIXED inside a range that a Watch says is a mapping of
        // ours; the page it replaces has no bytes any more.
        let mapped = unsafe {
            libc::mmap(
                std::ptr::with_exposed_provenance_mut(at),
                page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if mapped == libc::MAP_FAILED {
            return false;
        }
        let one = 1u64.to_ne_bytes();
        // SAFETY: write(2) is safe in a handler; a full eventfd is as good as written.
        unsafe { libc::write(NOTIFY.load(Ordering::Acquire), one.as_ptr().cast(), one.len()) };
        return true;
    }
    false
}
