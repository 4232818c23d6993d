//! The host: kernel, limits, what confines programs, units.
//!
//! What it is: functions of what the kernel tells, each of one fact, so that a test can tell them another one.
//!
//! What it is not: limits are those of the shell that `vublk doctor` runs in; a unit has its own.
//!
//! Invariant: a host on which vublkd serves with its default options has no "fail" here but for units that failed or lack a disk.

use std::fs::read_to_string;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Resource, getrlimit};

use super::remote::librbd;
use super::{Finding, fail, ok, warn};
use crate::args::{MAX_QUEUES, disk::descriptors_of};
use crate::engine::uring::ring::Ring;
use crate::engine::uring::{Feature, Uring};
use crate::sys;

/// All that can be told of this host.
pub(super) fn all() -> Vec<Finding> {
    let text = |path: &str| read_to_string(path).unwrap_or_default().trim().to_owned();
    let limit = |of| getrlimit(of).maximum;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut findings = vec![
        kernel(&text("/proc/sys/kernel/osrelease")),
        io_uring(&text("/proc/sys/kernel/io_uring_disabled"), Uring::probe().map(|()| Ring::missing())),
        landlock(sys::landlock_version()),
        seccomp(&text("/proc/sys/kernel/seccomp/actions_avail")),
        open_files(limit(Resource::Nofile), cpus),
        locked_memory(limit(Resource::Memlock)),
        librbd(),
    ];
    findings.extend(huge_pages(&huge()));
    findings.extend(apparmor(&text("/sys/module/apparmor/parameters/enabled"), || {
        (Path::new("/etc/apparmor.d/abstractions/libvirt-qemu").exists())
            .then(|| text("/etc/apparmor.d/local/abstractions/libvirt-qemu"))
    }));
    findings.extend(selinux(&text("/sys/fs/selinux/enforce")));
    if Path::new("/run/systemd/system").is_dir() {
        findings.extend(units(&listed_units(), |name| has_disk(name).unwrap_or(true)));
    }
    findings
}

/// Major and minor number of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|word| word.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

fn kernel(release: &str) -> Finding {
    let check = "kernel";
    let linux = format!("Linux {release}");
    let newer = "use a newer kernel; 6.1 is the oldest that is tested";
    match version(release) {
        (0, _) => warn(check, "its version is unknown: /proc is not mounted", "mount -t proc proc /proc"),
        older if older < (5, 3) => fail(check, format!("{linux}: vublkd starts on 5.3 and later"), newer),
        older if older < (5, 13) => {
            warn(check, format!("{linux}: io_uring and Landlock are used from 5.13 on"), newer)
        }
        older if older < (6, 1) => {
            warn(check, format!("{linux}: older than what vublkd is tested on"), newer)
        }
        older if older < (6, 13) => ok(check, format!("{linux}; --pin-memory needs 6.13")),
        _ => ok(check, linux),
    }
}

/// `sysctl`: of kernel.io_uring_disabled; empty before Linux 6.6. `made`: a ring as vublkd makes them, and what it lacks.
fn io_uring(sysctl: &str, made: io::Result<Vec<Feature>>) -> Finding {
    let check = "io_uring";
    let threads = "disks are read and written by threads, which is slower";
    match (sysctl, made) {
        ("2", _) => warn(check, format!("forbidden: {threads}"), "sysctl kernel.io_uring_disabled=0"),
        ("1", _) => warn(
            check,
            format!("only for root and one group (kernel.io_uring_group): for other users {threads}"),
            "sysctl kernel.io_uring_disabled=0, or put vublkd's user into that group",
        ),
        (_, Err(e)) => warn(
            check,
            format!("cannot be had here: {e}: {threads}"),
            "in a container: allow io_uring_setup, io_uring_enter and io_uring_register",
        ),
        (_, Ok(lacks)) if lacks.is_empty() => {
            ok(check, "allowed, with all that vublkd makes use of (DEFER_TASKRUN …)")
        }
        (_, Ok(lacks)) => {
            let names: Vec<_> = lacks.into_iter().map(Feature::name).collect();
            ok(
                check,
                format!("allowed; this kernel lacks {}, which would save instructions", names.join(", ")),
            )
        }
    }
}

fn landlock(version: io::Result<u32>) -> Finding {
    let check = "Landlock";
    match version {
        Ok(version) => ok(check, format!("version {version}: the sandbox forbids opening files")),
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => warn(
            check,
            "built into this kernel and not enabled: the sandbox does without",
            "add landlock to lsm= on the kernel's command line",
        ),
        Err(_) => warn(
            check,
            "this kernel has none (5.13): the sandbox does without",
            "use a kernel with CONFIG_SECURITY_LANDLOCK",
        ),
    }
}

fn seccomp(actions: &str) -> Finding {
    if actions.split(' ').any(|action| action == "kill_process") {
        return ok("seccomp", "the sandbox forbids system calls");
    }
    warn(
        "seccomp",
        "this kernel has none: the sandbox does without",
        "use a kernel with CONFIG_SECCOMP_FILTER",
    )
}

fn open_files(most: Option<u64>, cpus: usize) -> Finding {
    let check = "open files";
    let needed = descriptors_of(usize::from(MAX_QUEUES), cpus.min(MAX_QUEUES.into()), false);
    match most {
        Some(most) if most < u64::try_from(needed).unwrap_or(u64::MAX) => warn(
            check,
            format!("{most} at most, and a disk with {MAX_QUEUES} queues may need {needed}"),
            "ulimit -Hn 8192 as root, LimitNOFILE=8192 in a unit, or vublkd --num-queues=16",
        ),
        Some(most) => ok(check, format!("{most} at most")),
        None => ok(check, "no limit"),
    }
}

/// Linux has 8 MiB by default.
fn locked_memory(most: Option<u64>) -> Finding {
    const DEFAULT: u64 = 8 << 20;
    let check = "locked memory";
    match most {
        None => ok(check, "no limit"),
        Some(most @ ..DEFAULT) => warn(
            check,
            format!(
                "{most} bytes at most, less than is usual: rings may not be had, and --pin-memory is of no use"
            ),
            "ulimit -Hl 524288 as root, or LimitMEMLOCK=512M in a unit",
        ),
        Some(most) => ok(
            check,
            format!("{most} bytes at most; --pin-memory needs as much as its guests have (LimitMEMLOCK=)"),
        ),
    }
}

/// Huge pages of one size: kibibytes, how many there are, how many are free.
type Huge = (u64, u64, u64);

fn huge() -> Vec<Huge> {
    let folders = std::fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
    let of = |folder: std::fs::DirEntry| {
        let name = folder.file_name();
        let size = name.to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
        let number = |name: &str| read_to_string(folder.path().join(name)).ok()?.trim().parse().ok();
        Some((size, number("nr_hugepages")?, number("free_hugepages")?))
    };
    folders.filter_map(of).collect()
}

fn huge_pages(all: &[Huge]) -> Option<Finding> {
    let some = all.iter().filter(|(_, there, _)| *there > 0);
    let text: Vec<_> =
        some.map(|(size, there, free)| format!("{there} of {size} KiB, {free} free")).collect();
    let says = format!("{}; a guest's memory may be of them, vublkd needs none", text.join("; "));
    (!text.is_empty()).then(|| ok("huge pages", says))
}

/// `local`: what an administrator has added for libvirt's VMs, if libvirt's profiles are there.
fn apparmor(enabled: &str, local: impl FnOnce() -> Option<String>) -> Option<Finding> {
    let check = "AppArmor";
    (enabled == "Y").then(|| match local() {
        Some(text) if !text.contains("abstractions/vublk") => warn(
            check,
            "on, and VMs of libvirt have no rule for vublk's sockets, which they need on Ubuntu's kernels and from 6.17 on",
            "echo 'include if exists <abstractions/vublk>' >> /etc/apparmor.d/local/abstractions/libvirt-qemu",
        ),
        Some(_) => ok(check, "on; VMs of libvirt may connect"),
        None => ok(check, "on; libvirt has no profiles here"),
    })
}

fn selinux(enforce: &str) -> Option<Finding> {
    match enforce {
        "1" => {
            Some(ok("SELinux", "enforcing: if a VMM cannot connect, ausearch -m avc -ts recent shows why"))
        }
        "0" => Some(ok("SELinux", "permissive")),
        _ => None,
    }
}

/// Lines of systemctl: unit, load, active, sub, description.
fn listed_units() -> String {
    let mut command = Command::new("systemctl");
    command.args(["list-units", "--all", "--plain", "--no-legend", "--no-pager", "vublk@*"]);
    let done = command.output().ok().filter(|done| done.status.success());
    done.map(|done| String::from_utf8_lossy(&done.stdout).into_owned()).unwrap_or_default()
}

/// What a unit of this name would serve: the files of which its socket needs one.
fn files_of_unit(name: &str) -> [PathBuf; 2] {
    [format!("/etc/vublk/{name}.env").into(), format!("/var/lib/vublk/{name}/disk.raw").into()]
}

/// Whether vublk@NAME has a disk; an error: this user may not look.
fn has_disk(name: &str) -> io::Result<bool> {
    let [options, disk] = files_of_unit(name);
    Ok(options.try_exists()? || disk.try_exists()?)
}

/// A name of which no daemon serves a disk now.
pub(super) fn unit(name: &str) -> Finding {
    not_served(name, has_disk(name))
}

fn not_served(name: &str, has_disk: io::Result<bool>) -> Finding {
    let check = "unit";
    match has_disk {
        Ok(false) => lacks_disk(name),
        Ok(true) => warn(
            check,
            format!("vublk@{name} has a disk, and no daemon serves it now"),
            format!(
                "systemctl enable --now vublk@{name}.socket, then attach it to its VM; journalctl -u vublk@{name} says why a daemon ended"
            ),
        ),
        Err(e) => warn(
            check,
            format!("no daemon serves a disk of this name, and this user cannot look for one: {e}"),
            format!("sudo vublk doctor {name}"),
        ),
    }
}

/// systemd's own words for it are "Assertion failed".
fn lacks_disk(name: &str) -> Finding {
    let [options, disk] = files_of_unit(name).map(|path| path.display().to_string());
    fail(
        "unit",
        format!(
            "vublk@{name}.socket has no disk, neither {disk} nor {options}: it does not start (systemd says: Assertion failed)"
        ),
        format!(
            "install -D -m 0600 /dev/null {disk} && truncate -s 10G {disk} && systemctl enable --now vublk@{name}.socket; or \
             vublk list, where another name was meant"
        ),
    )
}

/// `has_disk`: whether the unit of a name has one.
fn units(listed: &str, has_disk: impl Fn(&str) -> bool) -> Option<Finding> {
    let check = "units";
    let mut all = Vec::new();
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [unit, _load, active, ..] = words.as_slice() {
            all.push((*unit, *active));
        }
    }
    let failed: Vec<&str> =
        all.iter().filter(|(_, active)| *active == "failed").map(|(unit, _)| *unit).collect();
    if let Some(first) = failed.first() {
        let says = format!("{} failed", failed.join(", "));
        return Some(fail(
            check,
            says,
            format!("journalctl -u {first}; when that is mended: systemctl restart {first}"),
        ));
    }
    let name = |unit: &str| Some(unit.strip_prefix("vublk@")?.strip_suffix(".socket")?.to_owned());
    let idle = all.iter().filter(|(_, active)| *active == "inactive").filter_map(|(unit, _)| name(unit));
    if let Some(name) = idle.into_iter().find(|name| !has_disk(name)) {
        return Some(lacks_disk(&name));
    }
    let active = all.iter().filter(|(_, active)| *active == "active").count();
    (!all.is_empty()).then(|| ok(check, format!("{active} of {} are active, none failed", all.len())))
}

#[cfg(test)]
mod tests {
    use super::super::Verdict::{self, Fail, Ok as Fine, Warn};
    use super::*;

    fn is(finding: &Finding, verdict: Verdict, says: &str) {
        assert_eq!(finding.verdict, verdict, "{finding:?}");
        assert!(finding.says.contains(says), "{finding:?}");
        assert_eq!(finding.remedy.is_some(), verdict != Fine, "{finding:?}");
    }

    #[test]
    fn kernels() {
        for (release, verdict, says) in [
            ("4.19.0", Fail, "5.3 and later"),
            ("5.2.21", Fail, "5.3"),
            ("5.10.0-28-amd64", Warn, "from 5.13 on"),
            ("5.15.0", Warn, "older than"),
            ("6.1.0-18-amd64", Fine, "--pin-memory needs 6.13"),
            ("6.18.44", Fine, "Linux 6.18.44"),
            ("7.0-rc1", Fine, "Linux 7.0"),
            ("", Warn, "unknown"),
        ] {
            is(&kernel(release), verdict, says);
        }
    }

    #[test]
    fn rings() {
        let denied = || Err(io::Error::from_raw_os_error(libc::EPERM));
        is(&io_uring("2", denied()), Warn, "forbidden");
        // Root may; vublkd's user may not.
        is(&io_uring("1", Ok(Vec::new())), Warn, "one group");
        is(&io_uring("0", denied()), Warn, "cannot be had here");
        is(&io_uring("", Ok(Vec::new())), Fine, "allowed, with all");
        is(&io_uring("0", Ok(vec![Feature::DeferTaskrun])), Fine, "lacks defer-taskrun");
    }

    #[test]
    fn what_confines() {
        is(&landlock(Ok(7)), Fine, "version 7");
        is(&landlock(Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))), Warn, "not enabled");
        is(&landlock(Err(io::Error::from_raw_os_error(libc::ENOSYS))), Warn, "has none");
        is(&seccomp("kill_process kill_thread trap"), Fine, "forbids");
        is(&seccomp(""), Warn, "has none");
        assert_eq!(apparmor("", || None), None);
        let found = |local: Option<&str>| apparmor("Y", || local.map(str::to_owned)).expect("it is on");
        is(&found(None), Fine, "no profiles");
        is(&found(Some("")), Warn, "no rule");
        is(&found(Some("include if exists <abstractions/vublk>")), Fine, "may connect");
        assert_eq!(selinux(""), None);
        is(&selinux("1").expect("it is on"), Fine, "enforcing");
    }

    #[test]
    fn limits() {
        is(&open_files(None, 4), Fine, "no limit");
        is(&open_files(Some(256), 4), Warn, "256 at most");
        is(&open_files(Some(524_288), 1000), Fine, "524288");
        is(&locked_memory(Some(65_536)), Warn, "65536 bytes");
        is(&locked_memory(Some(8 << 20)), Fine, "8388608");
        is(&locked_memory(None), Fine, "no limit");
        assert_eq!(huge_pages(&[(2048, 0, 0)]), None);
        is(&huge_pages(&[(2048, 512, 12), (1 << 20, 0, 0)]).expect("some"), Fine, "512 of 2048 KiB, 12 free");
    }

    #[test]
    fn units_of_systemd() {
        let units = |listed| super::units(listed, |name| name != "d");
        assert_eq!(units(""), None);
        let good = "vublk@a.service loaded active running VM disk a\nvublk@a.socket loaded active running Socket\n\
                    vublk@b.service loaded inactive dead VM disk b\n";
        is(&units(good).expect("some"), Fine, "2 of 3 are active");
        let bad = format!("{good}vublk@c.service loaded failed failed VM disk c\n");
        is(&units(&bad).expect("some"), Fail, "vublk@c.service failed");
        // Enabled before there was a disk.
        let lacks = format!("{good}vublk@d.socket loaded inactive dead Socket of the VM disk d\n");
        is(
            &units(&lacks).expect("some"),
            Fail,
            "vublk@d.socket has no disk, neither /var/lib/vublk/d/disk.raw nor",
        );
        let stopped = format!("{good}vublk@e.socket loaded inactive dead Socket of the VM disk e\n");
        is(&units(&stopped).expect("some"), Fine, "2 of 4 are active");
    }

    #[test]
    fn names_that_no_daemon_serves() {
        is(&not_served("a", Ok(false)), Fail, "Assertion failed");
        is(&not_served("a", Ok(true)), Warn, "no daemon serves it now");
        is(&not_served("a", Err(io::Error::from_raw_os_error(libc::EACCES))), Warn, "cannot look");
    }
}
