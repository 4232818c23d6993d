//! A guest that rewrites descriptors, indirect tables, headers and ranges between our reads of them, while requests run.
//!
//! Each value that the daemon reads was in memory at some moment, so all that it may do is known: it reads and writes the
//! first part of the disk, and the buffers. The rest of the disk, the rest of the guest's memory, and the kinds of bytes
//! that are in the buffers would tell of anything else. For that no header and no range is ever read from a buffer, and
//! sectors that are read in part from one value and in part from another are in the first part, too, or beyond the disk.

use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Victim;
use crate::session::each_engine;
use crate::support::daemon::{Daemon, Options};
use crate::support::device::{
    Device, IOERR, OK, Setup, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES, UNSUPP, UNWRITTEN,
};
use crate::support::dice::Dice;
use crate::support::disk::{Disk, PATTERNED, SECTOR, pattern};
use crate::support::memory::Memory;
use crate::support::ring::{INDIRECT, NEXT, WRITE};
use crate::support::sys::Deadline;

/// Chains, each of four descriptors.
const CHAINS: u64 = 32;
const PARTS: u64 = 4;
/// Bytes of a buffer. Chains name no more than that from its start on.
const BUFFER: u64 = 128 << 10;
const BUFFERS: u64 = 16;
const MOST: u32 = 64 << 10;
/// Sectors at which requests may begin: less than this, or beyond the disk.
const SECTORS: u64 = 0x300;
/// From here on nothing is ever named: behind 256 descriptors of the longest kind, at the last sector.
const CANARY: u64 = SECTORS * SECTOR as u64 + 257 * MOST as u64;
const DISK: u64 = 32 << 20;
const CANARY_PAGES: u64 = 64;
/// What a canary page of the guest or of the disk is full of.
const SONG: u8 = 0x5a;

/// Seconds of it.
fn time() -> Duration {
    let seconds = std::env::var("VUBLK_REWRITES").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(3))
}

/// A word of the guest's memory that is rewritten, by its host address, and what may be in it.
struct Word(usize, Vec<u64>);

/// The thread that rewrites.
struct Rewriter {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Rewriter {
    /// The words lie in a mapping that outlives this.
    fn over(words: Vec<Word>, seed: u64) -> Self {
        let (stop, writes) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let (ends, count) = (Arc::clone(&stop), Arc::clone(&writes));
        let thread = std::thread::spawn(move || {
            let mut dice = Dice::new(seed);
            while !ends.load(Ordering::Relaxed) {
                for _ in 0..1024 {
                    let Word(at, values) = &words[dice.below(words.len() as u64) as usize];
                    let value = values[dice.below(values.len() as u64) as usize];
                    // SAFETY: aligned, inside a mapping that outlives the thread, and shared: hence an atomic.
                    let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(*at)) };
                    word.store(value, Ordering::Relaxed);
                }
                count.fetch_add(1024, Ordering::Relaxed);
            }
        });
        Self { stop, writes, thread: Some(thread) }
    }
}

impl Drop for Rewriter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// Where all the parts are that requests are made of.
struct Stage {
    memory: Rc<Memory>,
    /// Of each chain: its header, its ranges (a page each), its status and its indirect table.
    control: u64,
    tables: u64,
    buffers: u64,
    /// Canary pages, before and after the buffers.
    canaries: [u64; 2],
}

impl Stage {
    fn new(memory: &Rc<Memory>) -> Self {
        let canary = || {
            let at = memory.alloc(CANARY_PAGES * 4096, 4096);
            memory.write(at, &vec![SONG; (CANARY_PAGES * 4096) as usize]);
            at
        };
        let control = memory.alloc(CHAINS * 8192, 4096);
        let tables = memory.alloc(CHAINS * 16 * PARTS, 4096);
        let first = canary();
        let buffers = memory.alloc(BUFFERS * BUFFER, 4096);
        // What the guest writes, and nothing else: high bytes.
        memory.write(buffers, &vec![0xa5; (BUFFERS * BUFFER) as usize]);
        let canaries = [first, canary()];
        Self { memory: Rc::clone(memory), control, tables, buffers, canaries }
    }

    fn header(&self, chain: u64) -> u64 {
        self.control + chain * 8192
    }

    fn ranges(&self, chain: u64) -> u64 {
        self.header(chain) + 4096
    }

    fn status(&self, chain: u64) -> u64 {
        self.header(chain) + 2048
    }

    fn host(&self, guest: u64) -> usize {
        let region = &self.memory.regions[0];
        region.host().expose_provenance() + (guest - region.guest) as usize
    }

    /// What a descriptor may hold: 8 bytes of an address, 8 of length, flags and next.
    fn descriptor(&self, at: u64, chain: u64, part: u64, dice: &mut Dice) -> [Word; 2] {
        let buffer = self.buffers + dice.below(BUFFERS) * BUFFER;
        let writable = if chain.is_multiple_of(4) { WRITE } else { 0 };
        // Where it is most often, its usual length and flags, and other lengths.
        let (home, usual, flags, lens): (u64, u32, u16, &[u32]) = match part {
            0 => (self.header(chain), 16, 0, &[32, u32::MAX]),
            1 | 2 if is_of_ranges(chain) => (self.ranges(chain), 16, 0, &[0, 32, 17, 512, u32::MAX]),
            1 => (buffer, 4096, writable, &[512, 1, 0, 32, u32::MAX]),
            2 => (buffer + 512, 4096, writable, &[512, 1, 0, MOST, MOST, u32::MAX]),
            _ => (self.status(chain), 1, WRITE, &[512, 4096, 0, 32, u32::MAX]),
        };
        let mut addresses = vec![home; 24];
        addresses.extend([0, 1 << 40, u64::MAX - 7]);
        if part == 3 || part > 0 && !is_of_ranges(chain) {
            // Others of its kind, and unaligned ones.
            addresses.extend((0..4).map(|_| self.buffers + dice.below(BUFFERS) * BUFFER));
            addresses.extend([buffer + 8, buffer + 511, buffer + 1]);
        }
        // Next: the one after it in its own chain, most often.
        let base = if is_indirect(chain) { 0 } else { chain * PARTS };
        let (next, more) = if part + 1 < PARTS { (base + part + 1, NEXT) } else { (base, 0) };
        let (base, next, flags) = (base as u16, next as u16, flags | more);
        let word =
            |len: u32, flags: u16, next: u16| u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        let mut rest = vec![word(usual, flags, next); 40];
        rest.extend(lens.iter().map(|&len| word(len, flags, next)));
        let others = [0, WRITE, NEXT, NEXT | WRITE, INDIRECT, INDIRECT | NEXT, 0xfff8];
        rest.extend(others.map(|flags| word(usual, flags, next)));
        rest.extend([base, 500, u16::MAX].map(|next| word(usual, flags, next)));
        [Word(self.host(at), addresses), Word(self.host(at + 8), rest)]
    }

    fn words(&self, table: u64) -> Vec<Word> {
        let mut dice = Dice::new(0x5eed);
        let mut words = Vec::new();
        for chain in 0..CHAINS {
            let own = self.tables + 16 * chain * PARTS;
            let entry = table + 16 * chain * PARTS;
            let place = if is_indirect(chain) { own } else { entry };
            for part in 0..PARTS {
                words.extend(self.descriptor(place + 16 * part, chain, part, &mut dice));
            }
            if is_indirect(chain) {
                let usual = (16 * PARTS) | u64::from(INDIRECT) << 32;
                let mut rest = vec![usual; 12];
                // Shorter and longer tables, none, and other flags.
                rest.extend([usual - 16, usual - 8, usual - 64, usual + 16 * 4000, 64, usual | 1 << 32]);
                let mut addresses = vec![own; 12];
                addresses.extend([own + 8, 1 << 40, u64::MAX - 15]);
                words.extend([Word(self.host(entry), addresses), Word(self.host(entry + 8), rest)]);
            }
            // The header: a kind and a reserved word, and a sector.
            let (often, seldom) = match is_of_ranges(chain) {
                true => ([T_DISCARD, T_WRITE_ZEROES], vec![T_FLUSH, 0x80, u32::MAX]),
                false => ([T_IN, T_OUT], vec![T_FLUSH, T_GET_ID, 0x80, u32::MAX]),
            };
            let kinds = often.repeat(8).into_iter().chain(seldom).map(u64::from).collect();
            // Whichever bytes are of which of these: a sector of the first ones, or none of the disk.
            let far = [DISK / 512, 1 << 40, 0xff << 56, u64::MAX << 16];
            let near = (0..12).map(|_| dice.below(SECTORS) | 0x80);
            let sectors: Vec<u64> = near.chain(far).collect();
            let at = self.host(self.header(chain));
            words.extend([Word(at, kinds), Word(at + 8, sectors.clone())]);
            // Ranges: a sector, then how many and flags.
            for range in 0..2 {
                let at = self.host(self.ranges(chain) + 16 * range);
                let counts = vec![0, 1, 0x80, 0x80, 0x80, 0x100, 0x80 | 1 << 32, 0x80 | 1 << 33, 1 << 24];
                words.extend([Word(at, sectors.clone()), Word(at + 8, counts)]);
            }
        }
        words
    }
}

/// Every second chain has its descriptors in a table of its own.
fn is_indirect(chain: u64) -> bool {
    !chain.is_multiple_of(2)
}

/// Of each eight chains two are discards and writes of zeroes.
fn is_of_ranges(chain: u64) -> bool {
    chain % 8 >= 6
}

/// The disk beyond all that is named.
#[track_caller]
fn assert_canaries(disk: &Disk, stage: &Stage) {
    assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), DISK, "the length of the disk");
    let disk = disk.read(CANARY / 512, (DISK - CANARY) / 512);
    let changed: Vec<(u64, u8)> = (CANARY / 512..)
        .zip(disk.chunks(512))
        .filter_map(|(sector, bytes)| bytes.iter().find(|&&byte| byte != SONG).map(|&byte| (sector, byte)))
        .collect();
    if let (Some(first), Some(last)) = (changed.first(), changed.last()) {
        panic!(
            "sectors {first:x?} to {last:x?}, {} in all, which no request names, have changed",
            changed.len()
        );
    }
    for canary in stage.canaries {
        let got = stage.memory.read(canary, (CANARY_PAGES * 4096) as usize);
        assert!(
            got.iter().all(|&byte| byte == SONG),
            "the guest's memory that no descriptor names was written"
        );
    }
}

/// Bytes that were on the disk or in the buffers before, or are a status, zeroes, the serial number or a part of the
/// guest's headers and ranges: all others were the daemon's.
#[track_caller]
fn assert_no_host_bytes(bytes: &[u8], serial: &[u8], what: &str) {
    let mut may_be = [false; 256];
    may_be[0x80..].fill(true);
    let kinds = [T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES].map(|kind| kind as u8);
    for byte in [OK, IOERR, UNSUPP].iter().chain(&kinds).chain(serial) {
        may_be[usize::from(*byte)] = true;
    }
    if let Some(at) = bytes.iter().position(|&byte| !may_be[usize::from(byte)]) {
        panic!(
            "{what}: a byte of the host at {at}: {:02x?}",
            &bytes[at.saturating_sub(8)..(at + 24).min(bytes.len())]
        );
    }
}

#[test]
fn descriptors_headers_and_tables_change_while_they_are_read() {
    each_engine(|engine| {
        let disk = Disk::of_size(DISK);
        let file = std::fs::File::options().write(true).open(&disk.path).unwrap();
        file.set_len(0).unwrap();
        file.set_len(DISK).unwrap();
        file.write_all_at(&vec![0xc3; CANARY as usize / 2], 0).unwrap();
        file.write_all_at(&vec![SONG; (DISK - CANARY) as usize], CANARY).unwrap();
        let daemon = Daemon::start(engine, &disk, &Options::default());
        rewrite(&disk, &daemon);
        // A good front-end needs its pattern.
        file.set_len(0).unwrap();
        file.set_len(DISK).unwrap();
        file.write_all_at(&pattern(0, PATTERNED), 0).unwrap();
        let mut victim = Victim::over(disk, daemon);
        victim.serves("a guest that rewrites what is being read");
        victim.stops();
    });
}

fn rewrite(disk: &Disk, daemon: &Daemon) {
    let mut device = Device::new(daemon, Setup { queues: 2, ring_size: 128, ..Setup::default() });
    let serial = device.run(1, T_GET_ID, 0, &[], 20).data;
    let (beside, _) = device.place(T_GET_ID, 0, &[], 20);
    let stage = Stage::new(&device.memory);
    let mut statuses = [0_u64; 256];
    let counts = |name: &str| super::count(daemon, name);
    let before = [counts("errors"), counts("malformed")];
    let words = stage.words(device.rings[0].table);
    for Word(at, values) in &words {
        // SAFETY: as the thread does.
        let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(*at)) };
        word.store(values[0], Ordering::Relaxed);
    }
    let rewriter = Rewriter::over(words, 0xbad);
    let began = Instant::now();
    let mut busy = vec![false; CHAINS as usize];
    let mut rounds = 0_u64;
    while began.elapsed() < time() {
        let memory = &stage.memory;
        for chain in 0..CHAINS {
            if !std::mem::replace(&mut busy[chain as usize], true) {
                memory.write(stage.status(chain), &[UNWRITTEN]);
                device.rings[0].stage_own((chain * PARTS) as u16);
            }
        }
        device.rings[0].publish();
        device.rings[0].kick.signal();
        let used =
            Deadline::new("an answer to a chain that is rewritten").until(|| device.rings[0].take_used());
        let mut next = Some(used);
        while let Some(used) = next {
            assert!(used.head.is_multiple_of(PARTS as u16), "head {} was never offered", used.head);
            let chain = u64::from(used.head) / PARTS;
            assert!(std::mem::take(&mut busy[chain as usize]), "chain {chain} came back twice");
            statuses[usize::from(memory.byte(stage.status(chain)))] += 1;
            next = device.rings[0].take_used();
        }
        rounds += 1;
        if rounds.is_multiple_of(256) {
            // The other queue is served, by its own driver.
            memory.write(beside[1].addr, &[0xff; 20]);
            let head = device.rings[1].chain(&beside);
            device.rings[1].offer(head);
            device.rings[1].wait_used("a request beside those that are rewritten");
            assert_eq!(memory.read(beside[1].addr, 20), serial);
        }
        if rounds.is_multiple_of(1 << 15) {
            assert_canaries(disk, &stage);
        }
    }
    let writes = rewriter.writes.load(Ordering::Relaxed);
    drop(rewriter);
    let done: u64 = statuses.iter().sum();
    let [errors, malformed] = [counts("errors") - before[0], counts("malformed") - before[1]];
    eprintln!(
        "{writes} words rewritten under {done} requests: {} OK, {} IOERR, {} UNSUPP, {} unwritten; {errors} errors and \
         {malformed} malformed chains are counted",
        statuses[usize::from(OK)],
        statuses[usize::from(IOERR)],
        statuses[usize::from(UNSUPP)],
        statuses[usize::from(UNWRITTEN)],
    );
    for (what, count) in [("OK", statuses[0]), ("errors", errors), ("malformed", malformed)] {
        assert!(count > 20, "only {count} requests were {what}: this proves nothing");
    }
    device.frontend.sync();
    assert!(!device.frontend.hung_up(), "a guest's mistakes end no connection");
    device.frontend.vring_base(0).unwrap();
    drop(device.frontend);
    super::answers(daemon, "a guest that rewrites what is being read");
    assert_canaries(disk, &stage);
    let buffers = stage.memory.read(stage.buffers, (BUFFERS * BUFFER) as usize);
    assert_no_host_bytes(&buffers, &serial, "the guest's buffers");
    assert_no_host_bytes(&disk.read(0, CANARY / 512), &serial, "the disk");
    let told = daemon.log().lines().filter(|line| line.contains("makes no sense")).count();
    assert!(told as u64 <= 10 * (1 + time().as_secs() / 10) + 10, "{told} lines about chains");
    daemon.wait_log("makes no sense");
}
