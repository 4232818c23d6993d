//! systemd as far as a daemon with a descriptor store sees it: the notify socket,
//! the store, and the descriptors and names that a start passes on. That the units
//! are valid is systemd's own tool's to say.

use std::ffi::OsStr;
use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::daemon::{Daemon, URING, pass_fd};
use super::disk::Disk;
use super::sys::Deadline;

type Store = Arc<Mutex<Vec<(String, OwnedFd)>>>;

/// One service with a socket and a store.
pub struct Manager {
    socket: PathBuf,
    listener: UnixListener,
    notify: PathBuf,
    store: Store,
    /// Numbers of the messages to itself that the thread has seen.
    seen: Arc<Mutex<u64>>,
    asked: u64,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    pub fn new(dir: &Path) -> Self {
        let (socket, notify) = (dir.join("disk.sock"), dir.join("notify"));
        let listener = UnixListener::bind(&socket).unwrap();
        let inbox = UnixDatagram::bind(&notify).unwrap();
        let (store, seen) = (Store::default(), Arc::new(Mutex::new(0)));
        let thread = std::thread::spawn({
            let (store, seen) = (Arc::clone(&store), Arc::clone(&seen));
            move || while take(&inbox, &store, &seen) {}
        });
        Self { socket, listener, notify, store, seen, asked: 0, thread: Some(thread) }
    }

    fn tell(&self, word: &str) {
        UnixDatagram::unbound().unwrap().send_to(word.as_bytes(), &self.notify).unwrap();
    }

    /// Waits until every message so far was taken.
    #[track_caller]
    fn settle(&mut self) {
        self.asked += 1;
        self.tell(&format!("X_SEEN={}\n", self.asked));
        Deadline::new("the notify socket")
            .until_slowly(|| (*self.seen.lock().unwrap() == self.asked).then_some(()));
    }

    /// The daemon's file of state.
    #[track_caller]
    pub fn state(&mut self) -> File {
        self.settle();
        let store = self.store.lock().unwrap();
        let (_, fd) = store.iter().find(|(name, _)| name == "vublk-1").expect("a file of state");
        fd.try_clone().unwrap().into()
    }

    /// Starts the service with what is stored, as systemd does once the last
    /// process is gone.
    #[track_caller]
    pub fn start(&mut self, disk: &Disk) -> Daemon {
        self.start_with(disk, &[] as &[&str])
    }

    /// The same with further arguments.
    #[track_caller]
    pub fn start_with(&mut self, disk: &Disk, extra: &[impl AsRef<OsStr>]) -> Daemon {
        self.settle();
        let store = self.store.lock().unwrap();
        let mut command = Command::new("sh");
        // LISTEN_PID is the process that the shell becomes.
        command.args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh", env!("CARGO_BIN_EXE_vublkd"), "--fd-store"]);
        command.arg(format!("--blk-file={}", disk.path.display())).arg("--log-level=debug").args(extra);
        if !disk.takes_direct() {
            command.arg("--direct=off");
        }
        let names: Vec<&str> =
            std::iter::once("disk.socket").chain(store.iter().map(|(n, _)| n.as_str())).collect();
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        command.env("NOTIFY_SOCKET", &self.notify);
        // Out of the way of the numbers that they get.
        let high = |fd: &dyn AsFdDyn| rustix::io::fcntl_dupfd_cloexec(fd.fd(), 1000).unwrap();
        let mut copies = vec![high(&self.listener)];
        copies.extend(store.iter().map(|(_, fd)| high(fd)));
        for (number, fd) in (3..).zip(&copies) {
            assert!(fd.as_raw_fd() >= 1000);
            pass_fd(&mut command, fd.as_fd(), number);
        }
        Daemon::spawn(URING, command, self.socket.clone())
    }

    /// Lets go of sockets whose other end is gone, as a systemd does that knows no
    /// FDPOLL=0.
    #[track_caller]
    pub fn drop_hung_up(&mut self) {
        self.settle();
        let hung_up = |fd: &OwnedFd| vublk::sys::hung_up_within(fd, std::time::Duration::ZERO).unwrap();
        self.store.lock().unwrap().retain(|(_, fd)| !hung_up(fd));
    }

    /// How many descriptors are stored.
    #[track_caller]
    pub fn stored(&mut self) -> usize {
        self.settle();
        self.store.lock().unwrap().len()
    }
}

/// `AsFd` without its lifetimes in a closure's signature.
trait AsFdDyn {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_>;
}

impl<T: AsFd> AsFdDyn for T {
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.as_fd()
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.tell("X_END=1\n");
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking());
    }
}

/// One message. False: the last.
fn take(inbox: &UnixDatagram, store: &Store, seen: &Mutex<u64>) -> bool {
    let mut bytes = [0; 4096];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(inbox, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .unwrap()
        .bytes;
    let fds: Vec<OwnedFd> = control
        .drain()
        .flat_map(|item| match item {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        })
        .collect();
    let text = String::from_utf8_lossy(&bytes[..got]).into_owned();
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let mut store = store.lock().unwrap();
    if value("FDSTOREREMOVE").is_some() {
        let name = value("FDNAME").expect("a name to remove");
        store.retain(|(n, _)| n != name);
    } else if value("FDSTORE").is_some() {
        let name = value("FDNAME").unwrap_or("stored");
        // Or it would let go of a socket whose other end hangs up.
        assert_eq!(value("FDPOLL"), Some("0"), "{name}");
        for fd in fds {
            // As systemd does: what it has already is dropped.
            if !store.iter().any(|(_, other)| vublk::sys::is_same_file(&fd, other)) {
                store.push((name.to_owned(), fd));
            }
        }
    } else if value("BARRIER").is_some() {
        drop(fds);
    }
    if let Some(number) = value("X_SEEN") {
        *seen.lock().unwrap() = number.parse().unwrap();
    }
    value("X_END").is_none()
}
