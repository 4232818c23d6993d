//! `--metrics`: what a daemon has counted, in OpenMetrics' text, for Prometheus.
//!
//! What it is: the names of the metrics, and what each is made of; [`server`] answers with them.
//!
//! What it is not: it counts nothing. A scrape makes its values from what `vublk status` shows, and waits for no worker.
//!
//! Invariant: names and labels are added, never renamed: dashboards and alerts have them.

pub mod server;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;

use crate::link::Link;
use crate::stats::histogram::{self, Histogram};
use crate::status::{DiskStatus, Done};

/// A disk of this process.
#[derive(Debug)]
pub struct Disk {
    /// As `vublk list` calls it.
    pub name: String,
    /// To its control thread.
    pub link: Arc<Link>,
}

/// All metrics of this process.
#[derive(Debug)]
pub struct Metrics {
    disks: Vec<Disk>,
    /// Seconds since 1970.
    started: f64,
}

impl Metrics {
    /// Of a process that starts now and has these disks.
    #[must_use]
    pub fn new(disks: Vec<Disk>) -> Self {
        let started = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self { disks, started: started.map_or(0.0, |time| time.as_secs_f64()) }
    }
}

/// Powers of two, in nanoseconds, that are bounds of a histogram's buckets here: from 8 µs to 17 s. Finer ones would be
/// many time series, and `vublk stat` has them.
const BOUNDS: std::ops::RangeInclusive<u32> = 13..=34;

/// Seconds below which requests took, and how many of them more than below the bound before; then all others.
fn buckets(latency: &Histogram) -> Vec<(f64, u64)> {
    let mut at = 0;
    let mut up_to = |limit: Option<u64>| {
        let mut sum = 0_u64;
        while at < histogram::BUCKETS
            && limit.is_none_or(|limit| histogram::end(at).is_some_and(|end| end <= limit))
        {
            sum = sum.saturating_add(latency.count(at));
            at += 1;
        }
        sum
    };
    #[expect(clippy::cast_precision_loss, reason = "a power of two")]
    let bounds = BOUNDS.map(|power| (1_u64 << power, (1_u64 << power) as f64 / 1e9));
    let mut all: Vec<_> = bounds.map(|(limit, seconds)| (seconds, up_to(Some(limit)))).collect();
    all.push((f64::INFINITY, up_to(None)));
    all
}

/// A disk, what it shows, its counters of workers, and its control thread's word.
struct Shown<'a> {
    name: &'a str,
    disk: DiskStatus,
    counters: Vec<(&'static str, u64)>,
    is_connected: bool,
}

impl Shown<'_> {
    fn counter(&self, name: &str) -> u64 {
        self.counters.iter().find(|(known, _)| *known == name).map_or(0, |(_, count)| *count)
    }
}

type One = fn(&Shown<'_>) -> f64;
type Count = fn(&Shown<'_>) -> u64;

/// Gauges of a disk: name, help, value.
const GAUGES: [(&str, &str, One); 8] = [
    ("vublk_disk_in_flight", "Requests in flight.", |shown| f64::from(shown.disk.in_flight)),
    (
        "vublk_disk_oldest_request_seconds",
        "Time since the oldest request in flight was fetched; 0 if there is none.",
        |shown| shown.disk.oldest_seconds,
    ),
    ("vublk_disk_held", "Requests that are held now because the disk refused them.", |shown| {
        shown.disk.held.as_ref().map_or(0.0, |held| f64::from(held.requests))
    }),
    (
        "vublk_disk_sync_failed",
        "1 once an fsync failed: every flush fails until the daemon is restarted.",
        |shown| f64::from(u8::from(shown.disk.sync_failed)),
    ),
    ("vublk_disk_front_end_connected", "1 while a VMM is connected.", |shown| {
        f64::from(u8::from(shown.is_connected))
    }),
    ("vublk_disk_size_bytes", "Size of the disk as its guest has it.", |shown| {
        #[expect(clippy::cast_precision_loss, reason = "what a metric can say")]
        let size = shown.disk.size as f64;
        size
    }),
    ("vublk_disk_served_seconds", "Time since the first daemon began to serve the disk.", |shown| {
        shown.disk.served_seconds
    }),
    ("vublk_disk_read_only", "1 if the guest may only read.", |shown| {
        f64::from(u8::from(shown.disk.read_only))
    }),
];

/// Counters of a disk without other labels: name without its ending, help, value.
const COUNTERS: [(&str, &str, Count); 9] = [
    ("vublk_disk_merged_requests", "Requests that went as a part of another one's operation.", |shown| {
        shown.counter("merged")
    }),
    ("vublk_disk_bounced_pieces", "Pieces of requests that were copied through pool pages.", |shown| {
        shown.counter("bounced")
    }),
    ("vublk_disk_pool_waits", "Times that a request had to wait for pool pages.", |shown| {
        shown.counter("pool_waits")
    }),
    ("vublk_disk_syncs", "fdatasync calls.", |shown| shown.counter("syncs")),
    ("vublk_disk_kicks", "Notifications by the guest's driver.", |shown| shown.disk.kicks),
    ("vublk_disk_calls", "Interrupts sent to the guest.", |shown| shown.disk.calls),
    ("vublk_disk_held_requests", "Requests that were held because the disk refused them.", |shown| {
        shown.disk.errors.held
    }),
    (
        "vublk_disk_front_ends",
        "VMMs that have connected and said something; each but the first is a reconnect.",
        |shown| shown.disk.front_ends,
    ),
    (
        "vublk_disk_replayed_requests",
        "Requests that were carried out again, left in flight by an earlier daemon.",
        |shown| shown.disk.replayed,
    ),
];

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let shown = self.disks.iter().filter_map(|Disk { name, link }| {
            let device = link.device()?;
            Some(Shown {
                name,
                disk: DiskStatus::new(device),
                counters: device.stats.counts().collect(),
                is_connected: link.shown().is_some_and(|shown| shown.front_end_pid.is_some()),
            })
        });
        let all: Vec<Shown<'_>> = shown.collect();
        // Gauges: Prometheus' older text has no other word for what is always 1.
        let mut build = encoder.encode_descriptor(
            "vublk_build_info",
            "The version of vublkd.",
            None,
            MetricType::Gauge,
        )?;
        ConstGauge::new(1_u64).encode(build.encode_family(&[("version", env!("CARGO_PKG_VERSION"))])?)?;
        ConstGauge::new(self.started).encode(encoder.encode_descriptor(
            "process_start_time_seconds",
            "Start time of the process since the Unix epoch.",
            None,
            MetricType::Gauge,
        )?)?;
        let mut disk =
            encoder.encode_descriptor("vublk_disk_info", "What is served.", None, MetricType::Gauge)?;
        for one in &all {
            let path = one.disk.path.display().to_string();
            let labels = [("disk", one.name), ("path", &path), ("serial", &one.disk.serial)];
            ConstGauge::new(1_u64).encode(disk.encode_family(&labels)?)?;
        }
        for (name, help, value) in GAUGES {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for one in &all {
                metric
                    .encode_family(&[("disk", one.name)])
                    .and_then(|of| ConstGauge::new(value(one)).encode(of))?;
            }
        }
        for (name, help, value) in COUNTERS {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for one in &all {
                count(&mut metric, &[("disk", one.name)], value(one))?;
            }
        }
        let mut metric = encoder.encode_descriptor(
            "vublk_disk_errors",
            "Requests and chains that went wrong, by kind: I/O errors, unsupported requests, chains without a status.",
            None,
            MetricType::Counter,
        )?;
        for one in &all {
            let errors = &one.disk.errors;
            let kinds =
                [("io", errors.io), ("unsupported", errors.unsupported), ("malformed", errors.malformed)];
            for (kind, times) in kinds {
                count(&mut metric, &[("disk", one.name), ("kind", kind)], times)?;
            }
        }
        let mut metric = encoder.encode_descriptor(
            "vublk_disk_successions",
            "Daemons that took over from one that had stopped for them, or had died.",
            None,
            MetricType::Counter,
        )?;
        for one in &all {
            for (why, times) in [("upgrade", one.disk.upgrades), ("crash", one.disk.crashes)] {
                count(&mut metric, &[("disk", one.name), ("why", why)], times)?;
            }
        }
        by_operation(&mut encoder, &all)
    }
}

fn by_operation(encoder: &mut DescriptorEncoder<'_>, all: &[Shown<'_>]) -> fmt::Result {
    type Of = fn(&Done) -> u64;
    let counters: [(&str, &str, Of); 2] = [
        ("vublk_disk_requests", "Requests that were answered, by operation.", |done| done.requests),
        ("vublk_disk_bytes", "Bytes that these requests named.", |done| done.bytes),
    ];
    for (name, help, value) in counters {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        each_operation(all, |labels, done| count(&mut metric, labels, value(done)))?;
    }
    let mut metric = encoder.encode_descriptor(
        "vublk_disk_request_duration_seconds",
        "How long requests took, from fetch to return.",
        None,
        MetricType::Histogram,
    )?;
    each_operation(all, |labels, done| {
        let buckets = buckets(&done.latency);
        metric.encode_family(labels)?.encode_histogram::<NoLabelSet>(
            done.seconds,
            done.requests,
            &buckets,
            None,
        )
    })
}

/// Each operation of each disk, also those that its guest has not asked for: a rate needs a beginning.
fn each_operation(
    all: &[Shown<'_>],
    mut each: impl FnMut(&[(&str, &str); 2], &Done) -> fmt::Result,
) -> fmt::Result {
    let none = Done::default();
    for one in all {
        for operation in crate::stats::Operation::ALL {
            let done = one.disk.operations.get(operation.name()).unwrap_or(&none);
            each(&[("disk", one.name), ("op", operation.name())], done)?;
        }
    }
    Ok(())
}

fn count<const N: usize>(
    metric: &mut MetricEncoder<'_>,
    labels: &[(&str, &str); N],
    times: u64,
) -> fmt::Result {
    ConstCounter::new(times).encode(metric.encode_family(labels)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_request_is_in_the_bucket_of_its_time() {
        let mut counts = [0; histogram::BUCKETS];
        for (ns, times) in [(5_000, 1), (8_191, 2), (8_192, 4), (1 << 20, 8), (1 << 34, 16), (1 << 40, 32)] {
            counts[histogram::bucket(ns)] += times;
        }
        let all = buckets(&Histogram::of(&counts));
        let filled: Vec<_> =
            all.iter().filter(|(_, count)| *count > 0).map(|&(end, count)| (end, count)).collect();
        // A bucket ends below its bound: what took exactly as long is in the next one.
        let want = [(8.192e-6, 3), (16.384e-6, 4), (2.097_152e-3, 8), (f64::INFINITY, 48)];
        assert_eq!(filled, want);
        assert_eq!(all.len(), 23);
    }
}
