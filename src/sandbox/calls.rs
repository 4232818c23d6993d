//! The system calls of each role.
//!
//! What it is: lists, and for a few calls what their arguments may be.
//!
//! Invariants: no role opens (but [`Role::Claim`]), executes, connects (but [`Role::Connect`]), starts a process, or maps
//! memory that can be executed; [`Role::Client`] opens for reading and connects, and may map libraries. Workers are started by the process's thread, whose list has theirs: a thread gets no call that the thread
//! which started it lacks.

use std::collections::BTreeMap;

use libc::c_long as Call;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BackendError, SeccompCondition, SeccompRule};

use super::Role;

pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// What any thread of Rust's standard library and the C library makes: memory, locks, time, its own end, the log.
const EVERY: &[Call] = &[
    libc::SYS_brk, // a refusal would be taken for an address
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    #[cfg(debug_assertions)]
    libc::SYS_fcntl, // the standard library looks whether what it closes is open
    libc::SYS_futex,
    libc::SYS_munmap,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield, // a channel, while the other end is in the middle of a message
    libc::SYS_write,
];

/// Operations on the disk.
const DISK: &[Call] = &[libc::SYS_fallocate, libc::SYS_fdatasync, libc::SYS_preadv2, libc::SYS_pwritev2];

/// A worker with io_uring, once its ring is made.
const RING: &[Call] = &[libc::SYS_io_uring_enter, libc::SYS_io_uring_register];

/// Threads whose end is the process's.
const END: &[Call] = &[libc::SYS_exit_group];

/// The threads engine.
const EPOLL: &[Call] = &[
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    #[cfg(not(target_arch = "x86_64"))]
    libc::SYS_epoll_pwait,
];

/// The control thread, and most of it the process's.
const CONTROL: &[Call] = &[
    libc::SYS_accept4,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_getpid, // with gettid and tgkill: pthread_kill(3)
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_io_uring_register, // guest memory that was pinned is let go
    libc::SYS_kcmp,              // systemd's store has a descriptor once
    libc::SYS_madvise,           // guest memory belongs in no core
    libc::SYS_memfd_create,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq, // a thread starts
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_timer_settime,
    libc::SYS_unlinkat,
];

/// Scrapes: nothing but what came to a socket that listens.
const METRICS: &[Call] = &[libc::SYS_accept4, libc::SYS_ppoll, libc::SYS_recvfrom, libc::SYS_sendto];

/// Connecting, the handshake, and the store.
const CONNECT: &[Call] = &[
    libc::SYS_connect,
    libc::SYS_getsockopt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
];

/// The library of a Ceph cluster, and the C library as it looks for hosts: files are read, servers connected to, threads
/// started.
const CLIENT: &[Call] = &[
    libc::SYS_clock_nanosleep,
    libc::SYS_connect,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_getdents64,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpeername,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pipe2,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pread64,
    libc::SYS_prlimit64,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sendmmsg, // the C library asks a name server
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    libc::SYS_writev,
];

/// Giving work to the threads of that library: Asio wakes the one that waits for its files so
/// (`epoll_reactor::interrupt` in Boost).
const CALLER: &[Call] = &[libc::SYS_epoll_ctl];

/// Refused without ending the process, for the C library goes on without: it allocates by mmap(2) then, opens none of
/// the kernel's files, and starts a thread by clone(2), whose arguments can be looked at.
const REFUSED: &[Call] = &[
    libc::SYS_clone3,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_openat,
    libc::SYS_sched_getaffinity,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
];

/// ioctl(2)s: non-blocking; a disk's size, a discard.
const IOCTLS: [u64; 3] = [libc::FIONBIO, 0x8008_1272, 0x1277];

/// What a role may call, with what it is refused, and what it is refused.
pub(super) fn of(role: Role) -> Result<(Rules, Rules), BackendError> {
    let mut rules = Rules::new();
    let mut allow = |calls: &[Call]| rules.extend(calls.iter().map(|&call| (call, Vec::new())));
    allow(EVERY);
    match role {
        Role::Process => {
            [DISK, RING, EPOLL, CONTROL, END].into_iter().for_each(&mut allow);
            // A thread that it has started confines itself further.
            allow(&[libc::SYS_io_uring_setup, libc::SYS_seccomp]);
            // The clients of the control socket, the service manager.
            allow(&[libc::SYS_recvfrom, libc::SYS_sendto]);
            // Of a program's own path. Other machines have readlinkat(2) alone.
            #[cfg(target_arch = "x86_64")]
            allow(&[libc::SYS_readlink]);
        }
        Role::Control => allow(CONTROL),
        Role::Worker => [DISK, RING, END].into_iter().for_each(&mut allow),
        Role::Io => allow(DISK),
        Role::Log => allow(&[libc::SYS_ppoll]),
        Role::Claim => allow(&[libc::SYS_openat, libc::SYS_fcntl]),
        Role::Metrics => allow(METRICS),
        Role::Connect => allow(CONNECT),
        Role::Client => allow(CLIENT),
        Role::Caller => [DISK, RING, END, CALLER].into_iter().for_each(&mut allow),
    }
    let refused = REFUSED.iter().filter(|call| !rules.contains_key(call));
    let refused: Rules = refused.map(|&call| (call, Vec::new())).collect();
    rules.extend(refused.clone());
    // Memory that is never executed.
    let no_exec = SeccompCondition::new(2, Dword, MaskedEq(libc::PROT_EXEC as u64), 0)?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let any = role == Role::Client; // the C library loads what looks for hosts
        rules.insert(call, if any { Vec::new() } else { vec![SeccompRule::new(vec![no_exec.clone()])?] });
    }
    if matches!(role, Role::Process | Role::Control | Role::Client) {
        let thread = libc::CLONE_THREAD as u64;
        rules.insert(libc::SYS_clone, vec![one(0, MaskedEq(thread), thread)?]);
        let mut options = vec![one(0, Eq, libc::PR_SET_NAME as u64)?];
        if role == Role::Process {
            options.push(one(0, Eq, libc::PR_SET_NO_NEW_PRIVS as u64)?);
        }
        if role == Role::Client {
            options.push(one(0, Eq, libc::PR_GET_NAME as u64)?);
        }
        rules.insert(libc::SYS_prctl, options);
        rules.insert(libc::SYS_socketpair, vec![one(0, Eq, libc::AF_UNIX as u64)?]);
    }
    if matches!(role, Role::Connect | Role::Client) {
        // The kernel's own tells the C library which addresses this host has.
        let kernel = (role == Role::Client).then_some(libc::AF_NETLINK);
        let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6]
            .into_iter()
            .chain(kernel)
            .map(|family| one(0, Eq, u64::from(family.unsigned_abs())));
        rules.insert(libc::SYS_socket, families.into_iter().collect::<Result<_, _>>()?);
        rules.insert(libc::SYS_socketpair, vec![one(0, Eq, libc::AF_UNIX as u64)?]);
    }
    if matches!(
        role,
        Role::Process | Role::Control | Role::Worker | Role::Caller | Role::Io | Role::Connect | Role::Client
    ) {
        let requests = IOCTLS.map(|request| one(1, Eq, request));
        rules.insert(libc::SYS_ioctl, requests.into_iter().collect::<Result<_, _>>()?);
    }
    Ok((rules, refused))
}

/// An argument that has to be like this.
fn one(at: u8, op: seccompiler::SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(at, Qword, op, value)?])
}
