//! The databases of users and groups, and becoming one of them.

use std::ffi::{CStr, CString};
use std::io;
use std::mem::MaybeUninit;

use super::check;

/// Bytes for the strings of an entry; a group with very many members needs more.
const FIRST_TRY: usize = 4 << 10;
const LAST_TRY: usize = 4 << 20;
/// Groups that a process may have (NGROUPS_MAX).
const MOST_GROUPS: usize = 65_536;

/// An entry of the database of users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// Its name.
    pub name: CString,
    /// Its number.
    pub uid: u32,
    /// Its primary group.
    pub gid: u32,
}

/// Calls a function of the kind of getpwnam_r(3) with more and more room.
fn look_up<T, R>(
    call: impl Fn(*mut T, *mut libc::c_char, usize, *mut *mut T) -> libc::c_int,
    take: impl Fn(&T) -> R,
) -> io::Result<Option<R>> {
    let mut strings = vec![0; FIRST_TRY];
    loop {
        let (mut entry, mut found) = (MaybeUninit::uninit(), std::ptr::null_mut());
        match call(entry.as_mut_ptr(), strings.as_mut_ptr(), strings.len(), &raw mut found) {
            0 if found.is_null() => return Ok(None),
            // SAFETY: not null: it points to `entry`, which the call has filled; its strings are in `strings`.
            0 => return Ok(Some(take(unsafe { &*found }))),
            libc::ERANGE if strings.len() < LAST_TRY => strings.resize(strings.len() * 4, 0),
            // getpwnam(3): what some libraries say of a name that is not there.
            libc::ENOENT | libc::ESRCH | libc::EBADF | libc::EPERM => return Ok(None),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn user(entry: &libc::passwd) -> User {
    // SAFETY: an entry's name ends in a zero byte, and lives as long as the entry.
    let name = unsafe { CStr::from_ptr(entry.pw_name) }.to_owned();
    User { name, uid: entry.pw_uid, gid: entry.pw_gid }
}

/// The user of this name.
///
/// # Errors
/// When the database cannot be read.
pub fn user_by_name(name: &CStr) -> io::Result<Option<User>> {
    // SAFETY: `name` ends in a zero byte; the room is as long as it says.
    look_up(|e, s, n, found| unsafe { libc::getpwnam_r(name.as_ptr(), e, s, n, found) }, user)
}

/// The user of this number.
///
/// # Errors
/// When the database cannot be read.
pub fn user_by_number(uid: u32) -> io::Result<Option<User>> {
    // SAFETY: the room is as long as it says.
    look_up(|e, s, n, found| unsafe { libc::getpwuid_r(uid, e, s, n, found) }, user)
}

/// The number of the group of this name.
///
/// # Errors
/// When the database cannot be read.
pub fn group_by_name(name: &CStr) -> io::Result<Option<u32>> {
    let number = |entry: &libc::group| entry.gr_gid;
    // SAFETY: `name` ends in a zero byte; the room is as long as it says.
    look_up(|e, s, n, found| unsafe { libc::getgrnam_r(name.as_ptr(), e, s, n, found) }, number)
}

/// The name of the group of this number.
///
/// # Errors
/// When the database cannot be read.
pub fn group_by_number(gid: u32) -> io::Result<Option<CString>> {
    // SAFETY: an entry's name ends in a zero byte, and lives as long as the entry.
    let name = |entry: &libc::group| unsafe { CStr::from_ptr(entry.gr_name) }.to_owned();
    // SAFETY: the room is as long as it says.
    look_up(|e, s, n, found| unsafe { libc::getgrgid_r(gid, e, s, n, found) }, name)
}

/// The groups that this user is in, and `gid`.
#[must_use]
pub fn groups_of(user: &CStr, gid: u32) -> Vec<u32> {
    let mut groups = vec![0; 64];
    loop {
        let mut count = libc::c_int::try_from(groups.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: writes at most `count` groups, and how many there are.
        let got = unsafe { libc::getgrouplist(user.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
        let there = usize::try_from(count).unwrap_or(0);
        if got >= 0 || groups.len() >= MOST_GROUPS {
            groups.truncate(there);
            return groups;
        }
        groups.resize((groups.len() * 4).max(there).min(MOST_GROUPS), 0);
    }
}

/// Makes all threads of this process those of a user for good, with these groups and no others.
///
/// # Errors
/// EPERM without the privileges of root; EINVAL for a number that has no meaning in this user namespace.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: reads as many groups as it is told. The C library's functions change every thread.
    check(unsafe { libc::setgroups(groups.len(), groups.as_ptr()) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::setresgid(gid, gid, gid) })?;
    // SAFETY: no pointers.
    check(unsafe { libc::setresuid(uid, uid, uid) }).map(drop)
}
