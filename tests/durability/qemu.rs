//! The cache mode as QEMU's own front-end handles it: a machine whose processor
//! sleeps, and whose virtio-pci device the test drives register by register.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::stage::{WRITEBACK, disk_status};
use crate::support::control::Control;
use crate::support::daemon::{Daemon, URING, vublkd};
use crate::support::disk::Disk;
use crate::support::sys::{Deadline, PATIENCE, installed, program};

/// Where the device is on the bus.
const SLOT: u32 = 4;
/// Where the test puts the device's registers.
const REGISTERS: u64 = 0xe000_0000;
/// Where the test puts the queue.
const QUEUE: u64 = 0x10_0000;

/// Bits of the device status.
const ACKNOWLEDGE: u64 = 1;
const DRIVER: u64 = 2;
const DRIVER_OK: u64 = 4;
const FEATURES_OK: u64 = 8;

/// Offsets in the common configuration.
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DEVICE_STATUS: u64 = 20;
const QUEUE_SELECT: u64 = 22;
const QUEUE_SIZE: u64 = 24;
const QUEUE_ENABLE: u64 = 28;
const QUEUE_DESC: u64 = 32;
const QUEUE_DRIVER: u64 = 40;
const QUEUE_DEVICE: u64 = 48;

/// VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_CONFIG_WCE and VIRTIO_F_VERSION_1.
const FEATURES: [u64; 2] = [1 << 9 | 1 << 11, 1];

fn connect(path: &Path) -> BufReader<UnixStream> {
    let stream = Deadline::new(format!("QEMU to listen on {}", path.display()))
        .until_slowly(|| UnixStream::connect(path).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    BufReader::new(stream)
}

fn line(from: &mut BufReader<UnixStream>) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    assert!(!line.is_empty(), "QEMU has closed a socket");
    line
}

/// QEMU's process and its log.
struct Process(Child, PathBuf);

impl Drop for Process {
    fn drop(&mut self) {
        let _ended = self.0.kill();
        let _status = self.0.wait();
        if std::thread::panicking() {
            eprintln!("--- QEMU ---\n{}---", std::fs::read_to_string(&self.1).unwrap_or_default());
        }
    }
}

/// A firmware that sleeps: `cli; hlt; jmp` to the `hlt`, where the processor starts.
fn firmware() -> Vec<u8> {
    let mut bytes = vec![0xf4; 64 << 10];
    let start = bytes.len() - 16;
    bytes[start..start + 4].copy_from_slice(&[0xfa, 0xf4, 0xeb, 0xfd]);
    bytes
}

/// QEMU with a disk of ours.
struct Machine {
    _process: Process,
    qtest: BufReader<UnixStream>,
    qmp: BufReader<UnixStream>,
    /// Addresses of the common and of the device's configuration.
    common: u64,
    config: u64,
}

impl Machine {
    fn start(folder: &TempDir, socket: &Path) -> Self {
        let path = |name: &str| folder.path().join(name);
        let (qtest, qmp, log, bios) = (path("qtest"), path("qmp"), path("qemu.log"), path("bios"));
        std::fs::write(&bios, firmware()).unwrap();
        let mut command = program("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-display", "none", "-m", "64M"])
            .args(["-machine", "q35,accel=tcg,memory-backend=ram"])
            .args(["-object", "memory-backend-memfd,id=ram,size=64M,share=on"])
            .arg("-bios")
            .arg(bios)
            .arg("-chardev")
            .arg(format!("socket,id=disk,path={},reconnect-ms=100", socket.display()))
            .arg("-device")
            .arg(format!(
                "vhost-user-blk-pci,chardev=disk,config-wce=on,num-queues=1,disable-legacy=on,addr={SLOT:#x}"
            ))
            .args(["-qtest-log", "/dev/null"])
            .arg("-qtest")
            .arg(format!("unix:{},server=on,wait=off", qtest.display()))
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", qmp.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&log).unwrap());
        // SAFETY: the closure makes one system call, which is allowed between fork
        // and exec.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let process = Process(command.spawn().unwrap(), log);
        let mut machine =
            Self { _process: process, qtest: connect(&qtest), qmp: connect(&qmp), common: 0, config: 0 };
        assert!(line(&mut machine.qmp).contains("QMP"));
        machine.command("qmp_capabilities");
        machine
    }

    /// A QMP command and its answer; events are passed over.
    fn command(&mut self, name: &str) {
        let command = json!({ "execute": name }).to_string();
        self.qmp.get_mut().write_all(command.as_bytes()).unwrap();
        self.wait_qmp(|message| message.get("return").is_some());
    }

    fn wait_qmp(&mut self, found: impl Fn(&Value) -> bool) {
        while !found(&serde_json::from_str(&line(&mut self.qmp)).unwrap()) {}
    }

    /// A reset, as that of a guest that reboots.
    fn reset(&mut self) {
        self.qmp.get_mut().write_all(json!({ "execute": "system_reset" }).to_string().as_bytes()).unwrap();
        self.wait_qmp(|message| message["event"] == json!("RESET"));
    }

    /// A qtest command; the number in its answer, if there is one.
    fn ask(&mut self, words: &str) -> u64 {
        self.qtest.get_mut().write_all(format!("{words}\n").as_bytes()).unwrap();
        let answer = line(&mut self.qtest);
        let rest = answer.trim().strip_prefix("OK").unwrap_or_else(|| panic!("{words}: {answer}"));
        match rest.trim().strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
            None => 0,
        }
    }

    /// Points the ports at a register of the PCI configuration.
    fn select(&mut self, register: u32) {
        self.ask(&format!("outl 0xcf8 {:#x}", 1 << 31 | SLOT << 11 | register & !3));
    }

    fn pci(&mut self, register: u32) -> u32 {
        self.select(register);
        self.ask("inl 0xcfc") as u32
    }

    fn set_pci(&mut self, register: u32, value: u32) {
        self.select(register);
        self.ask(&format!("outl 0xcfc {value:#x}"));
    }

    /// Finds the device's registers and maps them.
    fn map(&mut self) {
        assert_eq!(self.pci(0), 0x1042_1af4, "a modern virtio-blk device");
        let mut at = self.pci(0x34) & 0xff;
        let (mut common, mut config) = (None, None);
        while at != 0 {
            let head = self.pci(at);
            // Vendor, next, length, type; then the BAR, and its offset.
            if head & 0xff == 9 {
                let bar = self.pci(at + 4) & 0xff;
                let place = Some((bar, u64::from(self.pci(at + 8))));
                match head >> 24 {
                    1 => common = place,
                    4 => config = place,
                    _ => {}
                }
            }
            at = head >> 8 & 0xff;
        }
        let ((bar, common), (same, config)) = (common.unwrap(), config.unwrap());
        assert_eq!(bar, same);
        self.set_pci(0x10 + 4 * bar, REGISTERS as u32);
        self.set_pci(0x14 + 4 * bar, 0);
        let command = self.pci(4);
        self.set_pci(4, command | 6); // memory, bus master
        (self.common, self.config) = (REGISTERS + common, REGISTERS + config);
    }

    fn set(&mut self, width: char, offset: u64, value: u64) {
        let at = self.common + offset;
        self.ask(&format!("write{width} {at:#x} {value:#x}"));
    }

    fn get(&mut self, width: char, offset: u64) -> u64 {
        let at = self.common + offset;
        self.ask(&format!("read{width} {at:#x}"))
    }

    fn writeback(&mut self) -> u64 {
        let at = self.config + u64::from(WRITEBACK);
        self.ask(&format!("readb {at:#x}"))
    }

    fn set_writeback(&mut self, on: bool) {
        let at = self.config + u64::from(WRITEBACK);
        self.ask(&format!("writeb {at:#x} {}", u8::from(on)));
    }

    /// What a driver does first, up to DRIVER_OK, with one queue.
    fn drive(&mut self) {
        self.map();
        self.set('b', DEVICE_STATUS, 0);
        let mut status = ACKNOWLEDGE | DRIVER;
        self.set('b', DEVICE_STATUS, status);
        for (select, wanted) in (0..).zip(FEATURES) {
            self.set('l', DEVICE_FEATURE_SELECT, select);
            assert_eq!(self.get('l', DEVICE_FEATURE) & wanted, wanted, "features of word {select}");
            self.set('l', DRIVER_FEATURE_SELECT, select);
            self.set('l', DRIVER_FEATURE, wanted);
        }
        status |= FEATURES_OK;
        self.set('b', DEVICE_STATUS, status);
        assert_eq!(self.get('b', DEVICE_STATUS), status, "the features are taken");
        self.ask(&format!("memset {QUEUE:#x} 0x4000 0x0"));
        self.set('w', QUEUE_SELECT, 0);
        self.set('w', QUEUE_SIZE, 128);
        for (register, place) in [(QUEUE_DESC, 0), (QUEUE_DRIVER, 0x1000), (QUEUE_DEVICE, 0x2000)] {
            self.set('l', register, QUEUE + place);
            self.set('l', register + 4, 0);
        }
        self.set('w', QUEUE_ENABLE, 1);
        status |= DRIVER_OK;
        self.set('b', DEVICE_STATUS, status);
        assert_eq!(self.get('b', DEVICE_STATUS), status);
    }
}

fn start(socket: &Path, disk: &Disk) -> Daemon {
    let mut command = vublkd("io_uring", socket, &disk.path);
    if !disk.takes_direct() {
        command.arg("--direct=off");
    }
    let mut daemon = Daemon::spawn(URING, command, socket.to_path_buf());
    daemon.wait_listening();
    daemon
}

/// The queue runs, and the status has this mode.
#[track_caller]
fn assert_mode(daemon: &Daemon, mode: &str, when: &str) {
    Deadline::new(format!("{when}: the queue to run")).until_slowly(|| {
        let status = Control::of(daemon).call("status", json!({})).unwrap();
        (status["queues"].as_array().unwrap().len() == 1).then_some(())
    });
    assert_eq!(disk_status(daemon, "write_cache"), json!(mode), "{when}");
}

/// QEMU forwards a guest's write to the config space once, and does not repeat it
/// after a reset or when it connects to another daemon.
#[test]
fn the_cache_mode_survives_what_qemu_does() {
    let test = "durability::the_cache_mode_survives_what_qemu_does";
    if !installed("qemu-system-x86_64", test) {
        return;
    }
    let disk = Disk::new();
    let socket = disk.dir.path().join("disk.sock");
    let mut daemon = start(&socket, &disk);
    let mut machine = Machine::start(&disk.dir, &socket);
    machine.drive();
    assert_mode(&daemon, "writeback", "as configured");
    assert_eq!(machine.writeback(), 1, "as configured");
    machine.set_writeback(false);
    assert_mode(&daemon, "writethrough", "set by the guest");
    assert_eq!(machine.writeback(), 0, "set by the guest");
    machine.reset();
    machine.drive();
    assert_mode(&daemon, "writethrough", "after a reset");
    assert_eq!(machine.writeback(), 0, "after a reset");
    for how in [Signal::KILL, Signal::TERM] {
        daemon.signal(how);
        daemon.wait_end(PATIENCE);
        drop(daemon);
        daemon = start(&socket, &disk);
        assert_mode(&daemon, "writethrough", &format!("with another daemon after {how:?}"));
        assert_eq!(machine.writeback(), 0, "with another daemon after {how:?}");
    }
    machine.reset();
    machine.drive();
    assert_mode(&daemon, "writethrough", "after another daemon and a reset");
    machine.set_writeback(true);
    assert_mode(&daemon, "writeback", "set by the guest");
    daemon.signal(Signal::KILL);
    daemon.wait_end(PATIENCE);
    drop(daemon);
    daemon = start(&socket, &disk);
    assert_mode(&daemon, "writeback", "with another daemon after the guest chose write-back");
    assert_eq!(machine.writeback(), 1);
    drop(machine);
    daemon.stop();
}
