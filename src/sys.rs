//! System calls that no safer wrapper offers, each as a safe function.
//!
//! What it is: thin. Arguments in, `io::Result` out.
//!
//! What it is not: a place for policy; who calls decides what an error means.
//!
//! Invariant: no function here keeps a pointer after it returns.
#![expect(unsafe_code, reason = "calls libc")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, getrlimit, setrlimit};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A new eventfd, non-blocking and close-on-exec.
///
/// # Errors
/// When descriptors run out.
pub fn eventfd() -> io::Result<OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(Into::into)
}

/// Writes an eventfd. A full one, or a full pipe, has a reader that is awake.
pub fn signal(fd: impl AsFd) {
    if let Err(e) = rustix::io::write(fd, &1u64.to_ne_bytes())
        && e != rustix::io::Errno::AGAIN
    {
        tracing::debug!("cannot write an eventfd: {e}");
    }
}

/// Empties an eventfd; true if it had been written.
pub fn drain(fd: impl AsFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

/// A kind of open file description lock (fcntl(2), F_OFD_SETLK).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Many holders.
    Shared,
    /// One holder; needs a descriptor open for writing.
    Exclusive,
    /// No lock.
    None,
}

fn flock(kind: LockKind, start: u64, len: u64) -> io::Result<libc::flock> {
    let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    // SAFETY: all zeroes is a valid flock; l_pid must be 0 for OFD locks.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    let (kind, whence) = match kind {
        LockKind::Shared => (libc::F_RDLCK, libc::SEEK_SET),
        LockKind::Exclusive => (libc::F_WRLCK, libc::SEEK_SET),
        LockKind::None => (libc::F_UNLCK, libc::SEEK_SET),
    };
    let short = |n: libc::c_int| libc::c_short::try_from(n).map_err(|_| io::ErrorKind::InvalidInput);
    lock.l_type = short(kind)?;
    lock.l_whence = short(whence)?;
    lock.l_start = number(start)?;
    lock.l_len = number(len)?;
    Ok(lock)
}

/// Takes or drops an OFD lock on `[start, start + len)` without waiting.
///
/// # Errors
/// EAGAIN when another description holds a lock that conflicts; ENOLCK or
/// EINVAL where the file system has no locks.
pub fn ofd_lock(fd: impl AsFd, kind: LockKind, start: u64, len: u64) -> io::Result<()> {
    let lock = flock(kind, start, len)?;
    // SAFETY: F_OFD_SETLK reads one flock.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) }).map(drop)
}

/// A lock that another open file description or process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// Its kind.
    pub kind: LockKind,
    /// Its first byte.
    pub start: u64,
    /// Its bytes; 0: to the largest offset.
    pub len: u64,
    /// -1: an OFD lock. Else the process of a traditional lock, 0 where it cannot be named here.
    pub pid: i32,
}

/// A lock that keeps `kind` from being taken on the range. Works on descriptors of any mode.
///
/// # Errors
/// As fcntl(2).
pub fn ofd_conflict(fd: impl AsFd, kind: LockKind, start: u64, len: u64) -> io::Result<Option<Conflict>> {
    let mut lock = flock(kind, start, len)?;
    // SAFETY: F_OFD_GETLK reads and writes one flock.
    check(unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    let kind = match i32::from(lock.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => LockKind::Shared,
        _ => LockKind::Exclusive,
    };
    let number = |n| u64::try_from(n).unwrap_or(0);
    Ok(Some(Conflict { kind, start: number(lock.l_start), len: number(lock.l_len), pid: lock.l_pid }))
}

/// fallocate(2).
///
/// # Errors
/// As fallocate(2).
pub fn fallocate(fd: impl AsFd, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let number = |n: u64| i64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput));
    // SAFETY: no pointers.
    check(unsafe { libc::fallocate(fd.as_fd().as_raw_fd(), mode, number(offset)?, number(len)?) }).map(drop)
}

/// Memory and offset alignment of O_DIRECT on this file: STATX_DIOALIGN
/// (Linux 6.1). `None` when the kernel or the file system does not say.
#[must_use]
pub fn dio_align(fd: impl AsFd) -> Option<(u32, u32)> {
    // SAFETY: all zeroes is a valid statx.
    let mut out: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: an empty path with AT_EMPTY_PATH names the fd; `out` is a statx.
    let result = unsafe {
        libc::statx(
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut out,
        )
    };
    let said = result == 0 && out.stx_mask & libc::STATX_DIOALIGN != 0;
    (said && out.stx_dio_mem_align > 0 && out.stx_dio_offset_align > 0)
        .then_some((out.stx_dio_mem_align, out.stx_dio_offset_align))
}

/// Lets this process have as many descriptors as it may: 256 queues with three each
/// are more than the usual soft limit.
///
/// # Errors
/// As setrlimit(2).
pub fn raise_descriptor_limit() -> io::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    Ok(setrlimit(Resource::Nofile, limit)?)
}

/// Size of a block device in bytes (BLKGETSIZE64).
///
/// # Errors
/// As ioctl(2).
pub fn device_size(fd: impl AsFd) -> io::Result<u64> {
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    let mut size = 0u64;
    // SAFETY: BLKGETSIZE64 writes one u64.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut size) })?;
    Ok(size)
}

/// Logical block size of a block device in bytes (BLKSSZGET).
///
/// # Errors
/// As ioctl(2).
pub fn device_block(fd: impl AsFd) -> io::Result<u32> {
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let mut size: libc::c_int = 0;
    // SAFETY: BLKSSZGET writes one int.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKSSZGET, &raw mut size) })?;
    u32::try_from(size).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// SO_ACCEPTCONN: a listening socket, as against a connected one.
///
/// # Errors
/// ENOTSOCK when it is no socket.
pub fn is_listening(fd: impl AsFd) -> io::Result<bool> {
    rustix::net::sockopt::socket_acceptconn(fd).map_err(Into::into)
}

/// Drops this file's page cache; `write_back`: after writing it back.
///
/// # Errors
/// As fsync(2); that the cache could not be dropped is no error.
pub fn drop_cache(fd: impl AsFd, write_back: bool) -> io::Result<()> {
    let fd = fd.as_fd();
    if write_back {
        rustix::fs::fsync(fd)?;
    }
    // SAFETY: no pointers.
    unsafe { libc::posix_fadvise(fd.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}

/// Gives a range of a block device back (BLKDISCARD).
///
/// # Errors
/// EOPNOTSUPP when the device has no discard.
pub fn device_discard(fd: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let range = [offset, len];
    // SAFETY: BLKDISCARD reads two u64.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKDISCARD, range.as_ptr()) }).map(drop)
}

/// True for a block device that is read-only (BLKROGET).
///
/// # Errors
/// As ioctl(2).
pub fn device_is_read_only(fd: impl AsFd) -> io::Result<bool> {
    const BLKROGET: libc::c_ulong = 0x125e;
    let mut on: libc::c_int = 0;
    // SAFETY: BLKROGET writes one int.
    check(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKROGET, &raw mut on) })?;
    Ok(on != 0)
}

/// io_uring_enter(2) without a signal mask: `fd` is the ring's descriptor, or
/// its registered index with IORING_ENTER_REGISTERED_RING in `flags`.
///
/// # Errors
/// As io_uring_enter(2).
pub fn uring_enter(fd: i32, submit: u32, min_complete: u32, flags: u32) -> io::Result<u32> {
    // SAFETY: no pointer is passed; what the submission queue holds was vouched
    // for by whoever put it there.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            fd,
            submit,
            min_complete,
            flags,
            std::ptr::null::<u8>(),
            0usize,
        )
    };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Registers a ring's descriptor with the calling thread
/// (IORING_REGISTER_RING_FDS) and returns its index there.
///
/// # Errors
/// EINVAL before Linux 5.18.
pub fn uring_register_self(ring: i32) -> io::Result<i32> {
    #[repr(C)]
    struct RsrcUpdate {
        offset: u32,
        reserved: u32,
        data: u64,
    }
    const REGISTER_RING_FDS: libc::c_uint = 20;
    let data = u64::try_from(ring).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut update = RsrcUpdate { offset: u32::MAX, reserved: 0, data };
    // SAFETY: one io_uring_rsrc_update, which the kernel reads and writes back.
    let result =
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring, REGISTER_RING_FDS, &raw mut update, 1u32) };
    if result != 1 {
        return Err(io::Error::last_os_error());
    }
    i32::try_from(update.offset).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// CPU time that a process has used, of all its threads, those that ended and
/// the kernel's for it included; nanoseconds.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn process_cpu_ns(pid: i32) -> io::Result<u64> {
    let mut clock: libc::clockid_t = 0;
    // SAFETY: writes one clockid_t.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    check(unsafe { libc::clock_gettime(clock, &raw mut time) })?;
    let number = |n: i64| u64::try_from(n).map_err(|_| io::Error::from(io::ErrorKind::InvalidData));
    Ok(number(time.tv_sec)? * 1_000_000_000 + number(time.tv_nsec)?)
}

/// Gives `ring` the registered buffers of ring `from`, sharing their pages
/// (IORING_REGISTER_CLONE_BUFFERS). `ring` has none before.
///
/// # Errors
/// EINVAL before Linux 6.13: DST_REPLACE is asked for because kernels without it
/// also wait for every poll of the ring when its buffers are unregistered, and
/// those never end.
pub fn uring_clone_buffers(ring: i32, from: i32) -> io::Result<()> {
    #[repr(C)]
    struct CloneBuffers {
        from: u32,
        flags: u32,
        from_offset: u32,
        to_offset: u32,
        count: u32,
        reserved: [u32; 3],
    }
    const REGISTER_CLONE_BUFFERS: libc::c_uint = 30;
    const DST_REPLACE: u32 = 2;
    let from = u32::try_from(from).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let clone =
        CloneBuffers { from, flags: DST_REPLACE, from_offset: 0, to_offset: 0, count: 0, reserved: [0; 3] };
    // SAFETY: one io_uring_clone_buffers, which the kernel reads.
    let result = unsafe {
        libc::syscall(libc::SYS_io_uring_register, ring, REGISTER_CLONE_BUFFERS, &raw const clone, 1u32)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn signal_set(signals: &[i32]) -> io::Result<libc::sigset_t> {
    // SAFETY: all zeroes is a valid sigset_t, and sigemptyset makes it one.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a sigset_t of ours.
    unsafe { libc::sigemptyset(&raw mut set) };
    for &signal in signals {
        // SAFETY: as above; a bad number is an error, not harm.
        check(unsafe { libc::sigaddset(&raw mut set, signal) })?;
    }
    Ok(set)
}

/// Blocks `signals` for this thread and those that it starts, and returns a
/// signalfd for them.
///
/// # Errors
/// As signalfd(2).
pub fn block_signals(signals: &[i32]) -> io::Result<OwnedFd> {
    let set = signal_set(signals)?;
    // SAFETY: `set` is valid; the old mask is not asked for.
    check(unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) })?;
    // SAFETY: a new descriptor for a valid set.
    let fd = check(unsafe { libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) })?;
    // SAFETY: just made, and owned by nobody else.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

/// Lets signals in that the process which started this one had blocked for itself.
///
/// # Errors
/// As sigprocmask(2).
pub fn unblock_signals(signals: &[i32]) -> io::Result<()> {
    let set = signal_set(signals)?;
    // SAFETY: `set` is valid; the old mask is not asked for.
    check(unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut()) }).map(drop)
}

/// Lets `signals` end this process where it is pid 1, as in a container: there the kernel ignores
/// a signal that has no handler.
///
/// # Errors
/// As signal(2).
pub fn end_also_as_pid_1(signals: &[i32]) -> io::Result<()> {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: async-signal-safe; no destructor runs, as with a signal that kills.
        unsafe { libc::_exit(128 + signal) };
    }
    if !rustix::process::getpid().is_init() {
        return Ok(());
    }
    for &signal in signals {
        // SAFETY: `end` is a handler of one argument, and calls only what a handler may.
        if unsafe { libc::signal(signal, end as *const () as libc::sighandler_t) } == libc::SIG_ERR {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The number of the next signal that is pending on a signalfd.
#[must_use]
pub fn next_signal(fd: impl AsFd) -> Option<u32> {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    let got = rustix::io::read(fd, &mut info).ok()?;
    let [a, b, c, d, ..] = info;
    (got == info.len()).then(|| u32::from_ne_bytes([a, b, c, d]))
}

/// True if both descriptors lead to one open file description (kcmp(2),
/// KCMP_FILE); false, too, where the kernel does not say.
#[must_use]
pub fn is_same_file(one: impl AsFd, other: impl AsFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let pid = rustix::process::getpid().as_raw_nonzero().get();
    let (one, other) = (one.as_fd().as_raw_fd(), other.as_fd().as_raw_fd());
    // SAFETY: no pointers.
    unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) == 0 }
}

/// Waits until the other end of a pipe or socket is closed. False: not in time.
///
/// # Errors
/// As poll(2).
pub fn hung_up_within(fd: impl AsFd, time: Duration) -> io::Result<bool> {
    poll_one(fd.as_fd(), PollFlags::empty(), time)
}

/// Waits until there is something to read. False: not in time.
///
/// # Errors
/// As poll(2).
pub fn readable_within(fd: impl AsFd, time: Duration) -> io::Result<bool> {
    poll_one(fd.as_fd(), PollFlags::IN, time)
}

fn poll_one(fd: BorrowedFd<'_>, what: PollFlags, time: Duration) -> io::Result<bool> {
    let timeout = Timespec::try_from(time).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    Ok(poll(&mut fds, Some(&timeout))? > 0)
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// Takes over a descriptor that this process was started with (`--fd`,
/// LISTEN_FDS) and makes it close-on-exec. `None` when it is not open.
#[must_use]
pub fn inherited_fd(number: i32) -> Option<OwnedFd> {
    // SAFETY: only looks at whether the number is an open descriptor.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: open, and given to us by whoever started us; nothing else in this
    // process took it: it is above the standard streams and asked for once.
    let fd: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(number) };
    // A descriptor that is open can be marked.
    let _marked = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    Some(fd)
}
