//! librbd and librados as they are on this machine, loaded when the first image of a cluster is opened.
//!
//! What it is: the functions that are needed, with the types of rbd/librbd.h and rados/librados.h (Ceph 16.2).
//!
//! What it is not: it knows no image; [`super::image`] does. The programs are not linked with the libraries, and run
//! where there are none.
//!
//! Invariant: a library that was loaded stays loaded: its threads run in it until the process ends.
#![expect(unsafe_code, reason = "loads a library of C")]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::io;
use std::sync::OnceLock;

use libloading::Library;

/// What the libraries call rados_t, rados_ioctx_t, rbd_image_t and rbd_completion_t.
pub type Raw = *mut c_void;
/// rbd_callback_t.
pub type Completed = extern "C" fn(Raw, *mut c_void);
/// rbd_update_callback_t.
pub type Updated = extern "C" fn(*mut c_void);
/// Of rbd_diff_iterate2: an extent, whether it exists.
pub type Extent = extern "C" fn(u64, usize, c_int, *mut c_void) -> c_int;
/// RBD_LOCK_MODE_EXCLUSIVE.
pub const EXCLUSIVE: c_int = 0;
/// RBD_FEATURE_EXCLUSIVE_LOCK.
pub const FEATURE_EXCLUSIVE_LOCK: u64 = 1 << 2;
/// RBD_FEATURE_FAST_DIFF.
pub const FEATURE_FAST_DIFF: u64 = 1 << 4;
/// Features and their names (rbd/features.h).
pub const FEATURES: [(u64, &str); 12] = [
    (1 << 0, "layering"),
    (1 << 1, "striping"),
    (FEATURE_EXCLUSIVE_LOCK, "exclusive-lock"),
    (1 << 3, "object-map"),
    (FEATURE_FAST_DIFF, "fast-diff"),
    (1 << 5, "deep-flatten"),
    (1 << 6, "journaling"),
    (1 << 7, "data-pool"),
    (1 << 8, "operations"),
    (1 << 9, "migrating"),
    (1 << 10, "non-primary"),
    (1 << 11, "dirty-cache"),
];
/// RBD_WRITE_ZEROES_FLAG_THICK_PROVISION: the blocks stay allocated.
pub const THICK: c_int = 1;

/// rbd_image_info_t.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    /// Bytes.
    pub size: u64,
    /// Bytes of an object.
    pub object_size: u64,
    /// Objects.
    pub objects: u64,
    order: c_int,
    prefix: [u8; 24],
    parent_pool: i64,
    // RBD_MAX_IMAGE_NAME_SIZE is 96: more than the traits of arrays know.
    parent: [[u8; 32]; 3],
}

/// rbd_image_watcher_t.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Watcher {
    /// The client, as lists of locks name it.
    pub addr: *mut c_char,
    /// Its number.
    pub id: i64,
    /// Which of its watches.
    pub cookie: u64,
}

/// rbd_config_option_t.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ConfigOption {
    /// Its name.
    pub name: *mut c_char,
    /// What it is.
    pub value: *mut c_char,
    /// rbd_config_source_t.
    pub source: c_int,
}

macro_rules! functions {
    ($($(#[$doc:meta])* $library:ident $name:ident($($argument:ty),*) $(-> $result:ty)?;)*) => {
        /// Functions under their names in C; 0 or a negative errno where they give a `c_int`.
        #[derive(Debug)]
        #[expect(missing_docs, reason = "the headers of the libraries describe them")]
        pub struct Api {
            $($(#[$doc])* pub $name: unsafe extern "C" fn($($argument),*) $(-> $result)?,)*
        }

        impl Api {
            fn of(librados: &Library, librbd: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the types are those of the headers; the library is never unloaded.
                    $($name: unsafe { *functions!(@ $library librados librbd).get(stringify!($name))? },)*
                })
            }
        }
    };
    (@ rados $rados:ident $rbd:ident) => { $rados };
    (@ rbd $rados:ident $rbd:ident) => { $rbd };
}

functions! {
    rados rados_create2(*mut Raw, *const c_char, *const c_char, u64) -> c_int;
    rados rados_conf_read_file(Raw, *const c_char) -> c_int;
    rados rados_conf_set(Raw, *const c_char, *const c_char) -> c_int;
    rados rados_conf_get(Raw, *const c_char, *mut c_char, usize) -> c_int;
    rados rados_connect(Raw) -> c_int;
    rados rados_shutdown(Raw);
    rados rados_cluster_fsid(Raw, *mut c_char, usize) -> c_int;
    rados rados_getaddrs(Raw, *mut *mut c_char) -> c_int;
    rados rados_blocklist_add(Raw, *mut c_char, u32) -> c_int;
    rados rados_buffer_free(*mut c_char);
    rados rados_pool_lookup(Raw, *const c_char) -> i64;
    rados rados_ioctx_create(Raw, *const c_char, *mut Raw) -> c_int;
    rados rados_ioctx_set_namespace(Raw, *const c_char);
    rados rados_ioctx_destroy(Raw);
    rbd rbd_open(Raw, *const c_char, *mut Raw, *const c_char) -> c_int;
    rbd rbd_open_read_only(Raw, *const c_char, *mut Raw, *const c_char) -> c_int;
    rbd rbd_close(Raw) -> c_int;
    rbd rbd_stat(Raw, *mut Info, usize) -> c_int;
    rbd rbd_get_size(Raw, *mut u64) -> c_int;
    rbd rbd_get_features(Raw, *mut u64) -> c_int;
    rbd rbd_get_id(Raw, *mut c_char, usize) -> c_int;
    rbd rbd_resize(Raw, u64) -> c_int;
    rbd rbd_lock_acquire(Raw, c_int) -> c_int;
    rbd rbd_lock_release(Raw) -> c_int;
    rbd rbd_lock_get_owners(Raw, *mut c_int, *mut *mut c_char, *mut usize) -> c_int;
    rbd rbd_lock_get_owners_cleanup(*mut *mut c_char, usize);
    rbd rbd_lock_break(Raw, c_int, *const c_char) -> c_int;
    rbd rbd_watchers_list(Raw, *mut Watcher, *mut usize) -> c_int;
    rbd rbd_watchers_list_cleanup(*mut Watcher, usize);
    rbd rbd_config_image_list(Raw, *mut ConfigOption, *mut c_int) -> c_int;
    rbd rbd_config_image_list_cleanup(*mut ConfigOption, c_int);
    rbd rbd_update_watch(Raw, *mut u64, Updated, *mut c_void) -> c_int;
    rbd rbd_diff_iterate2(Raw, *const c_char, u64, u64, u8, u8, Extent, *mut c_void) -> c_int;
    rbd rbd_flush(Raw) -> c_int;
    rbd rbd_aio_create_completion(*mut c_void, Completed, *mut Raw) -> c_int;
    rbd rbd_aio_release(Raw);
    rbd rbd_aio_get_return_value(Raw) -> isize;
    rbd rbd_aio_readv(Raw, *const libc::iovec, c_int, u64, Raw) -> c_int;
    rbd rbd_aio_writev(Raw, *const libc::iovec, c_int, u64, Raw) -> c_int;
    rbd rbd_aio_discard(Raw, u64, u64, Raw) -> c_int;
    rbd rbd_aio_write_zeroes(Raw, u64, usize, Raw, c_int, c_int) -> c_int;
    rbd rbd_aio_flush(Raw, Raw) -> c_int;
}

static API: OnceLock<Result<Api, String>> = OnceLock::new();

/// True once this process has the libraries in it.
#[must_use]
pub fn is_loaded() -> bool {
    API.get().is_some_and(Result::is_ok)
}

impl Api {
    /// Loads the libraries, once.
    ///
    /// # Errors
    /// As dlopen(3) and dlsym(3) say it.
    pub fn load() -> Result<&'static Self, String> {
        let loaded = API.get_or_init(|| {
            // SAFETY: what the libraries do when they are loaded is that of any program that uses Ceph.
            let open = |name: &str| unsafe { Library::new(name) };
            let load = || {
                let (librados, librbd) = (open("librados.so.2")?, open("librbd.so.1")?);
                let api = Self::of(&librados, &librbd)?;
                std::mem::forget((librados, librbd));
                Ok(api)
            };
            load().map_err(|e: libloading::Error| e.to_string())
        });
        loaded.as_ref().map_err(Clone::clone)
    }

    /// What a function gives back, as an error of this process's.
    ///
    /// # Errors
    /// A negative number is an errno.
    pub fn ok(result: c_int) -> io::Result<()> {
        if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
    }
}

/// The text that a function wrote into a buffer, up to its NUL.
#[must_use]
pub fn text(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}
