//! The command `vublkd`: parses its command line, opens the disk, serves, and ends with an exit code.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{IsTerminal, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use vublk::args::disk::descriptors_of;
use vublk::args::file::control_of_file;
use vublk::args::{CAPABILITIES, Keep, Meant, MeantDisk, Read, Socket, Unreadable, limits_of};
use vublk::control::{ControlError, DaemonEnd, Source};
use vublk::kept_file::{self, KeptFile};
use vublk::link::Link;
use vublk::listen::{ListenError, OwnPath, beside};
use vublk::manager::{Kind, Manager};
use vublk::metrics::server::Place;
use vublk::metrics::{self, Metrics};
use vublk::process::{Ears, Process};
use vublk::program::Program;
use vublk::rbd::library;
use vublk::rpc::Server;
use vublk::session::judge;
use vublk::session::state::READS;
use vublk::signals::{self, Signals};
use vublk::start::{Failure, Start};
use vublk::store::{self, Inherited, Role};
use vublk::supervise::{self, GAVE_UP, RESTART};
use vublk::throttle::Group;
use vublk::user::{self, UserError};
use vublk::watchdog::Watchdog;
use vublk::workers::wait_for;
use vublk::{keep, listen, log, memory, sandbox, sys};

/// Exit codes; 2 is clap's, for a command line that makes no sense.
const CANNOT_SERVE: u8 = 1;
const USAGE: u8 = 2;
/// Cannot serve, for whatever reason; no guest waits for a successor, and the next front-end that connects starts one. For
/// systemd (RestartPreventExitStatus=): starts again and again would hold up all that comes after the disk's unit, as
/// libvirt-guests.service does.
const TURNED_AWAY: u8 = 4;
/// systemd starts the next daemon at once, which is right after a crash, and would be
/// a loop where the disk is gone.
const PAUSE: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // The first thing: before a thread starts, and before a signal can end what only starts or waits.
    let blocked = signals::block();
    if std::env::args_os().any(|a| a == "--print-capabilities") {
        // A broken pipe is the reader's choice, not an error of ours.
        let _printed = writeln!(std::io::stdout(), "{CAPABILITIES}");
        return ExitCode::SUCCESS;
    }
    if std::env::args_os().any(|a| a == "--print-state-version") {
        let layouts = READS.map(|layout| layout.to_string()).join(" ");
        let _printed = writeln!(std::io::stdout(), "{layouts}");
        return ExitCode::SUCCESS;
    }
    if let Err(e) = blocked.and_then(|()| log::start()) {
        let _printed = writeln!(
            std::io::stderr(),
            "vublkd: cannot start the thread that writes the log: {e}. Raise TasksMax=, pids.max or ulimit -u"
        );
        return ExitCode::from(CANNOT_SERVE);
    }
    let inherited = Inherited::take();
    let listeners = listeners(&inherited);
    let mut code = run(inherited, listeners.is_empty());
    if code != 0 && !sandbox::is_entered() {
        // A VMM that waited for ever would be a VM that neither starts nor fails.
        let gone = listen::turn_away(&listeners, PAUSE);
        if gone > 0 {
            log::complain(format_args!("{gone} front-ends that waited for the disk are turned away"));
        }
        if !listeners.is_empty() {
            code = TURNED_AWAY;
        }
    }
    log::flush();
    if library::is_loaded() {
        // Its threads may run yet, and would meet what the end of a program of C++ takes apart.
        sys::exit_now(code.into());
    }
    ExitCode::from(code)
}

/// The listening sockets that the service manager has passed, if no guest has a disk of theirs.
fn listeners(inherited: &Inherited) -> Vec<OwnedFd> {
    let fds = &inherited.fds;
    let is_guests = |(name, fd): &(String, OwnedFd)| {
        store::number(name).is_some() && rustix::net::getpeername(fd).is_ok()
    };
    if inherited.role != Role::First || fds.iter().any(is_guests) {
        return Vec::new();
    }
    let listening = fds.iter().filter(|(_, fd)| sys::is_listening(fd).is_ok_and(|yes| yes));
    listening.filter_map(|(_, fd)| fd.try_clone().ok()).collect()
}

/// `alone`: there are no front-ends to turn away, which takes a pause as well.
fn run(mut inherited: Inherited, alone: bool) -> u8 {
    // A program that was executed by its descriptor is called after that.
    let _for_ps = rustix::thread::set_name(c"vublkd");
    let role = inherited.role;
    if role == Role::Orphan {
        log::complain("its parent ended while it started; nothing is served. Start vublkd anew");
        return CANNOT_SERVE;
    }
    let kept = KeptFile::find(&inherited);
    let (meant, text) = match understand(&inherited, kept.as_ref()) {
        Ok(Some(understood)) => understood,
        Ok(None) => return 0,
        Err(code) => return code,
    };
    // Before a descriptor of our own can get its number.
    for disk in &meant.disks {
        let Socket::Fd(number) = disk.socket else { continue };
        let Some(fd) = sys::inherited_fd(number) else {
            log::complain(ControlError::BadFd(number, "is not open"));
            return CANNOT_SERVE;
        };
        inherited.fds.push((store::SOCKET.to_owned(), fd));
    }
    log::subscribe(meant.log_level);
    if let Err(e) = sys::raise_descriptor_limit() {
        tracing::debug!("cannot raise the limit of open files: {e}");
    }
    let made = match become_user(&meant, &mut inherited) {
        Ok(made) => made,
        Err(why) => {
            log::complain(&why);
            let is_usage = why.downcast_ref().is_some_and(UserError::is_usage);
            return if is_usage { USAGE } else { CANNOT_SERVE };
        }
    };
    if meant.keep == Keep::Parent && role != Role::Daemon {
        return supervise(&meant, inherited);
    }
    let keep = meant.keep;
    match serve(meant, inherited, text.map(|text| (text, kept))) {
        Ok(DaemonEnd::Stopped) => 0,
        // The store starts a successor, or systemd drops what is stored: it knows which.
        Ok(DaemonEnd::ForSuccessor { asked }) => {
            if asked {
                RESTART
            } else {
                0
            }
        }
        Err(why) => {
            log::complain(&why);
            if !sandbox::is_entered() {
                made.iter().for_each(|path| listen::remove_stale(path));
            }
            if keep == Keep::Systemd && (alone || sandbox::is_entered()) {
                let _in_a_sandbox_too = wait_for(&[], Some(PAUSE));
            }
            if why.downcast_ref().is_some_and(|e| matches!(e, ControlError::GaveUp)) {
                GAVE_UP
            } else {
                CANNOT_SERVE
            }
        }
    }
}

/// What is meant, and what is in the file of `--config`; `None`: what was asked for is done.
fn understand(inherited: &Inherited, kept: Option<&KeptFile>) -> Result<Option<(Meant, Option<String>)>, u8> {
    let complain = |why: &str| {
        log::complain(why);
        USAGE
    };
    let words: Vec<OsString> = std::env::args_os().collect();
    let read = match kept {
        // One that died is followed by one that does the same.
        Some(kept) if !kept.is_outdated() => Read::new(&words, Some(kept.text())),
        Some(kept) => Read::new(&words, None).or_else(|e| match e {
            Unreadable::File(why) => {
                log::complain(format_args!("{why}. The disks that were served are served as before"));
                Read::new(&words, Some(kept.text()))
            }
            other => Err(other),
        }),
        None => Read::new(&words, None),
    };
    let mut read = match read {
        Ok(read) => read,
        Err(Unreadable::CommandLine(e)) if e.use_stderr() => {
            let text = e.render();
            let colours = std::io::stderr().is_terminal();
            log::say(if colours { text.ansi().to_string() } else { text.to_string() });
            return Err(USAGE);
        }
        Err(Unreadable::CommandLine(help_or_version)) => help_or_version.exit(),
        Err(Unreadable::File(why)) => return Err(complain(&why)),
    };
    let check = read.typed.check_config.then(|| read.typed.config.clone()).flatten();
    let sockets = inherited.fds.iter().filter(|(name, _)| is_socket(inherited.role, name));
    let passed: Vec<&str> = sockets.map(|(name, _)| disk_name(name)).collect();
    if inherited.role != Role::First && !passed.is_empty() {
        read.typed.disk.fd = None; // it is among them
    }
    let text = read.file.as_ref().map(|file| file.text.clone());
    if let Some(path) = check {
        let disks = read.check().map_err(|why| complain(&why))?;
        let _printed = writeln!(std::io::stdout(), "{}: {disks} disks, no mistakes", path.display());
        return Ok(None);
    }
    let meant = read.mean(&passed).map_err(|why| complain(&why))?;
    Ok(Some((meant, text)))
}

/// Runs as the parent of the daemon.
fn supervise(meant: &Meant, mut inherited: Inherited) -> u8 {
    let role = inherited.role;
    for (name, _) in inherited.fds.iter_mut().filter(|(name, _)| is_socket(role, name)) {
        *name = with_disk(store::SOCKET, meant.config.as_ref().map(|_| disk_name(name)));
    }
    let ended = supervise::run(inherited, meant.stop_timeout, meant.sandbox);
    // Of a daemon that was killed, or had ended for a successor when the stop came.
    for disk in &meant.disks {
        if let Socket::Path(path) = &disk.socket {
            listen::remove_stale(path);
        }
    }
    if let Some((path, _)) = control_path(meant, &[]) {
        listen::remove_stale(&path);
    }
    if let Some(Place::Unix(path)) = &meant.metrics {
        listen::remove_stale(path);
    }
    match ended {
        Ok(code) => code,
        Err(why) => {
            log::complain(format_args!("cannot start the daemon: {why}"));
            CANNOT_SERVE
        }
    }
}

/// True for a listening or connected socket among what this process was started with, whatever its unit is called.
fn is_socket(role: Role, name: &str) -> bool {
    match role {
        Role::First => store::number(name).is_none() && !name.starts_with(store::MADE),
        Role::Parent | Role::Daemon | Role::Orphan => name.split('@').next() == Some(store::SOCKET),
    }
}

/// The disk's name in that of its socket; all of it where the service manager has given the name.
fn disk_name(name: &str) -> &str {
    match name.split_once('@') {
        Some((store::SOCKET, disk)) => disk,
        _ => name,
    }
}

/// The name of a socket of this disk.
fn with_disk(what: &str, disk: Option<&str>) -> String {
    disk.map_or_else(|| what.to_owned(), |disk| format!("{what}@{disk}"))
}

fn serve(
    meant: Meant,
    mut inherited: Inherited,
    file: Option<(String, Option<KeptFile>)>,
) -> Result<DaemonEnd, Failure> {
    let role = inherited.role;
    drop(inherited.split(kept_file::is_kept_file));
    let (kind, parent) = match meant.keep {
        Keep::Nowhere => (Kind::Other, None),
        Keep::Systemd => (Kind::Systemd, None),
        Keep::Parent => (Kind::Parent, inherited.split(|name| name == store::NOTIFY).pop().map(|(_, fd)| fd)),
    };
    let manager = Arc::new(Manager::new(kind, parent, meant.disks.len())?);
    let signals = Signals::new()?;
    // Opened while that is allowed.
    let _none_without_proc = judge::mounts();
    let memory_lost = sys::eventfd()?;
    memory::fault::install(memory_lost.try_clone()?)?;
    sys::allow_interrupts()?;
    let told = Arc::new(sys::eventfd()?);
    let by_parent = |name| std::env::var(name).ok().filter(|_| role == Role::Daemon);
    let on_trial = by_parent(store::TRIAL).is_some();
    let first = !inherited.fds.iter().any(|(name, _)| store::number(name).is_some());
    let control = control_path(&meant, &inherited.fds);
    if let Some((path, true)) = control.as_ref().filter(|_| first) {
        listen::check(path, "--control")?;
    }
    let made =
        inherited.split(|name| name == store::MADE_CONTROL).pop().map(|(_, fd)| UnixListener::from(fd));
    let made_metrics = inherited.split(|name| name == store::MADE_METRICS).pop().map(|(_, fd)| fd);
    let mut measured = Vec::new();
    let watchdog = Watchdog::new(role, manager.parent())?;
    if first {
        // A successor has what its predecessor had, and its guest waits.
        enough_descriptors(&meant)?;
    }
    let group = |name: Option<&String>, limits| Arc::new(Group::new(name.cloned(), limits));
    let named = meant.disks.iter().filter_map(|disk| disk.throttle_group.as_ref());
    let groups: BTreeMap<_, _> =
        named.map(|name| (name.clone(), group(Some(name), limits_of(name, &meant.disks)))).collect();
    let mut starts = Vec::new();
    for disk in meant.disks {
        let name = disk.name.clone();
        let mut of_it = |what: &str| {
            let wanted = with_disk(what, name.as_deref());
            inherited.split(|name| name == wanted).pop().map(|(_, fd)| fd)
        };
        let made = of_it(store::MADE_SOCKET).map(UnixListener::from);
        let passed = match (&disk.socket, role) {
            (Socket::Path(_), _) => None,
            (_, Role::First) => {
                let is_its = |other: &str| name.as_deref().is_none_or(|name| name == other);
                inherited.split(|other| is_socket(role, other) && is_its(other)).pop().map(|(_, fd)| fd)
            }
            _ => of_it(store::SOCKET),
        };
        let link = Arc::new(Link::new(Arc::clone(&told), meant.stop_timeout)?);
        measured.push(metrics::Disk { name: shown_name(&disk, control.as_ref()), link: Arc::clone(&link) });
        starts.push(Start {
            passed,
            made,
            stored: keep::stored(&mut inherited.fds, name.as_deref().unwrap_or_default()),
            keep: meant.keep,
            manager: Arc::clone(&manager),
            on_trial,
            refused: by_parent(supervise::REFUSED),
            sandbox: meant.sandbox,
            throttle: match &disk.throttle_group {
                Some(name) => groups.get(name).cloned().unwrap_or_default(),
                None => group(None, disk.limits),
            },
            link,
            meant: disk,
        });
    }
    let left = inherited.split(|name| store::number(name).is_some());
    drop(inherited);
    if let Some((_, Some(kept))) = &file {
        kept.count_on();
    }
    let sandbox = meant.sandbox;
    let config = meant.config.as_deref().map(|path| std::path::absolute(path).unwrap_or(path.into()));
    let process = Process {
        signals,
        config,
        memory_lost,
        told,
        watchdog,
        manager,
        file,
        left,
        on_trial,
        sandbox,
        first,
    };
    let ended = process.run(starts, || {
        let rpc = control_socket(control, made, role)?;
        // The parent keeps its socket for all its daemons.
        let own = match &meant.metrics {
            Some(Place::Unix(path)) if role == Role::First => OwnPath::taken_over(path),
            _ => None,
        };
        let metrics =
            made_metrics.map(|listener| metrics::server::Server::new(listener, Metrics::new(measured), own));
        Ok(Ears { rpc, metrics: metrics.transpose()? })
    });
    if let Err(why) = &ended
        && let Some(ControlError::GaveUp) = why.downcast_ref()
    {
        // The workers hang in the kernel: no destructor may wait for them.
        log::complain(ControlError::GaveUp);
        log::flush();
        sys::exit_now(GAVE_UP.into());
    }
    ended
}

/// Counts the descriptors that the queues, the workers and one front-end of each disk will need, before one comes.
fn enough_descriptors(meant: &Meant) -> Result<(), Failure> {
    let of_disk = |disk: &MeantDisk| {
        descriptors_of(disk.queues.into(), disk.workers.into(), meant.keep == Keep::Systemd)
    };
    let needed: usize = meant.disks.iter().map(of_disk).sum();
    let (left, most) = sys::descriptors_left()?;
    if left < needed {
        let (what, queues) = match (meant.disks.as_slice(), &meant.config) {
            ([disk], _) => (disk.disk.path.display().to_string(), format!("{} queues need", disk.queues)),
            (_, Some(file)) => (file.display().to_string(), "all queues need".to_owned()),
            (_, None) => (String::new(), "all queues need".to_owned()), // not reached
        };
        return Err(format!(
            "{what}: {queues} {} open files, and the limit is {most}. Raise it (ulimit -n, LimitNOFILE=), or use fewer \
             --num-queues",
            needed + (most - left)
        )
        .into());
    }
    Ok(())
}

/// Where the control socket is to be, if there is to be one; true: it was asked for, so that it is a reason not to serve
/// if it cannot be made. By default it is beside the socket of the only disk, or of the first one of a file.
fn control_path(meant: &Meant, inherited: &[(String, OwnedFd)]) -> Option<(PathBuf, bool)> {
    if let Some(path) = &meant.control {
        return Some((path.clone(), true));
    }
    let first = meant.disks.first()?;
    let socket = match &first.socket {
        Socket::Path(path) => path.clone(),
        Socket::Fd(_) | Socket::Passed => {
            let (_, fd) = inherited.iter().find(|(name, _)| {
                let is_any =
                    store::number(name).is_none() && !name.starts_with(store::MADE) && name != store::NOTIFY;
                is_any && first.name.as_deref().is_none_or(|disk| disk == disk_name(name))
            })?;
            match Source::from_fd(fd.try_clone().ok()?).ok()? {
                source @ Source::Listener(..) => source.path()?,
                Source::Connected(_) => return None,
            }
        }
    };
    let place = match &meant.config {
        None => beside(&socket),
        Some(file) => control_of_file(file, &socket)?,
    };
    Some((place, false))
}

/// What people call a disk, as `vublk list` does.
fn shown_name(disk: &MeantDisk, control: Option<&(PathBuf, bool)>) -> String {
    match (&disk.name, control, &disk.socket) {
        (Some(name), ..) => name.clone(),
        (None, Some((path, _)), _) | (None, None, Socket::Path(path)) => listen::disk_name(path),
        (None, None, _) => disk.disk.path.display().to_string(),
    }
}

/// Makes something of the control socket's path, or says why there will be none.
fn at_control_path<T>(
    (path, is_wanted): (PathBuf, bool),
    make: impl FnOnce(&Path) -> Result<T, ListenError>,
) -> Result<Option<T>, ListenError> {
    match make(&path) {
        Err(e) if !is_wanted => {
            tracing::warn!(
                "no control socket, vublk status, resize, retry, throttle and upgrade do not work: {e}"
            );
            Ok(None)
        }
        made => made.map(Some),
    }
}

/// The control socket, `made` already or not.
fn control_socket(
    place: Option<(PathBuf, bool)>,
    made: Option<UnixListener>,
    role: Role,
) -> Result<Option<Server>, ListenError> {
    let Some(place) = place else { return Ok(None) };
    let Some(listener) = made else { return at_control_path(place, Server::listen) };
    // The parent keeps it for all its daemons.
    let own = if role == Role::First { OwnPath::taken_over(&place.0) } else { None };
    Ok(Some(Server::over(listener, &place.0, own)))
}

/// Becomes the user of `--user`, if it is another, once the sockets are made that this user may not be able to make; gives
/// their paths.
fn become_user(meant: &Meant, inherited: &mut Inherited) -> Result<Vec<PathBuf>, Failure> {
    if inherited.role != Role::First {
        return Ok(Vec::new()); // it is that user
    }
    let account = user::account(meant.user.as_deref(), meant.group.as_deref())?;
    let owner = account.as_ref().map(|account| (account.uid, account.gid));
    let mut made = match owner {
        Some(owner) => make_sockets(meant, inherited, owner)?,
        None => Vec::new(), // each daemon may make its own
    };
    let remove =
        |made: &[MadeSocket]| made.iter().filter_map(|(.., own)| own.as_ref()).for_each(OwnPath::remove);
    made.extend(make_metrics(meant, inherited, owner).inspect_err(|_| remove(&made))?);
    if let Some(account) = &account {
        account.assume().inspect_err(|_| remove(&made))?;
    }
    if account.is_some() && meant.keep == Keep::Parent {
        let program = Program::own_path();
        if let Err(why) = Program::open(&program) {
            tracing::warn!("vublk upgrade will not work, the user of --user may not read the program: {why}");
        }
    }
    let paths = made.iter().filter_map(|(.., own)| Some(own.as_ref()?.path().to_owned())).collect();
    inherited.fds.extend(made.into_iter().map(|(name, fd, _)| (name, fd)));
    Ok(paths)
}

/// A socket's name among those that are inherited, itself, and its place.
type MadeSocket = (String, OwnedFd, Option<OwnPath>);

/// The socket of `--metrics`, which all daemons after this one have. A guest that waits for one gets its disk without.
fn make_metrics(
    meant: &Meant,
    inherited: &Inherited,
    owner: Option<(u32, u32)>,
) -> Result<Option<MadeSocket>, String> {
    let Some(place) = &meant.metrics else { return Ok(None) };
    match place.listen(owner) {
        Ok((listener, own)) => Ok(Some((store::MADE_METRICS.to_owned(), listener, own))),
        Err(why) if inherited.fds.iter().any(|(name, _)| store::number(name).is_some()) => {
            tracing::error!("no metrics: {why}");
            Ok(None)
        }
        Err(why) => Err(why),
    }
}

/// The disks' sockets, if they are not there yet, and the control socket, for this user.
fn make_sockets(meant: &Meant, inherited: &Inherited, owner: (u32, u32)) -> Result<Vec<MadeSocket>, Failure> {
    let owner = Some(owner);
    let mut made: Vec<MadeSocket> = Vec::new();
    let undo =
        |made: &[MadeSocket]| made.iter().filter_map(|(.., own)| own.as_ref()).for_each(OwnPath::remove);
    for disk in &meant.disks {
        let name = disk.name.as_deref().unwrap_or_default();
        let stored = |(_, of): (_, &str)| of == name;
        let succeeds = inherited.fds.iter().any(|(name, _)| store::number(name).is_some_and(stored));
        if let Socket::Path(path) = &disk.socket
            && !succeeds
        {
            let listener = listen::listen(path, 0o660, owner, "--socket-path");
            let (listener, own) = listener.inspect_err(|_| undo(&made))?;
            made.push((with_disk(store::MADE_SOCKET, disk.name.as_deref()), listener.into(), Some(own)));
        }
    }
    if let Some(place) = control_path(meant, &inherited.fds) {
        let control = at_control_path(place, |path| listen::listen(path, 0o600, owner, "--control"));
        let control = control.inspect_err(|_| undo(&made))?;
        made.extend(
            control.map(|(listener, own)| (store::MADE_CONTROL.to_owned(), listener.into(), Some(own))),
        );
    }
    Ok(made)
}
