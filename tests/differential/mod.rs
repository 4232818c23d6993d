//! One suite for all back-ends: vublkd with each of its engines, on a file, over NBD and on an
//! image of a Ceph cluster, and qemu-storage-daemon as the oracle that keeps the suite honest.
//!
//! A case that expects something else of the oracle says so in `DEVIATIONS`,
//! with the reason, and asks `Bench::deviates` for it.

mod driver;
mod framing;
mod malformed;
mod notify;
mod place;
mod qtest;
mod random;
mod requests;

use crate::support::daemon::{Daemon, Options};
use crate::support::device::{Device, Setup};
use crate::support::disk::Disk;
use place::{Place, Served};

/// Where vublkd means to differ from the oracle.
pub struct Deviation {
    pub name: &'static str,
    pub oracle: &'static str,
    pub vublkd: &'static str,
    pub reason: &'static str,
}

const DEVIATIONS: &[Deviation] = &[
    Deviation {
        name: "serial",
        oracle: "every export is called vhost_user_blk",
        vublkd: "--serial, padded to 20 bytes",
        reason: "a guest finds its disks by serial number",
    },
    Deviation {
        name: "barrier bit",
        oracle: "ignores the top bit of the type (a barrier in old drivers)",
        vublkd: "an unknown type",
        reason: "virtio 1 has no barriers; ignoring one is worse than refusing it",
    },
    Deviation {
        name: "writeback",
        oracle: "says 0 in the config space while it caches",
        vublkd: "says what it does",
        reason: "a driver that reads 0 stops flushing",
    },
    Deviation {
        name: "malformed",
        oracle: "marks the device broken and never answers again",
        vublkd: "gives the head back unserved and goes on",
        reason: "one bad request of a guest process must not cost the disk",
    },
    Deviation {
        name: "segments",
        oracle: "one discard or write-zeroes segment a request",
        vublkd: "as many as it offers",
        reason: "a driver merges ranges where it may",
    },
    Deviation {
        name: "empty descriptors",
        oracle: "marks the device broken",
        vublkd: "serves or refuses the request",
        reason: "an empty descriptor does no harm",
    },
    Deviation {
        name: "disabled rings",
        oracle: "serves a ring as soon as it has a kick descriptor",
        vublkd: "serves it while it is enabled",
        reason: "the protocol says so; a front-end that disables a ring takes its memory away",
    },
    Deviation {
        name: "non-existent queue",
        oracle: "trusts its front-end",
        vublkd: "drops the connection",
        reason: "a front-end is not trusted",
    },
    Deviation {
        name: "config space",
        oracle: "takes no offset, gives no more than its own structure",
        vublkd: "any part of it that is asked for, zero-filled",
        reason: "front-ends ask for what their headers know",
    },
];

/// What a case works with: a disk, and who is to serve it.
pub struct Bench {
    served: Served,
    place: Place,
    pub disk: Disk,
}

impl Bench {
    /// `None`: what it takes is not installed, which is told.
    fn new(served: Served, disk: Disk, test: &str) -> Option<Self> {
        let place = served.place(&disk, test)?;
        Some(Self { served, place, disk })
    }

    /// The same back-end on another disk, of so many bytes.
    pub fn another(&self, bytes: u64) -> Self {
        Self::new(self.served, Disk::of_size(bytes), "another disk").unwrap()
    }

    /// The disk, its file as what was written is stored.
    pub fn stored(&self) -> &Disk {
        if let Place::Rbd(image) = &self.place {
            image.export_to(&self.disk);
        }
        &self.disk
    }

    /// Whether the back-end at hand is the oracle and differs in this point.
    pub fn deviates(&self, name: &str) -> bool {
        let listed = DEVIATIONS.iter().find(|deviation| deviation.name == name);
        let listed = listed.unwrap_or_else(|| panic!("{name} is not in the list of deviations"));
        let deviates = self.served == Served::Oracle;
        if deviates {
            // Shown with a failing test, or with --nocapture.
            eprintln!(
                "deviation, {}: the oracle {}; vublkd: {} ({})",
                listed.name, listed.oracle, listed.vublkd, listed.reason
            );
        }
        deviates
    }

    #[track_caller]
    pub fn start(&self, options: &Options) -> Daemon {
        self.place.start(&self.disk, options)
    }

    /// A back-end in its default state and a device on it.
    #[track_caller]
    pub fn plain(&self) -> (Daemon, Device) {
        self.with(Setup::default())
    }

    #[track_caller]
    pub fn with(&self, setup: Setup) -> (Daemon, Device) {
        let daemon = self.start(&Options::default());
        let device = Device::new(&daemon, setup);
        (daemon, device)
    }
}

/// A deviation that no test asks for is out of date.
#[test]
fn every_deviation_is_used() {
    let cases = [
        include_str!("framing.rs"),
        include_str!("malformed.rs"),
        include_str!("notify.rs"),
        include_str!("qtest.rs"),
        include_str!("requests.rs"),
    ];
    for Deviation { name, .. } in DEVIATIONS {
        let asked = format!("deviates(\"{name}\")");
        assert!(cases.iter().any(|text| text.contains(&asked)), "{name}");
    }
}

fn run(served: Served, name: &str, case: fn(&Bench)) {
    if let Some(bench) = Bench::new(served, Disk::new(), &format!("{name} against {served:?}")) {
        case(&bench);
    }
}

/// Makes a test of each case for each back-end.
macro_rules! cases {
    (@one $name:ident, $served:ident, { $($module:ident: $($case:ident),+;)+ }) => {
        mod $name {
            $($(
                #[test]
                fn $case() {
                    super::run(super::Served::$served, stringify!($case), super::$module::$case);
                }
            )+)+
        }
    };
    ($($name:ident: $served:ident;)+ => $cases:tt) => { $(cases!(@one $name, $served, $cases);)+ };
}

cases! {
    io_uring: Uring;
    threads: Threads;
    oracle: Oracle;
    nbdkit: Nbdkit;
    nbdkit_in_4096: NbdkitIn4096;
    qemu_nbd: QemuNbd;
    =>
    {
        requests:
            read_gives_what_the_file_holds,
            write_reaches_the_file,
            flush,
            get_id,
            unknown_types,
            beyond_the_end,
            odd_lengths,
            empty_transfers,
            read_only,
            discard_and_write_zeroes,
            config_sizes,
            config_values;
        framing:
            header_split_anywhere,
            status_in_the_data_descriptor,
            one_byte_descriptors,
            misaligned_buffers,
            many_segments,
            large_requests,
            buffers_across_regions,
            scattered_regions,
            indirect_tables,
            tables_longer_than_the_ring,
            as_many_segments_as_offered,
            ring_sizes,
            ring_of_one,
            indices_wrap,
            zero_length_descriptors;
        malformed:
            loops,
            links_out_of_range,
            heads_out_of_range,
            nested_indirect,
            indirect_of_odd_size,
            indirect_with_next,
            indirect_not_negotiated,
            readable_after_writable,
            no_status_byte,
            short_header,
            outside_memory,
            too_long,
            avail_index_too_far,
            a_storm_of_nonsense;
        notify:
            signal_after_set_vring_call,
            used_event_is_honoured,
            no_interrupt_flag_is_honoured,
            kicks_can_be_left_out_while_it_works,
            a_kick_before_the_ring_is_enabled,
            batches_signal;
        qtest:
            basic,
            indirect,
            idx,
            non_existent_queue,
            hot_plug,
            eight_queues;
        random:
            random_requests,
            random_requests_on_four_queues;
        driver:
            depths,
            all_requests,
            several_queues,
            without_event_idx,
            scattered_vectors;
    }
}

// Each of them imports an image, and exports it. How chains are framed is the same worker's to understand.
cases! {
    rbd: Rbd;
    =>
    {
        requests:
            read_gives_what_the_file_holds,
            write_reaches_the_file,
            flush,
            get_id,
            unknown_types,
            beyond_the_end,
            odd_lengths,
            empty_transfers,
            read_only,
            discard_and_write_zeroes,
            config_sizes,
            config_values;
        random:
            random_requests,
            random_requests_on_four_queues;
        driver:
            depths,
            all_requests,
            several_queues,
            without_event_idx,
            scattered_vectors;
    }
}
