//! `vublk stat`: what disks do, told once or again and again.
//!
//! What it is: the loop over intervals, the table and the JSON lines.
//!
//! What it is not: [`crate::rates`] takes the samples and makes rates of them.
//!
//! Invariant: a daemon that does not answer for a moment, as in an upgrade, ends nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::time::{Duration, Instant, SystemTime};

use serde_json::json;

use super::{USAGE, printable};
use crate::find;
use crate::rates::{self, Key, Rates, Sample};

/// How often to tell, and how many times.
type Every = (Option<Duration>, Option<u64>);

/// Takes the interval and the count from the end of the words.
fn take_interval(words: &mut Vec<String>) -> Result<Every, String> {
    let number = |word: &String| word.parse::<f64>().ok();
    let numbers = words.iter().rev().take(2).take_while(|word| number(word).is_some()).count();
    let mut numbers = words.split_off(words.len() - numbers).into_iter();
    let Some(interval) = numbers.next() else { return Ok((None, None)) };
    let seconds = number(&interval).filter(|seconds| (0.01..=1e6).contains(seconds));
    let seconds = seconds.ok_or_else(|| format!("{interval}: use an interval of 0.01 to 1000000 seconds"))?;
    let count = numbers.next().map(|count| {
        let whole = count.parse::<u64>().ok().filter(|&count| count > 0);
        whole.ok_or_else(|| format!("{count}: use a whole number of times to tell, such as 10"))
    });
    Ok((Some(Duration::from_secs_f64(seconds)), count.transpose()?))
}

/// Tells what disks do until it has told often enough, or its reader is gone.
pub(super) fn stat(mut words: Vec<String>, queues: bool, as_json: bool) -> Result<(), (u8, String)> {
    let (interval, count) = take_interval(&mut words).map_err(|why| (USAGE, why))?;
    let given = words.into_iter().map(|word| find::place(word.as_ref(), None)).collect::<Result<Vec<_>, _>>();
    let given = given.map_err(|why| (1, why))?;
    let mut before = BTreeMap::<Key, (Instant, Sample)>::new();
    let mut missing = BTreeSet::new();
    let mut next = Instant::now();
    for told in 0.. {
        let all = if given.is_empty() {
            find::daemons().into_iter().map(|one| one.place).collect()
        } else {
            given.clone()
        };
        let mut now = BTreeMap::new();
        for place in all {
            let at = Instant::now();
            match rates::sample(&place, queues) {
                Ok(samples) => {
                    missing.remove(&place);
                    now.extend(samples.into_iter().map(|(key, sample)| (key, (at, sample))));
                }
                // Between a daemon and its successor no process answers.
                Err(why) if told == 0 && !given.is_empty() => return Err((1, why.to_string())),
                Err(why) => {
                    if missing.insert(place) {
                        let _printed = writeln!(io::stderr(), "vublk: {}", printable(&why.to_string()));
                    }
                }
            }
        }
        let rates = now.iter().map(|(key, (at, sample))| {
            let earlier =
                before.get(key).map(|(then, sample)| (sample, at.duration_since(*then).as_secs_f64()));
            (key, Rates::between(earlier, sample))
        });
        let text = if as_json { stat_json(rates) } else { stat_table(rates, told > 0) };
        if io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()).is_err() {
            return Ok(()); // its reader has seen enough
        }
        before = now;
        let Some(interval) = interval else { return Ok(()) };
        if count.is_some_and(|count| told + 1 >= count) {
            return Ok(());
        }
        next += interval;
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

fn stat_table<'a>(all: impl Iterator<Item = (&'a Key, Rates)>, again: bool) -> String {
    let mut text = if again { "\n".to_owned() } else { String::new() };
    text.push_str(&rates::head());
    for ((place, queue), rates) in all {
        let name = place.name();
        text.push_str(&rates.line(&queue.map_or(name.clone(), |queue| format!("{name}/{queue}"))));
    }
    text
}

fn stat_json<'a>(all: impl Iterator<Item = (&'a Key, Rates)>) -> String {
    let time =
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
    let disks = all.map(|((place, queue), rates)| {
        let mut told = rates.json();
        if let Some(fields) = told.as_object_mut() {
            fields.insert("name".into(), place.name().into());
            fields.insert("control".into(), json!(place.control));
            if let Some(disk) = &place.disk {
                fields.insert("disk".into(), json!(disk));
            }
            if let Some(queue) = queue {
                fields.insert("queue".into(), json!(queue));
            }
        }
        told
    });
    format!("{}\n", json!({"time": time, "disks": disks.collect::<Vec<_>>()}))
}
