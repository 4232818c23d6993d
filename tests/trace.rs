//! `vublk trace`, and the probes for bpftrace.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use vublk::memory::mapping::Mapping;
use vublk::trace::Reader;

use crate::session::each_engine;
use crate::support::control::{self, Control, vublk};
use crate::support::daemon::{Daemon, Options, URING, bare_vublkd, vublkd};
use crate::support::device::{
    Device, IOERR, OK, Setup, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, range,
};
use crate::support::disk::{Disk, SECTOR};
use crate::support::frontend::Frontend;
use crate::support::gate::Gate;
use crate::support::load::empty_disk;
use crate::support::sys::{Deadline, installed, readable_within, root, skip};

/// A program that runs beside the daemon, such as `vublk trace`.
struct Beside {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Beside {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Self { child, lines }
    }

    /// A trace that has begun.
    fn trace(daemon: &Daemon, words: &[&str]) -> Self {
        let begun = || daemon.log().matches("requests are traced").count();
        let before = begun();
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.arg("trace").args(words);
        let tracer = Self::start(command);
        Deadline::new("the trace to begin").until_slowly(|| (begun() > before).then_some(()));
        tracer
    }

    #[track_caller]
    fn line(&mut self) -> String {
        if self.lines.buffer().is_empty() {
            Deadline::new("a line").readable(self.lines.get_ref());
        }
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        line
    }

    #[track_caller]
    fn request(&mut self) -> Value {
        let line = self.line();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"))
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end: how it ended, and what it printed and complained of.
    #[track_caller]
    fn end(&mut self) -> (ExitStatus, String, String) {
        let deadline = Deadline::new("the program beside the daemon to end");
        let status = deadline.until_slowly(|| self.child.try_wait().unwrap());
        let (mut said, mut complained) = (String::new(), String::new());
        self.lines.read_to_string(&mut said).unwrap();
        self.child.stderr.take().unwrap().read_to_string(&mut complained).unwrap();
        (status, said, complained)
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn at(daemon: &Daemon) -> String {
    control::path(daemon).to_str().unwrap().to_owned()
}

/// What a request was, without its times.
fn what(told: &Value) -> (u64, &str, u64, u64, &str) {
    let number = |name: &str| told[name].as_u64().unwrap_or_else(|| panic!("{name}: {told}"));
    let text = |name: &str| told[name].as_str().unwrap_or_else(|| panic!("{name}: {told}"));
    (number("queue"), text("operation"), number("sector"), number("bytes"), text("status"))
}

/// Reads of one page each that a worker fetches in one turn; gives their sectors.
fn batch(device: &mut Device) -> Vec<u64> {
    let sectors: Vec<u64> = (0..16).map(|at| at * 24).collect();
    for &sector in &sectors {
        let (segs, _) = device.place(T_IN, sector, &[], 4096);
        let head = device.rings[0].chain(&segs);
        device.rings[0].stage(head);
    }
    device.rings[0].publish();
    device.rings[0].kick.signal();
    for _ in &sectors {
        device.rings[0].wait_used("a read of a batch");
    }
    sectors
}

/// Each request of two queues, of a worker each, is in the trace as it was sent, and none of those before it.
#[test]
fn each_request_is_a_line() {
    each_engine(|engine| {
        let disk = Disk::new();
        let mut daemon = Daemon::start(engine, &disk, &Options::default());
        let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
        device.assert_serves(0);
        let mut tracer = Beside::trace(&daemon, &["--json", &at(&daemon)]);
        let mut sent = Vec::new();
        for at in 0..20 {
            let queue = usize::from(at % 3 == 0);
            assert_eq!(device.run(queue, T_IN, at * 8, &[], 4096 + 512 * at as usize).status, OK);
            sent.push((queue as u64, "read", at * 8, 4096 + 512 * at, "ok"));
        }
        assert_eq!(device.run(1, T_OUT, 640, &[7; 8192], 0).status, OK);
        assert_eq!(device.run(0, T_FLUSH, 0, &[], 0).status, OK);
        let ranges = [range(64, 64, 0), range(256, 8, 0)].concat();
        assert_eq!(device.run(1, T_DISCARD, 0, &ranges, 0).status, OK);
        assert_eq!(device.run(0, T_WRITE_ZEROES, 0, &range(512, 128, 0), 0).status, OK);
        assert_eq!(device.run(1, T_GET_ID, 0, &[], 20).status, OK);
        assert_eq!(device.run(0, T_IN, 1 << 40, &[], 512).status, IOERR, "behind the end");
        sent.extend([
            (1, "write", 640, 8192, "ok"),
            (0, "flush", 0, 0, "ok"),
            (1, "discard", 64, 72 * 512, "ok"),
            (0, "zeroes", 512, 128 * 512, "ok"),
            (1, "other", 0, 20, "ok"),
            (0, "other", 0, 0, "io"),
        ]);
        let told: Vec<Value> = sent.iter().map(|_| tracer.request()).collect();
        assert_eq!(told.iter().map(what).collect::<Vec<_>>(), sent);
        let times: Vec<f64> = told.iter().map(|one| one["time"].as_f64().unwrap()).collect();
        assert!(times.is_sorted() && times[0] > 1e9, "{times:?}");
        assert!(told[..20].iter().all(|one| one["latency_ns"].as_u64() > Some(0)), "{told:?}");
        // Those that are counted together are told one by one.
        let sectors = batch(&mut device);
        let mut told: Vec<u64> = sectors.iter().map(|_| what(&tracer.request()).2).collect();
        told.sort_unstable();
        assert_eq!(told, sectors);
        // The counters go on as ever.
        let status = Control::of(&daemon).call("status", json!({})).unwrap();
        assert_eq!(status["counters"]["requests"], json!(27 + 16));
        tracer.signal(Signal::TERM);
        tracer.end();
        daemon.wait_log("requests are not traced any more");
        assert_eq!(device.run(1, T_FLUSH, 0, &[], 0).status, OK);
        drop(device);
        daemon.stop();
    });
}

/// As people read it; `--seconds` ends it, and says nothing of what was not slow.
#[test]
fn for_people_and_for_a_time() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    let mut tracer = Beside::trace(&daemon, &["--seconds=1", &at(&daemon)]);
    device.read(24, 8);
    let (status, said, complained) = tracer.end();
    assert!(status.success() && complained.is_empty(), "{status}: {complained}");
    let lines: Vec<Vec<&str>> = said.lines().map(|line| line.split_whitespace().collect()).collect();
    let [head, line] = lines.as_slice() else { panic!("{said}") };
    assert_eq!(head[1..], ["QUEUE", "OP", "SECTOR", "BYTES", "STATUS", "LAT(ms)"]);
    assert_eq!(line[1..6], ["0", "read", "24", "4096", "ok"], "{said}");
    assert!(line[0].parse::<f64>().unwrap() < 2.0 && line[6].parse::<f64>().unwrap() > 0.0, "{said}");
    for words in
        [&["trace", "--slow=10", "x"][..], &["trace", "--slow=-1ms", "x"], &["trace", "--seconds=0", "x"]]
    {
        assert_eq!(vublk(words).0.code(), Some(2), "{words:?}");
    }
    drop(device);
    daemon.stop();
}

/// A trace whose time was over before the tool has read the answer, as on a busy machine, has not failed.
#[test]
fn an_answer_that_takes_as_long_as_the_trace() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let listener = UnixListener::bind(&path).unwrap();
    let tool = std::thread::spawn(move || vublk(&["trace", "--seconds=1", path.to_str().unwrap()]));
    Deadline::new("the tool").readable(&listener);
    let (client, _) = listener.accept().unwrap();
    let mut line = String::new();
    // Without room for descriptors they are closed, as when the trace is over.
    BufReader::new(&client).read_line(&mut line).unwrap();
    assert!(line.contains(r#""method":"trace""#), "{line}");
    let asked = std::time::Instant::now();
    Deadline::new("a second").until_slowly(|| (asked.elapsed() > Duration::from_secs(1)).then_some(()));
    (&client).write_all(b"{\"jsonrpc\":\"2.0\",\"id\":1,\"result\":{\"rings\":0,\"records\":0}}\n").unwrap();
    let (status, said, complained) = tool.join().unwrap();
    assert!(status.success() && said.lines().count() == 1, "{said}{complained}");
}

/// A read that the disk holds is in the trace of slow requests, and the quick ones beside it are not.
#[test]
fn slow_requests() {
    let Some((gate, store)) = Gate::under_loop("trace::slow_requests", vec![0; 8 << 20]) else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let mut daemon = Daemon::spawn(URING, vublkd("io_uring", &socket, &store.path), socket);
    daemon.wait_listening();
    let mut device = Device::plain(&daemon);
    let mut tracer = Beside::trace(&daemon, &["--json", "--slow=1s", &at(&daemon)]);
    device.read(0, 8);
    gate.close(1, 1);
    let pending = device.submit(0, T_IN, 512, &[], 4096);
    Deadline::new("the read to be held").until_slowly(|| (gate.held() == 1).then_some(()));
    let held = std::time::Instant::now();
    Deadline::new("a second").until_slowly(|| (held.elapsed() > Duration::from_secs(1)).then_some(()));
    gate.open();
    let used = device.rings[0].wait_used("the read");
    assert_eq!(device.outcome(&pending, used).status, OK);
    let told = tracer.request();
    assert_eq!(what(&told), (0, "read", 512, 4096, "ok"));
    assert!(told["latency_ns"].as_u64() > Some(1_000_000_000), "{told}");
    tracer.signal(Signal::TERM);
    assert_eq!(tracer.end().1, "", "a quick request is in it");
    drop(device);
    daemon.stop();
}

/// One disk of several is traced, and the other is not.
#[test]
fn one_of_several_disks() {
    let (one, other) = (empty_disk(), empty_disk());
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let table = |name: &str, disk: &Disk| {
        let (image, socket) = (disk.path.display(), path(name));
        format!(
            "[[disk]]\nname = \"{name}\"\nblk-file = \"{image}\"\nsocket-path = \"{}\"\n",
            socket.display()
        )
    };
    let text = [table("a.sock", &one), table("b.sock", &other)].concat();
    let control = path("vm.control");
    std::fs::write(path("vm.toml"), format!("control = \"{}\"\n{text}", control.display())).unwrap();
    let mut command = bare_vublkd();
    command.arg("--config").arg(path("vm.toml")).arg("--log-level=debug");
    let mut daemon = Daemon::spawn(URING, command, path("a.sock"));
    let [mut a, mut b] = ["a.sock", "b.sock"].map(|name| {
        daemon.wait_log(&format!("{name}: serving "));
        let stream = std::os::unix::net::UnixStream::connect(path(name)).unwrap();
        Device::over(Frontend::new(stream), Setup::default())
    });
    let mut tracer = Beside::trace(&daemon, &["--json", "--disk=b.sock", control.to_str().unwrap()]);
    a.read(8, 8);
    b.read(16, 8);
    assert_eq!(what(&tracer.request()), (0, "read", 16, 4096, "ok"));
    drop((a, b));
    daemon.stop();
    let (status, _, complained) = tracer.end();
    assert!(status.code() == Some(1) && complained.contains("was stopped"), "{status}: {complained}");
}

/// A tool that is killed ends its trace, a second one has to wait for that, and an upgrade ends one in words. The guest
/// notices nothing.
#[test]
fn traces_end() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::with(&["--supervise"]));
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let tracer = Beside::trace(&daemon, &[&at(&daemon)]);
    let (status, _, complained) = vublk(&["trace", &at(&daemon)]);
    assert!(status.code() == Some(1) && complained.contains("traced already"), "{status}: {complained}");
    device.assert_serves(0);
    tracer.signal(Signal::KILL);
    daemon.wait_log("requests are not traced any more");
    device.assert_serves(0);
    let mut tracer = Beside::trace(&daemon, &["--json", &at(&daemon)]);
    device.read(8, 8);
    assert_eq!(what(&tracer.request()).2, 8);
    let (status, _, complained) = vublk(&["upgrade", &at(&daemon)]);
    assert!(status.success(), "{complained}");
    device.assert_serves(0);
    let (status, said, complained) = tracer.end();
    assert!(status.code() == Some(1) && said.is_empty(), "{status}: {said}");
    assert!(
        complained.contains("the trace has ended, because vublkd was stopped or upgraded"),
        "{complained}"
    );
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}

fn memory(bytes: u64, seals: SealFlags) -> File {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("trace", flags).unwrap());
    file.set_len(bytes).unwrap();
    fcntl_add_seals(&file, seals).unwrap();
    file
}

/// What cannot be written to safely is refused in words; and a ring that is not read in time says how much is missing.
#[test]
fn memory_that_is_refused_and_memory_that_is_small() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options { queues: Some(1), ..Options::default() });
    let mut device = Device::plain(&daemon);
    let mut control = Control::of(&daemon);
    let (ours, pipe) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let small = (8 + 512 * 5) * 8;
    let plain = File::open(&disk.path).unwrap();
    for (memory, pipe, why) in [
        (&memory(small, SealFlags::empty()), pipe.as_fd(), "could shrink: it has to be sealed"),
        (
            &memory(small, SealFlags::GROW | SealFlags::WRITE),
            pipe.as_fd(),
            "could shrink: it has to be sealed",
        ),
        (&memory(small, SealFlags::SHRINK | SealFlags::WRITE), pipe.as_fd(), "cannot be mapped"),
        (
            &memory(small - 1, SealFlags::SHRINK),
            pipe.as_fd(),
            "has 20543 bytes: for 1 workers it has to have 20544",
        ),
        (&memory(0, SealFlags::SHRINK), pipe.as_fd(), "has 0 bytes"),
        (&plain, pipe.as_fd(), "has to be a memfd"),
        (&memory(small, SealFlags::SHRINK), plain.as_fd(), "has to be the end of a pipe"),
    ] {
        let (_, said) = control.call_with("trace", json!({}), &[memory.as_fd(), pipe]).unwrap_err();
        assert!(said.contains(why), "{said:?} for {why:?}");
    }
    let good = memory(small, SealFlags::SHRINK);
    for fds in [&[][..], &[good.as_fd()], &[pipe.as_fd(), good.as_fd()]] {
        let (_, said) = control.call_with("trace", json!({}), fds).unwrap_err();
        assert!(said.contains("two descriptors") || said.contains("has to be the end of a pipe"), "{said}");
    }
    device.assert_serves(0);
    // Descriptors that a call has no use for are closed, and change nothing of it.
    control.call_with("status", json!({}), &[good.as_fd(), pipe.as_fd()]).unwrap();
    let begun = control.call_with("trace", json!({"seconds": 600}), &[good.as_fd(), pipe.as_fd()]).unwrap();
    assert_eq!(begun, json!({"rings": 1, "records": 512}));
    drop(pipe);
    for at in 0..700 {
        assert_eq!(device.run(0, T_IN, at, &[], SECTOR).status, OK);
    }
    let map = Arc::new(Mapping::new(&good, 0, small).unwrap());
    let (mut reader, mut got) = (Reader::new(&map, 0, 512), Vec::new());
    let lost = reader.read(|record| got.push(record.sector));
    assert_eq!((lost, got), (189, (189..700).collect::<Vec<_>>()));
    // It has a time.
    assert!(!readable_within(ours.as_fd(), Duration::ZERO), "the trace has ended");
    drop(ours);
    daemon.wait_log("requests are not traced any more");
    let (ours, pipe) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    control.call_with("trace", json!({"seconds": 1}), &[good.as_fd(), pipe.as_fd()]).unwrap();
    drop(pipe);
    Deadline::new("the trace to end by its time").readable(&ours);
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}

/// The probes that a program has: name and arguments, from the notes of the ELF file.
fn probes(program: &str) -> Vec<(String, usize)> {
    let bytes = std::fs::read(program).unwrap();
    let number = |at: usize, len: usize| {
        bytes[at..at + len].iter().rev().fold(0_usize, |sum, byte| sum << 8 | usize::from(*byte))
    };
    assert_eq!(bytes[..5], [0x7f, b'E', b'L', b'F', 2], "64 bits");
    // Section headers: where they are, how long one is, how many.
    let (table, size, count) = (number(0x28, 8), number(0x3a, 2), number(0x3c, 2));
    let mut found = Vec::new();
    for section in (0..count).map(|n| table + n * size).filter(|&at| number(at + 4, 4) == 7) {
        let (mut at, end) =
            (number(section + 0x18, 8), number(section + 0x18, 8) + number(section + 0x20, 8));
        while at + 12 <= end {
            let [name, described, kind] = [at, at + 4, at + 8].map(|at| number(at, 4));
            let from = at + 12 + name.next_multiple_of(4);
            if &bytes[at + 12..at + 12 + name] == b"stapsdt\0" && kind == 3 {
                // Three addresses; the last is that of the probe's semaphore.
                assert_ne!(number(from + 16, 8), 0, "without a semaphore the arguments are always computed");
                let texts = String::from_utf8_lossy(&bytes[from + 24..from + described]).into_owned();
                let texts: Vec<&str> = texts.split('\0').collect();
                found.push((format!("{}:{}", texts[0], texts[1]), texts[2].split_whitespace().count()));
            }
            at = from + described.next_multiple_of(4);
        }
    }
    found.sort();
    found.dedup();
    found
}

#[test]
fn probes_are_in_the_program() {
    let wanted = [("vublk:request__begin", 4), ("vublk:request__end", 6)];
    let wanted = wanted.map(|(name, arguments)| (name.to_owned(), arguments));
    assert_eq!(probes(env!("CARGO_BIN_EXE_vublkd")), wanted);
}

/// bpftrace sees each request begin and end, with what it was.
#[test]
fn probes_by_bpftrace() {
    let test = "trace::probes_by_bpftrace";
    if !root(test, "bpftrace attaches to no other user's probes") || !installed("bpftrace", test) {
        return;
    }
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::new(&daemon, Setup { queues: 2, ..Setup::default() });
    device.assert_serves(0);
    let pid = daemon.pid().to_string();
    let program = "BEGIN { printf(\"ready\\n\"); }
        usdt:vublkd:vublk:request__begin { printf(\"begin %d %d %ld %ld\\n\", arg0, arg1, arg2, arg3); }
        usdt:vublkd:vublk:request__end {
            printf(\"end %d %d %ld %ld %d %d\\n\", arg0, arg1, arg2, arg3, arg4, arg5 > 0);
        }";
    let program = program.replace("usdt:vublkd", &format!("usdt:{}", env!("CARGO_BIN_EXE_vublkd")));
    let mut command = Command::new("bpftrace");
    command.args(["-p", &pid, "-e", &program]);
    let mut tracer = Beside::start(command);
    let ready = loop {
        match tracer.line() {
            line if line.is_empty() => break false,
            line if line == "ready\n" => break true,
            _ => {}
        }
    };
    if !ready {
        let (_, _, why) = tracer.end();
        return skip(test, &format!("bpftrace cannot attach here: {}", why.trim()));
    }
    assert_eq!(device.run(1, T_IN, 80, &[], 4096).status, OK);
    assert_eq!(device.run(0, T_IN, 1 << 40, &[], 512).status, IOERR);
    for wanted in ["begin 1 0 80 4096\n", "end 1 0 80 4096 0 1\n", "end 0 3 0 0 1 0\n"] {
        assert_eq!(tracer.line(), wanted);
    }
    let mut begun = batch(&mut device);
    let mut ended = begun.clone();
    while !begun.is_empty() || !ended.is_empty() {
        let line = tracer.line();
        let words: Vec<&str> = line.split_whitespace().collect();
        let left = if words[0] == "begin" { &mut begun } else { &mut ended };
        let at = left.iter().position(|sector| words[3] == sector.to_string()).expect(&line);
        left.swap_remove(at);
    }
    drop(tracer); // killed: the kernel takes the probes out, which takes its time on a busy machine
    device.assert_serves(0);
    drop(device);
    daemon.stop();
}
