//! A whole device, control thread, worker and all, behind a front-end that says and does anything. After each case a good
//! front-end reads what is on the disk, and writes.

use std::io::ErrorKind;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::Arc;

use vublk::control::{Control, Source};
use vublk::link::Link;
use vublk::manager::{Kind, Manager};
use vublk::session::Session;
use vublk::succession::Succession;
use vublk::workers::EngineKind;

use super::hostile::Hostile;
use super::reader::Reader;
use super::stage::{DISK_BYTES, QUEUES, Stage};
use crate::support::device::{Device, Setup};
use crate::support::disk::{SECTOR, pattern};
use crate::support::frontend::{Frontend, msg};
use crate::support::memory::{Memory, Span};

/// The sectors that the good driver reads.
const READS: u64 = DISK_BYTES / 1024;

/// So that no case takes long.
const MOST_STEPS: usize = 32;

struct Ground {
    address: SocketAddr,
    disk: std::fs::File,
    link: Arc<Link>,
    control: Option<std::thread::JoinHandle<()>>,
    cases: u64,
}

fn without_a_store() -> Succession {
    Succession::new(None, Manager::new(Kind::Other, None, 1).unwrap().into(), false, None)
}

impl Ground {
    fn new() -> Self {
        let stage = Stage::new(EngineKind::Threads);
        stage.file.write_all_at(&pattern(0, DISK_BYTES / 512), 0).unwrap();
        let link = Arc::clone(&stage.link);
        // An abstract name is no file, and is gone with the process.
        let name = format!("vublk-fuzz-{}-{:?}", std::process::id(), std::thread::current().id());
        let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        let Stage { file, device, link: linked, workers } = stage;
        let session = Session::new(Arc::clone(&device), workers, Arc::clone(&linked), QUEUES);
        let mut control = Control::new(device, linked, session, without_a_store(), None);
        let control = std::thread::spawn(move || {
            control.serve(Source::Listener(listener, None), None, Vec::new()).unwrap();
        });
        Self { address, disk: file, link, control: Some(control), cases: 0 }
    }

    fn connect(&self) -> Frontend {
        Frontend::new(UnixStream::connect_addr(&self.address).unwrap())
    }

    /// A good front-end is served, whatever came before it.
    fn serves(&mut self) {
        self.cases += 1;
        let memory = Memory::with(&[Span { guest: 1 << 20, len: 1 << 20 }]);
        let mut good = Device::over(self.connect(), Setup { ring_size: 16, memory, ..Setup::default() });
        // What the hostile driver wrote is there, too; nothing of it comes later.
        let sector = READS + self.cases % 64;
        let mut on_disk = vec![0; 2 * SECTOR];
        self.disk.read_exact_at(&mut on_disk, sector * 512).unwrap();
        assert_eq!(good.read(sector, 2), on_disk, "what is on the disk is read");
        let at = DISK_BYTES / 512 - 1;
        let data = vec![self.cases as u8; SECTOR];
        good.write(at, &data);
        on_disk.truncate(SECTOR);
        self.disk.read_exact_at(&mut on_disk, at * 512).unwrap();
        assert_eq!(on_disk, data, "what is written is on the disk");
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.link.stop();
        let ended = self.control.take().map(std::thread::JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap();
        }
    }
}

pub fn run(data: &[u8]) {
    thread_local!(static GROUND: std::cell::RefCell<Option<Ground>> = const { std::cell::RefCell::new(None) });
    GROUND.with_borrow_mut(|ground| {
        let ground = ground.get_or_insert_with(Ground::new);
        play(ground, &mut Reader::new(data));
        ground.serves();
    });
}

fn play(ground: &Ground, bytes: &mut Reader<'_>) {
    let mut hostile = Hostile::new();
    let frontend = ground.connect();
    // Every message so far was whole: the next one is understood.
    let mut whole = true;
    for _ in 0..MOST_STEPS {
        if bytes.is_empty() {
            return;
        }
        let messages = hostile.next(bytes);
        if messages.is_empty() {
            hostile.let_work();
        }
        for message in messages {
            // Now and then it is cut off, or another one begins in the middle of it.
            let end = if bytes.rarely() { usize::from(bytes.u8()) } else { message.bytes.len() };
            whole &= end >= message.bytes.len();
            let sent = &message.bytes[..end.clamp(1, message.bytes.len())];
            if frontend.send_bytes(sent, &hostile.descriptors(&message)).is_err() {
                return; // it was hung up on
            }
        }
        // So that what follows happens after what was said; a front-end may as well not wait.
        if bytes.below(4) == 0 && whole {
            if frontend.send(msg::GET_FEATURES, 0, &[], &[]).is_err() {
                return;
            }
            loop {
                match frontend.receive() {
                    Ok(answer) if answer.request == msg::GET_FEATURES => break,
                    Ok(_) => {}
                    Err(e) => {
                        return assert_ne!(e.kind(), ErrorKind::WouldBlock, "no answer, and no hang-up");
                    }
                }
            }
        }
    }
}
