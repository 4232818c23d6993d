//! Two hosts on one link: two network namespaces and a pair of veth interfaces. No namespace has a name: the kernel removes
//! them, with what is in them, once this process and those that it started there are gone.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::daemon::run;
use super::sys::{installed, root, skip};

/// Address of the host with the servers (RFC 5737: of no real network).
pub const FAR: &str = "192.0.2.2";
const NEAR: &str = "192.0.2.1";

/// An end of the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// That of vublkd.
    Near,
    /// That of the servers.
    Far,
}

/// See the head of the file.
pub struct Network {
    near: File,
    far: File,
}

impl Network {
    /// With the link up; or the test is left out.
    pub fn new(test: &str) -> Option<Self> {
        if !root(test, "network namespaces") || !installed("ip", test) || !installed("tc", test) {
            return None;
        }
        let made = namespace().and_then(|near| Ok((near, namespace()?)));
        let (near, far) = match made {
            Ok(both) => both,
            Err(error) => {
                skip(test, &format!("no network namespace can be made: {error}"));
                return None;
            }
        };
        let network = Self { near, far };
        let far = format!("/proc/{}/fd/{}", std::process::id(), network.far.as_raw_fd());
        let pair = ["link", "add", "veth", "type", "veth", "peer", "name", "veth", "netns", &far];
        if let Err(reason) = network.ip(Host::Near, &pair) {
            skip(test, &format!("no veth: {reason}"));
            return None;
        }
        for (host, address) in [(Host::Near, NEAR), (Host::Far, FAR)] {
            let address = format!("{address}/24");
            network.ip(host, &["address", "add", &address, "dev", "veth"]).unwrap();
            network.ip(host, &["link", "set", "lo", "up"]).unwrap();
            network.set_link(host, true);
        }
        Some(network)
    }

    pub fn of(&self, host: Host) -> BorrowedFd<'_> {
        match host {
            Host::Near => self.near.as_fd(),
            Host::Far => self.far.as_fd(),
        }
    }

    fn ip(&self, host: Host, words: &[&str]) -> Result<(), String> {
        self.run(host, "ip", words)
    }

    fn run(&self, host: Host, program: &str, words: &[&str]) -> Result<(), String> {
        let mut command = Command::new(program);
        command.args(words);
        self.enter(host, &mut command);
        let (status, _, complained) = run(command);
        if status.success() { Ok(()) } else { Err(complained.trim().to_owned()) }
    }

    /// Has a command start on this host.
    pub fn enter(&self, host: Host, command: &mut Command) {
        let namespace = self.of(host).try_clone_to_owned().unwrap();
        // SAFETY: the closure makes one system call, which is allowed between fork and exec.
        unsafe {
            command.pre_exec(move || {
                Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
            });
        }
    }

    /// What `act` says on this host: on a thread of its own, since only threads have a namespace.
    pub fn on<T: Send>(&self, host: Host, act: impl FnOnce() -> T + Send) -> T {
        let namespace = self.of(host);
        std::thread::scope(|scope| {
            let there = scope.spawn(move || {
                move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network)).unwrap();
                act()
            });
            there.join().unwrap()
        })
    }

    /// Takes one end of the link down, or up again. Nothing passes meanwhile, and neither host is told by the other.
    #[track_caller]
    pub fn set_link(&self, host: Host, up: bool) {
        self.ip(host, &["link", "set", "veth", if up { "up" } else { "down" }]).unwrap();
    }

    /// Drops so many of 1000 packets that arrive at either host, whatever is in them; false where this kernel cannot.
    pub fn drop_packets(&self, per_mille: u32) -> bool {
        // A random word (SKF_AD_RANDOM); where it is above the limit 0 (TC_ACT_OK), else 2 (TC_ACT_SHOT).
        let limit = u32::MAX / 1000 * per_mille;
        let code = format!("4,32 0 0 4294963256,37 0 1 {limit},6 0 0 0,6 0 0 2");
        [Host::Near, Host::Far].into_iter().all(|host| {
            let filter = ["filter", "add", "dev", "veth", "ingress", "bpf", "da", "bytecode", &code];
            self.run(host, "tc", &["qdisc", "add", "dev", "veth", "clsact"]).is_ok()
                && self.run(host, "tc", &filter).is_ok()
        })
    }
}

fn namespace() -> std::io::Result<File> {
    let make = || {
        // SAFETY: the thread that leaves its namespace shares no descriptor table with another by that, and ends.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET)? };
        File::open("/proc/thread-self/ns/net")
    };
    std::thread::spawn(make).join().unwrap()
}
