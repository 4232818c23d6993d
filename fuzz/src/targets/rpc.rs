//! The control socket: lines of any bytes, cut anywhere, beside a plain reading of JSON-RPC 2.0.
//!
//! Each line gets the answer that it must get, in order, calls are made as they were asked for, and a line that is too
//! long ends the connection.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::{Value, json};
use vublk::link::{self, Reply};
use vublk::rpc::{Answer, Call, Server};

use super::reader::Reader;

/// Bytes of a line.
const MAX_LINE: usize = 4096;
const MAX_CLIENTS: usize = 8;

const WORDS: [&str; 34] = [
    "{\"jsonrpc\":\"2.0\",\"method\":",
    ",\"id\":1}\n",
    "\"status\"",
    "\"resize\"",
    "\"upgrade\"",
    ",\"params\":",
    "{\"size\":",
    "{\"binary\":",
    "1073741824",
    "null",
    "}",
    "\n",
    "{",
    "[",
    "]",
    ":",
    ",",
    "\"jsonrpc\"",
    "\"2.0\"",
    "\"id\"",
    "\"method\"",
    "\"params\"",
    "\"size\"",
    "\"binary\"",
    "\"x\"",
    "{\"disk\":\"root\"}",
    ",\"disk\":",
    "-1",
    "1.5",
    "18446744073709551615",
    "18446744073709551616",
    "true",
    "\"\\ud800\"",
    " ",
];

/// How a call is answered, whichever it is.
#[derive(Clone, Copy)]
struct Tape {
    later: bool,
    /// A value, a refusal, or nothing at all.
    end: u8,
}

/// The disk that a call names, and the call.
type Asked = (Option<String>, Call);

/// What a line leads to.
struct Outcome {
    call: Option<Asked>,
    /// The reply without the call's outcome: its number, and why no call is made. `None`: a notification.
    id: Option<Value>,
    error: Option<i32>,
}

/// An answer that is still to come: where it goes, and what it is.
type Late = (Arc<Reply>, Tape, Asked);

/// JSON-RPC 2.0, section 4, and the methods that there are.
fn plain(line: &[u8]) -> Outcome {
    let wrong = |error| Outcome { call: None, id: Some(Value::Null), error: Some(error) };
    let Ok(value) = serde_json::from_slice::<Value>(line) else { return wrong(-32700) };
    let Value::Object(request) = value else { return wrong(-32600) };
    let (Some(Value::String(version)), Some(Value::String(method))) =
        (request.get("jsonrpc"), request.get("method"))
    else {
        return wrong(-32600);
    };
    let id = request.get("id").cloned();
    if version != "2.0" {
        return Outcome { call: None, id: Some(id.unwrap_or_default()), error: Some(-32600) };
    }
    let params = request.get("params").filter(|params| !params.is_null());
    // By name or by position; no other name, and no other position.
    let param = |name: &str| match params {
        None => Some(&Value::Null),
        Some(Value::Object(map)) if map.keys().all(|key| key == name || key == "disk") => {
            Some(map.get(name).unwrap_or(&Value::Null))
        }
        Some(Value::Array(list)) if list.len() == 1 => list.first(),
        _ => None,
    };
    let call = match method.as_str() {
        "status" => Ok(Call::Status),
        "retry" => Ok(Call::Retry),
        "resize" => match param("size") {
            Some(Value::Null) => Ok(Call::Resize { size: None }),
            Some(size) if size.is_u64() => Ok(Call::Resize { size: size.as_u64() }),
            _ => Err(-32602),
        },
        "upgrade" => match param("binary") {
            Some(Value::Null) => Ok(Call::Upgrade { binary: None }),
            Some(Value::String(path)) => Ok(Call::Upgrade { binary: Some(path.into()) }),
            _ => Err(-32602),
        },
        _ => Err(-32601),
    };
    let disk = match params.and_then(|params| params.as_object()?.get("disk")) {
        None => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.clone())),
        Some(_) => Err(-32602),
    };
    match call.and_then(|call| Ok((disk?, call))) {
        Ok(call) => Outcome { call: Some(call), id, error: None },
        Err(error) => Outcome { call: None, id, error: Some(error) },
    }
}

/// What a call is answered with.
fn answer(tape: Tape, call: &Asked) -> link::Answer {
    match tape.end {
        0 => Ok(json!({"did": format!("{call:?}")})),
        1 => Err("not today".into()),
        // The thread that had to answer is gone.
        _ if tape.later => Err("the daemon ends".into()),
        _ => Ok(Value::Null),
    }
}

fn reply(id: Value, done: Result<Value, (i32, Option<String>)>) -> Value {
    match done {
        Ok(result) => json!({"jsonrpc": "2.0", "id": id, "result": result}),
        Err((code, why)) => json!({"jsonrpc": "2.0", "id": id, "error": {"code": code, "message": why}}),
    }
}

/// The calls and the replies that these bytes lead to; whether the connection ends.
fn expected(sent: &[u8], tapes: &[Tape]) -> (Vec<Asked>, Vec<Value>, bool) {
    let (mut calls, mut replies) = (Vec::new(), Vec::new());
    let mut lines: Vec<&[u8]> = sent.split(|&byte| byte == b'\n').collect();
    let rest = lines.pop().unwrap_or_default();
    let mut is_too_long = rest.len() >= MAX_LINE;
    for line in lines {
        if line.len() >= MAX_LINE {
            is_too_long = true;
            break;
        }
        let Outcome { call, id, error } = plain(line);
        let done = match (&call, error) {
            (Some(call), _) => {
                let tape = tapes[calls.len() % tapes.len()];
                answer(tape, call).map_err(|why| (-32000, Some(why)))
            }
            (None, error) => Err((error.unwrap(), None)),
        };
        calls.extend(call);
        replies.extend(id.map(|id| reply(id, done)));
    }
    if is_too_long {
        replies.push(reply(Value::Null, Err((-32600, None))));
    }
    (calls, replies, is_too_long)
}

struct Ground {
    server: Server,
    client: UnixStream,
    tapes: Vec<Tape>,
    calls: Vec<Asked>,
    late: VecDeque<Late>,
    got: Vec<u8>,
    hung_up: bool,
}

impl Ground {
    fn serve(&mut self) {
        let Self { server, tapes, calls, late, .. } = self;
        server.serve(|disk, call, _fds| {
            let call = (disk, call);
            let tape = tapes[calls.len() % tapes.len()];
            calls.push(call.clone());
            if !tape.later {
                return Answer::Now(answer(tape, &call));
            }
            let reply = Arc::new(Reply::default());
            late.push_back((Arc::clone(&reply), tape, call));
            Answer::Later(reply)
        });
        let mut bytes = [0; 4096];
        while let Ok(got) = self.client.read(&mut bytes) {
            self.got.extend_from_slice(&bytes[..got]);
            if got == 0 {
                self.hung_up = true;
                break;
            }
        }
    }

    /// An answer comes, or its sender goes.
    fn answer_late(&mut self) {
        if let Some((reply, tape, call)) = self.late.pop_front()
            && tape.end < 2
        {
            reply.give(answer(tape, &call));
        }
    }
}

pub fn run(data: &[u8]) {
    let mut bytes = Reader::new(data);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control");
    let mut server = Server::listen(&path).unwrap();
    let silent: Vec<UnixStream> = bytes.list(9, |_| UnixStream::connect(&path).unwrap());
    // More than one look takes, as there are no more places than clients.
    (0..2).for_each(|_| server.serve(|_, call, _| panic!("no client asked for {call:?}")));
    let client = UnixStream::connect(&path).unwrap();
    client.set_nonblocking(true).unwrap();
    let tape = |bytes: &mut Reader<'_>| Tape { later: bytes.bool(), end: bytes.below(3) as u8 };
    let mut tapes = bytes.list(5, tape);
    tapes.push(tape(&mut bytes));
    let (calls, late, got) = (Vec::new(), VecDeque::new(), Vec::new());
    let mut ground = Ground { server, client, tapes, calls, late, got, hung_up: false };
    let mut sent = Vec::new();
    while !bytes.is_empty() {
        let chunk = match bytes.below(16) {
            0 => {
                ground.serve();
                continue;
            }
            1 => {
                ground.answer_late();
                continue;
            }
            2 => {
                let len = bytes.u8();
                bytes.bytes(len.into()).to_vec()
            }
            // Up to about where a line is too long.
            3 => {
                let line = sent.rsplit(|&byte| byte == b'\n').next().map_or(0, <[u8]>::len);
                vec![b' '; (MAX_LINE - 4 + bytes.below(8) as usize).saturating_sub(line)]
            }
            _ => WORDS[bytes.below(32) as usize].as_bytes().to_vec(),
        };
        // A socket takes much more; and a client that is answered and does not read is another test's.
        if sent.len() + chunk.len() > 3 * MAX_LINE
            || ground.hung_up
            || ground.client.write_all(&chunk).is_err()
        {
            break;
        }
        sent.extend(chunk);
    }
    // Until nothing changes any more.
    for _ in 0..sent.len() + 8 {
        let before = (ground.calls.len(), ground.got.len(), ground.late.len());
        ground.answer_late();
        ground.serve();
        ground.serve();
        if before == (ground.calls.len(), ground.got.len(), ground.late.len()) && before.2 == 0 {
            let more = ground.server.fds().count();
            assert!(more > 0, "it listens");
            if ground.hung_up || rustix::io::ioctl_fionread(&ground.client).unwrap() == 0 {
                ground.serve();
                ground.serve();
                break;
            }
        }
    }
    let (calls, replies, is_too_long) = expected(&sent, &ground.tapes);
    assert_eq!(ground.calls, calls);
    let got: Vec<Value> = String::from_utf8(ground.got)
        .unwrap()
        .lines()
        .map(|line| {
            let mut reply: Value = serde_json::from_str(line).unwrap();
            // Why it is wrong is said in words of its own; why it was refused is not.
            if reply.pointer("/error/code").is_some_and(|code| *code != json!(-32000)) {
                assert!(reply["error"]["message"].take().is_string());
            }
            reply
        })
        .collect();
    assert_eq!(got, replies);
    assert_eq!(ground.hung_up, is_too_long);
    // Of too many clients the oldest is left, and no other.
    let left = (silent.len() + 1).saturating_sub(MAX_CLIENTS);
    for (at, mut client) in silent.into_iter().enumerate() {
        client.set_nonblocking(true).unwrap();
        assert_eq!(client.read(&mut [0]).is_ok(), at < left, "client {at}");
    }
}
