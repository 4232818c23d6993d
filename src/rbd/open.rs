//! From what an operator typed to an open image: connecting to its cluster, and what has to be seen before it is served.
//!
//! What it is not: nothing here is done while a guest has the image; [`super::image`] is that.
//!
//! Invariant: an image that is returned has no setting with which what was answered could be lost, and is another client's
//! only for a guest that must not go on, for one that is to arrive, or for reading.
#![expect(unsafe_code, reason = "calls a library of C")]

use std::ffi::{CStr, CString, c_char};
use std::fmt;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::ptr::{null, null_mut};

use super::checks;
use super::image::{Client, Facts, Handle, How, Likeness, RbdError};
use super::library::{self, Api, Info, Raw};
use super::standing::Found;
use super::uri::Uri;
use crate::shell::quoted;

/// How long the first connection to a cluster may take, seconds.
const CONNECT_SECONDS: &str = "30";
/// Bytes of what a function writes into a buffer of ours.
const TEXT: usize = 256;

fn c_text(text: impl AsRef<[u8]>) -> Result<CString, RbdError> {
    let text = text.as_ref();
    let why =
        |_| RbdError::Setting(String::from_utf8_lossy(text).into_owned(), io::ErrorKind::InvalidInput.into());
    CString::new(text).map_err(why)
}

/// A cluster that is being connected to; shut down unless it was.
struct Connecting {
    api: &'static Api,
    cluster: Raw,
    pool: Raw,
}

impl Drop for Connecting {
    fn drop(&mut self) {
        // SAFETY: both are handles of the library's, or null; nothing uses them any more.
        unsafe {
            if !self.pool.is_null() {
                (self.api.rados_ioctx_destroy)(self.pool);
            }
            if !self.cluster.is_null() {
                (self.api.rados_shutdown)(self.cluster);
            }
        }
    }
}

impl fmt::Debug for Connecting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connecting")
    }
}

impl Connecting {
    fn set(&self, option: &str, value: impl AsRef<[u8]>) -> Result<(), RbdError> {
        let (name, value) = (c_text(option)?, c_text(value)?);
        // SAFETY: two texts that end with a NUL.
        let set = unsafe { (self.api.rados_conf_set)(self.cluster, name.as_ptr(), value.as_ptr()) };
        Api::ok(set).map_err(|e| RbdError::Setting(format!("the setting {option}"), e))
    }

    /// The value of an option; nothing where it is longer than 4 KiB, or the library has no such option.
    fn get(&self, option: &CStr) -> String {
        let mut value = [0_u8; 4096];
        // SAFETY: a text, and a buffer of the length that is given.
        let got = unsafe {
            (self.api.rados_conf_get)(self.cluster, option.as_ptr(), value.as_mut_ptr().cast(), value.len())
        };
        if got < 0 { String::new() } else { library::text(&value) }
    }

    fn to(uri: &Uri, how: &How) -> Result<Self, RbdError> {
        let api = Api::load().map_err(RbdError::Library)?;
        let mut this = Self { api, cluster: null_mut(), pool: null_mut() };
        let user = c_text(format!("client.{}", uri.id.as_deref().unwrap_or("admin")))?;
        // SAFETY: a place for a handle, and texts that end with a NUL.
        let made = unsafe { (api.rados_create2)(&raw mut this.cluster, c"ceph".as_ptr(), user.as_ptr(), 0) };
        Api::ok(made).map_err(|e| RbdError::Io("make a client of Ceph", e))?;
        let conf = uri.conf.as_deref().map(|path| c_text(path.as_os_str().as_bytes())).transpose()?;
        let conf_ptr = conf.as_ref().map_or(null(), |path| path.as_ptr());
        // SAFETY: a path that ends with a NUL; or none, and the library looks where Ceph's programs do.
        let read = Api::ok(unsafe { (api.rados_conf_read_file)(this.cluster, conf_ptr) });
        read.map_err(|e| RbdError::Conf(conf_name(uri), e))?;
        if let Some(keyring) = &uri.keyring {
            this.set("keyring", keyring.as_os_str().as_bytes())?;
        }
        for (option, value) in checks::NEEDED {
            match this.set(option, value) {
                Err(RbdError::Setting(_, e)) if e.raw_os_error() == Some(libc::ENOENT) => {} // nor has it what that is for
                set => set?,
            }
        }
        this.set("client_mount_timeout", CONNECT_SECONDS)?;
        // One thread for answers, not two (which is Ceph's default): it sleeps and wakes less, so that more requests are done for
        // less CPU. Where the cluster's file asks for more, they are had.
        if this.get(c"librados_thread_count") == "2" {
            this.set("librados_thread_count", "1")?;
        }
        // After so many seconds without an answer a monitor is asked where the server is now, which was killed and started
        // anew, say. Ceph's own are 5 and 10: a guest's disk would stand still for that long.
        this.set("objecter_tick_interval", "1")?;
        this.set("objecter_timeout", "2")?;
        // Whole seconds; 0 is for ever, whatever the cluster's file says: a write that librados gives up by itself may be
        // carried out later.
        let seconds = how.patience.map_or(0, |patience| patience.as_secs().max(1)).to_string();
        for option in ["rados_osd_op_timeout", "rados_mon_op_timeout"] {
            this.set(option, &seconds)?;
        }
        let missing = this.missing(&user);
        // No thread of the library's runs before it connects.
        (how.confine)(&this.files(uri));
        // SAFETY: the cluster was made above.
        let connected = Api::ok(unsafe { (api.rados_connect)(this.cluster) });
        connected.map_err(|e| match e.raw_os_error() {
            Some(libc::ENOENT | libc::EACCES) => missing.unwrap_or(RbdError::Connect(e)),
            _ => RbdError::Connect(e),
        })?;
        let pool = c_text(&uri.pool)?;
        // SAFETY: a text, and a place for a handle.
        let found = unsafe { (api.rados_ioctx_create)(this.cluster, pool.as_ptr(), &raw mut this.pool) };
        Api::ok(found).map_err(|e| RbdError::Pool(uri.pool.clone(), e))?;
        let namespace = c_text(&uri.namespace)?;
        // SAFETY: a text that the library copies.
        unsafe { (api.rados_ioctx_set_namespace)(this.pool, namespace.as_ptr()) };
        Ok(this)
    }

    /// What is the matter where no connection comes about: the library says "No such file" to all of it.
    fn missing(&self, user: &CStr) -> Option<RbdError> {
        let mut looked = Vec::new();
        for path in self.get(c"keyring").split(',').filter(|path| !path.is_empty()) {
            match std::fs::read_to_string(path) {
                Ok(text) if text.contains(&format!("[{}]", user.to_string_lossy())) => looked.clear(),
                Ok(_) => looked.push(format!("{path} has none")),
                Err(e) => looked.push(format!("{path}: {e}")),
            }
            if looked.is_empty() {
                break;
            }
        }
        if !looked.is_empty() && self.get(c"key").is_empty() && self.get(c"keyfile").is_empty() {
            let user = user.to_string_lossy().into_owned();
            return Some(RbdError::NoKey { user, looked: looked.join("; ") });
        }
        self.get(c"mon_host").is_empty().then_some(RbdError::NoMonitor)
    }

    /// What the library reads yet: the user's key, and what stands beside the cluster's file.
    fn files(&self, uri: &Uri) -> Vec<PathBuf> {
        let keyrings = self.get(c"keyring");
        let listed = keyrings.split(',').filter(|path| !path.is_empty()).map(PathBuf::from);
        listed.chain(uri.conf.as_ref().and_then(|conf| Some(conf.parent()?.to_owned()))).collect()
    }

    /// This client's address.
    fn address(&self) -> io::Result<String> {
        let mut address: *mut c_char = null_mut();
        // SAFETY: a place for a text of the library's, which is freed once it was copied.
        unsafe {
            Api::ok((self.api.rados_getaddrs)(self.cluster, &raw mut address))?;
            let text = std::ffi::CStr::from_ptr(address).to_string_lossy().into_owned();
            (self.api.rados_buffer_free)(address);
            Ok(text)
        }
    }
}

impl Client {
    pub(super) fn open(uri: &Uri, how: &How) -> Result<(Self, Facts, u64), RbdError> {
        let mut connecting = Connecting::to(uri, how)?;
        let Connecting { api, cluster, pool } = connecting;
        let io = |what| move |e| RbdError::Io(what, e);
        let name = c_text(&uri.image)?;
        let snapshot = uri.snapshot.as_ref().map(c_text).transpose()?;
        let snapshot_ptr = snapshot.as_ref().map_or(null(), |name| name.as_ptr());
        let mut image = null_mut();
        // A look at a snapshot needs no watch; an image that is served for reading may be resized by others.
        let open = if snapshot.is_some() { api.rbd_open_read_only } else { api.rbd_open };
        // SAFETY: texts that end with a NUL, and a place for a handle.
        let opened = unsafe { open(pool, name.as_ptr(), &raw mut image, snapshot_ptr) };
        let opened = match Api::ok(opened) {
            // A user who may only read.
            Err(e) if how.read_only && matches!(e.raw_os_error(), Some(libc::EPERM | libc::EACCES)) => {
                // SAFETY: as above.
                Api::ok(unsafe {
                    (api.rbd_open_read_only)(pool, name.as_ptr(), &raw mut image, snapshot_ptr)
                })
            }
            opened => opened,
        };
        opened.map_err(|e| RbdError::Open(e, to_list(uri)))?;
        let client = connecting.address().map_err(io("find its own address"))?;
        let mut this = Self {
            api,
            cluster: Handle(cluster),
            pool: Handle(pool),
            image: Handle(image),
            like: Likeness { uri: uri.clone(), how: how.clone(), address: client.clone() },
            identity: String::new(),
            predecessor: None,
        };
        // From here on the handles are the thread's, for good.
        (connecting.cluster, connecting.pool) = (null_mut(), null_mut());
        let mut info = Info::default();
        let (mut features, mut id, mut fsid) = (0, [0_u8; TEXT], [0_u8; TEXT]);
        // SAFETY: places for numbers, and buffers of the lengths that are given.
        unsafe {
            Api::ok((api.rbd_stat)(image, &raw mut info, size_of::<Info>())).map_err(io("look at it"))?;
            Api::ok((api.rbd_get_features)(image, &raw mut features)).map_err(io("look at it"))?;
            Api::ok((api.rbd_get_id)(image, id.as_mut_ptr().cast(), id.len())).map_err(io("look at it"))?;
            let read = (api.rados_cluster_fsid)(cluster, fsid.as_mut_ptr().cast(), fsid.len());
            Api::ok(read).map_err(io("look at the cluster"))?;
        }
        let pool_name = c_text(&uri.pool)?;
        // SAFETY: a text.
        let pool_id = unsafe { (api.rados_pool_lookup)(cluster, pool_name.as_ptr()) };
        let (fsid, id) = (library::text(&fsid), library::text(&id));
        let Uri { namespace, snapshot, .. } = uri;
        let at = snapshot.as_deref().unwrap_or_default();
        let identity = format!("{fsid}/{pool_id}/{namespace}/{id}@{at}");
        this.identity.clone_from(&identity);
        if !how.read_only && features & library::FEATURE_EXCLUSIVE_LOCK == 0 {
            let name = uri.name();
            return Err(RbdError::NoLock(name.trim_start_matches("rbd:").to_owned()));
        }
        if !how.read_only
            && let Some((key, value, needed)) =
                checks::overridden(api, this.image).map_err(io("look at its settings"))?
        {
            let image = uri.name().trim_start_matches("rbd:").to_owned();
            return Err(RbdError::Overridden { key, value, needed, image });
        }
        let mut owners = match checks::owners(api, this.image) {
            _ if features & library::FEATURE_EXCLUSIVE_LOCK == 0 => Vec::new(),
            // A user who may only read.
            Err(e) if how.read_only => {
                tracing::warn!(disk = %uri.name(), "cannot find out which client has the image: {e}");
                Vec::new()
            }
            owners => owners.map_err(io("find out which client has it"))?,
        };
        let relied = if how.read_only { None } else { how.held.relied(&identity) };
        let is_earlier =
            |owner: &String| how.dead.contains(owner) || relied.is_some_and(|of| of.is_on(owner));
        let was_taken = relied.is_some_and(|of| of.was_taken(&owners, &how.dead));
        if was_taken {
            how.held.is_not_free(); // for the successors of this daemon, too
        }
        for dead in how.dead.iter().filter(|dead| how.read_only || !owners.contains(dead)) {
            if let Err(e) = this.refuse(dead) {
                tracing::debug!("servers wait for the client {dead} for some 30 s yet: {e}");
            }
        }
        this.predecessor = owners.iter().find(|owner| is_earlier(owner)).cloned();
        owners.retain(|owner| !is_earlier(owner));
        checks::keep_alive(api, this.image, &mut owners);
        if let (Some(owner), false) = (owners.first(), how.incoming || how.read_only || was_taken) {
            return Err(RbdError::Locked(owner.clone()));
        }
        let relied = relied.is_some();
        let facts =
            Facts { object_size: info.object_size, identity, client, features, owners, relied, was_taken };
        Ok((this, facts, info.size))
    }
}

/// The cluster's file, as it is looked for.
fn conf_name(uri: &Uri) -> String {
    let default = || "ceph.conf (in /etc/ceph, ~/.ceph and here, or as $CEPH_CONF says)".to_owned();
    uri.conf.as_ref().map_or_else(default, |path| path.display().to_string())
}

/// What an operator types to see what is there.
fn to_list(uri: &Uri) -> String {
    let options = uri.options();
    let pool =
        if uri.namespace.is_empty() { uri.pool.clone() } else { format!("{}/{}", uri.pool, uri.namespace) };
    match &uri.snapshot {
        Some(_) => format!("rbd{options} snap ls {}", quoted(&format!("{pool}/{}", uri.image))),
        None => format!("rbd{options} ls {}", quoted(&pool)),
    }
}

/// An image that is looked at.
struct Looked(&'static Api, Raw);

impl Drop for Looked {
    fn drop(&mut self) {
        // SAFETY: nothing uses the image any more.
        let _leaves_anyway = unsafe { (self.0.rbd_close)(self.1) };
    }
}

/// Who has the image of a client that the cluster refuses: asked by a client that is gone afterwards.
pub(super) fn who_has(refused: &Likeness) -> Result<Found, RbdError> {
    // This thread has given up all that it does not need.
    let how = How { confine: |_| {}, ..refused.how.clone() };
    let connecting = Connecting::to(&refused.uri, &how)?;
    let (api, name) = (connecting.api, c_text(&refused.uri.image)?);
    // One that is opened for reading knows of no lock, and needs none.
    let open = if how.read_only { api.rbd_open_read_only } else { api.rbd_open };
    let mut image = null_mut();
    // SAFETY: a text that ends with a NUL, and a place for a handle.
    let opened = unsafe { open(connecting.pool, name.as_ptr(), &raw mut image, null()) };
    Api::ok(opened).map_err(|e| RbdError::Open(e, to_list(&refused.uri)))?;
    let image = Looked(api, image);
    if how.read_only {
        return Ok(Found::Free);
    }
    let mut owners = match checks::owners(api, Handle(image.1)) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Vec::new(), // the feature was taken away
        owners => owners.map_err(|e| RbdError::Io("find out which client has it", e))?,
    };
    if owners.contains(&refused.address) {
        return Ok(Found::Own);
    }
    checks::keep_alive(api, Handle(image.1), &mut owners);
    Ok(owners.pop().map_or(Found::Free, Found::Other))
}
