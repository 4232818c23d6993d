//! The program of a successor, looked at before anything is given up for it.
//!
//! What it is: a [`Program`]: an open file that is judged, asked which states it can go on from, and executed, all by
//! its descriptor.
//!
//! What it is not: it starts no daemon; [`crate::supervise`] does.
//!
//! Invariant: what is executed is the file that was judged, whatever its path leads to by then.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::sys;

/// How long a program may take to say which states it reads.
const ANSWER_TIME: Duration = Duration::from_secs(1);
/// Who may have written the program of a successor: group and others may not.
const WRITABLE: u32 = 0o022;

/// See the head of the file.
#[derive(Debug)]
pub struct Program {
    file: File,
    path: PathBuf,
}

impl Program {
    /// Opens a program, without waiting, whatever is at its path.
    ///
    /// # Errors
    /// A sentence that names the path.
    pub fn open(path: &Path) -> Result<Self, String> {
        let open = || {
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("is no program")) }
        };
        let file = open().map_err(|e| format!("{}: {e}", path.display()))?;
        Ok(Self { file, path: path.into() })
    }

    /// Where the program of this process is, or was before another was installed there.
    #[must_use]
    pub fn own_path() -> PathBuf {
        let path = std::env::current_exe().unwrap_or_default();
        // proc(5): what is appended once the file is not there any more.
        let text = path.to_string_lossy();
        text.strip_suffix(" (deleted)").map_or_else(|| path.clone(), PathBuf::from)
    }

    /// For messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What a process executes that has the descriptor.
    #[must_use]
    pub fn executable(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.file.as_raw_fd()).into()
    }

    /// Lets children have the descriptor, which a script is read through, or not.
    pub fn share(&self, with_children: bool) {
        let flags = if with_children { FdFlags::empty() } else { FdFlags::CLOEXEC };
        // A descriptor that is open can be marked.
        let _marked = rustix::io::fcntl_setfd(&self.file, flags);
    }

    /// Whether it may follow a daemon whose state has the layout `version`. `other`: when that is readable there is
    /// something more urgent to do.
    ///
    /// # Errors
    /// A sentence that names the path.
    pub fn may_follow(&self, version: u32, other: Option<BorrowedFd<'_>>) -> Result<(), String> {
        let why = match self.is_trusted().and_then(|trusted| {
            if trusted { self.states(other) } else { Err(io::ErrorKind::PermissionDenied.into()) }
        }) {
            Ok(states) if states.contains(&version) => return Ok(()),
            Ok(states) if states.is_empty() => {
                "is no vublkd, or an older one: it does not say which states it can go on from".into()
            }
            Ok(states) => format!(
                "cannot go on from the running daemon's state: that has layout {version}, and it reads {}",
                states.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")
            ),
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                "is not executed: it has to belong to root or to the owner of the running vublkd, its group and others \
                 may not write to it (chown root, chmod 755), and it has to be executable"
                    .into()
            }
            Err(e) => format!("cannot be asked which states it can go on from: {e}"),
        };
        Err(format!("{}: {why}", self.path.display()))
    }

    /// Whether the daemon cannot have made it: a guest that has taken over a daemon, and writes to its disk, must not
    /// run as the parent does.
    fn is_trusted(&self) -> io::Result<bool> {
        let (program, running) = (self.file.metadata()?, std::fs::metadata("/proc/self/exe")?);
        Ok((program.uid() == 0 || program.uid() == running.uid()) && program.mode() & WRITABLE == 0)
    }

    /// The layouts of state that it can go on from.
    fn states(&self, other: Option<BorrowedFd<'_>>) -> io::Result<Vec<u32>> {
        self.share(true);
        let child = Command::new(self.executable())
            .arg("--print-state-version")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        self.share(false);
        let mut child = child?;
        let ended = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
        let fds: Vec<_> = std::iter::once(ended.as_fd()).chain(other).collect();
        crate::workers::wait_for(&fds, Some(ANSWER_TIME))?;
        let answered = sys::readable_within(&ended, Duration::ZERO)?;
        if !answered {
            child.kill()?;
        }
        let status = child.wait()?;
        let mut said = [0; 64];
        // What it has written is there: it has ended.
        let got = match child.stdout {
            Some(mut pipe) if answered && status.success() => {
                rustix::io::ioctl_fionbio(&pipe, true)?;
                pipe.read(&mut said)?
            }
            _ => 0,
        };
        let text = String::from_utf8_lossy(said.get(..got).unwrap_or_default()).into_owned();
        Ok(text.split_whitespace().map_while(|word| word.parse().ok()).collect())
    }
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
