//! Stops one thread of a process while its other threads run on, as on a busy
//! host. The thread is traced for that; it runs again when the tracer detaches or
//! ends.

use std::ptr;

use super::daemon::Daemon;
use super::sys::Deadline;

/// A thread that is stopped as long as this lives. Only the thread that made this
/// value can let it run again.
pub struct Frozen(libc::pid_t);

impl Frozen {
    /// Stops the thread of this name; the reason when this machine forbids tracing.
    #[track_caller]
    pub fn thread(daemon: &Daemon, name: &str) -> Result<Self, String> {
        Self::of(daemon.pid(), name)
    }

    /// The same of any process.
    #[track_caller]
    pub fn of(pid: u32, name: &str) -> Result<Self, String> {
        let all = threads_of(pid);
        let (tid, _) = *all.iter().find(|(_, comm)| comm == name).unwrap_or_else(|| {
            panic!("the daemon has no thread {name}: {all:?}");
        });
        let request = |request| {
            // SAFETY: neither request reads or writes memory of this process.
            let result = unsafe { libc::ptrace(request, tid, ptr::null_mut::<u8>(), ptr::null_mut::<u8>()) };
            if result == 0 { Ok(()) } else { Err(format!("ptrace: {}", std::io::Error::last_os_error())) }
        };
        request(libc::PTRACE_SEIZE)?;
        let frozen = Self(tid);
        request(libc::PTRACE_INTERRUPT)?;
        Deadline::new(format!("thread {name} to stop")).until_slowly(|| {
            let mut status = 0;
            // SAFETY: writes one status; names a thread that this one traces.
            let got = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
            (got == tid && libc::WIFSTOPPED(status)).then_some(())
        });
        Ok(frozen)
    }

    /// Waits until its process has ended it: a process is not seen to end before its traced threads are.
    #[track_caller]
    pub fn wait_ended(&self) {
        Deadline::new("the frozen thread to be ended").until_slowly(|| {
            // SAFETY: names a thread that this one traces, and writes nothing.
            let got = unsafe { libc::waitpid(self.0, ptr::null_mut(), libc::__WALL | libc::WNOHANG) };
            (got != 0).then_some(())
        });
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // SAFETY: as above, both. The first fails only if the thread has ended, and then the second takes its end.
        unsafe {
            libc::ptrace(libc::PTRACE_DETACH, self.0, ptr::null_mut::<u8>(), ptr::null_mut::<u8>());
            libc::waitpid(self.0, ptr::null_mut(), libc::__WALL | libc::WNOHANG);
        }
    }
}

/// The names of a daemon's threads, and the kernel's threads that work for it.
pub fn threads(daemon: &Daemon) -> Vec<(libc::pid_t, String)> {
    threads_of(daemon.pid())
}

fn threads_of(pid: u32) -> Vec<(libc::pid_t, String)> {
    let folder = format!("/proc/{pid}/task");
    let entries = std::fs::read_dir(folder).unwrap();
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            // A thread may end meanwhile.
            let name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            Some((entry.file_name().to_str()?.parse().ok()?, name.trim_end().to_owned()))
        })
        .collect()
}
