//! The sandbox: what a daemon gives up before it reads the first byte of a front-end.
//!
//! What it is: layers that hold whatever runs in this process. [`enter`] gives up capabilities and the file system
//! for all threads; [`confine`] leaves each thread the system calls of its [`Role`].
//!
//! What it is not: it keeps no thread from another's memory. A layer is there for the case that all others, and the
//! code itself, have failed.
//!
//! Invariants: nothing can be executed, and no process traced or signalled; nothing can be opened but, by one thread,
//! a block device that is served; nothing connects but one thread, to the server of a disk on another machine, or the threads
//! of a cluster's library. What a role lacks ends the process (SIGSYS), for its program is another then; a cluster's library is
//! refused it, for a line of ceph.conf may ask for it (admin_socket).
//!
//! ```text
//!   enter     no_new_privs, no capabilities*, not dumpable, no core    the process
//!             Landlock: the served device; sockets of ours removed    all threads that start from now on
//!   confine   seccomp: the calls of a role                            the thread, and those that it starts
//!   * but CAP_IPC_LOCK, where the limit of locked memory cannot be raised for root
//! ```

mod calls;

use std::fmt::Display;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, NetPort, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, path_beneath_rules,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// What `--sandbox` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// All layers.
    #[default]
    On,
    /// All, but the kernel's log tells of a system call that a role lacks, and the call is made.
    Log,
    /// None.
    Off,
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Signals and the control socket; it starts the other threads.
    Process,
    /// A disk's control thread.
    Control,
    /// A worker with io_uring.
    Worker,
    /// A thread that does one operation after another: of the threads engine.
    Io,
    /// Writes the log.
    Log,
    /// Claims a block device.
    Claim,
    /// Answers scrapes.
    Metrics,
    /// Connects to the server of a disk on another machine.
    Connect,
    /// Runs the library of a Ceph cluster; so do the threads that the library starts.
    Client,
    /// A worker that calls that library.
    Caller,
}

/// The mode, once [`enter`] has been called.
static ENTERED: OnceLock<Mode> = OnceLock::new();

/// What a daemon may need of root's when it starts: a disk and folders of other users, memory that is locked, and to find
/// out who has locked the disk.
const START: [CapabilitySet; 6] = [
    CapabilitySet::DAC_OVERRIDE,
    CapabilitySet::DAC_READ_SEARCH,
    CapabilitySet::FOWNER,
    CapabilitySet::IPC_LOCK,
    CapabilitySet::SYS_PTRACE,
    CapabilitySet::SYS_RESOURCE,
];

/// What the parent gives up, which starts daemons: no process may look into it, and neither it nor a program that it
/// executes has or gets more privileges than a daemon needs to start. Threads that run already keep what they have.
pub fn enter_as_parent() {
    close_process(|| keep_capabilities(START.into_iter().collect()));
}

fn close_process(drop_capabilities: impl FnOnce() -> io::Result<()>) {
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _hidden_anyway = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    hidden.unwrap_or_else(|e| lacks("PR_SET_DUMPABLE", &e));
    set_no_new_privs(true).unwrap_or_else(|e| lacks("no_new_privs", &e));
    drop_capabilities().unwrap_or_else(|e| lacks("capset", &e));
}

fn lacks(what: &str, why: &dyn Display) {
    tracing::warn!("the sandbox is without {what}: {why}");
}

/// Gives up what no thread needs any more. `device`: may be opened again. `folders`: sockets of ours are in them, which
/// the end of the process removes. `ports`: of TCP, to which one thread may connect. Threads that run already keep what they have. A layer that cannot be had is told in
/// the log.
pub fn enter(mode: Mode, device: Option<&File>, folders: &[BorrowedFd<'_>], ports: &[u16]) {
    if mode == Mode::Off {
        return;
    }
    // What a crate asks the kernel once, when it first needs it.
    let _now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Guest memory belongs in no core, and no process of the same user may look into this one.
    close_process(drop_capabilities);
    restrict_files(device, folders, ports).unwrap_or_else(|e| lacks("Landlock", &e));
    let _once = ENTERED.set(mode);
}

/// True once this process has given up something.
#[must_use]
pub fn is_entered() -> bool {
    ENTERED.get().is_some()
}

fn drop_capabilities() -> io::Result<()> {
    // Rings, and guest memory with --pin-memory, count as locked for those without CAP_IPC_LOCK.
    let unlimited = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }).is_ok();
    keep_capabilities(if unlimited { CapabilitySet::empty() } else { CapabilitySet::IPC_LOCK })
}

/// Those that are ambient and not kept go, too.
fn keep_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let CapabilitySets { effective, permitted, inheritable } = capabilities(None)?;
    // A unit's list of system calls may lack this one, which is right where nothing is left to drop.
    if kept.contains(permitted | inheritable) {
        return Ok(());
    }
    let (effective, permitted, inheritable) = (effective & kept, permitted & kept, inheritable & kept);
    Ok(set_capabilities(None, CapabilitySets { effective, permitted, inheritable })?)
}

fn restrict_files(
    device: Option<&File>,
    folders: &[BorrowedFd<'_>],
    ports: &[u16],
) -> Result<(), landlock::RulesetError> {
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    for folder in folders {
        rules = rules.add_rule(PathBeneath::new(folder, AccessFs::RemoveFile))?;
    }
    for &port in ports {
        rules = rules.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    }
    if let Some(device) = device {
        rules = rules.add_rule(PathBeneath::new(device, AccessFs::ReadFile | AccessFs::WriteFile))?;
    }
    if rules.restrict_self()?.ruleset == RulesetStatus::NotEnforced {
        tracing::warn!(
            "the sandbox has no Landlock, which this kernel lacks (5.13) or has not enabled (lsm=)"
        );
    }
    Ok(())
}

/// What a thread does before it connects to a cluster; it may read these files then.
pub type ConfineClient = fn(&[PathBuf]);

/// What the thread of a cluster's client gives up, and with it all threads that the cluster's library starts.
#[must_use]
pub fn of_client(mode: Mode) -> Option<ConfineClient> {
    match mode {
        Mode::Off => None,
        Mode::On => Some(|files| confine_client(Mode::On, files)),
        Mode::Log => Some(|files| confine_client(Mode::Log, files)),
    }
}

/// Where the C library, and Ceph's, look for what they want to know of hosts and of this machine.
const CLIENT_READS: [&str; 7] =
    ["/etc", "/usr", "/lib", "/lib64", "/proc/self", "/sys/devices", "/dev/urandom"];

/// The threads connect to servers whose ports only the cluster knows. They write no file, execute nothing, and no connection
/// comes to them.
fn confine_client(mode: Mode, files: &[PathBuf]) {
    set_no_new_privs(true).unwrap_or_else(|e| lacks("no_new_privs", &e));
    // The key may be another user's.
    keep_capabilities(CapabilitySet::DAC_READ_SEARCH).unwrap_or_else(|e| lacks("capset", &e));
    let restrict = || {
        let reads = AccessFs::ReadFile | AccessFs::ReadDir;
        let rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(ABI::V5))?
            .handle_access(AccessNet::BindTcp)?
            .scope(Scope::from_all(ABI::V6))?
            .create()?;
        // What is not there is left out.
        rules
            .add_rules(path_beneath_rules(CLIENT_READS, reads))?
            .add_rules(path_beneath_rules(files, reads))?
            .restrict_self()
    };
    restrict().map(drop).unwrap_or_else(|e: landlock::RulesetError| lacks("Landlock", &e));
    confine_as(Role::Client, mode);
}

/// Leaves this thread, and those that it starts, the system calls of its role, once the process has entered the sandbox.
pub fn confine(role: Role) {
    if let Some(&mode) = ENTERED.get() {
        confine_as(role, mode);
    }
}

fn confine_as(role: Role, mode: Mode) {
    if let Err(why) = filters(role, mode).and_then(|all| all.iter().try_for_each(|f| Ok(apply_filter(f)?))) {
        tracing::warn!("the sandbox is without the list of system calls of a thread ({role:?}): {why}");
    }
}

/// First one that refuses what the C library can do without; then one that lets through what the role needs.
fn filters(role: Role, mode: Mode) -> Result<[BpfProgram; 2], Box<dyn std::error::Error>> {
    let other = match mode {
        Mode::Log => SeccompAction::Log,
        _ if role == Role::Client => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        _ => SeccompAction::KillProcess,
    };
    let refuse = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let (allowed, refused) = calls::of(role)?;
    let program = |rules, default, matched| {
        SeccompFilter::new(rules, default, matched, arch).and_then(BpfProgram::try_from)
    };
    Ok([program(refused, SeccompAction::Allow, refuse)?, program(allowed, other, SeccompAction::Allow)?])
}

/// How many system calls a role may make.
///
/// # Errors
/// Never for a role that is.
pub fn count(role: Role) -> Result<usize, Box<dyn std::error::Error>> {
    let (allowed, refused) = calls::of(role)?;
    Ok(allowed.len() - refused.len())
}
