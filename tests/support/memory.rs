//! Guest memory as a front-end has it: memory files, mapped here and handed to
//! the back-end, at guest addresses and user addresses of our choice.
//!
//! Guest and user addresses are never the same number, so that a back-end that
//! mixes them up is found out.

use std::cell::Cell;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::rc::Rc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::sys::memory_file;

/// Where the guest sees a region and how large it is.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    pub guest: u64,
    pub len: u64,
}

/// One region: a memory file, mapped here.
pub struct Region {
    pub file: File,
    pub guest: u64,
    pub len: u64,
    /// What the front-end calls its own address of the region.
    pub user: u64,
    /// Where in the file the region starts.
    pub offset: u64,
    host: NonNull<u8>,
    next: Cell<u64>,
}

impl Region {
    /// A region that starts `offset` bytes into its file.
    pub fn new(guest: u64, len: u64, offset: u64) -> Self {
        let file = memory_file(offset + len);
        // SAFETY: a new shared mapping of a file we own; nothing else refers
        // to the addresses the kernel picks.
        let host = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                usize::try_from(len).unwrap(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                libc::off_t::try_from(offset).unwrap(),
            )
        };
        assert_ne!(host, libc::MAP_FAILED, "mmap of guest memory");
        Self {
            file,
            guest,
            len,
            user: guest ^ 0x5500_0000_0000,
            offset,
            host: NonNull::new(host.cast()).unwrap(),
            next: Cell::new(0),
        }
    }

    /// Where the region is mapped here.
    pub fn host(&self) -> *mut u8 {
        self.host.as_ptr()
    }

    fn holds(&self, guest: u64) -> bool {
        guest >= self.guest && guest - self.guest < self.len
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`; no pointer into it outlives the
        // region, all accesses go through `Memory`.
        unsafe { libc::munmap(self.host.as_ptr().cast(), usize::try_from(self.len).unwrap()) };
    }
}

/// All regions of a guest.
pub struct Memory {
    pub regions: Vec<Region>,
}

impl Memory {
    /// 64 MiB at 1 MiB: what most tests need.
    pub fn plain() -> Rc<Self> {
        Self::with(&[Span { guest: 1 << 20, len: 64 << 20 }])
    }

    pub fn with(spans: &[Span]) -> Rc<Self> {
        Rc::new(Self { regions: spans.iter().map(|span| Region::new(span.guest, span.len, 0)).collect() })
    }

    /// Takes `len` bytes out of region `region`; they are never given back.
    pub fn alloc_in(&self, region: usize, len: u64, align: u64) -> u64 {
        let region = &self.regions[region];
        let start = (region.guest + region.next.get()).next_multiple_of(align) - region.guest;
        assert!(start + len <= region.len, "the test's guest memory is full");
        region.next.set(start + len);
        region.guest + start
    }

    /// Bytes of region 0 that were taken, from its start on.
    pub fn taken(&self) -> u64 {
        self.regions[0].next.get()
    }

    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        self.alloc_in(0, len, align)
    }

    /// A page-aligned buffer with these contents.
    pub fn page_with(&self, data: &[u8]) -> u64 {
        let guest = self.alloc(data.len() as u64, 4096);
        self.write(guest, data);
        guest
    }

    /// The front-end's own address of a guest address.
    pub fn user(&self, guest: u64) -> u64 {
        let region = self.region(guest);
        region.user + (guest - region.guest)
    }

    fn region(&self, guest: u64) -> &Region {
        self.regions
            .iter()
            .find(|region| region.holds(guest))
            .unwrap_or_else(|| panic!("guest address {guest:#x} is in no region"))
    }

    /// Host pointer of a guest range that lies in one region.
    fn host(&self, guest: u64, len: usize) -> *mut u8 {
        let region = self.region(guest);
        let at = guest - region.guest;
        assert!(at + len as u64 <= region.len, "range leaves its region");
        // SAFETY: `at + len` is inside the mapping of `region`.
        unsafe { region.host.as_ptr().add(usize::try_from(at).unwrap()) }
    }

    /// Calls `each` for every piece of a guest range that lies in one region.
    fn pieces(&self, guest: u64, len: usize, mut each: impl FnMut(*mut u8, usize, usize)) {
        let mut done = 0;
        while done < len {
            let at = guest + done as u64;
            let region = self.region(at);
            let here = usize::try_from(region.guest + region.len - at).unwrap().min(len - done);
            each(self.host(at, here), done, here);
            done += here;
        }
    }

    pub fn write(&self, guest: u64, data: &[u8]) {
        self.pieces(guest, data.len(), |host, at, len| {
            // SAFETY: `host` points to `len` bytes of the mapping, `data` is
            // ours and has `at + len` bytes. The back-end may race, as a guest
            // may; it can only see other bytes.
            unsafe { std::ptr::copy_nonoverlapping(data[at..].as_ptr(), host, len) };
        });
    }

    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.pieces(guest, len, |host, at, len| {
            // SAFETY: as in `write`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(host, data[at..].as_mut_ptr(), len) };
        });
        data
    }

    pub fn byte(&self, guest: u64) -> u8 {
        // SAFETY: one byte inside the mapping; volatile because the back-end
        // writes it.
        unsafe { self.host(guest, 1).read_volatile() }
    }

    fn atomic(&self, guest: u64) -> &AtomicU16 {
        let host = self.host(guest, 2).cast::<u16>();
        assert!(host.is_aligned(), "ring field at odd address {guest:#x}");
        // SAFETY: aligned, inside the mapping, and the mapping lives as long
        // as `self`.
        unsafe { AtomicU16::from_ptr(host) }
    }

    pub fn load16(&self, guest: u64) -> u16 {
        u16::from_le(self.atomic(guest).load(Ordering::SeqCst))
    }

    pub fn store16(&self, guest: u64, value: u16) {
        self.atomic(guest).store(value.to_le(), Ordering::SeqCst);
    }

    pub fn load32(&self, guest: u64) -> u32 {
        u32::from_le_bytes(self.read(guest, 4).try_into().unwrap())
    }
}
