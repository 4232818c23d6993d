//! `vublk top` on a terminal: a disk under load, keys, another size, and the terminal as it was when it ends.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::support::control::vublk;
use crate::support::daemon::{Daemon, Options, URING};
use crate::support::device::{Device, OK, T_IN};
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, readable_within, terminal};

/// What a person sees: the cells of a terminal, as far as `vublk top` uses one.
struct Screen {
    cells: Vec<Vec<char>>,
    at: (usize, usize),
    /// What has come of an escape sequence.
    escape: Option<String>,
    /// Bytes of a character that is not whole.
    partial: Vec<u8>,
    alternate: bool,
    cursor: bool,
}

impl Screen {
    fn new(columns: usize, lines: usize) -> Self {
        let cells = vec![vec![' '; columns]; lines];
        Self { cells, at: (0, 0), escape: None, partial: Vec::new(), alternate: false, cursor: true }
    }

    fn take(&mut self, bytes: &[u8]) {
        self.partial.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&self.partial) {
            Ok(text) => text.len(),
            Err(e) => e.valid_up_to(),
        };
        let bytes: Vec<u8> = self.partial.drain(..whole).collect();
        String::from_utf8(bytes).unwrap().chars().for_each(|c| self.character(c));
    }

    fn character(&mut self, c: char) {
        let Some(mut escape) = self.escape.take() else {
            match c {
                '\x1b' => self.escape = Some(String::new()),
                '\r' => self.at.1 = 0,
                '\n' => self.at.0 += 1,
                c => {
                    assert!(!c.is_control(), "{c:?} is drawn");
                    let (line, column) = self.at;
                    if let Some(cell) = self.cells.get_mut(line).and_then(|line| line.get_mut(column)) {
                        *cell = c;
                    }
                    self.at.1 += 1;
                }
            }
            return;
        };
        escape.push(c);
        if escape == "[" || !c.is_ascii_alphabetic() {
            self.escape = Some(escape);
            return;
        }
        let numbers: Vec<usize> =
            escape[1..escape.len() - 1].split(';').filter_map(|n| n.parse().ok()).collect();
        match (escape.as_str(), c) {
            ("[?1049h", _) => self.alternate = true,
            ("[?1049l", _) => self.alternate = false,
            ("[?25h", _) => self.cursor = true,
            ("[?25l", _) => self.cursor = false,
            (_, 'H') => {
                let [line, column] = [0, 1].map(|n| numbers.get(n).copied().unwrap_or(1).max(1) - 1);
                self.at = (line, column);
            }
            ("[2J", _) => self.cells.iter_mut().for_each(|line| line.fill(' ')),
            (_, 'm' | 'h' | 'l' | 'J' | 'K' | 'n') => {}
            _ => panic!("a sequence that is unknown here: {escape:?}"),
        }
    }

    fn lines(&self) -> Vec<String> {
        self.cells.iter().map(|line| line.iter().collect::<String>().trim_end().to_owned()).collect()
    }
}

/// `vublk top` on a terminal of its own.
struct Top {
    child: Child,
    person: File,
    end: OwnedFd,
    before: libc::termios,
    screen: Screen,
}

fn settings(terminal: &OwnedFd) -> libc::termios {
    // SAFETY: all zeroes is a valid termios, which the call fills.
    unsafe {
        let mut settings = std::mem::zeroed();
        assert_eq!(libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings), 0);
        settings
    }
}

fn set_size(terminal: &File, columns: u16, lines: u16) {
    let size = libc::winsize { ws_row: lines, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: reads one winsize.
    assert_eq!(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }, 0);
}

impl Top {
    fn start(disk: &str) -> Self {
        let (person, end) = terminal();
        set_size(&person, 80, 24);
        let before = settings(&end);
        let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
        command.args(["top", disk]).env("TERM", "xterm");
        command.stdin(end.try_clone().unwrap()).stdout(end.try_clone().unwrap());
        command.stderr(end.try_clone().unwrap());
        // SAFETY: system calls that may be made between fork and exec. The terminal is that of a session of its own: its
        // signals go to the program.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Self { child, person, end, before, screen: Screen::new(80, 24) }
    }

    fn look(&mut self) {
        let mut bytes = [0; 65536];
        while readable_within(self.person.as_fd(), Duration::ZERO) {
            let Ok(got) = self.person.read(&mut bytes) else { return };
            self.screen.take(&bytes[..got]);
        }
    }

    /// Looks until the screen is as it should be, while something goes on.
    #[track_caller]
    fn until(
        &mut self,
        what: &str,
        mut goes_on: impl FnMut(),
        is_so: impl Fn(&[String]) -> bool,
    ) -> Vec<String> {
        let since = Instant::now();
        loop {
            goes_on();
            self.look();
            let lines = self.screen.lines();
            if is_so(&lines) {
                return lines;
            }
            assert!(since.elapsed() < Duration::from_secs(10), "not seen: {what}\n{}", lines.join("\n"));
            readable_within(self.person.as_fd(), Duration::from_millis(5));
        }
    }

    fn types(&mut self, keys: &str) {
        self.person.write_all(keys.as_bytes()).unwrap();
    }

    /// It has ended, and the terminal is as it was.
    #[track_caller]
    fn ends(mut self) {
        let deadline = Deadline::new("vublk top to end");
        let status = deadline.until_slowly(|| {
            self.look();
            self.child.try_wait().unwrap()
        });
        self.look();
        assert!(status.success(), "{status}");
        assert!(!self.screen.alternate && self.screen.cursor, "the screen is not as it was");
        let after = settings(&self.end);
        let flags = |of: &libc::termios| (of.c_iflag, of.c_oflag, of.c_cflag, of.c_lflag, of.c_cc);
        assert_eq!(flags(&after), flags(&self.before));
    }
}

impl Drop for Top {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

fn row<'a>(lines: &'a [String], name: &str) -> Option<Vec<&'a str>> {
    let line = lines.iter().find(|line| line.split_whitespace().next() == Some(name))?;
    Some(line.split_whitespace().collect())
}

fn has(lines: &[String], word: &str) -> bool {
    lines.iter().any(|line| line.contains(word))
}

#[test]
fn a_disk_under_load_on_a_terminal() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    let mut load = || assert_eq!(device.run(0, T_IN, 8, &[], 4096).status, OK);
    load();
    let mut top = Top::start(daemon.socket.to_str().unwrap());
    let lines = top.until("reads, and the map of their latencies", &mut load, |lines| {
        row(lines, "disk").is_some_and(|row| row.get(1).is_some_and(|reads| *reads != "0"))
            && lines.iter().any(|line| line.contains('┤') && line.contains(['░', '▒', '▓', '█']))
    });
    assert!(top.screen.alternate && !top.screen.cursor);
    assert!(lines[0].starts_with("vublk top   1 disk   by name"), "{lines:#?}");
    assert!(lines[23].starts_with("q quit"), "{lines:#?}");
    top.types("s");
    top.until("another order", &mut load, |lines| has(lines, "by requests per second"));
    top.types("?");
    top.until("the help", &mut load, |lines| has(lines, "select a disk"));
    top.types("?");
    // Larger, and smaller.
    for (columns, lines) in [(150, 40), (60, 15)] {
        top.look();
        top.screen.cells = vec![vec![' '; columns]; lines];
        set_size(&top.person, columns as u16, lines as u16);
        let seen = top.until("the whole of the new screen", &mut load, |seen| {
            seen[lines - 1].starts_with("q quit") && row(seen, "disk").is_some()
        });
        assert_eq!(has(&seen, "inflight"), columns == 150, "{seen:#?}");
    }
    // A daemon that hangs: keys are obeyed meanwhile, and it is told.
    daemon.signal(Signal::STOP);
    let typed = Instant::now();
    top.types("p");
    top.until("the pause", || {}, |lines| has(lines, "PAUSED"));
    assert!(typed.elapsed() < Duration::from_secs(2), "{:?}", typed.elapsed());
    top.types("p");
    top.until(
        "the silence",
        || {},
        |lines| has(lines, "1 without an answer") && has(lines, "no answer for "),
    );
    daemon.signal(Signal::CONT);
    top.until("the answer", || {}, |lines| !has(lines, "without an answer"));
    top.types("q");
    top.ends();
    drop(device);
    daemon.stop();
}

#[test]
fn a_signal_ends_it() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    for signal in [Signal::TERM, Signal::HUP] {
        let mut top = Top::start(daemon.socket.to_str().unwrap());
        top.until("the disk", || {}, |lines| row(lines, "disk").is_some());
        kill_process(Pid::from_child(&top.child), signal).unwrap();
        top.ends();
    }
    let mut top = Top::start(daemon.socket.to_str().unwrap());
    top.until("the disk", || {}, |lines| row(lines, "disk").is_some());
    top.types("\x03");
    top.ends();
    daemon.stop();
}

/// One screen as text, for documents and for who has no terminal.
#[test]
fn one_screen_as_text() {
    let disk = Disk::new();
    let mut daemon = Daemon::start(URING, &disk, &Options::default());
    let mut device = Device::plain(&daemon);
    device.assert_serves(0);
    let place = daemon.socket.to_str().unwrap();
    let (status, text, complained) = vublk(&["top", "--once=1", place]);
    assert!(status.success(), "{complained}");
    let lines: Vec<String> = text.lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 24, "{text}");
    assert!(row(&lines, "disk").is_some() && !text.contains('\x1b'), "{text}");
    let (status, _, complained) = vublk(&["top", place]);
    assert!(status.code() == Some(1) && complained.contains("vublk top --once"), "{complained}");
    let (status, _, complained) = vublk(&["top", "--once", "no-disk-is-called-so"]);
    assert!(status.code() == Some(1) && complained.contains("no disk has this name"), "{complained}");
    drop(device);
    daemon.stop();
}
