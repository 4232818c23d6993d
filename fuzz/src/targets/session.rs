//! A session under any sequence of messages. After each: the queues that run are those of which all that a queue needs is
//! there, memory is taken or refused as the document says, and a message is answered as it says. At the end: a successor
//! would be told the same.

mod model;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use vhost::vhost_user::BackendReqHandler;
use vublk::device::Device;
use vublk::session::Session;
use vublk::session::receiver::Receiver;
use vublk::workers::EngineKind;

use self::model::Model;
use super::hostile::{Hostile, Message};
use super::reader::Reader;
use super::stage::{QUEUES, Stage};
use crate::support::frontend::{Frontend, msg};

type Handler = BackendReqHandler<Mutex<Session>>;

/// How the session handled a message.
#[derive(Clone, Copy)]
struct Handled {
    /// It was carried out.
    done: bool,
    /// The connection goes on.
    goes_on: bool,
}

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

    /// Sends a message and has it handled.
    fn handle(&mut self, hostile: &Hostile, message: &Message) -> Handled {
        self.frontend.send_bytes(&message.bytes, &hostile.descriptors(message)).unwrap();
        if !matches!(self.receiver.receive(), Ok(true)) {
            return Handled { done: false, goes_on: false };
        }
        let judged = self.receiver.judge();
        let ids = (self.next_id..).take(self.receiver.message().1.len()).collect::<Vec<u32>>();
        self.next_id += 40;
        let mut session = self.session.lock().unwrap();
        session.set_received(ids);
        drop(session);
        let mut done = judged.why.is_none();
        if done {
            self.receiver.give_to_handler().unwrap();
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
            self.receiver.refuse(judged.request).unwrap();
        } else {
            self.receiver.relay().unwrap();
        }
        let ends = session.memory_lost() || session.failed() || session.is_refused();
        Handled { done, goes_on: (done || told) && !ends }
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

/// The answers that are facts.
fn check_answers(answers: &[(u32, Vec<u8>)], device: &Device, message: &Message, handled: Handled) {
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
                assert_eq!(
                    number == Some(0),
                    handled.done,
                    "the answer says whether the session carried the message out"
                );
            }
            _ => {}
        }
    }
    assert!(answers.len() <= 1, "more than one answer to a message");
}

/// So that no case takes long.
const MOST_STEPS: usize = 32;

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
    let mut hostile = Hostile::new();
    let mut connection = Connection::new(&ground.session);
    let mut model = Model::new();
    for _ in 0..MOST_STEPS {
        if bytes.is_empty() {
            break;
        }
        for message in hostile.next(bytes) {
            let expected = model.expects(&message, &hostile);
            let handled = connection.handle(&hostile, &message);
            check_answers(&connection.answers(), &ground.device, &message, handled);
            if let Some(expected) = expected {
                assert_eq!(handled.done, expected, "{message:?}, when {model:?}");
            }
            if handled.done {
                model.took(&message);
            }
            if !handled.goes_on {
                return;
            }
            model.check_queues(&connection.session.lock().unwrap().queues());
        }
        if connection.session.lock().unwrap().memory_lost() {
            return;
        }
    }
    model.check_state(&connection.session.lock().unwrap().state().bytes());
}
