//! A disk from its options to its front-ends: what its control thread does, from opening it to its end.
//!
//! What it is: a [`Start`], which takes over from an earlier daemon if there was one, and makes what serves the disk.
//!
//! What it is not: it knows no other disk of the process.
//!
//! Invariants: before the first byte of a front-end is read the thread has given up all that serving does not need. An
//! image is opened only once no other daemon serves it.

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use crate::args::{EngineChoice, Keep, MeantDisk, Socket};
use crate::control::{Control, ControlError, DaemonEnd, Source};
use crate::device::Device;
use crate::disk::Disk;
use crate::disk::uri::Uri;
use crate::engine::uring::Uring;
use crate::keep::{Fds, Keeper, Predecessor};
use crate::link::Link;
use crate::listen::{self, OwnPath};
use crate::manager::{Kind, Manager};
use crate::nbd::fence::{Fenced, fence};
use crate::nbd::remote::{self, Keep as _};
use crate::promise::Promise;
use crate::rbd::client;
use crate::rbd::held::Held;
use crate::session::Session;
use crate::session::state::RestoreError;
use crate::stats::Event;
use crate::store::Store;
use crate::succession::{Resume, Succession, TakenOver, take_over, without_state};
use crate::throttle::{Group, Throttle};
use crate::workers::{EngineKind, Options, Workers};
use crate::{sandbox, sys};

/// Why a disk is not served, or no longer.
pub type Failure = Box<dyn Error + Send + Sync>;

/// What earlier daemons of a disk, which are dead, have left on other machines.
#[derive(Debug, Default)]
struct Left {
    /// How their connections to NBD servers ended. `None`: it is not known that there was none; what one of them left in
    /// flight may be carried out yet.
    fenced: Option<Fenced>,
    /// They were these clients of a cluster,
    clients: Vec<String>,
    /// which have these numbers in the store.
    ids: Vec<u32>,
}

/// See the head of the file.
#[derive(Debug)]
pub struct Start {
    /// Its options.
    pub meant: MeantDisk,
    /// The socket that was passed for it.
    pub passed: Option<OwnedFd>,
    /// The listening socket that was made for it before the process became another user.
    pub made: Option<UnixListener>,
    /// What an earlier daemon of it has in the store.
    pub stored: Fds,
    /// What keeps what a successor needs.
    pub keep: Keep,
    /// What started the process.
    pub manager: Arc<Manager>,
    /// This program is new, and the store starts the one before it should it not serve.
    pub on_trial: bool,
    /// Why the last upgrade did not take place.
    pub refused: Option<String>,
    /// What the thread gives up.
    pub sandbox: sandbox::Mode,
    /// How much it may have.
    pub throttle: Arc<Group>,
    /// To the process.
    pub link: Arc<Link>,
}

impl Start {
    /// Opens the disk and serves it.
    ///
    /// # Errors
    /// Why it cannot be opened, or not served any longer.
    pub fn serve(mut self) -> Result<DaemonEnd, Failure> {
        let dead = self.stored.split_off(&remote::FIRST_ID);
        let (keeper, predecessor) = self.find_store()?.unzip();
        let predecessor = predecessor.flatten();
        let succeeds = predecessor.as_ref().is_some_and(|p| !p.fds.is_empty());
        let source = self.passed.take().map(Source::from_fd).transpose()?;
        let is_new_place = !succeeds && self.made.is_none();
        // First whether another daemon serves here: to wait at the fence for a
        // daemon that is alive would be to wait forever.
        let name = match (&self.meant.socket, &source) {
            (Socket::Path(path), _) => {
                if is_new_place {
                    listen::check(path, "--socket-path")?;
                }
                std::path::absolute(path)?.display().to_string()
            }
            (_, Some(source)) => source.name(self.meant.disk.read_only),
            (_, None) => return Err("the socket that was passed is gone".into()),
        };
        let engine = self.engine()?;
        if self.meant.disk.remote.is_some() && !matches!(engine, EngineKind::Uring(_)) {
            return Err(
                "a disk on another machine needs io_uring, which is not available here. Allow it (sysctl \
                        kernel.io_uring_disabled=0, or in the container's seccomp profile)"
                    .into(),
            );
        }
        let Left { fenced, clients, ids } = self.fence(dead)?;
        self.meant.disk.instance = name;
        self.meant.disk.dead_clients = clients;
        self.meant.disk.confine = sandbox::of_client(self.sandbox);
        if let (Some(Uri::Rbd(_)), Some(keeper)) = (&self.meant.disk.remote, &keeper) {
            self.meant.disk.held = Arc::new(Held::kept_in(keeper.marks()?));
        }
        let disk = Disk::open(&self.meant.disk, &|| match &self.meant.socket {
            // The one that was made is in no other daemon's place.
            Socket::Path(path) => is_new_place && listen::check(path, "--socket-path").is_err(),
            Socket::Fd(_) | Socket::Passed => false,
        })?;
        let client = self.name_client(&disk, &ids)?;
        if let (Some(image), true) = (disk.image(), client.is_some()) {
            image.set_store();
        }
        let has_predecessor = predecessor.is_some();
        let TakenOver {
            listener,
            mut resume,
            waiting,
            promise,
            write_back,
            sync_failed,
            had_stopped,
            snapshots,
            limits,
        } = self.take_over(predecessor, &disk)?;
        if let Some(image) = disk.image() {
            image.judge_guest();
        }
        let promise = match promise {
            Some(promise) => promise,
            None => {
                disk.check_format(&self.meant.disk)?;
                Promise::new(&disk, &self.meant.promise)?
            }
        };
        let mode_is_settled = write_back.is_some();
        let incoming = self.meant.disk.incoming;
        // A guest that arrives by migration may have been told that its writes are durable.
        if write_back.is_none() && self.meant.write_back && incoming {
            tracing::info!(
                "--incoming: write-through until the guest chooses write-back, whatever it had before"
            );
        }
        let write_back = write_back.unwrap_or(self.meant.write_back && !incoming);
        if incoming && disk.remote().is_some_and(|remote| !remote.export().flags.can_multi_conn()) {
            tracing::warn!(
                "--incoming: the server does not say (multi-conn) that one client sees what another one has written and \
                 flushed; do this only where you know that it does so"
            );
        }
        let in_memory = disk.backing.in_memory;
        let remote = disk.remote().cloned();
        if let (Some(remote), Some(keeper)) = (&remote, &keeper) {
            remote.marks().keep_in(keeper.marks()?);
        }
        let may_have_lost =
            fenced == Some(Fenced::Gone) && remote.as_ref().is_some_and(|r| r.marks().unflushed() > 0);
        let sync_failed = sync_failed || disk.lost_writes || may_have_lost;
        let count = disk.most_workers(self.meant.workers);
        let mut device = Device::new(disk, promise, count, write_back)?;
        device.reconnect_delay = self.meant.reconnect_delay;
        device.throttle = Throttle::new(Arc::clone(&self.throttle));
        device.throttle.register(self.link.waker());
        if let Some(limits) = limits {
            device.throttle.adopt(limits);
        }
        let device = Arc::new(device);
        device.holding.choose(self.meant.on_error, self.link.waker());
        if sync_failed {
            device.durability.set_sync_failed();
        }
        if let Some(keeper) = &keeper {
            let (file, at) = keeper.sync_note()?;
            device.durability.note_failed_syncs(file, at);
            device.stats.keep_in(keeper.stats()?);
        }
        if has_predecessor {
            device.stats.note(if had_stopped { Event::Upgrade } else { Event::Crash }, 1);
        }
        let pin_memory = self.meant.pin_memory && matches!(engine, EngineKind::Uring(_)) && !in_memory;
        if self.meant.pin_memory && !pin_memory {
            tracing::warn!(
                "--pin-memory has no effect here: it is for io_uring on a disk that is not memory"
            );
        }
        let MeantDisk { queues, tuning, .. } = self.meant;
        let options = Options { count, queues, engine, pin_memory, tuning };
        let workers = Workers::new(options, Arc::clone(&device), Arc::clone(&self.link))?;
        let mut session = Session::new(Arc::clone(&device), workers, Arc::clone(&self.link), queues);
        if mode_is_settled {
            session.settle_mode();
        }
        if sync_failed {
            session.hold_image();
        }
        if remote.is_some() && fenced.is_none() {
            session.replay_nothing();
        }
        if let Some(snapshots) = snapshots {
            session.take_snapshots(snapshots);
        }
        let source = match source {
            Some(source) => source,
            None => self.listen(listener, &mut resume)?,
        };
        tracing::info!(
            "serving {} ({} bytes, block {}{}) on {}",
            device.disk.path().display(),
            promise.bytes(),
            promise.block,
            if promise.read_only { ", read-only" } else { "" },
            source.name(promise.read_only),
        );
        let store = self.store();
        let succession = Succession::new(keeper, self.manager, self.on_trial, self.refused);
        self.link.opened(&device);
        let control_socket = self.link.wait_to_serve().inspect_err(|_| {
            if let Source::Listener(_, Some(own)) = &source {
                own.remove();
            }
        })?;
        let mut control =
            Control::new(Arc::clone(&device), Arc::clone(&self.link), session, succession, control_socket);
        // Both while that is allowed.
        let folder = source.folder();
        sandbox::enter(
            self.sandbox,
            device.disk.file().filter(|_| device.disk.backing.is_device),
            folder.as_slice(),
            &remote.as_ref().map(|remote| remote.ports()).unwrap_or_default(),
        );
        if let Some(remote) = &remote {
            remote.start(store.map(|store| Box::new(store) as _), || {
                sandbox::confine(sandbox::Role::Connect)
            })?;
        }
        if let Some(image) = device.disk.image() {
            image.watch(self.link.waker())?;
        }
        if self.sandbox != sandbox::Mode::Off {
            device.disk.start_claimer(|| sandbox::confine(sandbox::Role::Claim))?;
        }
        sys::prepare_foreign_signals();
        sandbox::confine(sandbox::Role::Control);
        let end = control.serve(source, resume, waiting);
        // Workers that were not waited for have the image yet.
        let is_idle = matches!(end, Ok(_) | Err(ControlError::Refused));
        if is_idle
            && device.disk.leave()
            && let Some((mut store, id)) = client
        {
            let _store_is_gone = store.forget(id);
        }
        Ok(end?)
    }

    /// Waits until NBD servers have done what dead daemons of this disk had sent them, and finds out which clients of a
    /// cluster these were.
    fn fence(&self, dead: Fds) -> std::io::Result<Left> {
        let mut left = Left::default();
        let mut connections = Vec::new();
        for (id, fd) in dead {
            let ended = match id {
                remote::FIRST_ID => Fenced::Done,
                remote::GONE_ID => Fenced::Gone,
                _ if sys::is_memory(&fd) => {
                    left.clients.push(client::name_in(fd)?);
                    left.ids.push(id);
                    continue;
                }
                _ => {
                    connections.push(id);
                    fence(&fd, |waited| {
                        tracing::warn!(
                            disk = %self.meant.disk.path.display(),
                            "waiting {} s for the server to end what an earlier vublkd had asked it for",
                            waited.as_secs()
                        );
                    })?
                }
            };
            left.fenced = left.fenced.max(Some(ended));
        }
        // Should this start fail, the next one has to know.
        if let (Some(mut store), false) = (self.store(), connections.is_empty()) {
            let told = sys::eventfd()?;
            match left.fenced {
                Some(Fenced::Done) => store.keep(remote::FIRST_ID, told.as_fd())?,
                Some(Fenced::Gone) => store.keep(remote::GONE_ID, told.as_fd())?,
                _ => {}
            }
            connections.into_iter().try_for_each(|id| store.forget(id))?;
        }
        if left.fenced == Some(Fenced::Unknown) {
            tracing::error!(
                disk = %self.meant.disk.path.display(),
                "the server could not be asked whether it has done what an earlier vublkd had sent: what that left in \
                 flight ends with I/O errors"
            );
            left.fenced = None;
        }
        Ok(left)
    }

    /// Puts this client of a cluster into the store, before it can write anything; under which number. `dead`: those of
    /// earlier ones, whose locks are broken.
    fn name_client(&self, disk: &Disk, dead: &[u32]) -> std::io::Result<Option<(Store, u32)>> {
        let Some(mut store) = self.store() else { return Ok(None) };
        let id = dead.iter().max().map_or(client::FIRST_ID, |last| last + 1);
        if let Some(image) = disk.image() {
            store.keep(id, client::named(&image.facts.client)?.as_fd())?;
        }
        dead.iter().try_for_each(|&id| store.forget(id))?;
        Ok(disk.image().map(|_| (store, id)))
    }

    /// The store of this disk, for what no state names.
    fn store(&self) -> Option<Store> {
        let socket = self.manager.socket().filter(|_| self.manager.kind() != Kind::Other)?;
        let systemd = (self.keep == Keep::Systemd).then(Fds::new);
        Some(Store::new(Arc::clone(socket), self.meant.name.clone().unwrap_or_default(), systemd))
    }

    /// The store, what a predecessor kept there, and why that cannot be read if it cannot.
    fn find_store(&mut self) -> std::io::Result<Option<(Keeper, Option<Predecessor>)>> {
        let Some(socket) = self.manager.socket().filter(|_| self.manager.kind() != Kind::Other) else {
            return Ok(None);
        };
        let fds = std::mem::take(&mut self.stored);
        let of_systemd = (self.keep == Keep::Systemd).then(|| fds.clone());
        let store = Store::new(Arc::clone(socket), self.meant.name.clone().unwrap_or_default(), of_systemd);
        let (keeper, predecessor, unreadable) = Keeper::new(store, fds)?;
        if let Some(why) = unreadable {
            tracing::error!("cannot go on where an earlier vublkd left off, its connection is closed: {why}");
        }
        Ok(Some((keeper, predecessor)))
    }

    fn take_over(&self, predecessor: Option<Predecessor>, disk: &Disk) -> Result<TakenOver, RestoreError> {
        let Some(predecessor) = predecessor else { return Ok(TakenOver::default()) };
        let known = without_state(&predecessor);
        match take_over(predecessor, disk, &self.meant.promise) {
            // The parent has the program yet that can read it, if this one is new.
            Err(e @ RestoreError::Version) if !self.on_trial => {
                tracing::error!(
                    "cannot go on where an earlier vublkd left off, the connection is closed: {e}"
                );
                Ok(known)
            }
            taken => taken,
        }
    }

    /// Where front-ends come from, if no socket was passed. `listener`: the one that an earlier daemon had.
    fn listen(
        &mut self,
        listener: Option<UnixListener>,
        resume: &mut Option<Resume>,
    ) -> Result<Source, Failure> {
        if listener.is_none() {
            resume.iter_mut().for_each(Resume::listens_anew); // what a predecessor made is not there any more
        }
        let Socket::Path(path) = &self.meant.socket else { return Err("there is no socket".into()) };
        let listener = match (listener.or(self.made.take()), OwnPath::taken_over(path)) {
            (Some(listener), Some(own)) => return Ok(Source::Listener(listener, Some(own))),
            (listener, _) => listener,
        };
        resume.iter_mut().for_each(Resume::listens_anew);
        let made = Source::listen(path).or_else(|e| {
            // The user of --user may not make another. A front-end that is connected goes on.
            tracing::warn!("no front-end can connect: the socket was removed, and no other can be made: {e}");
            listener.map(|listener| Source::Listener(listener, None)).ok_or(e)
        });
        Ok(made?)
    }

    /// The engine to use, and a word about it if it is not the best.
    fn engine(&self) -> Result<EngineKind, Failure> {
        let uring = EngineKind::Uring(self.meant.uring.clone());
        Ok(match (self.meant.engine, Uring::probe()) {
            (EngineChoice::Threads, _) => EngineKind::Threads,
            (EngineChoice::Null, _) => {
                tracing::warn!("--engine=null: nothing is read or written");
                EngineKind::Null
            }
            (EngineChoice::Auto | EngineChoice::IoUring, Ok(())) => uring,
            (EngineChoice::Auto, Err(e)) => {
                tracing::warn!(
                    "io_uring is not available here ({e}): using --engine=threads, which is slower"
                );
                EngineKind::Threads
            }
            (EngineChoice::IoUring, Err(e)) => {
                return Err(format!(
                    "io_uring is not available here: {e}. Allow it (sysctl kernel.io_uring_disabled=0, or in the \
                     container's seccomp profile), or use --engine=threads"
                )
                .into());
            }
        })
    }
}
