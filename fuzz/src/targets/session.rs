//! A session under any sequence of messages. After each: the queues that run are those of which all that a queue needs is
//! there, what the session says of itself is what can be, and a message is answered as the document says.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use vhost::vhost_user::BackendReqHandler;
use vublk::device::Device;
use vublk::session::Session;
use vublk::session::receiver::Receiver;
use vublk::workers::EngineKind;

use super::hostile::{Hostile, Message};
use super::reader::Reader;
use super::stage::{QUEUES, Stage};
use crate::support::frontend::{Frontend, feature, msg};

type Handler = BackendReqHandler<Mutex<Session>>;

/// A front-end's connection, as the control thread serves it.
struct Connection {
    session: Arc<Mutex<Session>>,
    receiver: Receiver,
    handler: Handler,
    frontend: Frontend,
    next_id: u32,
}

impl Connection {
    fn new(session: &Arc<Mutex<Session>>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (private, handlers) = UnixStream::pair().unwrap();
        Self {
            session: Arc::clone(session),
            receiver: Receiver::new(ours, private),
            handler: BackendReqHandler::from_stream(handlers, Arc::clone(session)),
            frontend: Frontend::new(theirs),
            next_id: 2,
        }
    }

    /// Sends a message and has it handled. `None`: it ends the connection; else whether it was carried out.
    fn handle(&mut self, hostile: &Hostile, message: &Message) -> Option<bool> {
        self.frontend.send_bytes(&message.bytes, &hostile.descriptors(message)).ok()?;
        if !self.receiver.receive().ok()? {
            return None;
        }
        let judged = self.receiver.judge();
        let ids = (self.next_id..).take(self.receiver.message().1.len()).collect::<Vec<u32>>();
        self.next_id += 40;
        let mut session = self.session.lock().unwrap();
        session.set_received(ids);
        drop(session);
        let mut done = judged.why.is_none();
        if done {
            self.receiver.give_to_handler().ok()?;
            done = self.handler.handle_request().is_ok();
        } else {
            self.receiver.forget();
        }
        let mut session = self.session.lock().unwrap();
        if let Some(channel) = self.receiver.take_channel().filter(|_| done) {
            session.set_channel(channel);
        }
        session.set_received(Vec::new());
        if session.start_moved() && session.take_undone().is_some() {
            self.receiver.drop_replies().unwrap();
            done = false;
        }
        let told = judged.by_number && session.acknowledges();
        if !done && told && !self.receiver.has_reply() {
            self.receiver.refuse(judged.request).ok()?;
        } else {
            self.receiver.relay().ok()?;
        }
        if session.memory_lost() || session.failed() || session.is_refused() {
            return None;
        }
        (done || told).then_some(done)
    }

    /// The answers that came, by the numbers of their messages.
    fn answers(&mut self) -> Vec<(u32, Vec<u8>)> {
        let mut bytes = Vec::new();
        self.frontend.socket.set_nonblocking(true).unwrap();
        let _would_block = (&self.frontend.socket).read_to_end(&mut bytes);
        self.frontend.socket.set_nonblocking(false).unwrap();
        let mut answers = Vec::new();
        let mut rest = bytes.as_slice();
        while let Some((head, body)) = rest.split_at_checked(12) {
            let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
            assert_eq!(word(4), 1 | 1 << 2, "the flags of an answer");
            let (payload, others) = body.split_at(word(8) as usize);
            answers.push((word(0), payload.to_vec()));
            rest = others;
        }
        assert!(rest.is_empty(), "a part of an answer");
        answers
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap()
}

/// Whether `[at, at + len)` of the front-end's addresses is in one region, and where in its file.
fn placed(regions: &Value, at: u64, len: u64, align: u64) -> bool {
    regions.as_array().unwrap().iter().any(|region| {
        let [user, size, offset] = ["user", "len", "offset"].map(|key| number(&region[0][key]));
        at >= user
            && at - user <= size
            && size - (at - user) >= len
            && (at - user + offset).is_multiple_of(align)
    })
}

/// What can be told of a queue from the session's own words. `None`: it does not matter whether it runs.
fn should_run(state: &Value, queue: usize) -> Option<bool> {
    let ring = &state["vrings"][queue];
    if ring.is_null() {
        return Some(false);
    }
    let size = number(&ring["size"]);
    let Some(addresses) = ring["addresses"].as_array() else { return Some(false) };
    let [desc, avail, used] = [0, 1, 2].map(|at| number(&addresses[at]));
    let regions = &state["regions"];
    let needs = number(&ring["kick"]) != 0
        && ring["enabled"] == true
        && size.is_power_of_two()
        && size <= 1024
        && placed(regions, desc, 16 * size, 16)
        && placed(regions, avail, 6 + 2 * size, 2)
        && placed(regions, used, 6 + 8 * size, 4);
    // With an in-flight region it may be that the region has no place for the queue, and then the queue may have run before
    // the region came, and goes on where it was.
    if needs && !state["inflight"].is_null() { None } else { Some(needs) }
}

fn check(connection: &Connection, device: &Device, settled: &[bool]) {
    let session = connection.session.lock().unwrap();
    let state: Value = serde_json::from_slice(&session.state().bytes()).unwrap();
    let queues = session.queues();
    let features = number(&state["features"]);
    assert_eq!(features & !device.promise().features(), 0, "features that were not offered");
    // Regions that share no address of the guest's.
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for region in state["regions"].as_array().unwrap() {
        let (guest, len) = (number(&region[0]["guest"]), number(&region[0]["len"]));
        let end = guest.checked_add(len).unwrap();
        assert!(len > 0 && spans.iter().all(|&(start, stop)| end <= start || stop <= guest), "{spans:?}");
        spans.push((guest, end));
    }
    for queue in 0..usize::from(QUEUES) {
        let runs = queues.iter().find(|running| running.index == queue);
        let Some(should) = should_run(&state, queue) else { continue };
        if let Some(running) = runs {
            assert!(should, "queue {queue} runs: {state}");
            assert_eq!(u64::from(running.size), number(&state["vrings"][queue]["size"]));
        } else if settled[queue] && features & feature::VERSION_1 != 0 {
            assert!(!should, "queue {queue} does not run: {state}");
        }
    }
}

/// The answers that are facts.
fn check_answers(answers: &[(u32, Vec<u8>)], device: &Device, message: &Message, done: Option<bool>) {
    for (request, payload) in answers {
        assert_eq!(*request, message.request, "an answer to another message");
        let number = payload.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        match *request {
            msg::GET_FEATURES => assert_eq!(number, Some(device.promise().features())),
            msg::GET_QUEUE_NUM => assert_eq!(number, Some(QUEUES.into())),
            msg::GET_CONFIG if payload.len() > 12 => {
                let offset = u32::from_le_bytes(payload[..4].try_into().unwrap()) as usize;
                let write_back = !device.durability.is_write_through();
                let space = device.promise().config_space(QUEUES, write_back);
                let want = (0..payload.len() - 12).map(|at| space.get(offset + at).copied().unwrap_or(0));
                assert!(payload[12..].iter().copied().eq(want), "config space at {offset}");
            }
            msg::SET_VRING_NUM | msg::SET_VRING_BASE | msg::SET_MEM_TABLE | msg::ADD_MEM_REG => {
                if let Some(done) = done {
                    assert_eq!(number == Some(0), done, "the answer says what became of it");
                }
            }
            _ => {}
        }
    }
    assert!(answers.len() <= 1, "more than one answer to a message");
}

struct Ground {
    session: Arc<Mutex<Session>>,
    device: Arc<Device>,
    _disk: std::fs::File,
}

pub fn run(data: &[u8]) {
    thread_local!(static GROUND: std::cell::RefCell<Option<Ground>> = const { std::cell::RefCell::new(None) });
    GROUND.with_borrow_mut(|ground| {
        let there = ground.get_or_insert_with(|| {
            let (session, device, disk) = Stage::new(EngineKind::Null).session();
            Ground { session: Arc::new(Mutex::new(session)), device, _disk: disk }
        });
        play(there, &mut Reader::new(data));
        let mut session = there.session.lock().unwrap();
        session.disconnect();
        assert!(session.queues().is_empty());
        let lost = session.take_failure();
        assert!(lost.is_none(), "no front-end ends the daemon: {lost:?}");
    });
}

fn play(ground: &Ground, bytes: &mut Reader<'_>) {
    let hostile = Hostile::new();
    let mut connection = Connection::new(&ground.session);
    // Of a queue nothing was said since the driver's features came.
    let mut settled = [true; QUEUES as usize];
    while !bytes.is_empty() {
        for message in hostile.next(bytes) {
            let done = connection.handle(&hostile, &message);
            let answers = connection.answers();
            check_answers(&answers, &ground.device, &message, done);
            match message.request {
                msg::SET_FEATURES => settled = [false; QUEUES as usize],
                msg::SET_MEM_TABLE if done == Some(true) => settled = [true; QUEUES as usize],
                msg::SET_VRING_ENABLE if done == Some(true) => {
                    let queue = u32::from_le_bytes(message.bytes[12..16].try_into().unwrap());
                    settled[queue as usize] = true;
                }
                _ => {}
            }
            if done.is_none() {
                return;
            }
            check(&connection, &ground.device, &settled);
        }
        if connection.session.lock().unwrap().memory_lost() {
            return;
        }
    }
}
