//! What `vublk top` looks like.
//!
//! What it is: pure, a function of the model and of the size of the screen.
//!
//! What it is not: it knows no terminal. Colours are the terminal's own and never the only sign of something, so that it
//! can be read on dark and on light.
//!
//! ```text
//!   title
//!   table     a line for each disk, as many as there is room for; the selected one is among them
//!   map       latencies of the selected disk: time across, latency up, shade is the number of requests
//!   depth     its requests in flight
//!   keys
//! ```

use std::time::Duration;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};

use super::model::{Disk, Model, Point};
use crate::rates::Rates;
use crate::stats::histogram::{self, BUCKETS};

const PLAIN: Style = Style::new();
const STRONG: Style = Style::new().add_modifier(Modifier::BOLD);
const SELECTED: Style = Style::new().add_modifier(Modifier::REVERSED);
const BAD: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
/// Lines of the depth's bars, and of the smallest map.
const DEPTH: u16 = 3;
const MAP: u16 = 5;
/// Columns of the labels beside map and bars.
const LABEL: u16 = 9;
/// More requests are darker.
const SHADES: [&str; 4] = ["░", "▒", "▓", "█"];
const EIGHTHS: [&str; 9] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];

const HELP: [&str; 16] = [
    "q         ends",
    "↑ ↓ k j   select a disk; Home, End: the first, the last",
    "s         sort by name, requests, bytes, p99, requests in flight",
    "p         pause: what is shown stays",
    "?         this page",
    "",
    "r/s w/s        reads and writes per second; writes of zeroes are writes",
    "rMB/s wMB/s    MiB per second",
    "r_await …      milliseconds from fetch to return: the mean",
    "p99            within which 99 in a hundred were done, of all requests",
    "aqu-sz         requests in flight: the mean",
    "err            requests that failed since the disk is served",
    "held, paused, throttled, limited   beside a name: vublk status says more",
    "",
    "map            time across, a second each; latency up; more requests darker",
    "               A column without a mark is a second without requests.",
];

/// Draws all of it.
pub(super) fn draw(model: &Model, screen: &mut Buffer) {
    let all = screen.area;
    let disks = model.sorted();
    let selected = model.selected(&disks);
    title(model, &disks, screen);
    if all.height < 2 {
        return;
    }
    line(screen, all.height - 1, "q quit  ↑↓ select  s sort  p pause  ? help", PLAIN);
    let below = Rect { y: 1, height: all.height - 2, ..all };
    if model.help {
        for (y, text) in (below.y..below.bottom()).zip(HELP) {
            line(screen, y, text, PLAIN);
        }
        return;
    }
    // The table has what it needs, up to a third; the map has the rest.
    let wanted = u16::try_from(disks.len()).unwrap_or(u16::MAX).saturating_add(1);
    let is_whole = below.height >= MAP + DEPTH + 5 && all.width >= 40 && !disks.is_empty();
    let rows = if is_whole { wanted.min((below.height / 3).max(3)) } else { below.height };
    table(model, &disks, selected, Rect { height: rows, ..below }, screen);
    let Some(disk) = disks.get(selected).filter(|_| is_whole) else { return };
    let depth = Rect { y: below.bottom() - DEPTH - 1, height: DEPTH + 1, ..below };
    let map = Rect { y: below.y + rows, height: depth.y - below.y - rows, ..below };
    let columns = Columns::of(disk, model.now, all.width - LABEL);
    latencies(disk, &columns, map, screen);
    in_flight(&columns, depth, screen);
}

/// The screen as text.
pub(super) fn text(screen: &Buffer) -> String {
    let mut text = String::new();
    for y in 0..screen.area.height {
        let cells = (0..screen.area.width).filter_map(|x| screen.cell((x, y)));
        let row: String = cells.map(|cell| cell.symbol()).collect();
        text.push_str(row.trim_end());
        text.push('\n');
    }
    text
}

fn line(screen: &mut Buffer, y: u16, text: &str, style: Style) {
    let width = screen.area.width;
    screen.set_stringn(0, y, text, width.into(), style);
}

fn title(model: &Model, disks: &[&Disk], screen: &mut Buffer) {
    let silent = disks.iter().filter(|disk| disk.silence(model.now).is_some()).count();
    let count = match disks.len() {
        0 => "no disk is served on this host".to_owned(),
        1 => "1 disk".to_owned(),
        count => format!("{count} disks"),
    };
    let silent = if silent > 0 { format!(", {silent} without an answer") } else { String::new() };
    let paused = if model.paused { "   PAUSED" } else { "" };
    let text = format!("vublk top   {count}{silent}   by {}{paused}", model.sort.name());
    line(screen, 0, &text, STRONG);
}

/// A number in at most six columns.
fn short(value: f64) -> String {
    match value {
        v if v < 0.005 => "0".into(),
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v if v < 99_999.5 => format!("{v:.0}"),
        v if v < 9_999_500.0 => format!("{:.0}k", v / 1e3),
        v => format!("{:.0}M", v / 1e6),
    }
}

/// Head, width, and what stands there; those with `true` only on a wide screen.
type Column = (&'static str, usize, bool, fn(&Disk, &Rates) -> String);

const READS: &[&str] = &["read"];
const WRITES: &[&str] = &["write", "zeroes"];

const COLUMNS: [Column; 14] = [
    ("r/s", 8, false, |_, rates| short(rates.per_second(rates.of(READS).requests))),
    ("w/s", 8, false, |_, rates| short(rates.per_second(rates.of(WRITES).requests))),
    ("f/s", 8, true, |_, rates| short(rates.per_second(rates.of(&["flush"]).requests))),
    ("rMB/s", 7, false, |_, rates| short(mib(rates.per_second(rates.of(READS).bytes)))),
    ("wMB/s", 7, false, |_, rates| short(mib(rates.per_second(rates.of(WRITES).bytes)))),
    ("r_await", 8, false, |_, rates| short(rates.of(READS).await_ms())),
    ("w_await", 8, false, |_, rates| short(rates.of(WRITES).await_ms())),
    ("f_await", 8, true, |_, rates| short(rates.of(&["flush"]).await_ms())),
    ("r_p99", 8, true, |_, rates| short(rates.of(READS).within(0.99))),
    ("w_p99", 8, true, |_, rates| short(rates.of(WRITES).within(0.99))),
    ("p99", 8, false, |_, rates| short(rates.all().within(0.99))),
    ("aqu-sz", 7, false, |_, rates| short(rates.depth())),
    ("inflight", 9, true, |_, rates| rates.in_flight().to_string()),
    ("err", 5, false, |disk, _| brief(disk.errors())),
];

fn mib(bytes: f64) -> f64 {
    bytes / 1_048_576.0
}

/// A count in at most four columns.
fn brief(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{}k", count / 1000),
        _ => "many".into(),
    }
}

fn table(model: &Model, disks: &[&Disk], selected: usize, area: Rect, screen: &mut Buffer) {
    let every: usize = COLUMNS.iter().map(|column| column.1).sum();
    let is_wide = usize::from(area.width) >= every + 16;
    let columns: Vec<&Column> = COLUMNS.iter().filter(|column| is_wide || !column.2).collect();
    let used: usize = columns.iter().map(|column| column.1).sum();
    let name = usize::from(area.width).saturating_sub(used).max(8);
    let head: String = columns.iter().map(|(head, width, ..)| format!("{head:>width$}")).collect();
    line(screen, area.y, &format!("{:<name$}{head}", "DISK"), STRONG);
    let room = usize::from(area.height).saturating_sub(1);
    let first = (selected + 1).saturating_sub(room);
    for ((y, disk), at) in (area.y + 1..area.bottom()).zip(disks.iter().skip(first)).zip(first..) {
        let style = if at == selected { SELECTED } else { PLAIN };
        screen.set_style(Rect { y, height: 1, ..area }, style);
        let silence = disk.silence(model.now);
        let note = disk.rates.as_ref().filter(|_| silence.is_none()).and_then(|rates| rates.notes().first());
        let note = note.map(|note| format!(" {}", note.word())).unwrap_or_default();
        // Some of the name is seen on the smallest screen, too.
        let called = cut(&disk.name, (name - 1).saturating_sub(note.len()).max(3));
        screen.set_stringn(area.x, y, called + &note, name - 1, style);
        let x = area.x + u16::try_from(name).unwrap_or(0);
        let rest = used.min(usize::from(area.width).saturating_sub(name));
        match (silence, &disk.rates) {
            (None, Some(rates)) => {
                let values: String =
                    columns.iter().map(|(_, width, _, of)| format!("{:>width$}", of(disk, rates))).collect();
                screen.set_stringn(x, y, values, rest, style);
                if disk.errors() > 0 {
                    let from = area.x + area.width.saturating_sub(5);
                    screen.set_style(Rect { x: from, y, width: 5.min(area.width), height: 1 }, BAD);
                }
            }
            (Some((silent, why)), _) => {
                let text = format!(
                    "no answer for {} s{}{why}",
                    silent.as_secs(),
                    if why.is_empty() { "" } else { ": " }
                );
                screen.set_stringn(x, y, text, rest, style.patch(BAD));
            }
            (None, None) => {}
        }
    }
}

/// So much of a text as there is room for.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// The seconds of a disk that there is room for: the newest at the right; those without an answer are empty.
struct Columns<'a>(Vec<Option<&'a Point>>);

impl<'a> Columns<'a> {
    fn of(disk: &'a Disk, now: Duration, width: u16) -> Self {
        let silent = disk.silence(now).map_or(0, |(silent, _)| silent.as_secs());
        let end = disk.history.back().map_or(0, |last| last.second) + silent;
        let mut columns = vec![None; width.into()];
        for point in &disk.history {
            let back = usize::try_from(end - point.second).unwrap_or(usize::MAX);
            if let Some(at) = columns.len().checked_sub(back + 1)
                && let Some(column) = columns.get_mut(at)
            {
                *column = Some(point);
            }
        }
        Self(columns)
    }

    fn points(&self) -> impl Iterator<Item = (u16, &'a Point)> {
        (LABEL..).zip(&self.0).filter_map(|(x, point)| Some((x, (*point)?)))
    }
}

/// A time in at most six columns.
fn time(ns: u64) -> String {
    let [us, ms, s] = [1_000, 1_000_000, 1_000_000_000];
    let (unit, name) = match ns {
        0 => return "0".into(),
        ns if ns < ms => (us, "µs"),
        ns if ns < s => (ms, "ms"),
        _ => (s, "s"),
    };
    let (whole, tenth) = (ns / unit, ns % unit * 10 / unit);
    if whole < 10 { format!("{whole}.{tenth} {name}") } else { format!("{whole} {name}") }
}

/// Buckets of a power of two; of those below the first one there is only the last.
const POWER: usize = 8;

/// A bucket's number where each power of two begins at a multiple of [`POWER`], and back.
fn even(bucket: usize) -> usize {
    bucket + POWER - 1
}

fn bucket(even: usize) -> Option<usize> {
    even.checked_sub(POWER - 1)
}

/// Where a bucket begins, nanoseconds; `None`: there is none so long.
fn begin(even: usize) -> Option<u64> {
    even.checked_sub(POWER).map_or(Some(0), histogram::end)
}

/// What rows of a map are: the first bucket, by its even number, and how many are one row.
fn scale(columns: &Columns<'_>, rows: usize) -> (usize, usize) {
    let full = |bucket: &usize| columns.points().any(|(_, point)| point.times.count(*bucket) > 0);
    // Some of the usual latencies where there is nothing.
    let first = even((0..BUCKETS).find(full).unwrap_or_else(|| histogram::bucket(64_000)));
    let last = (0..BUCKETS).rfind(full).map_or(first, even);
    // A part of a power of two, or several powers, so that each row is labelled with a round number.
    let each = [2, 4, 8, 16, 32, 64].into_iter().find(|each| first / each + rows > last / each).unwrap_or(64);
    let spare = rows.saturating_sub((last / each + 1).saturating_sub(first / each));
    ((first / each).saturating_sub(spare / 2) * each, each)
}

#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a shade"
)]
fn latencies(disk: &Disk, columns: &Columns<'_>, area: Rect, screen: &mut Buffer) {
    let title = format!("Latency of {}: {} s across, shade is requests", disk.name, columns.0.len());
    line(screen, area.y, &title, STRONG);
    let rows = usize::from(area.height.saturating_sub(1));
    let (first, each) = scale(columns, rows);
    let requests = |point: &Point, row: usize| {
        let from = first + row * each;
        let buckets = (from..from + each).filter_map(bucket);
        let count: u64 = buckets.map(|bucket| point.times.count(bucket)).sum();
        count as f64 / point.seconds.max(0.001)
    };
    let points = || columns.points().flat_map(|(_, point)| (0..rows).map(move |row| (point, row)));
    let most = points().map(|(point, row)| requests(point, row)).fold(0.0, f64::max);
    for row in 0..rows {
        let y = area.bottom() - 1 - u16::try_from(row).unwrap_or(0);
        let label = format!("{:>7} ┤", begin(first + row * each).map(time).unwrap_or_default());
        screen.set_stringn(area.x, y, label, LABEL.into(), PLAIN);
        for (x, point) in columns.points() {
            let here = requests(point, row);
            if here > 0.0 {
                let level = (here.ln_1p() / most.ln_1p() * SHADES.len() as f64).ceil() as usize;
                let shade = SHADES[level.clamp(1, SHADES.len()) - 1];
                screen.set_stringn(x, y, shade, 1, PLAIN);
            }
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a bar")]
fn in_flight(columns: &Columns<'_>, area: Rect, screen: &mut Buffer) {
    line(screen, area.y, "Requests in flight", STRONG);
    let most = columns.points().map(|(_, point)| point.depth).fold(1.0, f64::max).ceil();
    for row in 0..DEPTH {
        let y = area.bottom() - 1 - row;
        let label = match row {
            0 => "      0 ┤".to_owned(),
            row if row + 1 == DEPTH => format!("{:>7} ┤", short(most)),
            _ => "        │".to_owned(),
        };
        screen.set_stringn(area.x, y, label, LABEL.into(), PLAIN);
        for (x, point) in columns.points() {
            let eighths = (point.depth / most * f64::from(DEPTH) * 8.0).round();
            // What is there at all is seen.
            let eighths = if point.depth > 0.0 { eighths.max(1.0) } else { 0.0 } as u16;
            let here = usize::from(eighths.saturating_sub(row * 8).min(8));
            if here > 0 {
                screen.set_stringn(x, y, EIGHTHS[here], 1, PLAIN);
            }
        }
    }
}

#[cfg(test)]
mod tests;
