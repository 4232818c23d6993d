//! A disk that is traced: its workers write down each request that ends, in memory of a client's.
//!
//! What it is: beginning and ending a trace, one at a time.
//!
//! What it is not: a record is [`crate::trace`]'s, and no successor goes on with a trace.
//!
//! Invariant: the memory cannot shrink, and is unmapped once no worker writes there. A client that is gone ends its trace.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{SealFlags, fcntl_get_seals};
use serde::Serialize;

use super::Session;
use crate::memory::mapping::Mapping;
use crate::sys;
use crate::trace::{self, Request, Tracing};

/// A trace.
#[derive(Debug)]
pub(super) struct Trace {
    /// Hangs up when the client is gone, or has what it wants.
    client: Arc<OwnedFd>,
    until: Option<Instant>,
}

/// How the memory of a trace is used.
#[derive(Debug, Serialize)]
pub struct Begun {
    rings: usize,
    records: usize,
}

impl Session {
    /// Writes down each request that ends from now on.
    ///
    /// # Errors
    /// Why it is not done.
    pub fn begin_trace(&mut self, Request { slow_ns, seconds, fds }: Request) -> Result<Begun, String> {
        let (memory, client) = match <[OwnedFd; trace::FDS]>::try_from(fds) {
            Ok([memory, client]) => (memory, client),
            Err(fds) => {
                sys::close_foreign(fds);
                return Err(
                    "a trace needs two descriptors: memory, and the end of a pipe that is written".into()
                );
            }
        };
        let begun = self.end_trace_of_none().and_then(|()| check_pipe(&client));
        let begun = begun.and_then(|()| map(&memory, self.workers.most(), slow_ns));
        let tracing = match begun {
            Ok(tracing) => tracing,
            Err(why) => {
                sys::close_foreign([memory, client]);
                return Err(why);
            }
        };
        let begun = Begun { rings: self.workers.most(), records: tracing.records };
        let told = self.workers.set_trace(Some(tracing));
        self.answered(told).ok_or("a worker does not answer")?;
        let until = seconds.map(|time| Instant::now() + Duration::from_secs(time.into()));
        self.trace = Some(Trace { client: client.into(), until });
        tracing::info!("requests are traced");
        Ok(begun)
    }

    /// Ends a trace whose client is gone; an error: there is one who is not.
    fn end_trace_of_none(&mut self) -> Result<(), String> {
        self.end_late_trace();
        if self.trace.is_some() {
            Err("the disk is traced already, by another client".into())
        } else {
            Ok(())
        }
    }

    /// Ends a trace whose client is gone, or whose time has come.
    pub fn end_late_trace(&mut self) {
        let is_over = |trace: &Trace| {
            trace.until.is_some_and(|until| until <= Instant::now())
                || sys::hung_up_within(&trace.client, Duration::ZERO).unwrap_or(true)
        };
        if let Some(trace) = self.trace.take_if(|trace| is_over(trace)) {
            let told = self.workers.set_trace(None);
            self.answered(told);
            drop(trace); // its client has all records by now
            tracing::info!("requests are not traced any more");
        }
    }

    /// What hangs up when the client of a trace is gone.
    #[must_use]
    pub fn tracer(&self) -> Option<Arc<OwnedFd>> {
        self.trace.as_ref().map(|trace| Arc::clone(&trace.client))
    }

    /// When a trace ends by itself.
    #[must_use]
    pub fn traced_until(&self) -> Option<Instant> {
        self.trace.as_ref().and_then(|trace| trace.until)
    }
}

fn check_pipe(client: &OwnedFd) -> Result<(), String> {
    let is_pipe = sys::facts(client).is_ok_and(|facts| sys::is_type(&facts, libc::S_IFIFO));
    if is_pipe { Ok(()) } else { Err("the second descriptor of a trace has to be the end of a pipe".into()) }
}

/// Maps memory for the rings of so many workers.
fn map(memory: &OwnedFd, workers: usize, slow: u64) -> Result<Tracing, String> {
    let seals = fcntl_get_seals(memory).map_err(|_| "the first descriptor of a trace has to be a memfd")?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err("the memory of a trace could shrink: it has to be sealed by F_SEAL_SHRINK".into());
    }
    let file = memory.try_clone().map(File::from).map_err(|e| e.to_string())?;
    let bytes = file.metadata().map_err(|e| e.to_string())?.len();
    let records = trace::records(usize::try_from(bytes).unwrap_or(usize::MAX), workers).map_err(|least| {
        format!("the memory of a trace has {bytes} bytes: for {workers} workers it has to have {least}")
    })?;
    let memory =
        Mapping::new(&file, 0, bytes).map_err(|e| format!("the memory of a trace cannot be mapped: {e}"))?;
    Ok(Tracing { memory: Arc::new(memory), records, slow })
}
