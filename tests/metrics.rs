//! `--metrics`: what a scrape gets, what clients cannot do to it, and a real Prometheus beside it.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::stats::status;
use crate::succession::{attach, daemon_of, kill};
use crate::support::control::{Control, settle};
use crate::support::daemon::{Daemon, Options, URING, run};
use crate::support::device::{Device, OK, T_FLUSH, T_IN, T_OUT};
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, PATIENCE, skip};

/// An address that is free now.
fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn serve(extra: &[&str]) -> (Disk, Daemon, SocketAddr) {
    let (disk, at) = (Disk::new(), free());
    let metrics = format!("--metrics={at}");
    let words: Vec<&str> = extra.iter().copied().chain([metrics.as_str()]).collect();
    let daemon = Daemon::start(URING, &disk, &Options::with(&words));
    (disk, daemon, at)
}

/// The answer to these bytes, until the end of the connection.
#[track_caller]
fn ask(mut stream: impl Read + Write, request: &[u8]) -> String {
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[track_caller]
fn connect(at: SocketAddr) -> TcpStream {
    let stream = Deadline::new("the socket of --metrics").until_slowly(|| TcpStream::connect(at).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[track_caller]
fn get(at: SocketAddr, path: &str, accept: &str) -> String {
    ask(connect(at), format!("GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n").as_bytes())
}

#[track_caller]
fn scrape(at: SocketAddr) -> String {
    let answer = get(at, "/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5");
    let (head, body) = answer.split_once("\r\n\r\n").expect(&answer);
    assert!(
        head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("application/openmetrics-text"),
        "{head}"
    );
    assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{head}");
    assert!(body.ends_with("\n# EOF\n"), "{body}");
    body.to_owned()
}

/// The value of a time series.
#[track_caller]
fn value(text: &str, series: &str) -> f64 {
    let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{text}")).parse().unwrap()
}

/// What a scrape says is what the status says.
#[test]
fn a_scrape() {
    let (disk, mut daemon, at) = serve(&[]);
    let mut device = Device::plain(&daemon);
    for sector in 0..5 {
        assert_eq!(device.run(0, T_IN, sector, &[], 4096).status, OK);
    }
    assert_eq!(device.run(0, T_OUT, 0, &[1; 512], 0).status, OK);
    assert_eq!(device.run(0, T_FLUSH, 0, &[], 0).status, OK);
    let text = scrape(at);
    let (path, serial) =
        (disk.path.display(), status(&daemon)["disk"]["serial"].as_str().unwrap().to_owned());
    assert_eq!(
        value(&text, &format!("vublk_disk_info{{disk=\"disk\",path=\"{path}\",serial=\"{serial}\"}}")),
        1.0
    );
    for (series, want) in [
        (concat!("vublk_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"}"), 1.0),
        ("vublk_disk_requests_total{disk=\"disk\",op=\"read\"}", 5.0),
        ("vublk_disk_requests_total{disk=\"disk\",op=\"discard\"}", 0.0),
        ("vublk_disk_bytes_total{disk=\"disk\",op=\"read\"}", 20480.0),
        ("vublk_disk_bytes_total{disk=\"disk\",op=\"write\"}", 512.0),
        ("vublk_disk_request_duration_seconds_count{disk=\"disk\",op=\"read\"}", 5.0),
        ("vublk_disk_request_duration_seconds_bucket{le=\"+Inf\",disk=\"disk\",op=\"flush\"}", 1.0),
        ("vublk_disk_errors_total{disk=\"disk\",kind=\"io\"}", 0.0),
        ("vublk_disk_in_flight{disk=\"disk\"}", 0.0),
        ("vublk_disk_front_end_connected{disk=\"disk\"}", 1.0),
        ("vublk_disk_front_ends_total{disk=\"disk\"}", 1.0),
        ("vublk_disk_size_bytes{disk=\"disk\"}", f64::from(64 << 20)),
    ] {
        assert_eq!(value(&text, series), want, "{series}");
    }
    let took = status(&daemon)["disk"]["operations"]["read"]["seconds"].as_f64().unwrap();
    let sum = value(&text, "vublk_disk_request_duration_seconds_sum{disk=\"disk\",op=\"read\"}");
    assert!((sum - took).abs() < 1e-9, "{sum} and {took}");
    drop(device);
    daemon.stop();
}

/// A request that is none, or too much; and the text for those that do not know OpenMetrics.
#[test]
fn requests() {
    let (_disk, mut daemon, at) = serve(&[]);
    for (request, want) in [
        ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET /metrics?x=y HTTP/1.0\r\n\r\n", "HTTP/1.1 200 OK"),
        ("GET /etc/passwd HTTP/1.1\r\n\r\n", "HTTP/1.1 404 Not Found"),
        ("POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n", "HTTP/1.1 405 Method Not Allowed"),
        ("\0\r\n\r\n", "HTTP/1.1 400 Bad Request"),
        ("GET /metrics SMTP\r\n\r\n", "HTTP/1.1 400 Bad Request"),
    ] {
        let answer = ask(connect(at), request.as_bytes());
        assert!(answer.starts_with(want), "{request:?}: {answer}");
    }
    let many = format!("GET /metrics HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(40));
    assert!(ask(connect(at), many.as_bytes()).starts_with("HTTP/1.1 400 "));
    let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(4080));
    assert!(ask(connect(at), &long.as_bytes()[..4096]).starts_with("HTTP/1.1 431 "));
    let head = ask(connect(at), b"HEAD /metrics HTTP/1.1\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200 OK") && head.ends_with("\r\n\r\n"), "{head}");
    let older = get(at, "/metrics", "text/plain");
    assert!(older.contains("Content-Type: text/plain; version=0.0.4"), "{older}");
    assert!(
        older.contains("\n# TYPE vublk_disk_requests_total counter\n") && !older.contains("# EOF"),
        "{older}"
    );
    if let Some(promtool) = prometheus("promtool", "metrics::requests") {
        let mut check = Command::new(promtool);
        check.args(["check", "metrics"]);
        let body = older.split_once("\r\n\r\n").unwrap().1;
        let mut child =
            check.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(body.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.is_empty(), "{said}");
    }
    daemon.stop();
}

/// Clients that say nothing, half of a request, or read no answer: others are answered, and so is the guest.
#[test]
fn clients_that_are_slow_or_many() {
    let (_disk, mut daemon, at) = serve(&[]);
    let mut device = Device::plain(&daemon);
    let mut idle: Vec<TcpStream> = (0..20).map(|_| connect(at)).collect();
    for stream in &mut idle[10..] {
        stream.write_all(b"GET /metrics HT").unwrap();
    }
    let begun = Instant::now();
    for _ in 0..10 {
        scrape(at);
        device.assert_serves(0);
        assert!(Control::of(&daemon).answers_within("status", PATIENCE));
    }
    assert!(
        begun.elapsed() < Duration::from_secs(5),
        "it waited for those that are slow: {:?}",
        begun.elapsed()
    );
    // One that reads nothing: the answers are longer than a socket holds, in the end.
    let mut deaf = connect(at);
    deaf.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    scrape(at);
    // Those that were left for new ones, or had their time, are hung up.
    for stream in &mut idle {
        let mut rest = Vec::new();
        match stream.read_to_end(&mut rest) {
            Ok(0) => {}
            Err(e) if e.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("{other:?}"),
        }
    }
    scrape(at);
    device.assert_serves(0);
    drop(device);
    daemon.stop();
    assert!(TcpStream::connect(at).is_err(), "it listens on");
}

/// A Unix socket: made, answered on, and removed at the end; also as the parent's, over a crash and an upgrade.
#[test]
fn a_unix_socket_and_successors() {
    for supervised in [false, true] {
        let disk = crate::support::load::empty_disk();
        let place = disk.dir.path().join("metrics.sock");
        let metrics = format!("--metrics=unix:{}", place.display());
        let mut words = vec![metrics.as_str()];
        words.extend(supervised.then_some("--supervise"));
        let mut daemon = Daemon::start(URING, &disk, &Options::with(&words));
        let requests = || {
            let stream = Deadline::new("the socket").until_slowly(|| UnixStream::connect(&place).ok());
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let text = ask(stream, b"GET /metrics HTTP/1.1\r\n\r\n");
            let done = |op| value(&text, &format!("vublk_disk_requests_total{{disk=\"disk\",op=\"{op}\"}}"));
            (done("read") + done("write")).to_string()
        };
        let (frontend, mut ring, mut load) = attach(&daemon, 0);
        for round in 0..3 {
            load.offer(&mut ring);
            load.drain(&mut ring);
            assert_eq!(requests(), load.answered.to_string(), "round {round}");
            if supervised {
                let before = daemon_of(&daemon);
                if round % 2 == 0 {
                    kill(&daemon);
                } else {
                    Control::of(&daemon).call("upgrade", json!({})).unwrap();
                }
                // The parent has it: a scrape that comes meanwhile is answered by the next daemon.
                assert_eq!(requests(), load.answered.to_string(), "after daemon {before:?}");
                Deadline::new("the successor").until_slowly(|| (daemon_of(&daemon) != before).then_some(()));
                settle(&daemon);
            }
        }
        drop(frontend);
        daemon.stop();
        assert!(!place.exists(), "{} stays behind (supervised: {supervised})", place.display());
    }
}

/// An address that is taken is a reason not to serve, and what is no address is an error.
#[test]
fn addresses_that_cannot_be_had() {
    let disk = Disk::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let metrics = format!("--metrics={}", taken.local_addr().unwrap());
    let mut daemon = Daemon::start_at(URING, &disk, "disk.sock", &Options::with(&[&metrics]));
    assert_eq!(daemon.wait_end(PATIENCE).code(), Some(1));
    assert!(daemon.log().contains("Choose another address or port for --metrics"), "{}", daemon.log());
    for (word, code) in [("localhost", 2), ("unix:", 2), ("127.0.0.1", 2), ("unix:/nowhere/at/all", 1)] {
        let metrics = format!("--metrics={word}");
        let mut daemon = Daemon::start_at(URING, &disk, "other.sock", &Options::with(&[&metrics]));
        assert_eq!(daemon.wait_end(PATIENCE).code(), Some(code), "{word}: {}", daemon.log());
    }
}

/// A program of Prometheus: as `make setup` unpacks it, or as it is installed.
fn prometheus(name: &str, test: &str) -> Option<PathBuf> {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/prometheus/usr/bin").join(name);
    let installed = std::env::var_os("PATH").unwrap_or_default();
    let found =
        std::iter::once(unpacked).chain(std::env::split_paths(&installed).map(|folder| folder.join(name)));
    let found = found.into_iter().find(|path| path.is_file());
    if found.is_none() {
        skip(test, &format!("{name} is not installed"));
    }
    found
}

/// Ended when the test is.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _reaped = self.0.wait();
    }
}

/// Prometheus as Debian ships it scrapes a daemon; the alert rules are loaded, and each query of the dashboard is answered.
#[test]
fn a_real_prometheus() {
    let test = "metrics::a_real_prometheus";
    let (Some(program), Some(promtool)) = (prometheus("prometheus", test), prometheus("promtool", test))
    else {
        return;
    };
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist");
    let rules = dist.join("prometheus/vublk.rules.yml");
    for (words, file) in [(["check", "rules"], "vublk.rules.yml"), (["test", "rules"], "vublk.test.yml")] {
        let mut command = Command::new(&promtool);
        command.args(words).arg(file).current_dir(dist.join("prometheus"));
        let (status, said, complained) = run(command);
        assert!(status.success(), "{words:?}: {said}{complained}");
    }
    let (_disk, mut daemon, at) = serve(&[]);
    let mut device = Device::plain(&daemon);
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("prometheus.yml");
    let text = format!(
        "global: {{scrape_interval: 200ms, evaluation_interval: 200ms}}\nrule_files: [{}]\nscrape_configs:\n  - job_name: \
         vublk\n    static_configs: [{{targets: ['{at}']}}]\n",
        rules.display()
    );
    std::fs::write(&config, text).unwrap();
    let web = free();
    let mut command = Command::new(&program);
    command.arg(format!("--config.file={}", config.display()));
    command.arg(format!("--storage.tsdb.path={}", folder.path().join("data").display()));
    command.arg(format!("--web.listen-address={web}"));
    let log = std::fs::File::create(folder.path().join("log")).unwrap();
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let _ended = Ended(child);
    let query = |path: &str| -> Option<Value> {
        let mut stream = TcpStream::connect(web).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        serde_json::from_str(answer.split_once("\r\n\r\n")?.1).ok()
    };
    let ask = |expression: &str| query(&format!("/api/v1/query?query={}", percent(expression)));
    for sector in 0..50 {
        assert_eq!(device.run(0, T_IN, sector, &[], 4096).status, OK);
    }
    let reads = || {
        Some(
            ask("vublk_disk_requests_total{op=\"read\",job=\"vublk\"}")?["data"]["result"][0]["value"][1]
                .as_str()?
                .to_owned(),
        )
    };
    Deadline::new("a scrape that has all reads").until_slowly(|| (reads()? == "50").then_some(()));
    let count = ask("vublk_disk_request_duration_seconds_count{op=\"read\"}").unwrap();
    assert_eq!(count["data"]["result"][0]["value"][1], json!("50"));
    let loaded = query("/api/v1/rules").unwrap();
    let loaded = loaded["data"]["groups"][0]["rules"].as_array().unwrap().clone();
    let healthy = |rule: &Value| rule["health"] == json!("ok");
    assert!(loaded.len() >= 8, "{loaded:?}");
    Deadline::new("rules to be evaluated").until_slowly(|| {
        let rules = query("/api/v1/rules")?;
        rules["data"]["groups"][0]["rules"].as_array()?.iter().all(healthy).then_some(())
    });
    let dashboard: Value =
        serde_json::from_str(&std::fs::read_to_string(dist.join("grafana/vublk.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.len() > 10);
    for target in panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap()) {
        let expression = target["expr"].as_str().unwrap();
        let meant =
            expression.replace("$__rate_interval", "1h").replace("$disk", ".*").replace("$instance", ".*");
        // A rate needs two scrapes, and something between them.
        Deadline::new(format!("an answer with series to {meant}")).until_slowly(|| {
            device.assert_serves(0);
            let answer = ask(&meant)?;
            assert_eq!(answer["status"], json!("success"), "{meant}: {answer}");
            (!answer["data"]["result"].as_array()?.is_empty()).then_some(())
        });
    }
    // A scrape and its process end; nothing is left of the daemon but what was scraped.
    drop(device);
    daemon.stop();
    Deadline::new("the end of the target").until_slowly(|| {
        (ask("up{job=\"vublk\"}")?["data"]["result"][0]["value"][1] == json!("0")).then_some(())
    });
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(
            |byte| {
                if byte.is_ascii_alphanumeric() {
                    char::from(byte).to_string()
                } else {
                    format!("%{byte:02X}")
                }
            },
        )
        .collect()
}
