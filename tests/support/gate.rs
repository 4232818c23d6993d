//! A file in memory behind a FUSE mount of our own, whose reads, writes and
//! fsyncs can be held back: an asynchronous backing store that is as slow as a
//! test wants and answers in the order that a test wants.
//!
//! It behaves like a disk with a volatile cache. What was written is durable
//! after the next fsync that succeeds; an fsync that fails, and a power cut,
//! lose what was written since the last one that succeeded.
//!
//! A request that is held was copied out of the kernel already. A request that
//! was not read yet is still the pages of whoever made it, so what these hold
//! later is what will be written.
//!
//! A gate with a log (`Gate::logged`) holds nothing back for a test. It takes all that the kernel has, ends it in an
//! order of its own, and writes down what a power cut needs to be judged: see `blocklog`.
//!
//! The mount has no place in any folder. It ends with the last descriptor of
//! it, and the server with its connection, however the test ends.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use super::blocklog::{Change, End, Log, Recorder};
use super::loopdev::LoopDevice;
use super::sys::{Event, PATIENCE, root, skip, tick};

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const FALLOCATE: u32 = 43;
/// Its modes PUNCH_HOLE and ZERO_RANGE: both read as zeroes.
const ZEROING: u32 = 0x2 | 0x10;
/// Opcodes that have no answer: FORGET, INTERRUPT, BATCH_FORGET.
const SILENT: [u32; 3] = [2, 36, 42];

const IN_HEADER: usize = 40;
/// fuse_read_in and fuse_write_in.
const RW_HEADER: usize = 40;
const MAX_WRITE: u32 = 128 << 10;
/// Direct I/O is sent off without waiting for the one before.
const ASYNC_DIO: u32 = 1 << 15;
const ASYNC_READ: u32 = 1;
const BIG_WRITES: u32 = 1 << 5;
/// Of an open file: direct writes of several threads are sent off side by side.
const DIRECT_IO: u64 = 1;
const PARALLEL_DIRECT_WRITES: u64 = 1 << 6;

/// A disk with a log ends something when nothing more has come for as long as this.
const LATENCY: Duration = Duration::from_micros(50);

const FSCONFIG_SET_STRING: libc::c_uint = 1;
const FSCONFIG_CMD_CREATE: libc::c_uint = 6;

/// A read or a write that has not been carried out.
struct Request {
    unique: u64,
    write: bool,
    offset: usize,
    len: usize,
    data: Vec<u8>,
}

struct State {
    file: Vec<u8>,
    /// What the writes since the last good fsync replaced, oldest first.
    replaced: Vec<(usize, Vec<u8>)>,
    held: VecDeque<Request>,
    /// How many more reads and writes to hold.
    to_hold: usize,
    /// How many more to take out of the kernel.
    to_take: usize,
    /// How many of those that are held are to be carried out now.
    release: usize,
    /// Writes that were carried out.
    writes: usize,
    /// How many fsyncs more fail.
    bad_syncs: usize,
    /// Fsyncs are held, and here they are.
    holds_syncs: bool,
    held_syncs: VecDeque<u64>,
    /// Results for the oldest of them, true for success.
    sync_results: VecDeque<bool>,
    syncs: Syncs,
    /// What touches these bytes is answered with this errno, nothing being done; `true`: writes alone.
    bad: Option<(Range<usize>, i32, bool)>,
    /// Reads and writes that failed so.
    failed: usize,
    recorder: Option<Recorder>,
    stop: bool,
}

/// Fsyncs that were answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Syncs {
    pub good: usize,
    pub failed: usize,
}

impl State {
    /// Makes everything durable, or loses what is not.
    fn sync(&mut self, good: bool) {
        if good {
            self.replaced.clear();
            self.syncs.good += 1;
        } else {
            self.lose();
            self.syncs.failed += 1;
        }
    }

    fn lose(&mut self) {
        while let Some((at, old)) = self.replaced.pop() {
            self.file[at..at + old.len()].copy_from_slice(&old);
        }
    }
}

/// The file, its mount and the thread that serves it.
pub struct Gate {
    state: Arc<Mutex<State>>,
    wake: Arc<Event>,
    mount: File,
    thread: Option<JoinHandle<()>>,
}

impl Gate {
    /// One behind a loop device, as a disk; or the test is left out.
    pub fn under_loop(test: &str, contents: Vec<u8>) -> Option<(Self, LoopDevice)> {
        if !root(test, "a loop device over a mount") {
            return None;
        }
        let made = Self::new(contents).and_then(|gate| {
            let store = LoopDevice::over(&gate.path(), 4096).map_err(|e| format!("no loop device: {e}"))?;
            Ok((gate, store))
        });
        made.map_err(|reason| skip(test, &reason)).ok()
    }

    /// A file of these contents; the reason when this machine has no FUSE.
    pub fn new(contents: Vec<u8>) -> Result<Self, String> {
        Self::with_recorder(contents, None)
    }

    /// A file of zeroes that keeps a log.
    pub fn logged(bytes: usize, seed: u64) -> Result<Self, String> {
        Self::with_recorder(vec![0; bytes], Some(Recorder::new(seed)))
    }

    fn with_recorder(contents: Vec<u8>, recorder: Option<Recorder>) -> Result<Self, String> {
        let fuse = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .map_err(|error| format!("/dev/fuse: {error}"))?;
        let state = State {
            file: contents,
            replaced: Vec::new(),
            held: VecDeque::new(),
            to_hold: 0,
            to_take: usize::MAX,
            release: 0,
            writes: 0,
            bad_syncs: 0,
            holds_syncs: false,
            held_syncs: VecDeque::new(),
            sync_results: VecDeque::new(),
            syncs: Syncs::default(),
            bad: None,
            failed: 0,
            recorder,
            stop: false,
        };
        let state = Arc::new(Mutex::new(state));
        let wake = Arc::new(Event::new());
        let mount = mount(fuse.as_raw_fd()).map_err(|error| format!("mount of FUSE: {error}"))?;
        let server = (Arc::clone(&state), Arc::clone(&wake));
        let thread = std::thread::spawn(move || serve(fuse, &server.0, &server.1));
        Ok(Self { state, wake, mount, thread: Some(thread) })
    }

    /// Where root can open the file while the test runs.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.mount.as_raw_fd()))
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.wake.signal();
    }

    /// Holds the next `hold` reads and writes, and leaves in the kernel all
    /// but the first `take` of them.
    pub fn close(&self, hold: usize, take: usize) {
        self.change(|state| (state.to_hold, state.to_take) = (hold, take));
    }

    /// Takes everything out of the kernel from now on; what is to be held is.
    pub fn take_all(&self) {
        self.change(|state| state.to_take = usize::MAX);
    }

    /// Carries out what is held, in its order.
    pub fn open(&self) {
        self.change(|state| {
            (state.to_hold, state.to_take) = (0, usize::MAX);
            state.release = usize::MAX;
        });
    }

    /// Carries out the oldest `count` of those that are held; what comes meanwhile
    /// is held or not, as before.
    pub fn let_through(&self, count: usize) {
        self.change(|state| state.release = count);
    }

    /// Reads and writes that touch these bytes fail.
    pub fn fail(&self, bytes: Range<usize>, errno: i32) {
        self.change(|state| state.bad = Some((bytes, errno, false)));
    }

    /// Writes fail.
    pub fn fail_writes(&self, errno: i32) {
        self.change(|state| state.bad = Some((0..usize::MAX, errno, true)));
    }

    /// How many have failed so.
    pub fn failed(&self) -> usize {
        self.state.lock().unwrap().failed
    }

    /// None fails any more.
    pub fn heal(&self) {
        self.change(|state| state.bad = None);
    }

    /// The next `count` fsyncs fail.
    pub fn fail_syncs(&self, count: usize) {
        self.change(|state| state.bad_syncs = count);
    }

    /// Holds every fsync from now on.
    pub fn hold_syncs(&self) {
        self.change(|state| state.holds_syncs = true);
    }

    /// Answers the oldest fsync that is held.
    pub fn end_sync(&self, good: bool) {
        self.change(|state| state.sync_results.push_back(good));
    }

    /// Holds no fsync any more; those that are held succeed.
    pub fn open_syncs(&self) {
        self.change(|state| {
            state.holds_syncs = false;
            while state.sync_results.len() < state.held_syncs.len() {
                state.sync_results.push_back(true);
            }
        });
    }

    /// How many fsyncs are held now.
    pub fn held_syncs(&self) -> usize {
        self.state.lock().unwrap().held_syncs.len()
    }

    /// Fsyncs that were answered so far.
    pub fn syncs(&self) -> Syncs {
        self.state.lock().unwrap().syncs
    }

    /// Loses what is not durable.
    pub fn power_cut(&self) {
        self.change(State::lose);
    }

    /// Changes the file below the kernel's page cache, as another host that
    /// shares the disk does. It is durable at once.
    pub fn write_below(&self, at: usize, data: &[u8]) {
        let mut all_durable = false;
        self.change(|state| {
            state.file[at..at + data.len()].copy_from_slice(data);
            all_durable = state.replaced.is_empty();
        });
        assert!(all_durable, "writes of this host are not durable yet");
    }

    /// How many reads and writes are held now.
    pub fn held(&self) -> usize {
        self.state.lock().unwrap().held.len()
    }

    /// How many writes are held now, and the longest of them in bytes.
    pub fn held_writes(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        let writes = || state.held.iter().filter(|request| request.write);
        (writes().count(), writes().map(|request| request.len).max().unwrap_or(0))
    }

    /// How many writes were carried out so far.
    pub fn writes(&self) -> usize {
        self.state.lock().unwrap().writes
    }

    /// What the file would hold after a power cut.
    pub fn durable(&self) -> Vec<u8> {
        let state = self.state.lock().unwrap();
        let mut file = state.file.clone();
        for (at, old) in state.replaced.iter().rev() {
            file[*at..at + old.len()].copy_from_slice(old);
        }
        file
    }

    /// How many entries the log has.
    pub fn logged_so_far(&self) -> usize {
        self.state.lock().unwrap().recorder.as_ref().map_or(0, |recorder| recorder.log.entries.len())
    }

    /// The log up to now.
    pub fn log(&self) -> Log {
        self.state.lock().unwrap().recorder.as_ref().unwrap().log.clone()
    }

    /// What the file holds.
    pub fn contents(&self) -> Vec<u8> {
        self.state.lock().unwrap().file.clone()
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        // The server lets go of the connection; the kernel then fails what is
        // left in it, and nobody hangs.
        if let Ok(mut state) = self.state.lock() {
            state.stop = true;
        }
        self.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Mounts the connection on nothing; the root of the mount is a plain file.
fn mount(fuse: RawFd) -> io::Result<File> {
    let check = |result: libc::c_long| {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
    };
    // SAFETY: the strings end in a zero byte, the descriptors are ours, and
    // each new one gets one owner.
    unsafe {
        let context = check(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), 1))?;
        let context = File::from_raw_fd(context);
        let fd = std::ffi::CString::new(fuse.to_string()).unwrap();
        let options = [
            (c"source", c"vublk-test"),
            (c"fd", fd.as_c_str()),
            (c"rootmode", c"100600"),
            (c"user_id", c"0"),
            (c"group_id", c"0"),
        ];
        for (key, value) in options {
            check(libc::syscall(
                libc::SYS_fsconfig,
                context.as_raw_fd(),
                FSCONFIG_SET_STRING,
                key.as_ptr(),
                value.as_ptr(),
                0,
            ))?;
        }
        let nothing = std::ptr::null::<libc::c_char>();
        check(libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        ))?;
        Ok(File::from_raw_fd(check(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0))?))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Answers a request. An error only says that the kernel does not wait for it
/// any more.
fn answer(mut fuse: &File, unique: u64, error: i32, payload: &[u8]) {
    let mut bytes = ((16 + payload.len()) as u32).to_le_bytes().to_vec();
    bytes.extend((-error).to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(payload);
    let _aborted = fuse.write(&bytes);
}

fn serve(fuse: File, state: &Mutex<State>, wake: &Event) {
    let mut buffer = vec![0; MAX_WRITE as usize + 8192];
    loop {
        let (taking, patience) = {
            let mut state = state.lock().unwrap();
            if state.stop {
                return;
            }
            for _ in 0..std::mem::take(&mut state.release).min(state.held.len()) {
                if let Some(request) = state.held.pop_front() {
                    carry_out(&fuse, &mut state, &request);
                }
            }
            while !state.held_syncs.is_empty()
                && let Some(good) = state.sync_results.pop_front()
                && let Some(unique) = state.held_syncs.pop_front()
            {
                end_sync(&fuse, &mut state, unique, good);
            }
            let busy = state.recorder.as_ref().is_some_and(|recorder| !recorder.is_idle());
            (state.to_take > 0, if busy { LATENCY } else { PATIENCE })
        };
        if !taking {
            tick(&[wake.as_fd()], PATIENCE);
            wake.take();
            continue;
        }
        if !tick(&[wake.as_fd(), fuse.as_fd()], patience) {
            end_one(&fuse, &mut state.lock().unwrap());
        }
        if wake.take() > 0 {
            continue; // what to do with a request may have changed
        }
        if !tick(&[fuse.as_fd()], std::time::Duration::ZERO) {
            continue;
        }
        let got = match (&fuse).read(&mut buffer) {
            Ok(got) => got,
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return, // unmounted
            // The request was taken back.
            Err(_) => continue,
        };
        let mut state = state.lock().unwrap();
        dispatch(&fuse, &buffer[..got], &mut state);
        if state.recorder.as_mut().is_some_and(Recorder::ends_one_now) {
            end_one(&fuse, &mut state);
        }
    }
}

fn dispatch(fuse: &File, request: &[u8], state: &mut State) {
    let (opcode, unique) = (u32_at(request, 4), u64_at(request, 8));
    let body = &request[IN_HEADER..];
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    if let Some(recorder) = &mut state.recorder
        && [WRITE, FALLOCATE, FSYNC].contains(&opcode)
    {
        return record(recorder, opcode, unique, body);
    }
    match opcode {
        INIT => {
            let flags = u32_at(body, 12) & (ASYNC_DIO | ASYNC_READ | BIG_WRITES);
            // major, minor, max_readahead, flags; 512 background requests,
            // congested at 512; max_write, time_gran; the rest is reserved.
            let fields = [7, 31, MAX_WRITE, flags, 512 << 16 | 512, MAX_WRITE, 1];
            let mut payload: Vec<u8> = fields.iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
            payload.resize(64, 0);
            answer(fuse, unique, 0, &payload);
        }
        GETATTR => {
            let size = state.file.len() as u64;
            // Valid for an hour; inode, size, blocks, three times, their
            // nanoseconds; mode, links, owner, group, device, block size.
            let mut payload = words(&[3600, 0, 1, size, size / 512, 0, 0, 0, 0]);
            let fields: [u32; 8] = [0, 0o100_600, 1, 0, 0, 0, 4096, 0];
            payload.extend(fields.iter().flat_map(|word| word.to_le_bytes()));
            answer(fuse, unique, 0, &payload);
        }
        STATFS => {
            // Blocks, those free, those available, files, those free. A loop device
            // over the file takes the block size for its discard granularity.
            let mut payload = words(&[state.file.len() as u64 / 4096, 0, 0, 1, 0]);
            // Block size, longest name, fragment size; the rest is reserved.
            payload.extend([4096_u32, 255, 4096].iter().flat_map(|word| word.to_le_bytes()));
            payload.resize(80, 0);
            answer(fuse, unique, 0, &payload);
        }
        OPEN => {
            let logged = state.recorder.is_some();
            let flags = if logged { DIRECT_IO | PARALLEL_DIRECT_WRITES } else { 0 };
            answer(fuse, unique, 0, &words(&[0, flags]));
        }
        FSYNC => {
            if state.holds_syncs {
                return state.held_syncs.push_back(unique);
            }
            let bad = state.bad_syncs > 0;
            state.bad_syncs -= usize::from(bad);
            end_sync(fuse, state, unique, !bad);
        }
        READ | WRITE => {
            let request = Request {
                unique,
                write: opcode == WRITE,
                offset: u64_at(body, 8) as usize,
                len: u32_at(body, 16) as usize,
                data: body[RW_HEADER..].to_vec(),
            };
            state.to_take = state.to_take.saturating_sub(usize::from(state.to_take < usize::MAX));
            if state.to_hold > 0 {
                state.to_hold -= 1;
                state.held.push_back(request);
            } else {
                carry_out(fuse, state, &request);
            }
        }
        _ if SILENT.contains(&opcode) => {}
        _ => answer(fuse, unique, libc::ENOSYS, &[]),
    }
}

/// Something that a disk with a log is told.
fn record(recorder: &mut Recorder, opcode: u32, unique: u64, body: &[u8]) {
    let at = || u64_at(body, 8) as usize;
    match opcode {
        FSYNC => recorder.sync(unique),
        WRITE => {
            let data = body[RW_HEADER..].to_vec();
            let answer = (data.len() as u64).to_le_bytes().to_vec();
            recorder.change(unique, answer, Change { at: at(), data });
        }
        _ => {
            assert_ne!(u32_at(body, 24) & ZEROING, 0, "a fallocate that is no change");
            let data = vec![0; u64_at(body, 16) as usize];
            recorder.change(unique, Vec::new(), Change { at: at(), data });
        }
    }
}

/// Ends something that a disk with a log has under way.
fn end_one(fuse: &File, state: &mut State) {
    let Some((recorder, (unique, end, words))) =
        state.recorder.as_mut().and_then(|recorder| recorder.end_one().map(|ended| (recorder, ended)))
    else {
        return;
    };
    if let End::Change(number) = end {
        let Change { at, data } = &recorder.log.changes[number];
        state.file[*at..*at + data.len()].copy_from_slice(data);
    }
    answer(fuse, unique, 0, &words);
}

fn end_sync(fuse: &File, state: &mut State, unique: u64, good: bool) {
    state.sync(good);
    answer(fuse, unique, if good { 0 } else { libc::EIO }, &[]);
}

fn carry_out(fuse: &File, state: &mut State, request: &Request) {
    let end = (request.offset + request.len).min(state.file.len());
    let start = request.offset.min(end);
    if let Some((bytes, errno, writes_only)) = state.bad.clone()
        && (request.write || !writes_only)
        && bytes.start < end
        && start < bytes.end
    {
        state.failed += 1;
        return answer(fuse, request.unique, errno, &[]);
    }
    if !request.write {
        return answer(fuse, request.unique, 0, &state.file[start..end]);
    }
    state.replaced.push((start, state.file[start..end].to_vec()));
    state.file[start..end].copy_from_slice(&request.data[..end - start]);
    state.writes += 1;
    let mut size = ((end - start) as u32).to_le_bytes().to_vec();
    size.resize(8, 0);
    answer(fuse, request.unique, 0, &size);
}
