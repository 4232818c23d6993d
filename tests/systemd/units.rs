//! What an administrator meets: the user and the sandbox of the unit, starts that fail, signals from outside, the order
//! at shutdown.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Signal, kill_process};

use crate::support::daemon::run;
use crate::support::device::{Device, OK, Setup, T_IN};
use crate::support::disk::{Disk, assert_same, pattern, salted};
use crate::support::freeze::Frozen;
use crate::support::frontend::{Frontend, msg};
use crate::support::gate::Gate;
use crate::support::sys::{Deadline, PATIENCE, installed, skip};
use crate::support::systemd::{Systemd, ships, units};

const SERVICE: &str = "vublk@vm1.service";
/// How long ExecStopPost= waits after a start that failed.
const PAUSE: Duration = Duration::from_secs(2);

fn device(systemd: &Systemd) -> Device {
    // A start may fail, as long as the machine is not ready; the next one comes soon.
    let frontend = Deadline::within(2 * PATIENCE, "a disk that is served").until_slowly(|| {
        let frontend = Frontend::new(systemd.connect("vm1"));
        frontend.ask(msg::GET_FEATURES, &[]).is_ok().then_some(frontend)
    });
    Device::over(frontend, Setup::default())
}

fn restarts(systemd: &Systemd, unit: &str) -> u32 {
    systemd.show("NRestarts", unit).parse().unwrap()
}

/// `systemd-analyze security` counts from 0 to 10 what a unit may do; tenths here.
#[test]
fn the_sandbox_as_systemd_counts_it() {
    if !installed("systemd-analyze", "systemd::units::the_sandbox_as_systemd_counts_it") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let unit = folder.path().join(SERVICE);
    let (_, text) =
        units(env!("CARGO_BIN_EXE_vublkd")).into_iter().find(|(name, _)| name == "vublk@.service").unwrap();
    std::fs::write(&unit, text).unwrap();
    let mut analyze = Command::new("systemd-analyze");
    analyze.args(["security", "--no-pager", "--offline=true", "--threshold=12"]).arg(unit);
    let (status, said, complained) = run(analyze);
    assert!(status.success(), "{said}{complained}");
}

/// The daemon runs as a user of its own without capabilities, sees no other disk, and serves; who may connect to the
/// disk is up to the socket's group; `systemctl reload` finds a disk that has grown.
#[test]
fn a_user_of_its_own() {
    let disk = Disk::new();
    let Some(systemd) = Systemd::with("systemd::units::a_user_of_its_own", &disk, |files| {
        files.write("lib/vublk/vm2/disk.raw", "another disk");
    }) else {
        return;
    };
    let mut device = device(&systemd);
    device.assert_serves(0);
    let daemon = systemd.daemon().unwrap().as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{daemon}/status")).unwrap();
    let of = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t")).unwrap();
    let user = systemd.files.id("passwd", "vublk");
    assert_eq!(of("Uid"), format!("{user}\t{user}\t{user}\t{user}"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(of(set), "0000000000000000", "{set}");
    }
    assert_eq!((of("NoNewPrivs"), of("Seccomp")), ("1", "2"));
    // The daemon's own sandbox inside of the unit's.
    assert!(!systemd.log().contains("the sandbox is without"), "{}", systemd.log());
    let seen = std::fs::read_dir(format!("/proc/{daemon}/root/var/lib/vublk")).unwrap();
    assert_eq!(seen.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>(), ["vm1"]);

    let socket = std::fs::metadata(systemd.path("run/vublk/vm1.sock")).unwrap();
    assert_eq!((socket.uid(), socket.gid()), (0, systemd.files.id("group", "kvm")));
    assert_eq!(socket.permissions().mode() & 0o777, 0o660);

    device.write(7, &salted(3, 7, 9));
    assert_same(&disk.read(7, 9), &salted(3, 7, 9), "what the guest wrote");
    let size = || {
        let tool = systemd.inside(&["/run/bin/vublk", "status", "--json", "/run/vublk/vm1/control"]);
        let (status, said, complained) = run(tool);
        assert!(status.success(), "{complained}");
        said
    };
    assert!(size().contains("67108864"), "{}", size());
    OpenOptions::new().write(true).open(&disk.path).unwrap().set_len(128 << 20).unwrap();
    systemd.ctl(&["reload", SERVICE]);
    Deadline::new("the new size").until_slowly(|| size().contains("134217728").then_some(()));
    device.assert_serves(0);
}

/// A unit that cannot serve is started at most five times in ten seconds, whatever the reason. Where vublkd itself cannot
/// serve, a front-end that waits is turned away, as often as it comes and without a wait, and starts the unit again: nothing else
/// does. A front-end that waits is served once the reason is gone where vublkd does not get that far. Where systemd itself
/// cannot set the unit up there is one start, and an error.
#[test]
fn starts_that_fail() {
    let disk = Disk::new();
    let slow = ["no-program", "crash", "ends-with-success"];
    let until_asked = ["no-environment", "wrong-option", "no-disk"];
    let never = ["no-user", "no-folder"];
    let Some(systemd) = Systemd::with("systemd::units::starts_that_fail", &disk, |files| {
        let service = |name: &str, text: &str| {
            files.drop_in(&format!("vublk@{name}.service"), &format!("[Service]\n{text}\n"));
        };
        service("no-program", "ExecStart=\nExecStart=/run/bin/none");
        service("crash", "ExecStart=\nExecStart=/bin/sh -c 'kill -SEGV $$$$'");
        service("no-user", "User=vublk-none");
        service("no-folder", "ReadWritePaths=/none");
        for name in slow.iter().chain(&never).chain(&until_asked) {
            files.options(name, "");
        }
        files.options("wrong-option", "--no-such-option");
        files.options("ends-with-success", "--print-capabilities");
        files.options("vm1", "--no-such-option");
    }) else {
        return;
    };
    let unit = |name: &str| format!("vublk@{name}.service");
    // It waits from now on; it is the reason for the first start.
    let turned_away = Frontend::new(systemd.connect("vm1"));
    for name in slow.iter().chain(&never).chain(&until_asked) {
        systemd.ctl(&["start", &format!("vublk@{name}.socket")]);
    }
    std::fs::remove_file(systemd.files.path("etc/vublk/no-environment.env")).unwrap();
    let started = Instant::now();
    for name in slow.iter().chain(&until_asked) {
        systemd.ctl(&["start", "--no-block", &unit(name)]);
    }
    for name in never {
        let (status, _, complained) = systemd.try_ctl(&["start", &unit(name)]);
        assert!(!status.success() && complained.contains("failed"), "{name}: {complained}");
    }
    for name in slow {
        Deadline::within(2 * PATIENCE, format!("{name} to be tried again"))
            .until_slowly(|| (restarts(&systemd, &unit(name)) >= 2).then_some(()));
    }
    let tried: u32 = slow.iter().map(|name| restarts(&systemd, &unit(name))).max().unwrap();
    let took = started.elapsed();
    eprintln!("starts that fail: at most {tried} restarts in {took:?}");
    assert!(took >= PAUSE * tried - Duration::from_millis(100), "{tried} restarts in {took:?}");
    for name in never.iter().chain(&until_asked) {
        assert_eq!(systemd.show("ActiveState", &unit(name)), "failed", "{name}");
        assert_eq!(restarts(&systemd, &unit(name)), 0, "{name}");
    }
    turned_away.wait_hangup("vublkd cannot serve the disk");
    assert!(systemd.log().contains("--no-such-option"));
    assert!(systemd.log().contains("1 front-ends that waited for the disk are turned away"));
    // The disk of another is not there; and once it is, the next that comes is served.
    // QEMU comes four times, and its guest stands still when it is for a disk that is attached.
    let started = Instant::now();
    for _ in 0..4 {
        Frontend::new(systemd.connect("no-disk")).wait_hangup("there is no disk");
    }
    assert!(started.elapsed() < 2 * PAUSE, "turned away after {:?}", started.elapsed());
    assert_eq!(restarts(&systemd, &unit("no-disk")), 0);
    systemd.files.options("vm1", "");
    let mut device = Device::over(Frontend::new(systemd.connect("vm1")), Setup::default());
    device.assert_serves(0);
    // Without its environment file a disk has no socket, and a VMM has an error.
    let (status, _, complained) = systemd.try_ctl(&["start", "vublk@vm3.socket"]);
    assert!(!status.success() && complained.contains("Assertion failed"), "{complained}");
    assert!(!std::path::Path::new(&systemd.path("run/vublk/vm3.sock")).exists());
}

/// A front-end that was served keeps its connection while no daemon can be started.
#[test]
fn a_successor_that_cannot_start() {
    let disk = Disk::new();
    let Some(systemd) = Systemd::start("systemd::units::a_successor_that_cannot_start", &disk) else {
        return;
    };
    let mut device = device(&systemd);
    device.assert_serves(0);
    let program = systemd.files.path("bin/vublkd");
    let aside = systemd.files.path("bin/aside");
    let [image, elsewhere] =
        ["disk.raw", "elsewhere"].map(|name| systemd.files.path(&format!("lib/vublk/vm1/{name}")));
    for round in 0..3 {
        let before = restarts(&systemd, SERVICE);
        match round {
            0 => std::fs::rename(&program, &aside).unwrap(),
            1 => systemd.files.options("vm1", "--no-such-option"),
            _ => std::fs::rename(&image, &elsewhere).unwrap(),
        }
        kill_process(systemd.daemon().unwrap(), Signal::KILL).unwrap();
        Deadline::within(2 * PATIENCE, "two starts")
            .until_slowly(|| (restarts(&systemd, SERVICE) >= before + 2).then_some(()));
        assert_ne!(systemd.show("NFileDescriptorStore", SERVICE), "0");
        match round {
            0 => std::fs::rename(&aside, &program).unwrap(),
            1 => systemd.files.options("vm1", ""),
            _ => std::fs::rename(&elsewhere, &image).unwrap(),
        }
        Deadline::new("a daemon that serves")
            .until_slowly(|| (systemd.show("ActiveState", SERVICE) == "active").then_some(()));
        device.assert_serves(0);
    }
}

/// SIGTERM to the daemon, from another than systemd: the next goes on with the connection. A stop is a stop.
#[test]
fn a_sigterm_from_outside() {
    let disk = Disk::new();
    let Some(systemd) = Systemd::start("systemd::units::a_sigterm_from_outside", &disk) else { return };
    let mut device = device(&systemd);
    device.assert_serves(0);
    let mut waits = Vec::new();
    for _ in 0..8 {
        let before = systemd.daemon().unwrap();
        let sent = Instant::now();
        kill_process(before, Signal::TERM).unwrap();
        systemd.daemon_after(before);
        device.assert_serves(0);
        waits.push(sent.elapsed());
    }
    waits.sort_unstable();
    eprintln!("SIGTERM from outside: the next answer after {:?} (median) to {:?}", waits[4], waits[7]);
    let told = || systemd.log().matches("took over from a vublkd that stopped").count();
    Deadline::new("the log of each").until_slowly(|| (told() == waits.len()).then_some(()));
    systemd.ctl(&["stop", SERVICE]);
    assert_eq!(systemd.show("ActiveState", SERVICE), "inactive");
    assert_eq!(systemd.show("Result", SERVICE), "success");
    device.frontend.wait_hangup("the service was stopped");
}

/// `journalctl -p err -u …` shows why a disk is not served, and no more than that.
#[test]
fn errors_in_the_journal() {
    let test = "systemd::units::errors_in_the_journal";
    let disk = Disk::new();
    let mut has_journal = false;
    let Some(systemd) = Systemd::with(test, &disk, |files| {
        has_journal = files.journald();
        files.drop_in("vublk@.service", "[Service]\nStandardError=journal\n");
        files.options("no-disk", "");
    }) else {
        return;
    };
    if !has_journal {
        return skip(test, "systemd-journald is not installed");
    }
    Deadline::new("the journal")
        .until_slowly(|| systemd.try_ctl(&["start", "systemd-journald.service"]).0.success().then_some(()));
    systemd.ctl(&["start", "vublk@no-disk.socket"]);
    systemd.ctl(&["start", "--no-block", "vublk@no-disk.service"]);
    device(&systemd).assert_serves(0);
    let lines = |priority: &str, name: &str| {
        let unit = format!("vublk@{name}.service");
        let (_, said, _) =
            run(systemd.inside(&["journalctl", "--quiet", "-o", "cat", "-p", priority, "-u", &unit]));
        said
    };
    Deadline::new("the error").until_slowly(|| {
        lines("err", "no-disk").contains("/var/lib/vublk/no-disk/disk.raw: no such file").then_some(())
    });
    Deadline::new("the news").until_slowly(|| lines("info", "vm1").contains("serving").then_some(()));
    assert_eq!(lines("err", "vm1"), "");
}

/// At shutdown a VM stops before its disk, and what it writes then is on the disk: a unit of one's own, a scope as
/// machined makes it, and libvirt-guests.service.
#[test]
fn guests_stop_before_their_disks() {
    for guest in ["qemu@vm1.service", "machine-vm1.scope", "libvirt-guests.service"] {
        stops_before_its_disk(guest);
    }
}

fn stops_before_its_disk(guest: &str) {
    let disk = Disk::new();
    let (name, _) = guest.rsplit_once('.').unwrap();
    let vm = "[Unit]\nDescription=VM\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n\
              ExecStop=/bin/sh /var/lib/last-words\n";
    let Some(systemd) = Systemd::with("systemd::units::guests_stop_before_their_disks", &disk, |files| {
        let after = std::fs::read_to_string(ships().join("examples/vm.conf")).unwrap();
        files.unit("qemu@.service", vm);
        files.drop_in("qemu@.service", &after);
        files.drop_in("machine-.scope", &after);
        files.unit("libvirt-guests.service", vm);
        let last_words = "echo > /var/lib/stops; read _ < /var/lib/may-end";
        files.write("lib/last-words", last_words);
        // No process of its own for them: systemd would send SIGTERM to that, too.
        let scope = format!(
            "trap '{last_words}; exit' TERM\necho > /var/lib/runs\n{{ read _ < /var/lib/goes-on; }} 2> /dev/null\n"
        );
        files.write("lib/scope", &scope);
        for pipe in ["lib/may-end", "lib/goes-on"] {
            mknodat(CWD, files.path(pipe), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        }
    }) else {
        return;
    };
    let mut device = device(&systemd);
    device.assert_serves(0);
    let appears = |file: &str| {
        let path = systemd.files.path(file);
        Deadline::new(format!("{guest}: {file}")).until_slowly(|| path.exists().then_some(()));
    };
    let scope = guest.ends_with(".scope").then(|| {
        let unit = format!("--unit={name}");
        let words = ["systemd-run", "--quiet", "--scope", &unit, "sh", "/var/lib/scope"];
        let scope = systemd.inside(&words).spawn().unwrap();
        appears("lib/runs");
        scope
    });
    if scope.is_none() {
        systemd.ctl(&["start", guest]);
    }

    systemd.ctl(&["start", "--no-block", "shutdown.target"]);
    appears("lib/stops");
    // All jobs of the shutdown are there by now, and those that need not wait have begun.
    assert_eq!(systemd.show("ActiveState", SERVICE), "active", "while {guest} stops");
    device.write(50, &salted(5, 50, 1));
    let pipe = systemd.files.path("lib/may-end");
    let open = || File::options().write(true).custom_flags(libc::O_NONBLOCK).open(&pipe).ok();
    Deadline::new("its last words").until_slowly(open).write_all(b"\n").unwrap();
    Deadline::new("the disk to stop")
        .until_slowly(|| (systemd.show("ActiveState", SERVICE) == "inactive").then_some(()));
    device.frontend.wait_hangup("the disk was stopped");
    if let Some(mut scope) = scope {
        scope.wait().unwrap();
    }
    assert_same(&disk.read(50, 1), &salted(5, 50, 1), "the last words");
}

/// WatchdogSec=: a worker that stands still ends the daemon, and the next one goes on with the connection; a disk that
/// hangs for much longer than that ends nothing.
#[test]
fn the_watchdog() {
    let test = "systemd::units::the_watchdog";
    // On a busy machine a good worker may be a second late.
    let limit = Duration::from_secs(3);
    let Some((gate, store)) = Gate::under_loop(test, pattern(0, 8 << 11)) else { return };
    let disk = Disk::new();
    let Some(systemd) = Systemd::with(test, &disk, |files| {
        // A block device, and no list of devices: the machine may have no controller for that.
        files.drop_in(
            "vublk@.service",
            "[Service]\nStandardError=append:/var/lib/vublkd.log\nWatchdogSec=3\nPrivateDevices=no\n",
        );
        let text = format!("BLK_FILE={}\nVUBLKD_OPTIONS=--log-level=debug\n", store.path.display());
        files.write("etc/vublk/vm1.env", &text);
        store.give(files.id("passwd", "vublk"));
    }) else {
        return;
    };
    let mut device = device(&systemd);
    device.assert_serves(0);
    let (before, starts) = (systemd.daemon().unwrap(), restarts(&systemd, SERVICE));

    gate.close(1, usize::MAX);
    let pending = device.submit(0, T_IN, 0, &[], 512);
    let hangs = Instant::now();
    Deadline::new("the disk to hang").until_slowly(|| (gate.held() == 1).then_some(()));
    // Twice as long as the watchdog would need to find it out.
    Deadline::new("the watchdog's time").until_slowly(|| (hangs.elapsed() > 2 * limit).then_some(()));
    assert_eq!(
        (systemd.daemon(), restarts(&systemd, SERVICE)),
        (Some(before), starts),
        "while the disk hangs"
    );
    gate.open();
    let used = device.rings[0].wait_used("the answer");
    assert_eq!(device.outcome(&pending, used).status, OK);

    let frozen = match Frozen::of(before.as_raw_nonzero().get().unsigned_abs(), "vublk-0") {
        Ok(frozen) => frozen,
        Err(reason) => return skip(test, &reason),
    };
    frozen.wait_ended();
    systemd.daemon_after(before);
    device.assert_serves(0);
    assert_eq!(restarts(&systemd, SERVICE), starts + 1);
}
