//! Who has a disk: the processes and kernel drivers that messages name.
//!
//! What it is: a look through /proc and /sys, as far as this user may see.
//!
//! What it is not: nothing is decided by what it finds but how long to wait.
//!
//! Invariant: no look waits for a file system: a descriptor's file is asked for what the
//! kernel knows of it.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{DirEntry, File, read_dir, read_to_string};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Statx, StatxFlags, statx};

use crate::sys::{Conflict, facts, inode};

/// Processes that hold a lock; none: they cannot be found.
#[derive(Debug, Default)]
pub struct Holders {
    /// Number and name.
    processes: BTreeSet<(u32, String)>,
    /// They hold it. Else they have the file open, and no process is seen to hold it.
    are_certain: bool,
}

impl Holders {
    /// Those of a lock on an open file.
    #[must_use]
    pub fn of(file: &File, lock: &Conflict) -> Self {
        if let Ok(pid @ 1..) = u32::try_from(lock.pid) {
            return Self { processes: [(pid, name(&pid.to_string()))].into(), are_certain: true };
        }
        let Ok(own) = facts(file) else { return Self::default() };
        let open = openers(|found| inode(found) == inode(&own));
        // "lock:	1: OFDLCK ADVISORY  WRITE -1 00:27:2 4096 EOF"
        let start = lock.start.to_string();
        let holds =
            |line: &str| line.starts_with("lock:") && line.split_whitespace().rev().nth(1) == Some(&start);
        let holding: BTreeSet<_> = open
            .iter()
            .filter(|(_, descriptor)| descriptor.lines().any(holds))
            .map(|(process, _)| process.clone())
            .collect();
        if holding.is_empty() {
            Self { processes: open.into_iter().map(|(process, _)| process).collect(), are_certain: false }
        } else {
            Self { processes: holding, are_certain: true }
        }
    }

    /// True if they are known, and none has this name.
    #[must_use]
    pub fn are_all_but(&self, name: &str) -> bool {
        self.are_certain && self.processes.iter().all(|(_, n)| n != name)
    }

    /// True if they are known, and all have this name.
    #[must_use]
    pub fn are_all(&self, name: &str) -> bool {
        self.are_certain && self.processes.iter().all(|(_, n)| n == name)
    }

    /// Behind a sentence, if they are known.
    #[must_use]
    pub fn in_brackets(&self) -> String {
        if self.are_certain { format!(" ({self})") } else { String::new() }
    }
}

impl fmt::Display for Holders {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.are_certain, self.processes.len()) {
            (true, _) => f.write_str(&list(&self.processes)),
            (false, 0) => {
                f.write_str("another process (vublk doctor, run as root, names it, if it is on this host)")
            }
            (false, 1) => write!(f, "another process ({} has it open)", list(&self.processes)),
            (false, _) => write!(f, "another process (these have it open: {})", list(&self.processes)),
        }
    }
}

/// A few of them, for one line.
fn list(processes: &BTreeSet<(u32, String)>) -> String {
    let few: Vec<String> =
        processes.iter().take(5).map(|(pid, name)| format!("{name} (process {pid})")).collect();
    let more = if processes.len() > few.len() { ", …" } else { "" };
    format!("{}{more}", few.join(", "))
}

/// The name of this process, as others see it.
#[must_use]
pub fn own_name() -> String {
    name("self")
}

fn name(process: &str) -> String {
    let name = read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
    // A process gives itself its name: it must not write our log.
    let name: String = name.trim_end().chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    if name.is_empty() { "another program".into() } else { name }
}

/// What the kernel knows of a file without asking its file system.
fn look(at: impl AsFd, path: &Path) -> rustix::io::Result<Statx> {
    statx(at, path, AtFlags::STATX_DONT_SYNC | AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
}

fn entries(folder: &Path) -> impl Iterator<Item = DirEntry> + use<> {
    read_dir(folder).into_iter().flatten().flatten()
}

/// Other processes that have such a file open, and what the kernel tells of the descriptor.
fn openers(is_wanted: impl Fn(&Statx) -> bool) -> Vec<((u32, String), String)> {
    let mut found = Vec::new();
    for process in entries(Path::new("/proc")) {
        let number = process.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = number.filter(|&pid: &u32| pid != std::process::id()) else { continue };
        for descriptor in entries(&process.path().join("fd")) {
            if look(CWD, &descriptor.path()).is_ok_and(|file| is_wanted(&file)) {
                let told = read_to_string(process.path().join("fdinfo").join(descriptor.file_name()));
                found.push(((pid, name(&pid.to_string())), told.unwrap_or_default()));
            }
        }
    }
    found
}

/// Loop devices that have this file for a disk.
pub fn loops_over(file: &File) -> Vec<PathBuf> {
    let Ok(own) = facts(file) else { return Vec::new() };
    let over = |device: DirEntry| {
        let path = read_to_string(device.path().join("loop/backing_file")).ok()?;
        let found = look(CWD, Path::new(path.trim_end_matches('\n'))).ok()?;
        (inode(&found) == inode(&own)).then(|| Path::new("/dev").join(device.file_name()))
    };
    entries(Path::new("/sys/block")).filter_map(over).collect()
}

/// Who has claimed a block device, in words, and what to type.
#[must_use]
pub fn who_claimed(device: &File) -> String {
    let Ok(own) = facts(device) else { return "its user cannot be found".into() };
    let number = |file: &Statx| format!("{}:{}", file.stx_rdev_major, file.stx_rdev_minor);
    // The device, its partitions, and the disk that it is a partition of: a claim on one of
    // them is in the way of a claim on the device.
    let folder = PathBuf::from(format!("/sys/dev/block/{}", number(&own)));
    let mut family: Vec<PathBuf> = entries(&folder).map(|entry| entry.path()).collect();
    family.retain(|part| part.join("partition").is_file());
    if folder.join("partition").is_file() {
        family.extend(folder.canonicalize().ok().and_then(|folder| Some(folder.parent()?.to_owned())));
    }
    family.push(folder);
    let text = |path: PathBuf| read_to_string(path).unwrap_or_default().trim().to_owned();
    let mut numbers: Vec<String> = family.iter().map(|folder| text(folder.join("dev"))).collect();
    numbers.push(number(&own));
    let is_one = |file: &Statx| {
        u32::from(file.stx_mode) & libc::S_IFMT == libc::S_IFBLK && numbers.contains(&number(file))
    };
    let leads_to_one =
        |path: &str| path.starts_with('/') && look(CWD, Path::new(path)).is_ok_and(|f| is_one(&f));
    for line in text("/proc/self/mountinfo".into()).lines() {
        // proc(5): device, mount point, and the source behind the separator; btrfs has a device of its own.
        let source = line.split_once(" - ").and_then(|(_, rest)| rest.split(' ').nth(1)).unwrap_or_default();
        let words: Vec<&str> = line.split(' ').collect();
        if let [_, _, device, _, place, ..] = words.as_slice()
            && (numbers.iter().any(|number| number == device) || leads_to_one(source))
        {
            let what = if source.starts_with('/') { source } else { place };
            return format!(
                "it is mounted on {}. Unmount it first: umount {what}",
                place.replace("\\040", " ")
            );
        }
    }
    for line in text("/proc/swaps".into()).lines().skip(1) {
        if let Some(path) = line.split_whitespace().next().filter(|path| leads_to_one(path)) {
            return format!("it is used for swap. Give it up first: swapoff {path}");
        }
    }
    if let Some(holder) = family.iter().flat_map(|folder| entries(&folder.join("holders"))).next() {
        let mapped = text(holder.path().join("dm/name"));
        let name = if mapped.is_empty() {
            holder.file_name().display().to_string()
        } else {
            format!("mapper/{mapped}")
        };
        return format!("it is a part of /dev/{name}. Serve that one, or take it apart first");
    }
    let open = openers(is_one);
    if open.is_empty() {
        return "a process or a kernel driver has claimed it (lsblk, or lsof as root, may show it)".into();
    }
    let processes = open.into_iter().map(|(process, _)| process).collect();
    format!("{} has claimed it. Stop that process", Holders { processes, are_certain: false })
}
