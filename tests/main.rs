//! The tests of vublkd from outside: a real process, a real socket, real rings
//! in shared memory, real files.
//!
//! - `support`: back-ends to start, our own front-end and rings;
//! - `broken`: disks that fail, fill up, hang or change under the daemon, and `--on-error`;
//! - `control`: the control socket;
//! - `crowd`: what many idle daemons cost;
//! - `differential`: one suite for each engine of vublkd and for
//!   qemu-storage-daemon as the oracle, with the list of deviations;
//! - `disks`: several disks in one process;
//! - `durability`: the cache mode, fsyncs that fail, and hosts that give no
//!   threads;
//! - `chains`: chains as random bytes beside a plain walk of them;
//! - `fence`: what a killed daemon left in the kernel ends before the next one
//!   serves;
//! - `flags`: io_uring without its features, overflows, the smallest pool;
//! - `fuzz`: the corpora of the fuzz targets, replayed;
//! - `hostile`: front-ends and guests that attack, and the good front-end after each;
//! - `inspect`: what `vublk inspect` tells of files and block devices;
//! - `journal`: what a ring that dies leaves for the next, by the library;
//! - `metrics`: what Prometheus gets;
//! - `model`: what the library's parts are compared with, here and by the fuzzer;
//! - `nbd`: what `vublk inspect` tells of disks of NBD servers;
//! - `parent`: the parent that is the store where systemd's is not;
//! - `power`: power cuts at every place of a log that the disk below the daemon keeps;
//! - `promise`: what guests and operators get whatever holds the data: XFS with
//!   shared blocks, tmpfs, overlays, block devices that cannot discard;
//! - `recovery`: what a killed daemon had in flight is done by the next one;
//! - `ring`: the library's ring beside virtio-queue's;
//! - `sim`: the deterministic simulator;
//! - `stats`: what is counted, over crashes and upgrades;
//! - `snapshot`: snapshots of a disk that a guest uses, and what has changed since;
//! - `succession`: daemons that go on for one another on one connection;
//! - `syscalls`: what a request costs in system calls;
//! - `systemd`: the units that ship, socket activation, the descriptor store, what an administrator meets;
//! - `throttle`: limits of disks and of groups;
//! - `tool`: the tool beside the daemon;
//! - `top`: the screen of `vublk top` on a terminal;
//! - `trace`: requests one by one, and the probes for bpftrace;
//! - `user`: the user that vublkd runs as, and what its parent gives up;
//! - `turns`: a worker of the library on a slow disk, turn by turn;
//! - `watchdog`: the service manager's watchdog;
//! - `session`: the life of a connection and of the daemon, vublkd alone.
//!
//! What a machine cannot run (no root, no QEMU) is left out with a line that
//! says so; a hang is a failure that names what it waited for.
#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    unsafe_code,
    reason = "a test may panic; guest memory, seccomp and mounts need raw system calls"
)]

mod broken;
mod chains;
mod control;
mod crowd;
mod differential;
mod disks;
mod durability;
mod fence;
mod flags;
mod fuzz;
mod hostile;
mod inspect;
mod journal;
mod metrics;
mod model;
mod nbd;
mod parent;
mod power;
mod promise;
mod rbd;
mod recovery;
mod remote;
mod ring;
mod session;
mod sim;
mod snapshot;
mod stats;
mod succession;
mod support;
mod syscalls;
mod systemd;
mod throttle;
mod tool;
mod top;
mod trace;
mod turns;
mod user;
mod watchdog;
