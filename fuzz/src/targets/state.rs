//! What a predecessor kept: the file of state, and the state in it, when their bytes are anything.
//!
//! A plain reading of the file is compared with `keep::Keeper`. A state is read, and a session restored from it: what it
//! says is what the session then says, its descriptors are those that the text names, and a good state is served after each.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use serde_json::{Value, json};
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vublk::device::Device;
use vublk::keep::{Fds, Keeper, Phase, Predecessor};
use vublk::session::Session;
use vublk::session::state::{self, RestoreError, State};
use vublk::store::{self, Store};
use vublk::workers::EngineKind;

use super::reader::Reader;
use super::stage::{Stage, promise_options};
use crate::support::sys::{Event, memory_file};

/// The number of the file of state in the store.
const STATE: u32 = 1;
/// Where its parts are, and how long one may be.
const PARTS: u64 = 4096;
const MOST: u64 = 512 << 10;

/// A store, and its other end, which has to be read now and then.
fn store() -> (Store, OwnedFd) {
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    (Store::new(Arc::new(ours), String::new(), None), theirs)
}

/// Reads what the keeper told the store: descriptors put, numbers removed.
fn told(parent: &OwnedFd) -> Vec<(String, Option<OwnedFd>)> {
    rustix::io::ioctl_fionbio(parent, true).unwrap();
    std::iter::from_fn(|| store::receive(parent).ok().flatten()).collect()
}

/// What the file of state says, by the comments at its declaration.
#[derive(Debug, PartialEq)]
struct Kept {
    phase: u8,
    state: Vec<u8>,
    message: Option<(Vec<u8>, Vec<u32>)>,
    sync_failed: bool,
}

fn plain(file: &[u8]) -> Option<Kept> {
    let word = |at: usize| file.get(at..at + 4).map(|w| u32::from_le_bytes(w.try_into().unwrap()));
    let [b'v', 1, phase @ 0..4, active @ 0..2, ..] = file.get(..20)? else { return None };
    let words = [word(4)?, word(8)?, word(12)?, word(16)?];
    if words.iter().any(|&len| u64::from(len) > MOST) {
        return None;
    }
    let part = |at: u64, len: u32| {
        if len == 0 {
            Some(Vec::new())
        } else {
            file.get(at as usize..)?.get(..len as usize).map(<[u8]>::to_vec)
        }
    };
    let state = part(PARTS + u64::from(*active) * MOST, words[usize::from(*active)])?;
    let tries = file.get(64).copied().unwrap_or(0);
    let message = if *phase == 2 {
        let numbers = part(PARTS + 2 * MOST + u64::from(words[2]), words[3])?;
        let numbers = numbers.chunks_exact(4).map(|n| u32::from_le_bytes(n.try_into().unwrap())).collect();
        // Two daemons have died of it.
        Some((part(PARTS + 2 * MOST, words[2])?, numbers)).filter(|_| tries < 2)
    } else {
        None
    };
    // The two bytes are read together or not at all.
    let sync_failed = file.get(65).is_some_and(|&byte| byte != 0);
    Some(Kept { phase: *phase, state, message, sync_failed })
}

fn same(found: &Predecessor, want: &Kept) {
    assert_eq!(found.state, want.state);
    let message = found.pending.as_ref().map(|pending| (pending.bytes.clone(), pending.fds.clone()));
    assert_eq!(message, want.message);
    let is_unsure = want.phase == 1 || want.phase == 3 || want.phase == 2 && want.message.is_none();
    assert_eq!(found.is_unsure, is_unsure);
    assert_eq!(found.sync_failed, want.sync_failed);
}

fn contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Bytes at places of the file that mean something.
fn scribble(file: &File, bytes: &mut Reader<'_>) {
    let at = match bytes.below(8) {
        0 | 1 => bytes.below(20),
        2 => 64 + bytes.below(2),
        3 => PARTS,
        4 => PARTS + MOST,
        5 => PARTS + 2 * MOST,
        6 => PARTS + 2 * MOST + bytes.below(64),
        _ => bytes.u16().into(),
    };
    let len = bytes.below(32) as usize;
    file.write_all_at(bytes.bytes(len), at).unwrap();
}

/// A file of any bytes, of any length.
fn hostile_file(bytes: &mut Reader<'_>) {
    let file = memory_file(0);
    if bytes.bool() {
        file.write_all_at(&[b'v', 1, bytes.below(4) as u8, bytes.below(2) as u8], 0).unwrap();
    }
    bytes.list(10, |bytes| scribble(&file, bytes));
    if bytes.bool() {
        file.set_len(u64::from(bytes.u16()) * 64).unwrap();
    }
    let want = plain(&contents(&file));
    let (store, parent) = store();
    let mut fds = Fds::new();
    fds.insert(STATE, Arc::new(file.into()));
    fds.insert(2 + bytes.u32() % 100, Arc::new(memory_file(1).into()));
    let had = fds.clone();
    let (mut keeper, found, why) = Keeper::new(store, fds).unwrap();
    match (want, found) {
        (Some(want), Some(found)) => {
            assert!(why.is_none());
            same(&found, &want);
            assert!(told(&parent).is_empty());
        }
        (None, None) => {
            assert!(why.is_some());
            // All is removed, and a new file is there, which says nothing.
            let told = told(&parent);
            let removed = told.iter().filter(|(text, _)| text.starts_with("FDSTOREREMOVE")).count();
            assert_eq!((removed, told.len()), (had.len(), had.len() + 1));
        }
        (want, found) => panic!("got {found:?} ({why:?}), want {want:?}"),
    }
    // And it keeps.
    keeper.commit(b"{}", &BTreeSet::new(), Phase::Idle).unwrap();
    keeper.idle().unwrap();
}

/// A keeper that does what it is for, dies at any moment, and is succeeded.
fn lives(bytes: &mut Reader<'_>) {
    let (first, parent) = store();
    let (mut keeper, found, why) = Keeper::new(first, Fds::new()).unwrap();
    assert!(found.is_none() && why.is_none());
    let mut parents = vec![parent];
    // What the store has, and what the file has to say.
    let mut has = Fds::new();
    let mut want = Kept { phase: 0, state: Vec::new(), message: None, sync_failed: false };
    let mut tries = 0;
    let mut names = BTreeSet::new();
    while !bytes.is_empty() {
        match bytes.below(8) {
            0 => keeper.reading().map(|()| (want.phase, want.message, tries) = (1, None, 0)).unwrap(),
            1 => keeper.idle().map(|()| (want.phase, want.message, tries) = (0, None, 0)).unwrap(),
            // After the one before it was carried out.
            2 if want.phase != 2 => {
                let fds = bytes.list(3, |_| OwnedFd::from(memory_file(1)));
                let len = usize::from(bytes.u8());
                let message = bytes.bytes(len).to_vec();
                let ids = keeper.received(&message, &fds).unwrap();
                assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), fds.len(), "each has its number");
                (want.phase, want.message) = (2, Some((message, ids)));
            }
            3..5 => {
                let len = usize::from(bytes.u8());
                let state = bytes.bytes(len).to_vec();
                let phase = [Phase::Idle, Phase::Replying][bytes.below(2) as usize];
                // It names some of what there is.
                let offered = want.message.iter().flat_map(|(_, ids)| ids.iter().copied());
                let offered: Vec<u32> = names.iter().copied().chain(offered).collect();
                names = offered.into_iter().filter(|_| bytes.bool()).collect();
                keeper.commit(&state, &names, phase).unwrap();
                (want.phase, want.state, want.message, tries) = (phase as u8, state, None, 0);
            }
            5 if want.phase == 2 => {
                keeper.try_again().unwrap();
                tries += 1;
            }
            6 => {
                let (file, at) = keeper.sync_note().unwrap();
                file.write_all_at(&[1], at).unwrap();
                want.sync_failed = true;
            }
            _ => {
                // It dies; its successor finds what the store has.
                drop(keeper);
                for (text, fd) in parents.iter().flat_map(told).collect::<Vec<_>>() {
                    let id = text.lines().find_map(|line| store::number(line.strip_prefix("FDNAME=")?));
                    match fd {
                        Some(fd) => has.insert(id.unwrap().0, Arc::new(fd)),
                        None => has.remove(&id.unwrap().0),
                    };
                }
                let (next, parent) = store();
                parents = vec![parent];
                let (successor, found, why) = Keeper::new(next, has.clone()).unwrap();
                assert!(why.is_none(), "{why:?}");
                let found = found.unwrap();
                let message = want.message.take().filter(|_| tries < 2);
                let needed = names.iter().chain(message.iter().flat_map(|message| &message.1));
                needed.for_each(|id| assert!(found.fds.contains_key(id), "{id} is not in the store"));
                want.message = message;
                same(&found, &want);
                keeper = successor;
            }
        }
    }
}

/// A session, and descriptors of each kind under the numbers from 2 on.
struct Ground {
    session: Session,
    device: Arc<Device>,
    _disk: File,
    memory: File,
    region: File,
    log: File,
    fds: Fds,
    base: Value,
}

const MEMORY: u32 = 2;
const REGION: u32 = 3;
const LOG: u32 = 4;
const KICK: u32 = 5;
const CALL: u32 = 6;
const SOCKET: u32 = 7;
const OTHER_KICK: u32 = 8;
const MEMORY_BYTES: u64 = 0x1_0000;

impl Ground {
    fn new() -> Self {
        let (session, device, disk) = Stage::new(EngineKind::Null).session();
        let [memory, region, log] = [memory_file(MEMORY_BYTES), memory_file(0x1_0000), memory_file(0x1000)];
        let mut fds = Fds::new();
        for (id, file) in [(MEMORY, &memory), (REGION, &region), (LOG, &log)] {
            fds.insert(id, Arc::new(file.try_clone().unwrap().into()));
        }
        for id in [KICK, OTHER_KICK, CALL] {
            let event = Event::new();
            fds.insert(id, Arc::new(event.as_fd().try_clone_to_owned().unwrap()));
        }
        let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
        fds.insert(SOCKET, Arc::new(socket.into()));
        let mut base: Value = serde_json::from_slice(&session.state().bytes()).unwrap();
        base["connection"] = json!(SOCKET);
        base["features"] = json!(1_u64 << 32 | 1 << 30 | 1 << 29 | 1 << 28);
        base["protocol_features"] = json!(1 << 12 | 1 << 3 | 1);
        let memory_region =
            json!({"guest": 0x10_0000, "len": MEMORY_BYTES, "user": 0x7000_0000, "offset": 0});
        base["regions"] = json!([[memory_region, MEMORY]]);
        base["inflight"] =
            json!({"bytes": 0x1_0000, "offset": 0, "queues": 2, "size": 64, "fd": REGION, "own": false});
        base["log"] = json!({"bytes": 0x1000, "offset": 0, "fd": LOG});
        let ring = |at: u64, kick: u32| {
            json!({"size": 16, "addresses": [at, at + 0x1000, at + 0x2000], "used_log": null, "base": 0,
                "enabled": true, "kick": kick, "call": CALL, "err": 0})
        };
        base["vrings"] = json!([ring(0x7000_0000, KICK), ring(0x7000_4000, OTHER_KICK)]);
        base["deaths"] = json!([{"queue": 0, "head": 1, "count": 1, "used": 0, "guilt": 20}]);
        Self { session, device, _disk: disk, memory, region, log, fds, base }
    }

    /// As the control thread takes it over. `Ok`: its rings run, as far as they can.
    fn restore(&mut self, state: &State) -> Result<(), RestoreError> {
        let session = &mut self.session;
        let said = session
            .set_protocol_features(state.protocol_features)
            .and_then(|()| session.set_features(state.features));
        if let Err(e) = said {
            return Err(RestoreError::Map(e.to_string()));
        }
        session.restore(state, &state::Fds(&self.fds))
    }

    fn start(&mut self, state: &State) {
        self.session.count_deaths(state);
        self.session.start_restored(state);
    }

    /// The good state runs both of its rings.
    fn serves(&mut self) {
        for (file, len) in [(&self.memory, MEMORY_BYTES), (&self.region, 0x1_0000), (&self.log, 0x1000)] {
            file.write_all_at(&vec![0; len as usize], 0).unwrap();
        }
        let good = State::parse(&serde_json::to_vec(&self.base).unwrap()).unwrap();
        self.restore(&good).unwrap();
        self.start(&good);
        assert_eq!(self.session.queues().len(), 2);
        self.session.disconnect();
        assert!(self.session.queues().is_empty() && !self.session.failed());
    }
}

/// All places of a value that hold a number, a boolean, or null.
fn leaves(value: &Value, at: String, all: &mut Vec<String>) {
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| leaves(value, format!("{at}/{key}"), all)),
        Value::Array(list) => (0..).zip(list).for_each(|(i, value)| leaves(value, format!("{at}/{i}"), all)),
        _ => {}
    }
    all.push(at);
}

fn value(bytes: &mut Reader<'_>) -> Value {
    match bytes.below(10) {
        0 => Value::Null,
        1 => json!(bytes.bool()),
        2 => json!(bytes.u64()),
        3 => json!(bytes.u32()),
        4 => json!(bytes.u16()),
        5 => json!(0x7000_0000 + u64::from(bytes.u16())),
        6 => json!(bytes.below(10)),
        7 => json!(1_u64 << bytes.below(64)),
        8 => json!(-i64::from(bytes.u8())),
        _ => json!([]),
    }
}

/// Numbers of descriptors, as the text has them.
fn named(state: &Value) -> BTreeSet<u32> {
    let mut named = Vec::new();
    for key in ["listener", "connection", "channel"] {
        named.push(&state[key]);
    }
    named.extend(state["waiting"].as_array().into_iter().flatten());
    named.extend(state["regions"].as_array().into_iter().flatten().map(|region| &region[1]));
    named.extend([&state["inflight"]["fd"], &state["log"]["fd"]]);
    for ring in state["vrings"].as_array().into_iter().flatten() {
        named.extend([&ring["kick"], &ring["call"], &ring["err"]]);
    }
    named.into_iter().filter_map(Value::as_u64).filter(|&id| id != 0).map(|id| id as u32).collect()
}

fn hostile_state(ground: &mut Ground, bytes: &mut Reader<'_>) {
    let mut text = ground.base.clone();
    let mut places = Vec::new();
    leaves(&text, String::new(), &mut places);
    let changes = bytes.list(8, |bytes| {
        let place = usize::from(bytes.u8()) % places.len();
        (&places[place], value(bytes))
    });
    for (place, value) in changes {
        if let Some(at) = text.pointer_mut(place) {
            *at = value;
        }
    }
    bytes.list(40, |bytes| {
        let (file, at) = match bytes.below(3) {
            0 => (&ground.memory, u64::from(bytes.u16() % 0x7000)),
            _ => (&ground.region, u64::from(bytes.u16() % 0x900)),
        };
        let len = bytes.below(12) as usize;
        file.write_all_at(bytes.bytes(len), at).unwrap();
    });
    let Ok(state) = State::parse(&serde_json::to_vec(&text).unwrap()) else { return };
    assert_eq!(state.names(), named(&text));
    let again: Value = serde_json::from_slice(&state.bytes()).unwrap();
    let twice = State::parse(&state.bytes()).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&twice.bytes()).unwrap(), again, "written and read again");
    // What the guest would be promised is told without a fault.
    if let Some(promise) = state.promise(&ground.device.disk, &promise_options()) {
        let space = promise.config_space(4, true);
        assert_eq!(space[..8], promise.capacity.to_le_bytes());
        assert!(promise.bytes() >= promise.capacity && promise.physical_block() >= promise.block);
        let _whole_blocks = promise.optimal_io();
    }
    match ground.restore(&state) {
        Ok(()) => {
            let now: Value = serde_json::from_slice(&ground.session.state().bytes()).unwrap();
            for key in ["features", "protocol_features", "write_back", "news", "regions", "inflight"] {
                assert_eq!(now[key], again[key], "{key}");
            }
            let vrings = |state: &Value| {
                let mut vrings = state["vrings"].as_array().unwrap().clone();
                let untouched = json!({"size": 0, "addresses": null, "used_log": null, "base": 0,
                    "enabled": false, "kick": 0, "call": 0, "err": 0});
                while vrings.last() == Some(&untouched) {
                    vrings.pop();
                }
                vrings
            };
            // Without VHOST_USER_F_PROTOCOL_FEATURES the rings are enabled from the start.
            if again["features"].as_u64().unwrap() & 1 << 30 != 0 {
                assert_eq!(vrings(&now), vrings(&again));
            }
            ground.start(&state);
            for queue in ground.session.queues() {
                let ring = &again["vrings"][queue.index];
                assert!(ring["size"] == json!(queue.size) && queue.size.is_power_of_two(), "{queue:?}");
                assert!(ring["enabled"] == json!(true) && !ring["addresses"].is_null(), "{queue:?}");
                assert!(ring["kick"] != json!(0), "{queue:?}");
            }
        }
        Err(RestoreError::Missing(id)) => {
            let is_named = id == 0 || named(&text).contains(&id);
            assert!(is_named && !ground.fds.contains_key(&id), "{id} is missing");
        }
        Err(_) => assert!(ground.session.queues().is_empty()),
    }
    ground.session.disconnect();
}

pub fn run(data: &[u8]) {
    thread_local!(static GROUND: RefCell<Option<Ground>> = const { RefCell::new(None) });
    let mut bytes = Reader::new(data);
    match bytes.below(4) {
        0 => hostile_file(&mut bytes),
        1 => lives(&mut bytes),
        _ => GROUND.with_borrow_mut(|ground| {
            let there = ground.get_or_insert_with(Ground::new);
            hostile_state(there, &mut bytes);
            if there.session.take_failure().is_some() {
                *ground = None; // a kick that cannot be watched ends this daemon, and the next one is as new
                return;
            }
            there.serves();
        }),
    }
}
