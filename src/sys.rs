//! System calls that no safer wrapper offers, each as a safe function.
//!
//! What it is: thin. Arguments in, `io::Result` out.
//!
//! What it is not: a place for policy; who calls decides what an error means.
//!
//! Invariant: no function here keeps a pointer after it returns.
#![expect(unsafe_code, reason = "calls libc")]

mod disk;
pub mod users;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Statx;
use rustix::process::{Resource, getrlimit, setrlimit};

pub use self::disk::{
    Conflict, LockKind, device_block, device_discard, device_is_read_only, device_size, dio_align,
    drop_cache, fallocate, ofd_conflict, ofd_lock,
};

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

/// Writes all of `bytes` from byte `at` of a file on, by pwritev2(2): the one call for that which every thread has.
///
/// # Errors
/// As pwritev2(2); WriteZero where a file takes nothing.
pub fn write_all_at(file: impl AsFd, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
    use rustix::io::{ReadWriteFlags, pwritev2, retry_on_intr};
    while !bytes.is_empty() {
        let written =
            retry_on_intr(|| pwritev2(&file, &[io::IoSlice::new(bytes)], at, ReadWriteFlags::empty()))?;
        bytes = bytes.get(written..).filter(|_| written > 0).ok_or(io::ErrorKind::WriteZero)?;
        at += written as u64;
    }
    Ok(())
}

/// Writes an eventfd. A full one, or a full pipe, has a reader that is awake.
pub fn signal(fd: impl AsFd) {
    if let Err(e) = rustix::io::write(fd, &1u64.to_ne_bytes())
        && e != rustix::io::Errno::AGAIN
    {
        tracing::debug!("cannot write an eventfd: {e}");
    }
}

/// The signal that interrupts a write to an eventfd. A front-end's may be full and, whatever
/// we have set, blocking: O_NONBLOCK belongs to the open file description, which it shares.
const INTERRUPT: libc::c_int = libc::SIGALRM;
/// How long such a write may take.
const WRITE_TIME_NS: libc::c_long = 2_000_000;

/// Makes [`signal_foreign`] and [`interrupt`] work: until then their signal ends the process.
///
/// # Errors
/// As sigaction(2).
pub fn allow_interrupts() -> io::Result<()> {
    extern "C" fn nothing(_signal: libc::c_int) {}
    let handler: extern "C" fn(libc::c_int) = nothing;
    // SAFETY: all zeroes is a valid sigaction: no flags, so that a write is not restarted.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as libc::sighandler_t;
    // SAFETY: the handler does nothing.
    check(unsafe { libc::sigaction(INTERRUPT, &raw const action, std::ptr::null_mut()) }).map(drop)
}

/// Interrupts the system call that a thread is in, if it is one that can be interrupted.
pub fn interrupt<T>(thread: &JoinHandle<T>) {
    // SAFETY: the handle has not been joined, so the thread's number is its own.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), INTERRUPT) };
}

/// A timer that [`interrupt`]s the thread that made it. It is the process's, and goes with it.
#[derive(Debug)]
struct Alarm(libc::timer_t);

impl Alarm {
    fn new() -> io::Result<Self> {
        // SAFETY: all zeroes is a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = INTERRUPT;
        event.sigev_notify_thread_id = rustix::thread::gettid().as_raw_nonzero().get();
        let mut timer = std::ptr::null_mut();
        // SAFETY: reads one sigevent, writes one timer_t.
        check(unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) })?;
        Ok(Self(timer))
    }

    /// Again and again: the first signal may come before the call that it is for. 0: never.
    fn every(&self, nanoseconds: libc::c_long) -> io::Result<()> {
        let period = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
        let period = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: a timer that lives; reads one itimerspec.
        check(unsafe { libc::timer_settime(self.0, 0, &raw const period, std::ptr::null_mut()) }).map(drop)
    }
}

thread_local! {
    /// Made before the sandbox closes, see [`prepare_foreign_signals`].
    static ALARM: io::Result<Alarm> = Alarm::new();
}

/// Makes what [`signal_foreign`] needs on this thread.
pub fn prepare_foreign_signals() {
    ALARM.with(|_made| ());
}

/// As [`signal`], for an eventfd of a front-end's and a thread that no other thread would
/// [`interrupt`]: a write that takes its time is given up.
pub fn signal_foreign(fd: impl AsFd) {
    ALARM.with(|alarm| match alarm {
        Ok(alarm) if alarm.every(WRITE_TIME_NS).is_ok() => {
            signal(fd);
            let _set_before = alarm.every(0);
        }
        Ok(_) => {}
        Err(e) => tracing::debug!("cannot write an eventfd: no timer: {e}"),
    });
}

/// True for an eventfd: its counter is all there is to it, and every write of it is an event.
#[must_use]
pub fn is_eventfd(fd: impl AsFd) -> bool {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    // No path of a file begins like that.
    rustix::fs::readlink(path, []).is_ok_and(|name| name.to_bytes() == b"anon_inode:[eventfd]")
}

/// True for a memfd and a file of tmpfs or hugetlbfs: no other process can make us wait for it.
#[must_use]
pub fn is_memory(fd: impl AsFd) -> bool {
    rustix::fs::fcntl_get_seals(fd).is_ok()
}

/// What a descriptor leads to, as this kernel knows it: no server is asked, which could take its
/// time.
///
/// # Errors
/// As statx(2).
pub fn facts(fd: impl AsFd) -> rustix::io::Result<Statx> {
    facts_at(fd, c"")
}

/// The same of `name` in a folder; of a symbolic link itself.
///
/// # Errors
/// As statx(2).
pub fn facts_at(folder: impl AsFd, name: impl rustix::path::Arg) -> rustix::io::Result<Statx> {
    use rustix::fs::{AtFlags, StatxFlags, statx};
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW;
    statx(folder, name, flags, StatxFlags::BASIC_STATS)
}

/// What tells a file from others: the numbers of its device, and its own.
pub type Inode = (u32, u32, u64);

/// The number of a file.
#[must_use]
pub fn inode(facts: &Statx) -> Inode {
    (facts.stx_dev_major, facts.stx_dev_minor, facts.stx_ino)
}

/// True for [`facts`] of a file of this type: libc::S_IFREG, say.
#[must_use]
pub fn is_type(facts: &Statx, kind: u32) -> bool {
    u32::from(facts.stx_mode) & libc::S_IFMT == kind
}

/// Closes descriptors that a front-end sent. To close one may take as long as another process
/// likes (a socket that lingers, a file whose server is a process): then it takes a thread.
/// Those that no thread can be had for wait for the next one.
pub fn close_foreign(fds: impl IntoIterator<Item = OwnedFd>) {
    /// Those that wait, and the threads that close them.
    static CLOSING: Mutex<(Vec<OwnedFd>, usize)> = Mutex::new((Vec::new(), 0));
    const MOST_THREADS: usize = 16;
    let closing = || CLOSING.lock().unwrap_or_else(PoisonError::into_inner);
    let slow: Vec<OwnedFd> = fds.into_iter().filter(|fd| !is_memory(fd) && !is_eventfd(fd)).collect();
    // Those that are not set to linger again meanwhile are closed at once.
    for fd in &slow {
        let _no_socket = rustix::net::sockopt::set_socket_linger(fd, None);
    }
    let mut waiting = closing();
    waiting.0.extend(slow);
    if waiting.0.is_empty() || waiting.1 >= MOST_THREADS {
        return;
    }
    let close = move || {
        loop {
            let mut waiting = closing();
            let Some(fd) = waiting.0.pop() else {
                waiting.1 -= 1;
                return;
            };
            drop(waiting);
            drop(fd);
        }
    };
    if std::thread::Builder::new().name("vublk-close".into()).stack_size(64 << 10).spawn(close).is_ok() {
        waiting.1 += 1;
    }
}

/// Closes a connection for its other end, also where the store has a copy of ours, and takes out what
/// was sent and not read: else to close the last copy would close the descriptors in it.
pub fn hang_up(socket: impl AsFd) {
    let socket = socket.as_fd();
    let _closed_already = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
    loop {
        let (got, fds) = receive_now(socket, &mut [0; 4096]);
        close_foreign(fds);
        if !got.is_ok_and(|got| got > 0) {
            return;
        }
    }
}

/// Receives bytes, 0 at the end, and the descriptors that came with them, without waiting.
pub fn receive_now(socket: impl AsFd, bytes: &mut [u8]) -> (rustix::io::Result<usize>, Vec<OwnedFd>) {
    use rustix::net::{RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut ancillary = rustix::net::RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(socket, &mut [io::IoSliceMut::new(bytes)], &mut ancillary, flags);
    let fds = ancillary.drain().flat_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
        _ => Vec::new(),
    });
    (got.map(|got| got.bytes), fds.collect())
}

/// Sends bytes, and descriptors with the first of them; gives how many bytes were sent.
///
/// # Errors
/// As sendmsg(2).
pub fn send_with(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_SENT))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::INVAL);
    }
    sendmsg(socket, &[io::IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
}

/// What could be received from a socket now, which stays there; 0 at its end.
///
/// # Errors
/// EAGAIN when there is nothing.
pub fn peek(socket: impl AsFd, bytes: &mut [u8]) -> rustix::io::Result<usize> {
    use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};
    // recvmsg(2), for a control thread has it anyway, and recvfrom(2) would be one more system call.
    let (flags, mut no_fds) = (RecvFlags::DONTWAIT | RecvFlags::PEEK, RecvAncillaryBuffer::default());
    recvmsg(socket, &mut [io::IoSliceMut::new(bytes)], &mut no_fds, flags).map(|got| got.bytes)
}

/// Sends bytes without waiting for room.
///
/// # Errors
/// EAGAIN when there is no room; EPIPE when the other end is gone.
pub fn send_now(socket: impl AsFd, bytes: &[u8]) -> rustix::io::Result<usize> {
    use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[io::IoSlice::new(bytes)], &mut SendAncillaryBuffer::default(), flags)
}

/// Descriptors that can be sent at once (SCM_MAX_FD).
pub const MOST_SENT: usize = 253;

/// True if `error` says that there are no more descriptors.
#[must_use]
pub fn is_out_of_descriptors(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// How many descriptors this process may open yet, and may have in all.
///
/// # Errors
/// When /proc cannot be read.
pub fn descriptors_left() -> io::Result<(usize, usize)> {
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    // One is that of the folder.
    let open = std::fs::read_dir("/proc/self/fd")?.count().saturating_sub(1);
    Ok((most.saturating_sub(open), most))
}

/// Empties an eventfd; true if it had been written.
pub fn drain(fd: impl AsFd) -> bool {
    rustix::io::read(fd, &mut [0; 8]).is_ok()
}

/// The version of Landlock that this kernel has.
///
/// # Errors
/// ENOSYS: it has none; EOPNOTSUPP: it is not enabled.
pub fn landlock_version() -> io::Result<u32> {
    /// LANDLOCK_CREATE_RULESET_VERSION: no rules are made.
    const VERSION: libc::c_uint = 1;
    let none = std::ptr::null::<u8>();
    // SAFETY: with this flag there has to be no pointer.
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0_usize, VERSION) };
    u32::try_from(version).map_err(|_| io::Error::last_os_error())
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

/// SO_ACCEPTCONN: a listening socket, as against a connected one.
///
/// # Errors
/// ENOTSOCK when it is no socket.
pub fn is_listening(fd: impl AsFd) -> io::Result<bool> {
    rustix::net::sockopt::socket_acceptconn(fd).map_err(Into::into)
}

/// The process that was at the other end of a Unix socket when it connected (SO_PEERCRED).
/// `None`: it is in another PID namespace, so that it has no number here.
#[must_use]
pub fn peer_pid(fd: impl AsFd) -> Option<i32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of::<libc::ucred>()).ok()?;
    let (fd, level, name) = (fd.as_fd().as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED);
    // SAFETY: SO_PEERCRED writes one ucred, of which `len` is the size.
    let result = unsafe { libc::getsockopt(fd, level, name, (&raw mut peer).cast(), &raw mut len) };
    (result == 0 && peer.pid > 0).then_some(peer.pid)
}

/// io_uring_enter(2) without a signal mask: `fd` is the ring's descriptor, or
/// its registered index with IORING_ENTER_REGISTERED_RING in `flags`. With a `time`, which needs Linux 5.11, it waits
/// for that at most.
///
/// # Errors
/// As io_uring_enter(2); ETIME.
pub fn uring_enter(
    fd: i32,
    submit: u32,
    min_complete: u32,
    flags: u32,
    time: Option<Duration>,
) -> io::Result<u32> {
    /// struct io_uring_getevents_arg.
    #[repr(C)]
    struct Arg {
        sigmask: u64,
        sigmask_len: u32,
        reserved: u32,
        time: *const [i64; 2],
    }
    const EXT_ARG: u32 = 1 << 3;
    let time = time.map(|t| [i64::try_from(t.as_secs()).unwrap_or(i64::MAX), t.subsec_nanos().into()]);
    let arg = time.as_ref().map(|time| Arg { sigmask: 0, sigmask_len: 0, reserved: 0, time });
    let (at, len) = arg.as_ref().map_or((std::ptr::null(), 0), |arg| (arg, size_of::<Arg>()));
    let flags = if arg.is_some() { flags | EXT_ARG } else { flags };
    // SAFETY: `arg` and the time that it names outlive the call, and are only read; the engine that filled the
    // submission queue vouches for what it holds.
    let result = unsafe {
        libc::syscall(libc::SYS_io_uring_enter, fd, submit, min_complete, flags, at.cast::<u8>(), len)
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
    // SAFETY: just made, and owned by no other value.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) })
}

/// Has children that end wait for it to be asked how, also where the process that started this one ignored SIGCHLD.
///
/// # Errors
/// As signal(2).
pub fn default_sigchld() -> io::Result<()> {
    // SAFETY: no handler; the usual disposition is set.
    let before = unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    if before == libc::SIG_ERR { Err(io::Error::last_os_error()) } else { Ok(()) }
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
    poll_one(fd.as_fd(), PollFlags::empty(), Some(time))
}

/// Waits until there is something to read, without a time for as long as it takes. False: not
/// in time.
///
/// # Errors
/// As poll(2).
pub fn readable_within(fd: impl AsFd, time: impl Into<Option<Duration>>) -> io::Result<bool> {
    poll_one(fd.as_fd(), PollFlags::IN, time.into())
}

fn poll_one(fd: BorrowedFd<'_>, what: PollFlags, time: Option<Duration>) -> io::Result<bool> {
    let timeout = time.map(Timespec::try_from).transpose().map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    Ok(poll(&mut fds, timeout.as_ref())? > 0)
}

/// Ends the process at once, without a destructor.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: runs no code of ours.
    unsafe { libc::_exit(code) }
}

/// Nanoseconds of CLOCK_MONOTONIC, which all processes of a machine share: without a system call.
#[inline]
#[must_use]
pub fn monotonic_ns() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // The C library's: rustix's finds no vDSO under valgrind, where the gate of instructions runs.
    // SAFETY: writes one timespec; a clock that every Linux has, so it cannot fail.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let ns = now.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(now.tv_nsec);
    ns.cast_unsigned()
}

/// True at most once in ten seconds, which `last` remembers: for a line that a front-end can
/// provoke, where there is no device at hand to count lines.
pub fn is_seldom(last: &AtomicU64) -> bool {
    let (now, before) = (monotonic_ns(), last.load(Ordering::Relaxed));
    (before == 0 || now.saturating_sub(before) > 10_000_000_000)
        && last.compare_exchange(before, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
}

/// Takes over a descriptor that this process was started with (`--fd`,
/// LISTEN_FDS) and makes it close-on-exec. `None` when it is not open.
#[must_use]
pub fn inherited_fd(number: i32) -> Option<OwnedFd> {
    // SAFETY: only looks at whether the number is an open descriptor.
    if number < 3 || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
        return None;
    }
    // SAFETY: open, and given to this process by the one that started it; nothing else in this
    // process took it: it is above the standard streams and asked for once.
    let fd: OwnedFd = unsafe { std::os::fd::FromRawFd::from_raw_fd(number) };
    // A descriptor that is open can be marked.
    let _marked = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    Some(fd)
}
