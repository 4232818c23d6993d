//! `vublk inspect` on disks of NBD servers: nbdkit, qemu-nbd and nbd-server, and what is told where there is none.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::process::Command;

use serde_json::Value;

use crate::support::daemon::run;
use crate::support::nbd::Server;
use crate::support::sys::installed;

const MIB: u64 = 1 << 20;

fn inspect(uri: &str, arguments: &[&str]) -> (bool, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vublk"));
    command.arg("inspect").arg(uri).args(arguments);
    let (status, stdout, stderr) = run(command);
    (status.success(), stdout, stderr)
}

#[track_caller]
fn text(uri: &str) -> String {
    let (is_well, stdout, stderr) = inspect(uri, &[]);
    assert!(is_well, "{stderr}");
    stdout
}

#[track_caller]
fn json(uri: &str) -> Value {
    let (is_well, stdout, stderr) = inspect(uri, &["--json"]);
    assert!(is_well, "{stderr}");
    serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"))
}

#[track_caller]
fn refused(uri: &str) -> String {
    let (is_well, stdout, stderr) = inspect(uri, &[]);
    assert!(!is_well, "{stdout}");
    stderr
}

/// Each of `fields` is in the report with its value.
#[track_caller]
fn has(report: &Value, fields: &Value) {
    for (name, value) in fields.as_object().unwrap() {
        assert_eq!(&report[name], value, "{name}: {report}");
    }
}

#[test]
fn nbdkit_tells_what_it_can_do() {
    if !installed("nbdkit", "nbd::nbdkit_tells_what_it_can_do") {
        return;
    }
    // 1 MiB of the 64 is data.
    let server = Server::nbdkit(&["data", "@33554432 1*1048576", "size=64M"]);
    let uri = server.uri("");
    let report = json(&uri);
    has(
        &report,
        &serde_json::json!({
            "path": uri, "kind": "NBD export", "size": 64 * MIB, "minimum_block": 1, "read_only": false, "flush": true,
            "fua": true, "trim": true, "write_zeroes": true, "fast_zero": true, "multi_conn": true,
            "structured_replies": true, "counted_bytes": 64 * MIB, "counted_whole": true, "allocated_bytes": MIB,
            "zero_bytes": 63 * MIB, "allocation_error": null,
        }),
    );
    let text = text(&uri);
    for line in
        ["NBD export, 67108864 bytes\n", "allocated          1048576 bytes\n", "read-only          no\n"]
    {
        assert!(text.contains(line), "{line:?} is missing:\n{text}");
    }
    let (is_well, _, why) = inspect(&uri, &["--buffered"]);
    assert!(!is_well && why.contains("--buffered is for files"), "{why}");
}

#[test]
fn what_nbdkit_leaves_out_is_told() {
    if !installed("nbdkit", "nbd::what_nbdkit_leaves_out_is_told") {
        return;
    }
    // Blocks of 4 KiB; nothing but reading; simple replies, and so no extents.
    let filters = ["--filter=blocksize-policy", "--no-sr", "-r", "memory", "8M"];
    let sizes = [
        "blocksize-minimum=4K",
        "blocksize-preferred=64K",
        "blocksize-maximum=1M",
        "blocksize-error-policy=error",
    ];
    let server = Server::nbdkit(&[&filters[..], &sizes].concat());
    let report = json(&server.uri(""));
    has(
        &report,
        &serde_json::json!({
            "size": 8 * MIB, "minimum_block": 4096, "preferred_block": 65536, "maximum_request": MIB, "read_only": true,
            "structured_replies": false, "allocated_bytes": null, "counted_bytes": 0, "counted_whole": false,
        }),
    );
    let text = text(&server.uri(""));
    assert!(text.contains("allocated          unknown: the server does not tell"), "{text}");
    assert!(text.contains("in multiples of 4096 bytes, best of 65536, up to 1048576\n"), "{text}");

    // Counting stops at 64 GiB.
    let server = Server::nbdkit(&["memory", "65G"]);
    let report = json(&server.uri(""));
    has(
        &report,
        &serde_json::json!({"counted_bytes": 64u64 << 30, "counted_whole": false, "allocated_bytes": 0}),
    );
    let text = self::text(&server.uri(""));
    assert!(text.contains("0 bytes of the first 68719476736\n"), "{text}");
}

#[test]
fn qemu_nbd_tells_what_it_can_do() {
    if !installed("qemu-nbd", "nbd::qemu_nbd_tells_what_it_can_do") {
        return;
    }
    let server = Server::qemu_nbd(16 * MIB, 2 * MIB, &["--export-name=root disk", "--discard=unmap"]);
    let uri = server.uri("root%20disk");
    has(
        &json(&uri),
        &serde_json::json!({
            "path": uri, "size": 16 * MIB, "flush": true, "fua": true, "trim": true, "write_zeroes": true,
            "structured_replies": true, "counted_whole": true, "allocated_bytes": 2 * MIB, "zero_bytes": 14 * MIB,
        }),
    );
    let why = refused(&server.uri("other"));
    assert!(why.contains("no export \"other\"; it has \"root disk\"\n"), "{why}");
}

/// It serves one client at a time unless it is told otherwise: the next one waits.
#[test]
fn a_server_that_is_taken_is_told() {
    if !installed("qemu-nbd", "nbd::a_server_that_is_taken_is_told") {
        return;
    }
    let server = Server::qemu_nbd(MIB, 0, &[]);
    let mut client = std::os::unix::net::UnixStream::connect(&server.socket).unwrap();
    client.read_exact(&mut [0; 8]).unwrap();
    let why = refused(&server.uri(""));
    assert!(why.contains("as many connections as it takes") && why.contains("--shared=0"), "{why}");
}

#[test]
fn nbd_server_tells_what_it_can_do() {
    if !installed("nbd-server", "nbd::nbd_server_tells_what_it_can_do") {
        return;
    }
    let server = Server::nbd_server(16 * MIB, 2 * MIB);
    has(
        &json(&server.uri("disk")),
        &serde_json::json!({
            "size": 16 * MIB, "flush": true, "fua": true, "trim": true, "read_only": false, "allocated_bytes": null,
        }),
    );
}

#[test]
fn where_there_is_no_server_it_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nbd.sock");
    let uri = format!("nbd+unix:///disk?socket={}", path.display());
    let why = refused(&uri);
    assert!(why.contains(&format!("{uri}: no connection")) && why.contains("no such socket"), "{why}");
    let listener = UnixListener::bind(&path).unwrap();
    let other = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        client.write_all(b"220 mail.example.com ESMTP\r\n").unwrap();
        // Until it goes, which resets the connection where it has not read all.
        let _gone = client.read_to_end(&mut Vec::new());
    });
    let why = refused(&uri);
    assert!(why.contains("no NBD server"), "{why}");
    other.join().unwrap();
    assert!(refused(&uri).contains("nothing listens there"));
    let port = TcpListener::bind("127.0.0.1:0").and_then(|gone| gone.local_addr()).unwrap().port();
    assert!(refused(&format!("nbd://127.0.0.1:{port}/disk")).contains("nothing listens there"));
    assert!(refused("nbds://127.0.0.1/disk").contains("stunnel"));
}
