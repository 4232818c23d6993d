//! What a successor needs: descriptors in the store, and a file of state that says what they are for.
//!
//! What it is: a [`Keeper`], which puts descriptors into the [`Store`], and writes the file of state, itself one of
//! them, before and after each message of the front-end; and [`Predecessor`], what an earlier daemon kept there.
//!
//! What it is not: it knows no message and no queue: states and messages are
//! bytes. It is never given a disk's descriptor or a ring's: the kernel drops a dead
//! daemon's locks only with the last of them, which is how a successor
//! knows that the dead daemon's last write has ended.
//!
//! Invariants: whenever this process is killed the file holds one whole state; a
//! descriptor that a state names is in the store before that state is written; one that no state
//! names is removed.
//!
//! ```text
//!   idle ─► reading ─► received ─► replying ─► idle
//!           a message  it is whole,   it is carried    the reply
//!           may be     kept, and not  out: the new     is out
//!           half read  carried out    state counts
//!
//!   found by a successor:
//!   idle      go on
//!   reading   what was read is lost: the connection is closed
//!   received  carry it out, from the state before it
//!   replying  the reply may be out or not: the connection is closed
//! ```

pub mod file;

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use self::file::{
    AT_SYNC_FAILED, AT_TRIES, Header, MARKS, MARKS_BYTES, MESSAGE, STATS, STATS_BYTES, length, load,
};
pub use self::file::{Pending, Phase};
use crate::memory::mapping::Mapping;
pub use crate::store::{FdId, Fds};
use crate::store::{Store, number};
use crate::sys;

/// The file of state.
pub const STATE: FdId = 1;
/// How many successors may carry out a message that daemons die of: with the first
/// one three have died then.
const TRIES: u8 = 2;

/// What an earlier daemon kept.
#[derive(Debug)]
pub struct Predecessor {
    /// Its last state; empty if it died before it had one.
    pub state: Vec<u8>,
    /// The message it was at, if it had one whole.
    pub pending: Option<Pending>,
    /// What was read of a message, or a reply to it, may be lost; or each daemon dies
    /// of the one that it was at.
    pub is_unsure: bool,
    /// An fdatasync had failed.
    pub sync_failed: bool,
    /// All descriptors.
    pub fds: Fds,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Keeper {
    store: Store,
    kept: BTreeSet<FdId>,
    next: FdId,
    /// Descriptors of the message under way.
    pending: Vec<FdId>,
    file: File,
    header: Header,
    /// The byte at [`AT_TRIES`].
    tries: u8,
}

/// The descriptors of a disk's store, which is named so or not at all, among those of a process.
#[must_use]
pub fn stored(fds: &mut Vec<(String, OwnedFd)>, disk: &str) -> Fds {
    let (its, others) = std::mem::take(fds)
        .into_iter()
        .partition(|(name, _): &(String, OwnedFd)| number(name).is_some_and(|(_, of)| of == disk));
    *fds = others;
    let its: Vec<(String, OwnedFd)> = its;
    its.into_iter().filter_map(|(name, fd)| Some((number(&name)?.0, Arc::new(fd)))).collect()
}

impl Keeper {
    /// A keeper over `store`, which has `fds`; and what an earlier daemon kept there. A file of state that this
    /// program cannot read is removed from the store with all that it named, and the sentence says so.
    ///
    /// # Errors
    /// When the file of state cannot be made or read, or the store does not read.
    pub fn new(store: Store, mut fds: Fds) -> io::Result<(Self, Option<Predecessor>, Option<io::Error>)> {
        let Some(state) = fds.remove(&STATE) else {
            return Ok((Self::anew(store, &fds)?, None, None));
        };
        let file = File::from(state.try_clone()?);
        let (header, state, mut pending) = match load(&file) {
            Ok(loaded) => loaded,
            Err(e) => {
                fds.insert(STATE, Arc::new(file.into()));
                return Ok((Self::anew(store, &fds)?, None, Some(e)));
            }
        };
        let mut bytes = [0; 2];
        let _shorter_if_nothing_failed = file.read_exact_at(&mut bytes, AT_TRIES);
        let [tries, sync_failed] = bytes;
        pending = pending.filter(|_| tries < TRIES);
        let is_unsure = match header.phase {
            Phase::Idle => false,
            Phase::Received => pending.is_none(),
            Phase::Reading | Phase::Replying => true,
        };
        let mut kept: BTreeSet<FdId> = fds.keys().copied().collect();
        kept.insert(STATE);
        let next = kept.last().map_or(STATE, |last| *last) + 1;
        let held = pending.as_ref().map_or_else(Vec::new, |p| p.fds.clone());
        let keeper = Self { store, kept, next, pending: held, file, header, tries };
        Ok((
            keeper,
            Some(Predecessor { state, pending, is_unsure, sync_failed: sync_failed != 0, fds }),
            None,
        ))
    }

    /// A keeper with a new file of state; what the store has is removed.
    fn anew(mut store: Store, fds: &Fds) -> io::Result<Self> {
        for &id in fds.keys() {
            store.remove(id)?;
        }
        let file = File::from(rustix::fs::memfd_create("vublk-state", rustix::fs::MemfdFlags::CLOEXEC)?);
        // Before it is in the store: a successor that finds it can read it.
        sys::write_all_at(&file, &Header::default().bytes(), 0)?;
        store.put(STATE, file.as_fd())?;
        Ok(Self {
            store,
            kept: BTreeSet::from([STATE]),
            next: STATE + 1,
            pending: Vec::new(),
            file,
            header: Header::default(),
            tries: 0,
        })
    }

    /// Where it keeps.
    #[must_use]
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Keeps a descriptor. Kept a second time it may get the same number.
    ///
    /// # Errors
    /// When the parent is gone, or the store has no room: then the descriptor is lost with this process.
    pub fn keep(&mut self, fd: impl AsFd) -> io::Result<FdId> {
        let fd = fd.as_fd();
        if let Some(id) = self.store.find(fd) {
            return Ok(id);
        }
        let id = self.next;
        self.next = id.checked_add(1).ok_or_else(|| io::Error::other("no number is left"))?;
        self.store.put(id, fd)?;
        self.kept.insert(id);
        Ok(id)
    }

    /// A message may be half read from now on.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn reading(&mut self) -> io::Result<()> {
        self.set_phase(Phase::Reading)
    }

    /// Nothing was read, or a reply is out.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn idle(&mut self) -> io::Result<()> {
        self.set_phase(Phase::Idle)
    }

    /// Removes everything from the store: what is kept is not true any more, and a successor
    /// must not go on from it.
    pub fn abandon(mut self) {
        // As far as it is possible at all.
        let _ = self.set_phase(Phase::Reading);
        for id in std::mem::take(&mut self.kept) {
            if id != STATE && self.store.remove(id).is_err() {
                return;
            }
        }
    }

    /// Where [`crate::disk::Disk`] notes down that an fdatasync failed, at once: a
    /// successor has to know, or a FLUSH of its would succeed.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn sync_note(&self) -> io::Result<(File, u64)> {
        Ok((self.file.try_clone()?, AT_SYNC_FAILED))
    }

    /// Where the counters of this daemon's workers are, which go on from those of earlier ones.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn stats(&self) -> io::Result<Mapping> {
        self.area(STATS, STATS_BYTES as u64)
    }

    /// Where it is noted, by earlier daemons too, what is known of a disk on another machine that no state says: how much a
    /// server has made durable, and whether the guest relies on a cluster's lock.
    ///
    /// # Errors
    /// When memory runs out.
    pub fn marks(&self) -> io::Result<Mapping> {
        self.area(MARKS, MARKS_BYTES)
    }

    fn area(&self, at: u64, bytes: u64) -> io::Result<Mapping> {
        if self.file.metadata()?.len() < at + bytes {
            self.file.set_len(at + bytes)?;
        }
        Mapping::new(&self.file, at, bytes)
    }

    /// How far the message under way has come.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.header.phase
    }

    fn set_phase(&mut self, phase: Phase) -> io::Result<()> {
        self.carried_out(phase)?;
        if self.header.phase == phase {
            return Ok(());
        }
        self.header.phase = phase;
        sys::write_all_at(&self.file, &self.header.bytes(), 0)
    }

    /// Begins to carry out a message at which an earlier process had died.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn try_again(&mut self) -> io::Result<()> {
        self.tries = self.tries.saturating_add(1);
        sys::write_all_at(&self.file, &[self.tries], AT_TRIES)
    }

    /// No daemon died of the message.
    fn carried_out(&mut self, phase: Phase) -> io::Result<()> {
        if self.tries > 0 && phase != Phase::Received {
            self.tries = 0;
            sys::write_all_at(&self.file, &[0], AT_TRIES)?;
        }
        Ok(())
    }

    /// Keeps a whole message, before it is carried out; gives its descriptors'
    /// numbers.
    ///
    /// # Errors
    /// As [`Keeper::keep`].
    pub fn received(&mut self, bytes: &[u8], fds: &[OwnedFd]) -> io::Result<Vec<FdId>> {
        let ids = fds.iter().map(|fd| self.keep(fd)).collect::<io::Result<Vec<_>>>()?;
        self.store.settle()?;
        let at = self.header.at(MESSAGE);
        sys::write_all_at(&self.file, bytes, at)?;
        let numbers: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        sys::write_all_at(&self.file, &numbers, at + bytes.len() as u64)?;
        self.header.message = length(bytes)?;
        self.header.fds = length(&numbers)?;
        self.set_phase(Phase::Received)?;
        self.pending.clone_from(&ids);
        Ok(ids)
    }

    /// `state` is what counts from now on, and with it a message that was
    /// received is carried out. `names`: every descriptor that it names; others are
    /// removed.
    ///
    /// # Errors
    /// When the file of state cannot be written.
    pub fn commit(&mut self, state: &[u8], names: &BTreeSet<FdId>, phase: Phase) -> io::Result<()> {
        self.store.settle()?;
        self.carried_out(phase)?;
        let slot = 1 - self.header.active;
        sys::write_all_at(&self.file, state, self.header.at(slot))?;
        if let Some(len) = self.header.len.get_mut(usize::from(slot)) {
            *len = length(state)?;
        }
        self.header.active = slot;
        self.header.phase = phase;
        sys::write_all_at(&self.file, &self.header.bytes(), 0)?;
        if phase != Phase::Received {
            self.pending.clear(); // the state names what it needs of it
        }
        let needed = |id: &FdId| *id == STATE || names.contains(id) || self.pending.contains(id);
        let gone: Vec<FdId> = self.kept.iter().copied().filter(|id| !needed(id)).collect();
        gone.into_iter().try_for_each(|id| {
            self.kept.remove(&id);
            self.store.remove(id)
        })
    }
}
