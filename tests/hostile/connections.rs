//! Connections and messages without end, whole ones and halves.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::Victim;
use crate::support::control::settle;
use crate::support::daemon::URING;
use crate::support::device::{Device, negotiate};
use crate::support::frontend::{feature, message, msg, single_region, words32};
use crate::support::memory::Region;

/// Lines of the log that are no news of each message.
#[track_caller]
fn assert_few_lines(victim: &Victim, most: usize, what: &str) {
    let log = victim.daemon.log();
    let told = log.lines().filter(|line| !line.contains("DEBUG")).count();
    assert!(told <= most, "{told} lines about {what}:\n{log}");
}

/// Ten thousand front-ends come and go: in silence, with a whole message, with half of one, with a descriptor.
#[test]
fn ten_thousand_connects() {
    let mut victim = Victim::new(URING);
    let begun = Instant::now();
    let half = &message(msg::SET_FEATURES, 1, &[0; 8])[..14];
    for round in 0..10_000 {
        let frontend = victim.daemon.connect();
        match round % 10 {
            0 => frontend.send_bytes(half, &[]).unwrap(),
            3 => frontend.send_bytes(&[0; 64], &[]).unwrap(),
            5 => drop(frontend.send(msg::GET_FEATURES, 0, &[], &[])),
            7 => frontend.send(msg::SET_VRING_KICK, 0, &[0; 8], &[frontend.socket.as_fd()]).unwrap(),
            _ => {}
        }
        if round % 1000 == 0 {
            victim.answers("10 000 connects");
        }
    }
    settle(&victim.daemon);
    eprintln!("10 000 connects took {:?}", begun.elapsed());
    victim.daemon.wait_log("messages about front-ends that connect are left out");
    assert_few_lines(&victim, 60 + 40 * begun.elapsed().as_secs() as usize / 10, "10 000 connects");
    victim.serves("10 000 connects");
    victim.stops();
}

/// Half a message, then silence: the daemon answers others and stops meanwhile, hangs up after its time, and says so.
#[test]
fn half_a_message_and_then_silence() {
    let mut victim = Victim::new(URING);
    let begun = Instant::now();
    let frontend = victim.daemon.connect();
    let region = Region::new(1 << 30, 4096, 0);
    let whole = message(msg::ADD_MEM_REG, 1, &single_region(&region));
    // Its descriptors are there already.
    frontend.send_bytes(&whole[..whole.len() - 1], &[region.file.as_fd()]).unwrap();
    victim.answers("half a message");
    frontend.wait_hangup_within(Duration::from_secs(9), "half a message");
    assert!(begun.elapsed() > Duration::from_secs(4), "it had its time");
    victim.daemon.wait_log("the front-end sent only a part of a message");
    victim.serves("half a message");
    // In the middle of a session, its rings running: the same.
    let mut device = Device::plain(&victim.daemon);
    device.assert_serves(0);
    device.frontend.send_bytes(&whole[..5], &[]).unwrap();
    // Requests are served meanwhile.
    device.assert_serves(0);
    let frontend = device.frontend;
    frontend.wait_hangup_within(Duration::from_secs(9), "half a message in a session");
    victim.serves("half a message in a session");
    victim.stops();
}

/// One message after another, to a queue that serves: each flood leaves it serving.
#[test]
fn messages_without_end() {
    const TIMES: u32 = 1000;
    let mut victim = Victim::new(URING);
    let mut device = Device::plain(&victim.daemon);
    let region = Region::new(1 << 36, 1 << 20, 0);
    let begun = Instant::now();
    for time in 0..TIMES {
        let frontend = &device.frontend;
        // Of a queue that has nothing else, and of one that serves.
        frontend.vring_state(msg::SET_VRING_ENABLE, 3, time & 1);
        frontend.vring_state(msg::SET_VRING_ENABLE, 0, (time + 1) & 1);
        // A guest's mistakes in the config space, and its cache mode.
        frontend.set_config(time % 70, &[7]);
        frontend.set_config(32, &[(time & 1) as u8]);
        frontend.add_region(&region);
        frontend.remove_region(&region);
        let told = frontend.command(msg::REM_MEM_REG, &single_region(&region), &[]);
        assert_eq!(told.ok(), Some(1));
        if time % 100 == 0 {
            victim.answers("messages without end");
        }
    }
    device.frontend.vring_state(msg::SET_VRING_ENABLE, 0, 1);
    eprintln!("{} messages took {:?}", 7 * TIMES, begun.elapsed());
    device.assert_serves(0);
    for _ in 0..100 {
        device.frontend.set_mem_table(&device.memory);
        device.frontend.tell64(msg::SET_FEATURES, device.features | feature::LOG_ALL);
        device.frontend.tell64(msg::SET_FEATURES, device.features);
    }
    device.assert_serves(0);
    let lines = 40 + 40 * begun.elapsed().as_secs() as usize / 10;
    assert_few_lines(&victim, lines, "messages without end");
    drop(device);
    victim.serves("messages without end");
    // Resets, with rings that run.
    for _ in 0..50 {
        let mut frontend = victim.daemon.connect();
        negotiate(&mut frontend, 0);
        for _ in 0..20 {
            frontend.tell(msg::RESET_DEVICE, &[], &[]);
            frontend.send(msg::GET_VRING_BASE, 0, &words32(&[0, 0]), &[]).unwrap();
            assert_eq!(frontend.receive().unwrap().payload.len(), 8);
        }
    }
    victim.serves("resets without end");
    victim.stops();
}
