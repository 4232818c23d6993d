//! How this client stands with its cluster: as any other, or refused by it (its blocklist), and what that means for the
//! guest.
//!
//! What it is: a [`Record`] of it, and the look at who has the image since, by a client that is made for that and gone
//! afterwards: one that is refused is told nothing any more.
//!
//! What it is not: it ends no process, and answers no request; [`crate::control`] and [`crate::engine::rbd`] do.
//!
//! Invariant: a guest goes on with another client only where no other one can have written to its image meanwhile.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::image::{Likeness, RbdError};
use super::open;

/// How long after the first look in vain the next one is taken; twice as long after each, up to the second.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A client that takes a lock by force has the other one refused first, removes its lock, and takes it then. So long after the
/// first look it has done all three.
const TAKING: Duration = Duration::from_secs(2);

/// How this client stands with the cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// As any other.
    #[default]
    Good,
    /// It is refused, and who has the image is being found out.
    Looking,
    /// This guest must not go on: another client has the image, or may have had it.
    Lost,
    /// It is refused, and a successor with a client of its own can go on.
    Successor,
}

/// Who has the image of a client that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A client that is alive.
    Other(String),
    /// The lock is that client's yet: no other has had it since.
    Own,
    /// The lock is free, or of another client that is dead.
    Free,
}

/// See the head of the file.
#[derive(Debug, Default)]
pub(super) struct Record {
    standing: AtomicU8,
    /// Why this guest must not go on, and what is to be done.
    why_lost: Mutex<String>,
}

impl Record {
    pub(super) fn get(&self) -> Standing {
        const ALL: [Standing; 3] = [Standing::Good, Standing::Looking, Standing::Successor];
        let number = self.standing.load(Ordering::Acquire);
        ALL.into_iter().find(|standing| *standing as u8 == number).unwrap_or(Standing::Lost)
    }

    pub(super) fn set(&self, standing: Standing) {
        self.standing.store(standing as u8, Ordering::Release);
    }

    /// The guest must not go on: says why in the log, and for `vublk status`.
    pub(super) fn lose(&self, disk: &str, why: String) {
        tracing::error!(%disk, "{why}");
        *self.why_lost.lock().unwrap_or_else(PoisonError::into_inner) = why;
        self.set(Standing::Lost);
    }

    pub(super) fn why_lost(&self) -> Option<String> {
        let is_lost = self.get() == Standing::Lost;
        is_lost.then(|| self.why_lost.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// True once, for the one that is to look.
    pub(super) fn begin_to_look(&self) -> bool {
        let (good, looking) = (Standing::Good as u8, Standing::Looking as u8);
        self.standing.compare_exchange(good, looking, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }
}

/// What a client that is refused had of its image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Had {
    /// Its lock: the guest goes on where it was.
    pub(super) lock: bool,
    /// There is a store, whose successor goes on with the connection.
    pub(super) store: bool,
}

/// Finds out who has the image, however long that takes, and says and notes what follows from it.
pub(super) fn look(client: &Likeness, disk: &str, had: Had, record: &Record) {
    let (mut is_second, mut pause) = (false, FIRST_PAUSE);
    loop {
        match open::who_has(client) {
            Ok(Found::Own | Found::Free) if had.lock && !std::mem::replace(&mut is_second, true) => {
                std::thread::park_timeout(TAKING);
            }
            Ok(found) => return judge(disk, &found, had, record),
            // All clients of this host are refused, say.
            Err(e) if is_refused(&e) => {
                let why = format!(
                    "the cluster refuses this client (its blocklist), and others of this host too: {e}. Nothing is read or \
                     written any more. Remove the host from ceph osd blocklist ls, and stop and start vublkd"
                );
                return record.lose(disk, why);
            }
            Err(e) => {
                tracing::warn!(%disk, "cannot find out yet who has the image: {e}");
                std::thread::park_timeout(pause); // no message comes when a cluster answers again
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

fn is_refused(error: &RbdError) -> bool {
    let (RbdError::Connect(e) | RbdError::Pool(_, e) | RbdError::Open(e, _) | RbdError::Io(_, e)) = error
    else {
        return false;
    };
    is_refusal(e)
}

/// What a function says to a client on the blocklist.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESHUTDOWN)
}

fn judge(disk: &str, found: &Found, had: Had, record: &Record) {
    let why = match (standing_of(found, had), found) {
        (standing @ Standing::Successor, _) => {
            tracing::error!(
                %disk,
                "the cluster refuses this client (its blocklist), and no other has had the image since: this vublkd ends, and \
                 its successor goes on with a client of its own"
            );
            return record.set(standing);
        }
        (_, Found::Other(owner)) => format!(
            "the cluster refuses this client (its blocklist): the client {owner} has taken the image. Nothing is read or \
             written any more. Stop this VM, or that client; then stop and start vublkd"
        ),
        (_, Found::Free) if had.lock => "the cluster refuses this client (its blocklist), and its lock was taken away: \
             another client may have written to the image, so this guest must not go on. Nothing is read or written any more. \
             Stop this VM, stop and start vublkd, and start the VM anew"
            .to_owned(),
        (_, Found::Own | Found::Free) => "the cluster refuses this client (its blocklist). Nothing is read or written any \
             more, and there is no store that could start a successor. Stop and start vublkd"
            .to_owned(),
    };
    record.lose(disk, why);
}

fn standing_of(found: &Found, had: Had) -> Standing {
    match found {
        Found::Own | Found::Free if !had.store => Standing::Lost,
        Found::Own => Standing::Successor,
        // What others have written since is no harm to a guest that has not begun.
        Found::Free if !had.lock => Standing::Successor,
        Found::Free | Found::Other(_) => Standing::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::{Found, Had, Standing, standing_of};

    #[test]
    fn a_guest_goes_on_only_where_no_other_client_wrote() {
        let other = Found::Other("10.0.0.7:0/1".into());
        for (found, lock, store, expected) in [
            (&Found::Own, true, true, Standing::Successor),
            (&Found::Own, true, false, Standing::Lost),
            (&Found::Free, true, true, Standing::Lost),
            (&Found::Free, false, true, Standing::Successor),
            (&Found::Free, false, false, Standing::Lost),
            (&other, true, true, Standing::Lost),
            (&other, false, true, Standing::Lost),
        ] {
            assert_eq!(standing_of(found, Had { lock, store }), expected, "{found:?} {lock} {store}");
        }
    }
}
