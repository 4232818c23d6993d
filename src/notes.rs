//! What a person should know of a disk beside its figures: it is paused, its requests are held, its server is lost, or it has limits.
//!
//! What it is: read from what a daemon answers to `status`; a word for tables, a sentence for `vublk status`.
//!
//! What it is not: no daemon makes or reads it.
//!
//! Invariant: the words are part of what `vublk stat --json` tells: they are added to, never changed.

use serde_json::Value;

/// See the head of the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Note {
    /// No request is fetched: for how many seconds already, and for how many more at most.
    Paused(f64, f64),
    /// So many requests were refused by the disk and wait, for so many seconds; the error of the first of them.
    Held(u64, u64, String),
    /// The disk's server is not connected, for so many seconds.
    Lost(f64),
    /// So many queues wait for the limits.
    Throttled(u64),
    /// Limits are set, and no queue waits for them.
    Limited,
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
        let lost = status.pointer("/disk/server_lost_seconds").and_then(Value::as_f64).map(Self::Lost);
        lost.into_iter().chain(paused).chain(held).chain(limited).collect()
    }

    /// For a row of a table.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Paused(..) => "paused",
            Self::Held(..) => "held",
            Self::Lost(_) => "lost",
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
            Self::Lost(seconds) => {
                format!(
                    "its server is lost for {seconds:.1} s, and requests wait for it: vublk inspect URI tells what answers there"
                )
            }
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
