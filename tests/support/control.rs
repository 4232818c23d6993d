//! The control socket as a program sees it: lines of JSON.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use serde_json::{Value, json};
use vublk::sys;

use super::daemon::{Daemon, run};
use super::sys::{Deadline, PATIENCE};

/// Where a daemon's control socket is by default.
pub fn path(daemon: &Daemon) -> PathBuf {
    let mut name = daemon.socket.clone().into_os_string();
    name.push(".control");
    name.into()
}

/// Returns when the control thread is between two messages of the front-end, and has sent its replies.
#[track_caller]
pub fn settle(daemon: &Daemon) {
    Control::of(daemon).call("resize", json!({})).unwrap();
}

/// A connection to a control socket.
pub struct Control(BufReader<UnixStream>);

impl Control {
    #[track_caller]
    pub fn of(daemon: &Daemon) -> Self {
        let path = path(daemon);
        // It is made after the disk's socket.
        let stream = Deadline::new("the control socket").until_slowly(|| UnixStream::connect(&path).ok());
        stream.set_read_timeout(Some(2 * PATIENCE)).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// Whether a call is answered in time: `status`, for which the control thread of the disk is not
    /// needed, or `resize`, for which it is.
    pub fn answers_within(&mut self, method: &str, time: Duration) -> bool {
        self.0.get_ref().set_read_timeout(Some(time)).unwrap();
        self.send(format!("{}\n", json!({"jsonrpc": "2.0", "method": method, "id": 1})).as_bytes());
        self.0.read_line(&mut String::new()).is_ok_and(|got| got > 0)
    }

    /// The next line; `Null` when the daemon hung up.
    #[track_caller]
    pub fn receive(&mut self) -> Value {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Value::Null,
            Ok(_) => serde_json::from_str(&line).unwrap(),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionReset => Value::Null,
            Err(e) => panic!("the control socket: {e}"),
        }
    }

    /// The result of a call, or its error's code and message.
    #[track_caller]
    pub fn call(&mut self, method: &str, params: Value) -> Result<Value, (i64, String)> {
        self.call_with(method, params, &[])
    }

    /// The same with descriptors.
    #[track_caller]
    pub fn call_with(
        &mut self,
        method: &str,
        params: Value,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Value, (i64, String)> {
        let call = json!({"jsonrpc": "2.0", "id": 7, "method": method, "params": params});
        sys::send_with(self.0.get_ref(), format!("{call}\n").as_bytes(), fds).unwrap();
        let mut answer = self.receive();
        assert_eq!((&answer["jsonrpc"], &answer["id"]), (&json!("2.0"), &json!(7)), "{answer}");
        match answer.get("error") {
            Some(error) => {
                Err((error["code"].as_i64().unwrap(), error["message"].as_str().unwrap().to_owned()))
            }
            None => Ok(answer["result"].take()),
        }
    }
}

/// `vublk WORDS…` to its end: status, what it printed, what it complained of.
#[track_caller]
pub fn vublk(words: &[&str]) -> (ExitStatus, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.args(words);
    run(command)
}

/// `vublk status` says in words that the disk is so, and `vublk stat` marks its row.
#[track_caller]
pub fn says(disk: &str, word: &str, sentence: &str) {
    let (status, text, complained) = vublk(&["status", disk]);
    assert!(status.success(), "{complained}");
    let note = |line: &&str| line.starts_with("note ") && line.contains(&format!(" {word}"));
    let line = text.lines().find(note).unwrap_or_else(|| panic!("{word} is not told: {text}"));
    assert!(line.contains(sentence), "{line}");
    let (_, text, _) = vublk(&["stat", disk]);
    let marked = text.lines().skip(1).all(|line| line.split_whitespace().last() == Some(word));
    assert!(marked && text.lines().count() == 2, "{text}");
    let (_, text, _) = vublk(&["stat", "--json", disk]);
    let told: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(told["disks"][0]["notes"], json!([word]), "{text}");
}
