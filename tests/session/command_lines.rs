//! Command lines that are wrong, of both programs: each with its exit code (2: it makes no
//! sense; 1: it cannot be done) and words that its message has to have. No message may read
//! as if it were for the programmer.

use std::os::unix::net::UnixListener;
use std::process::Command;

use crate::support::daemon::{Daemon, Options, URING, bare_vublkd, run};
use crate::support::device::Device;
use crate::support::disk::Disk;
use crate::support::frontend::msg;

/// S is a socket that can be made, B a disk; the folder has `disk.raw`, `empty.raw`, `small.raw`,
/// `note.txt`, the folder `sub`, the pipe `pipe`, and `live.sock` on which a process listens.
const VUBLKD: &[(&str, i32, &[&str])] = &[
    ("", 2, &["--blk-file"]),
    ("S", 2, &["--blk-file"]),
    ("B", 2, &["--socket-path=PATH", "socket activation"]),
    ("S B --no-such-option", 2, &["--no-such-option"]),
    ("S B --read_only", 2, &["--read-only"]),
    ("S B disk.raw", 2, &["disk.raw"]),
    ("S disk.raw", 2, &["'disk.raw'", "--blk-file=disk.raw", "--config=disk.raw"]),
    ("S B -x", 2, &["'-x'"]),
    ("--config={dir}/disk.raw", 2, &["disk.raw", "no text", "--blk-file"]),
    ("--config={dir}/none.toml", 2, &["none.toml", "man vublk.toml"]),
    // Given twice, without a value, with an empty one.
    ("S S B", 2, &["--socket-path", "multiple times"]),
    ("S B B", 2, &["--blk-file", "multiple times"]),
    ("S B --read-only --read-only=off", 2, &["--read-only", "multiple times"]),
    ("S B --engine=null --engine=auto", 2, &["--engine", "multiple times"]),
    ("S B --direct", 2, &["--direct", "on", "off"]),
    ("S B --control", 2, &["--control", "value"]),
    ("S --blk-file=", 2, &["--blk-file"]),
    ("--socket-path= B", 2, &["--socket-path", "value"]),
    ("S B --engine=", 2, &["--engine", "io_uring"]),
    ("S B --num-queues=", 2, &["--num-queues", "value"]),
    ("S B --logical-block-size=", 2, &["--logical-block-size", "value"]),
    // Names that are none.
    ("S B --engine=steam", 2, &["--engine", "io_uring"]),
    ("S B --direct=maybe", 2, &["--direct", "on", "off"]),
    ("S B --read-only=yes", 2, &["--read-only", "on", "off"]),
    ("S B --incoming=1", 2, &["--incoming", "on", "off"]),
    ("S B --pin-memory=true", 2, &["--pin-memory", "on", "off"]),
    ("S B --lock=yes", 2, &["--lock", "on", "off"]),
    ("S B --plug=0", 2, &["--plug", "on", "off"]),
    ("S B --write-cache=none", 2, &["--write-cache", "writethrough"]),
    ("S B --discard=on", 2, &["--discard", "unmap", "ignore"]),
    ("S B --format=qcow2", 2, &["--format", "qemu-img convert"]),
    ("S B --log-level=loud", 2, &["--log-level", "warn"]),
    // Numbers that are none, negative, too small, too large.
    ("S B --num-queues=0", 2, &["--num-queues", "from 1 to 256"]),
    ("S B --num-queues=257", 2, &["--num-queues", "from 1 to 256"]),
    ("S B --num-queues=-1", 2, &["--num-queues", "from 1 to 256"]),
    ("S B --num-queues=four", 2, &["--num-queues", "from 1 to 256"]),
    ("S B --num-queues=1.5", 2, &["--num-queues", "from 1 to 256"]),
    ("S B --num-queues=99999999999999999999", 2, &["--num-queues", "from 1 to 256"]),
    ("S B --workers=0", 2, &["--workers", "from 1 to 256"]),
    ("S B --workers=1000", 2, &["--workers", "from 1 to 256"]),
    ("S B --poll-us=10001", 2, &["--poll-us", "from 0 to 10000"]),
    ("S B --poll-us=50us", 2, &["--poll-us", "from 0 to 10000"]),
    ("S B --stop-timeout-ms=-1", 2, &["--stop-timeout-ms", "from 0 to"]),
    ("S B --stop-timeout-ms=18446744073709551615", 2, &["--stop-timeout-ms", "from 0 to"]),
    ("S B --logical-block-size=0", 2, &["--logical-block-size", "512, 1024, 2048 or 4096"]),
    ("S B --logical-block-size=1000", 2, &["--logical-block-size", "512, 1024, 2048 or 4096"]),
    ("S B --logical-block-size=8k", 2, &["--logical-block-size", "512, 1024, 2048 or 4096"]),
    ("S B --logical-block-size=big", 2, &["--logical-block-size", "512, 1024, 2048 or 4096"]),
    ("S B --serial=abcdefghijklmnopqrstu", 2, &["--serial", "20"]),
    ("B --fd=0", 2, &["--fd", "from 3"]),
    ("B --fd=-1", 2, &["--fd", "from 3"]),
    ("B --fd=socket", 2, &["--fd", "from 3"]),
    ("B --fd=99999999999", 2, &["--fd", "from 3"]),
    // Contradictions.
    ("S B --fd=9", 2, &["--socket-path", "--fd"]),
    ("S B --supervise --fd-store", 2, &["--supervise", "--fd-store"]),
    ("S --blk-file={dir}/x.sock", 2, &["--blk-file and --socket-path are both {dir}/x.sock"]),
    ("S B --control={dir}/x.sock", 2, &["--control and --socket-path are both {dir}/x.sock"]),
    ("S B --control={dir}/disk.raw", 2, &["--blk-file and --control are both {dir}/disk.raw"]),
    ("S B --control={dir}/./disk.raw", 2, &["--blk-file and --control are both {dir}/disk.raw"]),
    // Disks on other machines.
    ("S --disk=", 2, &["--disk", "no disk"]),
    ("S --disk=nbd:127.0.0.1:10809", 2, &["write nbd://"]),
    ("S --disk=ceph:vms/vm1", 2, &["write rbd:POOL/IMAGE"]),
    ("S --blk-file=nbd://127.0.0.1/x", 2, &["--disk=nbd://127.0.0.1/x"]),
    ("S --blk-file=rbd:vms/vm1", 2, &["--disk=rbd:vms/vm1"]),
    ("S --disk=rbd:vms/vm1 --direct=off", 2, &["--direct=off is for files and block devices"]),
    ("S --disk=nbd://127.0.0.1/x --lock=off", 2, &["--lock=off is for files and block devices"]),
    ("S --disk=nbd://127.0.0.1/x --pin-memory", 2, &["--pin-memory is for files and block devices"]),
    ("S B --pin-memory --engine=threads", 2, &["--pin-memory", "--engine=auto"]),
    ("S B --pin-memory=on --engine=null", 2, &["--pin-memory", "--engine=auto"]),
    // Sockets that cannot be.
    ("B --fd=9", 1, &["descriptor 9 is not open", "--socket-path=PATH"]),
    ("B --fd=3", 1, &["descriptor 3 is not open", "--socket-path=PATH"]),
    ("B --socket-path={dir}/no/such/x.sock", 1, &["no/such/x.sock", "folder", "--socket-path"]),
    ("B --socket-path={dir}/note.txt/x.sock", 1, &["note.txt/x.sock", "--socket-path"]),
    ("B --socket-path={dir}/sub", 1, &["{dir}/sub", "--socket-path"]),
    ("B --socket-path={dir}/note.txt", 1, &["note.txt", "regular file", "--socket-path"]),
    ("B --socket-path={dir}/live.sock", 1, &["live.sock", "another", "--socket-path"]),
    ("B --socket-path={dir}/{long}", 2, &["--socket-path", "107 bytes"]),
    ("S B --control={dir}/{long}", 2, &["--control", "107 bytes"]),
    ("S B --control={dir}/no/such/x.control", 1, &["no/such/x.control", "folder", "--control"]),
    ("S B --control={dir}/note.txt", 1, &["note.txt", "regular file", "--control"]),
    ("S B --fd-store", 1, &["--fd-store", "systemd"]),
    // Disks that cannot be.
    ("S --blk-file={dir}/none.raw", 1, &["none.raw", "no such file", "truncate"]),
    ("S --blk-file={dir}", 1, &["{dir}", "director"]),
    ("S --blk-file={dir}/", 1, &["{dir}", "director"]),
    ("S --blk-file={dir}/note.txt/disk.raw", 1, &["note.txt/disk.raw"]),
    ("S --blk-file={dir}/empty.raw", 1, &["empty.raw", "truncate"]),
    ("S --blk-file={dir}/small.raw", 1, &["small.raw", "truncate"]),
    ("S --blk-file={dir}/live.sock", 1, &["live.sock", "socket"]),
    ("S --blk-file={dir}/pipe", 1, &["{dir}/pipe", "pipe"]),
    ("S --blk-file={dir}/pipe --read-only", 1, &["{dir}/pipe", "pipe"]),
    ("S --blk-file=/dev/null", 1, &["/dev/null"]),
];

const VUBLK: &[(&str, i32, &[&str])] = &[
    ("", 2, &["Usage", "bench"]),
    ("steam", 2, &["steam"]),
    ("status", 2, &["<DISK>"]),
    ("status a b", 2, &["'b'"]),
    ("status {dir}/none.sock", 1, &["none.sock", "no vublkd", "vublk list"]),
    ("status no-such-disk", 1, &["no-such-disk", "vublk list"]),
    ("status {dir}/note.txt", 1, &["note.txt", "is a file", "no vublkd", "vublk list"]),
    ("status {dir}", 1, &["{dir}", "is a folder", "no vublkd", "vublk list"]),
    ("status {dir}/{long}", 1, &["{long}", "no vublkd"]),
    ("status {dir}/none.sock --json --json", 2, &["--json", "multiple times"]),
    ("resize", 2, &["<DISK>"]),
    ("resize {dir}/none.sock 20G", 1, &["none.sock", "no vublkd"]),
    ("resize {dir}/none.sock 9E", 2, &["'9E'", "8E"]),
    ("resize {dir}/none.sock 99999999999999999999", 2, &["8E"]),
    ("resize {dir}/none.sock 20X", 2, &["'20X'", "20G"]),
    ("resize {dir}/none.sock twenty", 2, &["'twenty'", "20G"]),
    ("resize {dir}/none.sock ''", 2, &["20G"]),
    ("resize {dir}/none.sock -5", 2, &["'-5'", "20G"]),
    ("resize {dir}/none.sock 1G 2G", 2, &["'2G'"]),
    ("upgrade", 2, &["<DISK>"]),
    ("upgrade {dir}/none.sock", 1, &["none.sock", "no vublkd"]),
    ("upgrade {dir}/none.sock --binary=", 2, &["--binary", "value"]),
    ("add {dir}/disk.raw B S", 1, &["disk.raw", "no text"]),
    ("inspect no-such-disk", 1, &["no-such-disk", "no such file"]),
    ("inspect", 2, &["<DISK>"]),
    ("inspect {dir}/none.raw", 1, &["none.raw", "no such file"]),
    ("inspect {dir}", 1, &["{dir}", "director"]),
    ("inspect {dir}/pipe", 1, &["{dir}/pipe", "pipe"]),
    ("inspect {dir}/disk.raw --buffered=yes", 2, &["--buffered"]),
    ("bench", 2, &["<SOCKET>"]),
    ("bench {dir}/none.sock", 1, &["none.sock", "listens"]),
    ("bench {dir}/note.txt", 1, &["note.txt", "listens"]),
    ("bench {dir}/{long}", 2, &["107 bytes"]),
    ("bench no-such-disk", 1, &["no-such-disk", "vublk list"]),
    ("bench {dir}", 1, &["{dir}", "listens"]),
    ("bench {dir}/live.sock --rw=steam", 2, &["--rw", "randread"]),
    ("bench {dir}/live.sock --bs=0", 2, &["--bs", "512", "4k"]),
    ("bench {dir}/live.sock --bs=1000", 2, &["--bs", "512", "4k"]),
    ("bench {dir}/live.sock --bs=2G", 2, &["--bs", "1G"]),
    ("bench {dir}/live.sock --bs=4q", 2, &["--bs", "4k"]),
    ("bench {dir}/live.sock --bs=-4k", 2, &["--bs", "4k"]),
    ("bench {dir}/live.sock --qd=0", 2, &["--qd", "from 1 to 256"]),
    ("bench {dir}/live.sock --qd=257", 2, &["--qd", "from 1 to 256"]),
    ("bench {dir}/live.sock --queues=many", 2, &["--queues", "from 1 to 256"]),
    ("bench {dir}/live.sock --runtime=-1", 2, &["--runtime", "seconds"]),
    ("bench {dir}/live.sock --runtime=soon", 2, &["--runtime", "seconds"]),
    ("bench {dir}/live.sock --runtime=nan", 2, &["--runtime", "seconds"]),
    ("bench {dir}/live.sock --poll --wait", 2, &["--poll", "--wait"]),
    ("bench {dir}/live.sock --rw=write", 2, &["live.sock", "--destroy-data"]),
    ("bench {dir}/live.sock --rw=randwrite", 2, &["live.sock", "--destroy-data"]),
    ("bench {dir}/live.sock --rw=randrw --verify", 2, &["live.sock", "--destroy-data"]),
    ("bench {dir}/live.sock --verify", 2, &["--verify", "--rw=randrw"]),
];

/// What no person reads: Rust's types, Debug formats, and the words of its libraries.
const FOR_PROGRAMMERS: &[&str] = &[
    "panicked",
    "::",
    "..=",
    "Some(",
    "Err(",
    "Os {",
    "kind:",
    "Error(",
    "invalid digit",
    "target type",
    "float literal",
    "entity not found",
    "cannot parse",
    "SUN_LEN",
    "u16",
    "u32",
    "u64",
    "i32",
    "usize",
    "f64",
    "/proc/self/fd",
];

struct Bench {
    disk: Disk,
    live: Option<UnixListener>,
}

impl Bench {
    fn new() -> Self {
        let disk = Disk::new();
        let at = |name: &str| disk.dir.path().join(name);
        std::fs::write(at("empty.raw"), b"").unwrap();
        std::fs::write(at("small.raw"), [0; 511]).unwrap();
        std::fs::write(at("note.txt"), b"a note").unwrap();
        std::fs::create_dir(at("sub")).unwrap();
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let live = Some(UnixListener::bind(at("live.sock")).unwrap());
        Self { disk, live }
    }

    fn fill_in(&self, text: &str) -> String {
        let dir = self.disk.dir.path().to_str().unwrap();
        text.replace("{dir}", dir).replace("{long}", &"long".repeat(40)).replace("''", "")
    }

    /// Runs a line and judges what it said.
    #[track_caller]
    fn judge(&self, mut command: Command, line: &str, code: i32, words: &[&str]) -> Result<(), String> {
        let full = |word| match word {
            "S" => "--socket-path={dir}/x.sock",
            "B" => "--blk-file={dir}/disk.raw",
            other => other,
        };
        let direct = if self.disk.takes_direct() { None } else { Some("--direct=off") };
        let is_daemon = command.get_program() == env!("CARGO_BIN_EXE_vublkd");
        let name = if is_daemon { "vublkd" } else { "vublk" };
        command.args(line.split_whitespace().map(|word| self.fill_in(full(word))));
        command.args(direct.filter(|_| is_daemon && !line.contains("--direct")));
        let (status, stdout, said) = run(command);
        eprintln!("$ {name} {line}\n[{status}]\n{said}");
        let fault = |what: String| Err(format!("{name} {line}: {what}; it said:\n{said}"));
        if status.code() != Some(code) {
            return fault(format!("{status}, not {code}"));
        }
        if said.contains("serving ") {
            return fault("it did not serve".into());
        }
        if !stdout.is_empty() {
            return fault(format!("printed {stdout:?}"));
        }
        if let Some(word) = FOR_PROGRAMMERS.iter().find(|word| said.contains(**word)) {
            return fault(format!("{word:?} is for programmers"));
        }
        // A number may stand behind its text, never instead of it.
        if said
            .match_indices("os error")
            .any(|(at, _)| !said[..at].ends_with('(') || said[..at].ends_with(": ("))
        {
            return fault("an error number without its text".into());
        }
        match words.iter().map(|word| self.fill_in(word)).find(|word| !said.contains(word.as_str())) {
            Some(word) => fault(format!("without {word:?}")),
            None => Ok(()),
        }
    }
}

#[test]
fn each_is_refused_in_words_for_people() {
    let bench = Bench::new();
    let mut faults = Vec::new();
    for (program, lines) in [(env!("CARGO_BIN_EXE_vublkd"), VUBLKD), (env!("CARGO_BIN_EXE_vublk"), VUBLK)] {
        for (line, code, words) in lines {
            faults.extend(bench.judge(Command::new(program), line, *code, words).err());
        }
    }
    assert!(
        faults.is_empty(),
        "{} of {} command lines:\n{}",
        faults.len(),
        VUBLKD.len() + VUBLK.len(),
        faults.join("\n")
    );
    assert!(!bench.disk.dir.path().join("x.sock").exists(), "a socket was left behind");
    drop(bench.live);
}

/// Those that a running daemon refuses.
#[test]
fn what_a_daemon_refuses() {
    let bench = Bench::new();
    let options = Options { logical_block_size: Some(4096), ..Options::with(&["--supervise"]) };
    let _daemon = Daemon::start(URING, &bench.disk, &options);
    let other = Disk::new();
    let read_only = Daemon::start(URING, &other, &Options { read_only: true, ..options });
    let readable = format!("bench {} --rw=write --destroy-data", read_only.socket.display());
    let mut faults = Vec::new();
    let lines: [(&str, &[&str]); 12] = [
        ("resize {dir}/disk.sock.control 7E", &["{dir}/disk.raw", "too large", "smaller size"]),
        ("status {dir}/disk.raw", &["{dir}/disk.raw", "type disk instead"]),
        ("snapshot {dir}/disk.sock {dir}/no/such", &["{dir}/no/such", "Make its folder"]),
        ("resize {dir}/disk.sock.control 1M", &["{dir}/disk.raw", "only grows"]),
        ("resize {dir}/disk.sock.control 0", &["{dir}/disk.raw", "only grows"]),
        ("resize {dir}/disk.sock.control 67109376", &["{dir}/disk.raw", "multiple of 4096"]),
        ("upgrade {dir}/disk.sock.control --binary={dir}/none", &["{dir}/none"]),
        ("bench {dir}/disk.sock --queues=8", &["{dir}/disk.sock", "--queues"]),
        ("bench {dir}/disk.sock --bs=512", &["{dir}/disk.sock", "4096", "--bs"]),
        ("bench {dir}/disk.sock --bs=32M", &["{dir}/disk.sock", "--bs"]),
        ("bench {dir}/disk.sock --bs=1G --qd=256 --queues=4", &["{dir}/disk.sock", "--bs"]),
        (&readable, &["disk.sock", "read-only", "--rw=randread"]),
    ];
    for (line, words) in lines {
        faults.extend(bench.judge(Command::new(env!("CARGO_BIN_EXE_vublk")), line, 1, words).err());
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// What is right in more than one way of writing it.
#[test]
fn switches_and_sizes_as_people_write_them() {
    for (words, read_only, block) in [
        (&["--read-only=on", "--logical-block-size=4k"][..], true, 4096_u32),
        (&["--read-only", "--logical-block-size=4K"], true, 4096),
        (&["--read-only=off", "--logical-block-size=2KiB"], false, 2048),
        (&["--incoming=off", "--pin-memory=off", "--logical-block-size=512"], false, 512),
    ] {
        let disk = Disk::new();
        let daemon = Daemon::start(URING, &disk, &Options::with(words));
        daemon.wait_log(if read_only { "read-only" } else { "serving" });
        let device = Device::plain(&daemon);
        assert_eq!(device.frontend.config(20, 4).unwrap(), block.to_le_bytes(), "{words:?}");
        let features = device.frontend.ask64(msg::GET_FEATURES);
        assert_eq!(features & 1 << 5 != 0, read_only, "{words:?}");
    }
    let mut help = bare_vublkd();
    help.arg("--help");
    let (status, text, _) = run(help);
    assert!(status.success() && text.contains("--read-only[=<on|off>]"), "{text}");
}
