//! Screens, from models of known figures.

use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use serde::Deserialize;
use serde_json::json;

use super::super::model::{Move, Sort};
use super::*;
use crate::find::Place;
use crate::rates::{Key, Sample};
use crate::status::Errors;

/// What a disk has counted after so many seconds of so many reads a second, each of which took so long.
fn sample(seconds: u32, per_second: u32, ns: u64, errors: u64) -> Sample {
    let requests = seconds * per_second;
    Sample::deserialize(json!({
        "in_flight": 3,
        "operations": {"read": {
            "requests": requests, "bytes": u64::from(requests) * 1_048_576,
            "seconds": Duration::from_nanos(ns).as_secs_f64() * f64::from(requests),
            "latency": {"first_bucket": histogram::bucket(ns), "counts": [requests]},
        }},
        "errors": {"io": errors, "unsupported": 0, "malformed": 0, "held": 0},
        "served_seconds": seconds,
    }))
    .expect("a sample")
}

fn place(name: &str) -> Place {
    Place { control: format!("/run/vublk/{name}.control").into(), disk: None }
}

fn hear(model: &mut Model, name: &str, at: u32, sample: Sample) {
    let key: Key = (place(name), None);
    model.now = Duration::from_secs(at.into());
    model.counted(&place(name), model.now, vec![(key, sample)]);
}

/// Ten seconds of two disks: 1000 reads a second of 100 µs, and 10 of 40 ms.
fn model() -> Model {
    let mut model = Model::default();
    for at in 1..=10 {
        hear(&mut model, "alpha", at, sample(at, 1000, 100_000, 0));
        hear(&mut model, "beta", at, sample(at, 10, 40_000_000, 2));
    }
    model
}

fn screen(model: &Model, width: u16, height: u16) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
    terminal.draw(|frame| draw(model, frame.buffer_mut())).expect("a screen");
    text(terminal.backend().buffer()).lines().map(str::to_owned).collect()
}

#[track_caller]
fn line_of(screen: &[String], begin: &str) -> Vec<String> {
    let line = screen.iter().find(|line| line.starts_with(begin));
    line.unwrap_or_else(|| panic!("{begin}: {screen:#?}")).split_whitespace().map(str::to_owned).collect()
}

#[test]
fn eighty_columns_and_twenty_four_lines() {
    let lines = screen(&model(), 80, 24);
    assert_eq!(lines.len(), 24);
    assert!(lines.iter().all(|line| line.chars().count() <= 80), "{lines:#?}");
    assert!(lines[0].starts_with("vublk top   2 disks   by name"), "{}", lines[0]);
    let head = line_of(&lines, "DISK");
    assert_eq!(head[1..], ["r/s", "w/s", "rMB/s", "wMB/s", "r_await", "w_await", "p99", "aqu-sz", "err"]);
    let alpha = line_of(&lines, "alpha");
    assert_eq!(alpha[1..7], ["1000", "0", "1000", "0", "0.10", "0"], "{alpha:?}");
    assert_eq!(alpha[8..], ["0.10", "0"]);
    let beta = line_of(&lines, "beta");
    assert_eq!((beta[5].as_str(), beta[8].as_str(), beta[9].as_str()), ("40.0", "0.40", "2"), "{beta:?}");
    // The map: nine seconds at the right, in the row whose label says so, and nothing else.
    let map = lines.iter().position(|line| line.starts_with("Latency of alpha")).expect("a map");
    let depth = lines.iter().position(|line| line.starts_with("Requests in flight")).expect("bars");
    let marked: Vec<&String> = lines[map + 1..depth].iter().filter(|line| line.contains('█')).collect();
    let [row] = marked.as_slice() else { panic!("{lines:#?}") };
    assert!(row.ends_with(&"█".repeat(9)) && row.chars().count() == 80, "{row}");
    let label = row.trim_start().split(" ┤").next().expect("a label");
    assert!(["98 µs", "90 µs"].contains(&label), "{row}");
    assert_eq!(lines[depth + 3], format!("      0 ┤{}{}", " ".repeat(62), "▂".repeat(9)), "0.1 in flight");
    assert!(lines[23].starts_with("q quit"));
}

#[test]
fn the_selected_disk_and_the_order() {
    let mut model = model();
    model.select(Move::Down);
    assert!(screen(&model, 80, 24).iter().any(|line| line.starts_with("Latency of beta")));
    model.select(Move::Down);
    model.sort = Sort::P99;
    let lines = screen(&model, 80, 24);
    assert!(lines[2].starts_with("beta") && lines[3].starts_with("alpha"), "{lines:#?}");
    model.select(Move::Last);
    assert!(screen(&model, 80, 24).iter().any(|line| line.starts_with("Latency of alpha")));
    // One of many, far down the table.
    for disk in 0..40 {
        hear(&mut model, &format!("disk{disk:02}"), 10, sample(1, 1, 1, 0));
    }
    (model.sort, _) = (Sort::Name, model.select(Move::Last));
    let lines = screen(&model, 80, 24);
    assert!(lines.iter().any(|line| line.starts_with("disk39")), "{lines:#?}");
    assert!(lines.iter().any(|line| line.starts_with("Latency of disk39")));
}

#[test]
fn silence_pauses_and_names_that_are_hostile() {
    let mut model = model();
    model.now = Duration::from_secs(17);
    hear(&mut model, "alpha", 17, sample(17, 1000, 100_000, 0));
    model.silent(&place("beta"), "no answer: \u{1b}[2J\nnone");
    let lines = screen(&model, 80, 24);
    assert!(lines[0].contains("1 without an answer"), "{}", lines[0]);
    let beta = lines.iter().find(|line| line.starts_with("beta")).expect("it is there");
    assert!(beta.contains(r"no answer for 7 s: no answer: \u{1b}[2J none"), "{beta}");
    // A gap where alpha did not answer, and no column for it.
    let row = lines.iter().find(|line| line.contains('█')).expect("a map");
    assert!(row.ends_with("█████████      █"), "{row}");
    model.silent(&place("\u{1b}[31mred\n"), "");
    assert!(screen(&model, 80, 24).iter().any(|line| line.contains(r"\u{1b}[31mr")), "escaped");
    model.pause(Duration::from_secs(17));
    hear(&mut model, "alpha", 18, sample(18, 5000, 100_000, 0));
    model.now = Duration::from_secs(17); // as `hear` found it
    model.go_on(Duration::from_secs(60));
    let lines = screen(&model, 80, 24);
    assert!(lines[0].contains("PAUSED"));
    assert_eq!(line_of(&lines, "alpha")[1], "1000", "a paused screen counts no silence");
    model.pause(Duration::from_secs(60));
    model.go_on(Duration::from_secs(61));
    assert_eq!(line_of(&screen(&model, 80, 24), "alpha")[1], "1000", "the disk has a second to answer");
    model.gone(&place("beta"));
    assert!(!screen(&model, 80, 24).iter().any(|line| line.starts_with("beta")));
}

#[test]
fn a_second_that_is_late_leaves_no_gap() {
    let mut model = Model::default();
    for at in 1..30 {
        model.now = Duration::from_millis(u64::from(at) * 1049);
        let counted = vec![((place("a"), None), sample(at, 100, 100_000, 0))];
        model.counted(&place("a"), model.now, counted);
    }
    let lines = screen(&model, 80, 24);
    assert!(lines.iter().any(|line| line.ends_with(&"█".repeat(28))), "{lines:#?}");
}

/// Latencies from next to nothing to half a minute, and none beyond the last that can be told.
#[test]
fn all_latencies() {
    let mut model = Model::default();
    for at in 1..=10 {
        hear(&mut model, "alpha", at, sample(at, 100, if at % 2 == 0 { 900 } else { 30_000_000_000 }, 0));
    }
    let lines = screen(&model, 80, 24);
    let labels = lines.iter().filter_map(|line| line.split_once('┤')).map(|(label, _)| label.trim());
    let zeroes = labels.filter(|label| *label == "0").count();
    assert!(zeroes <= 2, "of the shortest latencies, and of the depth: {lines:#?}");
}

/// What else there is to say stands beside the name, of which something is seen whatever its length.
#[test]
fn a_word_beside_the_name() {
    let status = |more: serde_json::Value| {
        let mut disk = json!({"in_flight": 0, "operations": {}, "errors": Errors::default()});
        disk.as_object_mut().expect("fields").extend(more.as_object().expect("fields").clone());
        Sample::of(json!({ "disk": disk })).expect("a status")
    };
    let mut model = Model::default();
    let limits = |queues| json!({"throttle": {"iops_total": 5, "waiting_queues": queues}});
    hear(&mut model, "alpha", 1, status(limits(0)));
    hear(&mut model, "a-long-name", 1, status(limits(1)));
    let held = json!({"held": {"requests": 1, "error": "", "seconds": 2}, "throttle": limits(0)["throttle"]});
    hear(&mut model, "gamma", 1, status(held));
    hear(&mut model, "plain", 1, status(json!({"throttle": {"waiting_queues": 0}})));
    let lines = screen(&model, 80, 24);
    for (begin, word) in [("alpha", "limited"), ("a-", "throttled"), ("gamma", "held"), ("plain", "0")] {
        assert_eq!(line_of(&lines, begin)[1], word, "{lines:#?}");
    }
    // Of a small screen the word may be cut.
    assert!(
        screen(&model, 60, 15).iter().any(|line| line.starts_with("ga… hel")),
        "{:#?}",
        screen(&model, 60, 15)
    );
}

/// Requests that have not ended are in flight, too.
#[test]
fn a_disk_that_is_held() {
    let mut model = Model::default();
    hear(&mut model, "alpha", 1, sample(1, 10, 1000, 0));
    hear(&mut model, "alpha", 2, sample(1, 10, 1000, 0));
    let line = line_of(&screen(&model, 80, 24), "alpha");
    assert_eq!(line[line.len() - 2], "3.00", "{line:?}");
}

/// Whatever the size, nothing is drawn outside, and nothing fails.
#[test]
fn all_sizes() {
    let mut model = model();
    for width in [1, 5, 9, 10, 39, 40, 80, 150, 400] {
        for height in [1, 2, 3, 8, 15, 24, 100] {
            for help in [false, true] {
                model.help = help;
                assert_eq!(screen(&model, width, height).len(), usize::from(height));
            }
        }
    }
    model.help = false;
    let wide = screen(&model, 150, 50);
    assert!(line_of(&wide, "DISK").contains(&"inflight".to_owned()), "{wide:#?}");
    assert_eq!(
        screen(&Model::default(), 80, 24)[0].trim_end(),
        "vublk top   no disk is served on this host   by name"
    );
}
