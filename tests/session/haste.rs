//! Stopping without any patience: where nothing is in flight there is nothing
//! to wait for, and nothing to give up.

use super::each_engine;
use crate::support::daemon::{Daemon, Options};
use crate::support::device::{Device, Setup};
use crate::support::disk::Disk;

#[test]
fn a_stop_without_patience_when_idle() {
    each_engine(|engine| {
        for queues in [0, 1, 4, 4, 4, 4, 4, 4] {
            let disk = Disk::new();
            let mut daemon = Daemon::start(engine, &disk, &Options::with(&["--stop-timeout-ms=0"]));
            let mut device = Device::new(&daemon, Setup { queues, ..Setup::default() });
            for queue in 0..queues {
                device.assert_serves(queue as usize);
            }
            device.frontend.sync();
            daemon.stop();
        }
    });
}
