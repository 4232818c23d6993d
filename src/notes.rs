//! What a person should know of a disk beside its figures: it is paused, its requests are held, its server or its image is
//! lost, or it has limits.
//!
//! What it is: read from what a daemon answers to `status`; a word for tables, a sentence for `vublk status`.
//!
//! What it is not: no daemon makes or reads it.
//!
//! Invariant: the words are part of what `vublk stat --json` tells: they are added to, never changed.

use serde_json::Value;

use crate::shell::quoted;

/// See the head of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// No request is fetched: for how many seconds already, and for how many more at most.
    Paused(f64, f64),
    /// So many requests were refused by the disk and wait, for so many seconds; the error of the first of them.
    Held(u64, u64, String),
    /// The disk's server is lost.
    Lost(Lost),
    /// The guest gets I/O errors, since another client has the image, or may have had it; why, and what to do.
    ImageLost(String),
    /// So many queues wait for the limits.
    Throttled(u64),
    /// Limits are set, and no queue waits for them.
    Limited,
}

/// A server, or a cluster, that does not answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Lost {
    /// For so long.
    pub seconds: f64,
    /// What is typed for the disk.
    pub uri: String,
    /// Requests that have no answer yet.
    pub waiting: u64,
    /// How long they wait: `--reconnect-delay`.
    pub patience: Option<f64>,
}

impl Lost {
    fn sentence(&self) -> String {
        let Self { seconds, uri, waiting, patience } = self;
        let requests = match patience.map(|patience| (patience, seconds - patience)) {
            Some((patience, since)) if since >= 0.0 => {
                format!("; requests have failed for {since:.1} s (--reconnect-delay={patience:.0})")
            }
            _ => match waiting {
                0 => ", and no request waits for it".to_owned(),
                1 => ", and 1 request waits for it".to_owned(),
                _ => format!(", and {waiting} requests wait for it"),
            },
        };
        if uri.starts_with("rbd:") {
            format!(
                "the cluster has not answered a request for {seconds:.1} s{requests}: ceph health detail tells what it lacks"
            )
        } else {
            format!(
                "its server is lost for {seconds:.1} s{requests}: vublk inspect {} tells what answers there",
                quoted(uri)
            )
        }
    }
}

impl Note {
    /// What there is to say of a disk of this status; the gravest comes first.
    #[must_use]
    pub fn all(status: &Value) -> Vec<Self> {
        let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_u64).unwrap_or(0);
        let seconds = |of: &Value, name: &str| of.get(name).and_then(Value::as_f64).unwrap_or(0.0);
        let paused = status
            .get("paused")
            .map(|paused| Self::Paused(seconds(paused, "seconds"), seconds(paused, "ends_in_seconds")));
        let held = status.pointer("/disk/held").map(|held| {
            let error = held.get("error").and_then(Value::as_str).unwrap_or_default();
            Self::Held(number(held, "requests"), number(held, "seconds"), error.to_owned())
        });
        let throttle = status.pointer("/disk/throttle").and_then(Value::as_object);
        let is_limited = throttle.is_some_and(|all| all.keys().any(|name| name.contains("ps_")));
        let limited = is_limited.then(|| {
            let waiting = status.pointer("/disk/throttle/waiting_queues").and_then(Value::as_u64);
            waiting.filter(|&queues| queues > 0).map_or(Self::Limited, Self::Throttled)
        });
        let of_disk = |name: &str| status.get("disk").and_then(|disk| disk.get(name));
        let text = |name: &str| of_disk(name).and_then(Value::as_str).map(str::to_owned);
        let lost = of_disk("server_lost_seconds").and_then(Value::as_f64).map(|seconds| {
            Self::Lost(Lost {
                seconds,
                uri: text("path").unwrap_or_default(),
                waiting: of_disk("in_flight").and_then(Value::as_u64).unwrap_or(0),
                patience: of_disk("reconnect_delay_seconds").and_then(Value::as_f64),
            })
        });
        let image_lost = text("image_lost").map(Self::ImageLost);
        image_lost.into_iter().chain(lost).chain(paused).chain(held).chain(limited).collect()
    }

    /// For a row of a table.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Paused(..) => "paused",
            Self::Held(..) => "held",
            Self::Lost(_) => "lost",
            Self::ImageLost(_) => "image-lost",
            Self::Throttled(_) => "throttled",
            Self::Limited => "limited",
        }
    }

    /// The words of several, as they stand in a table.
    #[must_use]
    pub fn words(all: &[Self]) -> String {
        all.iter().map(Self::word).collect::<Vec<_>>().join(",")
    }

    /// The whole of it, for the disk of this name.
    #[must_use]
    pub fn sentence(&self, disk: &str) -> String {
        match self {
            Self::Paused(seconds, more) => format!(
                "paused for {seconds:.1} s, and requests wait: vublk resume {disk} ends it, or it ends by itself in {more:.1} s"
            ),
            Self::Held(requests, seconds, error) => format!(
                "held for {seconds} s: {requests} requests wait because the disk refused them ({error}): mend it, then \
                 vublk retry {disk}"
            ),
            Self::Lost(lost) => lost.sentence(),
            Self::ImageLost(why) => format!("its requests end with I/O errors: {why}"),
            Self::Throttled(queues) => format!(
                "throttled: {queues} queues wait for the disk's limits: vublk throttle {disk} shows and changes them"
            ),
            Self::Limited => {
                format!(
                    "limited, and no request waits for it: vublk throttle {disk} shows and changes the limits"
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::Note;

    #[track_caller]
    fn says(disk: Value, words: &str, text: &str) {
        let notes = Note::all(&json!({ "disk": disk }));
        assert_eq!(Note::words(&notes), words);
        let sentence = notes.first().map(|note| note.sentence("vm1")).unwrap_or_default();
        assert!(sentence.contains(text), "{sentence}");
    }

    #[test]
    fn what_is_said_of_a_lost_server() {
        let lost = |in_flight: u32, patience: Option<f64>| {
            json!({
                "path": "nbd://far/disk", "server_lost_seconds": 4.5, "in_flight": in_flight,
                "reconnect_delay_seconds": patience,
            })
        };
        says(
            lost(0, None),
            "lost",
            "for 4.5 s, and no request waits for it: vublk inspect nbd://far/disk tells",
        );
        says(lost(1, Some(5.0)), "lost", "for 4.5 s, and 1 request waits for it:");
        says(lost(8, None), "lost", "for 4.5 s, and 8 requests wait for it:");
        says(lost(0, Some(3.0)), "lost", "for 4.5 s; requests have failed for 1.5 s (--reconnect-delay=3):");
        let cluster = json!({"path": "rbd:vms/vm1", "server_lost_seconds": 12.0, "in_flight": 2});
        says(
            cluster,
            "lost",
            "has not answered a request for 12.0 s, and 2 requests wait for it: ceph health",
        );
        says(
            json!({"image_lost": "it was taken. Stop this VM"}),
            "image-lost",
            "errors: it was taken. Stop this VM",
        );
        says(json!({"in_flight": 3}), "", "");
    }
}
