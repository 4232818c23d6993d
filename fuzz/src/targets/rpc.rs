//! The control socket: lines of any bytes, cut anywhere, beside a plain reading of JSON-RPC 2.0.
//!
//! Each line gets the answer that it must get, in order, calls are made as they were asked for, and a line that is too
//! long ends the connection.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde_json::{Value, json};
use vublk::changes::Since;
use vublk::link::{self, Reply};
use vublk::log::LogLevel;
use vublk::rpc::{Answer, Call, Server};

use super::reader::Reader;

/// Bytes of a line.
const MAX_LINE: usize = 4096;
const MAX_CLIENTS: usize = 8;

const WORDS: [&str; 64] = [
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
    "\"retry\"",
    "\"queues\"",
    "{\"from\":",
    "\"pause\"",
    "{\"timeout_ms\":",
    "\"resume\"",
    "{\"pause\":",
    "\"snapshot\"",
    "\"changed\"",
    "{\"since\":",
    "\"last\"",
    "\"previous\"",
    ",\"from\":",
    "\"throttle\"",
    "{\"iops\":",
    ",\"bps\":",
    "\"log-level\"",
    "{\"level\":",
    "\"error\"",
    "\"warn\"",
    "\"info\"",
    "\"debug\"",
    "\"trace\"",
    "{\"slow_ns\":",
    ",\"seconds\":",
    "65535",
    "65536",
    "4294967295",
    "4294967296",
    "{\"last\":null}",
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
    let call = meant(method, params).unwrap_or(Err(-32602));
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

/// The values of a call's parameters, by name, or by position. Of a list the first `needed` have to be there.
fn values<'a, const N: usize>(
    params: Option<&'a Value>,
    names: [&str; N],
    needed: usize,
) -> Option<[Option<&'a Value>; N]> {
    match params {
        None => Some([None; N]),
        Some(Value::Object(map)) => {
            let is_known = |key: &String| key == "disk" || names.contains(&key.as_str());
            map.keys().all(is_known).then(|| names.map(|name| map.get(name)))
        }
        Some(Value::Array(list)) => {
            let fits = (needed..=N).contains(&list.len());
            fits.then(|| std::array::from_fn(|at| list.get(at)))
        }
        Some(_) => None,
    }
}

/// A number up to `most`; `missing` where there is none.
fn number(value: Option<&Value>, most: u64, missing: Option<u64>) -> Option<u64> {
    value.map_or(missing, |value| value.as_u64().filter(|number| *number <= most))
}

/// The same, where null is none, as no value is.
fn maybe(value: Option<&Value>, most: u64) -> Option<Option<u64>> {
    value
        .filter(|value| !value.is_null())
        .map_or(Some(None), |value| number(Some(value), most, None).map(Some))
}

/// A word; serde takes {"word": null} for one.
fn word(value: &Value) -> Option<&str> {
    match value {
        Value::String(word) => Some(word),
        Value::Object(map) if map.len() == 1 => {
            map.iter().next().filter(|(_, v)| v.is_null()).map(|(k, _)| k.as_str())
        }
        _ => None,
    }
}

/// What a method and its parameters ask for; an error's code where there is no such method. `None`: parameters that it
/// does not take.
fn meant(method: &str, params: Option<&Value>) -> Option<Result<Call, i32>> {
    Some(Ok(match method {
        "status" => Call::Status,
        "retry" => Call::Retry,
        "queues" => {
            let [from] = values(params, ["from"], 0)?;
            Call::Queues { from: number(from, u16::MAX.into(), Some(0))? as u16 }
        }
        "pause" => {
            let [time] = values(params, ["timeout_ms"], 0)?;
            Call::Pause { timeout_ms: number(time, u64::MAX, Some(30_000))? }
        }
        "resume" => {
            let [pause] = values(params, ["pause"], 1)?;
            Call::Resume { pause: maybe(pause, u64::MAX)? }
        }
        "snapshot" => {
            let [pause] = values(params, ["pause"], 1)?;
            Call::Snapshot { pause: number(pause, u64::MAX, None)? }
        }
        "changed" => {
            let [since, from] = values(params, ["since", "from"], 0)?;
            let since = match since.map(word) {
                None | Some(Some("last")) => Since::Last,
                Some(Some("previous")) => Since::Previous,
                _ => return None,
            };
            Call::Changed { since, from: number(from, u64::MAX, Some(0))? }
        }
        "resize" => {
            let [size] = values(params, ["size"], 1)?;
            Call::Resize { size: maybe(size, u64::MAX)? }
        }
        "throttle" => {
            let empty = serde_json::Map::new();
            let limits = params.map_or(Some(&empty), Value::as_object)?;
            let limits = limits.iter().filter(|(name, _)| *name != "disk");
            Call::Throttle(
                limits
                    .map(|(name, limit)| Some((name.clone(), maybe(Some(limit), u64::MAX)?.unwrap_or(0))))
                    .collect::<Option<_>>()?,
            )
        }
        "log-level" => {
            let [level] = values(params, ["level"], 1)?;
            Call::LogLevel(match level.filter(|level| !level.is_null()).map(word) {
                None => None,
                Some(word) => Some(match word? {
                    "error" => LogLevel::Error,
                    "warn" => LogLevel::Warn,
                    "info" => LogLevel::Info,
                    "debug" => LogLevel::Debug,
                    "trace" => LogLevel::Trace,
                    _ => return None,
                }),
            })
        }
        "trace" => {
            let [slow, seconds] = values(params, ["slow_ns", "seconds"], 2)?;
            let slow_ns = number(slow, u64::MAX, Some(0))?;
            Call::Trace { slow_ns, seconds: maybe(seconds, u32::MAX.into())?.map(|seconds| seconds as u32) }
        }
        "upgrade" => {
            let [binary] = values(params, ["binary"], 1)?;
            match binary.filter(|binary| !binary.is_null()) {
                None => Call::Upgrade { binary: None },
                Some(Value::String(path)) => Call::Upgrade { binary: Some(path.into()) },
                Some(_) => return None,
            }
        }
        _ => return Some(Err(-32601)),
    }))
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
            _ => WORDS[bytes.below(WORDS.len() as u64) as usize].as_bytes().to_vec(),
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
