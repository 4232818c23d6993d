//! The process: its signals, its control socket, and the control thread of its disk.
//!
//! What it is: the loop of the first thread. It answers `status` from what the disk shows, and passes other calls
//! and the word to stop on by the disk's [`Link`].
//!
//! What it is not: it knows no front-end, no guest and no store; a disk's [`Control`](crate::control::Control) does.
//!
//! Invariants: this thread waits for nothing that a guest, a front-end or a disk does, so `status` is answered and a
//! stop ends the process in time whatever they do. A control thread that does not end is left behind.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use crate::control::{ControlError, DaemonEnd};
use crate::device::Device;
use crate::link::{Call, Link};
use crate::rpc::{self, Answer, Server};
use crate::sandbox::{self, Role};
use crate::signals::{Signal, Signals};
use crate::status::{QueuesStatus, Status};
use crate::supervise::GAVE_UP;
use crate::watchdog::Watchdog;
use crate::workers::wait_for;
use crate::{log, sys};

/// How much longer than for a drain a control thread may take.
const LAST_MOMENT: Duration = Duration::from_millis(500);
/// How soon it is tried again to accept a client for which there was no descriptor.
const RETRY_EVERY: Duration = Duration::from_millis(100);

/// Wakes the process when it is dropped.
struct Told(Arc<OwnedFd>);

impl Drop for Told {
    fn drop(&mut self) {
        sys::signal(&self.0);
    }
}

/// See the head of the file.
#[derive(Debug)]
pub struct Process {
    /// Those of the process.
    pub signals: Signals,
    /// Written by the SIGBUS handler.
    pub memory_lost: OwnedFd,
    /// The control socket, if there is one.
    pub rpc: Option<Server>,
    /// The service manager's, if it has one.
    pub watchdog: Option<Watchdog>,
    /// The disk, as its control thread serves it.
    pub device: Arc<Device>,
    /// To its control thread.
    pub link: Arc<Link>,
}

impl Process {
    /// Runs the disk's control thread, which does `serve`, to its end.
    ///
    /// # Errors
    /// As [`crate::control::Control::serve`]; when the thread cannot be started.
    pub fn run(
        mut self,
        serve: impl FnOnce() -> Result<DaemonEnd, ControlError> + Send + 'static,
    ) -> Result<DaemonEnd, ControlError> {
        let (sender, ended) = sync_channel(1);
        let told = Told(Arc::clone(self.link.told()));
        let _none_yet = self.link.next_start();
        let started = Instant::now();
        let thread = std::thread::Builder::new().name("vublk-control".into());
        let serve = move || {
            // Also where it panics, in a build that unwinds.
            let (_told, sender) = (told, sender);
            sandbox::confine(Role::Control);
            let _kept = sender.send(serve());
        };
        let thread = thread.spawn(serve).map_err(ControlError::NoThread)?;
        sandbox::confine(Role::Process);
        loop {
            sys::drain(self.link.told());
            let ended = ended.try_recv();
            while let Some(start) = self.link.next_start() {
                start.now();
            }
            if !matches!(ended, Err(TryRecvError::Empty)) {
                self.link.close();
            }
            // Before it serves, the disk has nothing to say, and a client would take that for its word. When it has
            // ended, clients wait for answers yet: of an upgrade, say.
            let mut clients = self.rpc.as_mut().filter(|_| self.link.shown().is_some());
            if let Some(rpc) = &mut clients {
                rpc.serve(|call| answer(call, &self.link, &self.device, started));
            }
            match ended {
                // Its descriptors are closed, and the disk with them, before the process is seen to end.
                Ok(Ok(end)) => return thread.join().map(|()| end).map_err(|_| ControlError::Panicked),
                Ok(Err(why)) => return Err(why),
                Err(TryRecvError::Disconnected) => return Err(ControlError::Panicked),
                Err(TryRecvError::Empty) => {}
            }
            while let Some(signal) = self.signals.next() {
                match signal {
                    Signal::Stop => self.link.stop(),
                    Signal::Report => tracing::info!("statistics: {}", self.device.stats),
                    Signal::Grown => drop(self.link.ask(Call::Resize(None), true)),
                    Signal::Succeed => drop(self.link.ask(Call::Upgrade(None), true)),
                }
            }
            if sys::drain(&self.memory_lost) {
                self.link.wake();
            }
            let now = Instant::now();
            let mut left = self.link.deadline().map(|at| (at + LAST_MOMENT).saturating_duration_since(now));
            if left.is_some_and(|left| left.is_zero()) {
                log::complain("stopped: the control thread does not end");
                log::flush();
                sys::exit_now(GAVE_UP.into());
            }
            let mut fds = vec![self.signals.as_fd(), self.memory_lost.as_fd(), self.link.told().as_fd()];
            if let Some(rpc) = &clients {
                fds.extend(rpc.fds());
                left = left.into_iter().chain(rpc.is_deaf().then_some(RETRY_EVERY)).min();
            }
            if let Some(watchdog) = &mut self.watchdog {
                left = left.into_iter().chain([watchdog.look(&self.device.pulses)]).min();
            }
            wait_for(&fds, left)?;
        }
    }
}

fn answer(call: rpc::Call, link: &Link, device: &Device, started: Instant) -> Answer {
    let call = match call {
        rpc::Call::Status => {
            let status = Status::new(device, link.shown(), started.elapsed());
            return Answer::Now(serde_json::to_value(status).map_err(|e| e.to_string()));
        }
        rpc::Call::Queues { from } => {
            let queues = QueuesStatus::new(device, from);
            return Answer::Now(serde_json::to_value(queues).map_err(|e| e.to_string()));
        }
        rpc::Call::Resize { size } => Call::Resize(size),
        rpc::Call::Retry => Call::Retry,
        rpc::Call::Upgrade { binary } => Call::Upgrade(binary),
    };
    Answer::Later(link.ask(call, false))
}
