//! The user that vublkd runs as, where root starts it: `--user`, `--group`.
//!
//! What it is: an [`Account`]: numbers that were looked up, and the step to them.
//!
//! What it is not: it opens nothing. What only root can make, the sockets, is made before [`Account::assume`], by its
//! caller; the disk is opened after it, since a successor has to be able to open it, too.
//!
//! Invariant: the step is for good, for all threads, and leaves no group and no capability of root's.

use std::ffi::CString;

use rustix::process::{Resource, Rlimit, getegid, geteuid, getgid, getuid, setrlimit};
use thiserror::Error;

use crate::sys::users::{User, become_user, group_by_name, groups_of, user_by_name, user_by_number};

/// Why vublkd cannot run as that user.
#[derive(Debug, Error)]
pub enum UserError {
    /// There is no such user.
    #[error("--user={0}: there is no such user. Use a name or a number that `getent passwd` shows")]
    NoUser(String),
    /// There is no such group.
    #[error("--group={0}: there is no such group. Use a name or a number that `getent group` shows")]
    NoGroup(String),
    /// A number without an entry, so that its group is not known.
    #[error("--user={0}: no user has this number, so its group is not known. Add --group=GROUP")]
    WhichGroup(String),
    /// Another user than the one that started it.
    #[error(
        "{option}={value}: only root can start vublkd as another {kind}. Start it as root, or leave {option} away"
    )]
    NotRoot {
        /// The option.
        option: &'static str,
        /// What was typed.
        value: String,
        /// What it names.
        kind: &'static str,
    },
    /// The kernel, or the database, says no.
    #[error("cannot {0}: {1}")]
    Io(&'static str, std::io::Error),
}

impl UserError {
    /// True if the command line is wrong for every user that could start it.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::NoUser(_) | Self::NoGroup(_) | Self::WhichGroup(_))
    }
}

/// See the head of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// The user's number.
    pub uid: u32,
    /// The group's.
    pub gid: u32,
    groups: Vec<u32>,
}

/// chown(1)'s way: what is all digits is a number, unless it is a name. The largest one means "as it is" to the kernel.
fn number(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&number| number != u32::MAX)
}

fn c_string(text: &str) -> CString {
    CString::new(text).unwrap_or_default() // no name holds a zero byte, and none is empty
}

/// The account that `--user` and `--group` name; `None`: the process runs as that user and group already.
///
/// # Errors
/// [`UserError`].
pub fn account(user: Option<&str>, group: Option<&str>) -> Result<Option<Account>, UserError> {
    let unreadable = |e| UserError::Io("look up a user", e);
    let entry: Option<User> = match user {
        None => user_by_number(geteuid().as_raw()).map_err(unreadable)?,
        Some(text) => match (user_by_name(&c_string(text)).map_err(unreadable)?, number(text)) {
            (Some(entry), _) => Some(entry),
            (None, Some(uid)) => user_by_number(uid).map_err(unreadable)?,
            (None, None) => return Err(UserError::NoUser(text.into())),
        },
    };
    let uid = match (&entry, user) {
        (Some(entry), _) => entry.uid,
        (None, Some(text)) => number(text).ok_or_else(|| UserError::NoUser(text.into()))?,
        (None, None) => geteuid().as_raw(),
    };
    let is_user = uid == geteuid().as_raw() && uid == getuid().as_raw();
    let gid = match group {
        Some(text) => group_by_name(&c_string(text))
            .map_err(|e| UserError::Io("look up a group", e))?
            .or_else(|| number(text))
            .ok_or_else(|| UserError::NoGroup(text.into()))?,
        None if is_user => return Ok(None),
        None => match &entry {
            Some(entry) => entry.gid,
            None => return Err(UserError::WhichGroup(user.unwrap_or_default().into())),
        },
    };
    if is_user && gid == getegid().as_raw() && gid == getgid().as_raw() {
        return Ok(None);
    }
    if !geteuid().is_root() {
        let (option, value, kind) =
            if is_user { ("--group", group, "group") } else { ("--user", user, "user") };
        return Err(UserError::NotRoot { option, value: value.unwrap_or_default().into(), kind });
    }
    let groups = entry.map_or_else(|| vec![gid], |entry| groups_of(&entry.name, gid));
    Ok(Some(Account { uid, gid, groups }))
}

impl Account {
    /// Becomes the user for good. What it needs of root's is taken along: memory that io_uring, and --pin-memory,
    /// lock is not limited.
    ///
    /// # Errors
    /// [`UserError::Io`].
    pub fn assume(&self) -> Result<(), UserError> {
        let _as_it_was = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
        become_user(self.uid, self.gid, &self.groups)
            .map_err(|e| UserError::Io("become the user of --user", e))
    }
}
