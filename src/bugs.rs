//! Bugs on purpose, for the tests that have to find them.
//!
//! What it is: mistakes that block back-ends have made, each of which one
//! line of the code asks for. Without the feature `bugs` the answer is a
//! constant, and the line is not there.
//!
//! What it is not: anything that a program is ever built with.
//!
//! Invariant: a bug is on for the thread that turned it on, and for no other.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bug {
    /// The used index is shown before the status byte is written.
    PublishBeforeStatus,
    /// One chain is never returned.
    ForgetOneHead,
    /// FLUSH is answered, and nothing was made durable.
    FlushWithoutSync,
    /// After a crash the ring goes on at the front-end's base, not at what the
    /// in-flight region says.
    ReplayFromFrontEndsBase,
    /// Whether the driver wants an interrupt is judged by an old used index.
    StaleSignal,
    /// What a read brought is not marked in the dirty log.
    UnmarkedRead,
    /// A block that is read, changed and written is not kept from its neighbours.
    NeighbourUndone,
    /// A FLUSH that comes while an fdatasync runs is answered with it.
    SyncOfEarlier,
    /// Of those that wait for an fdatasync all but one are answered when it begins.
    AnsweredBeforeSync,
}

impl Bug {
    /// Each of them.
    pub const ALL: [Self; 9] = [
        Self::PublishBeforeStatus,
        Self::ForgetOneHead,
        Self::FlushWithoutSync,
        Self::ReplayFromFrontEndsBase,
        Self::StaleSignal,
        Self::UnmarkedRead,
        Self::NeighbourUndone,
        Self::SyncOfEarlier,
        Self::AnsweredBeforeSync,
    ];
}

#[cfg(feature = "bugs")]
thread_local! {
    static CURRENT: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Turns a bug on, or off, for this thread.
#[cfg(feature = "bugs")]
pub fn set(bug: Option<Bug>) {
    CURRENT.set(bug);
}

/// True if this thread has the bug.
#[cfg(feature = "bugs")]
#[must_use]
pub fn has(bug: Bug) -> bool {
    CURRENT.get() == Some(bug)
}

/// No thread has any.
#[cfg(not(feature = "bugs"))]
#[inline]
#[must_use]
pub const fn has(_: Bug) -> bool {
    false
}
