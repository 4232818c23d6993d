//! What the cluster says of an image that decides whether it may be served.
//!
//! What it is: which clients are alive, and settings that the image or its pool has for itself.
//!
//! What it is not: it opens and locks nothing; [`super::image`] does.
//!
//! Invariant: what cannot be found out counts as it is worse: a client as alive.
#![expect(unsafe_code, reason = "calls a library of C")]

use std::ffi::{CStr, c_char, c_int};
use std::io;
use std::ptr::null_mut;

use super::image::Handle;
use super::library::{Api, ConfigOption, Watcher};

/// Settings without which an image is not served, and what they have to be. Those of ceph.conf are overridden by this
/// process; `rbd config image set` and `rbd config pool set` override this process.
pub(super) const NEEDED: [(&str, &str); 4] = [
    // What was answered has to outlive this process, which a cache in it does not.
    ("rbd_cache", "false"),
    // One on this host's SSD survives this process, but not the host.
    ("rbd_persistent_cache_mode", "disabled"),
    // The guest may change its pages while they are on their way, and checksums would be wrong.
    ("rbd_disable_zero_copy_writes", "true"),
    // A dead client whose lock is broken is refused from then on.
    ("rbd_blocklist_on_break_lock", "true"),
];
/// How often a list that has grown meanwhile is asked for again.
const TRIES: usize = 4;

fn copied(text: *const c_char) -> String {
    // SAFETY: a text of the library's, which ends with a NUL.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// Who owns the lock, alive or not.
///
/// # Errors
/// As rbd_lock_get_owners; EINVAL where the image has no such lock.
pub(super) fn owners(api: &Api, image: Handle) -> io::Result<Vec<String>> {
    let (mut mode, mut owners, mut count) = (0, [null_mut(); 8], 8);
    // SAFETY: places for as many texts as `count` says; they are freed once they were copied.
    unsafe {
        let got = (api.rbd_lock_get_owners)(image.0, &raw mut mode, owners.as_mut_ptr(), &raw mut count);
        match Api::ok(got) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(Vec::new()),
            got => got?,
        }
        let found = owners.iter().take(count).map(|&owner| copied(owner)).collect();
        (api.rbd_lock_get_owners_cleanup)(owners.as_mut_ptr(), count);
        Ok(found)
    }
}

/// Leaves those clients that are alive: they watch the image. A lock has no end, and outlives the client that owned it.
pub(super) fn keep_alive(api: &Api, image: Handle, clients: &mut Vec<String>) {
    if clients.is_empty() {
        return;
    }
    match watchers(api, image) {
        Ok(watchers) => clients.retain(|client| watchers.contains(client)),
        Err(e) => tracing::warn!("cannot find out which clients are alive: {e}"),
    }
}

fn watchers(api: &Api, image: Handle) -> io::Result<Vec<String>> {
    let mut count = 16;
    for _ in 0..TRIES {
        let mut list = vec![Watcher { addr: null_mut(), id: 0, cookie: 0 }; count];
        // SAFETY: places for as many watchers as `count` says; their texts are freed once they were copied.
        unsafe {
            match Api::ok((api.rbd_watchers_list)(image.0, list.as_mut_ptr(), &raw mut count)) {
                Err(e) if e.raw_os_error() == Some(libc::ERANGE) => continue,
                got => got?,
            }
            let found = list.iter().take(count).map(|watcher| copied(watcher.addr)).collect();
            (api.rbd_watchers_list_cleanup)(list.as_mut_ptr(), count);
            return Ok(found);
        }
    }
    Err(io::Error::from_raw_os_error(libc::ERANGE))
}

/// The first of [`NEEDED`] that the image, or its pool, sets to something else: its name, what it is, what it has to be.
///
/// # Errors
/// As rbd_config_image_list.
pub(super) fn overridden(api: &Api, image: Handle) -> io::Result<Option<(String, String, &'static str)>> {
    let mut count: c_int = 256;
    for _ in 0..TRIES {
        let empty = ConfigOption { name: null_mut(), value: null_mut(), source: 0 };
        let mut list = vec![empty; usize::try_from(count).unwrap_or(0)];
        // SAFETY: places for as many options as `count` says; their texts are freed once they were copied.
        unsafe {
            match Api::ok((api.rbd_config_image_list)(image.0, list.as_mut_ptr(), &raw mut count)) {
                Err(e) if e.raw_os_error() == Some(libc::ERANGE) => continue,
                got => got?,
            }
            let found = list.iter().take(usize::try_from(count).unwrap_or(0)).find_map(|option| {
                let (name, value) = (copied(option.name), copied(option.value));
                let (_, needed) = NEEDED.into_iter().find(|(needed, _)| *needed == name)?;
                (value != needed).then_some((name, value, needed))
            });
            (api.rbd_config_image_list_cleanup)(list.as_mut_ptr(), count);
            return Ok(found);
        }
    }
    Err(io::Error::from_raw_os_error(libc::ERANGE))
}
