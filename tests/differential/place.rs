//! Where the disk of a case is, and who serves it: a file, or what a server on this machine has.

use crate::support::ceph::{Ceph, Image};
use crate::support::daemon::{Backend, Daemon, Options, QSD, THREADS, URING, bare_vublkd};
use crate::support::disk::Disk;
use crate::support::nbd::Server;
use crate::support::sys::installed;

/// Who serves the disk, and where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// The disk's file, by vublkd with its engine `io_uring`.
    Uring,
    /// The same with its engine `threads`.
    Threads,
    /// The same by qemu-storage-daemon.
    Oracle,
    /// The same file by vublkd, over nbdkit.
    Nbdkit,
    /// The same, where the server refuses what is not whole blocks of 4096 bytes.
    NbdkitIn4096,
    /// The same file by vublkd, over qemu-nbd.
    QemuNbd,
    /// A copy of the file as an image of a Ceph cluster, by vublkd.
    Rbd,
}

/// What holds the disk's bytes.
pub enum Place {
    File(Backend),
    Nbd(Box<Server>),
    Rbd(Image<'static>),
}

impl Served {
    /// `None`: what it takes is not installed, which is told.
    pub fn place(self, disk: &Disk, test: &str) -> Option<Place> {
        let path = disk.path.to_str().unwrap();
        let has = |program| installed(program, test);
        Some(match self {
            Self::Oracle if !has("qemu-storage-daemon") => return None,
            Self::Nbdkit | Self::NbdkitIn4096 if !has("nbdkit") => return None,
            Self::QemuNbd if !has("qemu-nbd") => return None,
            Self::Uring => Place::File(URING),
            Self::Threads => Place::File(THREADS),
            Self::Oracle => Place::File(QSD),
            Self::Nbdkit => Place::Nbd(Server::of(disk).into()),
            Self::NbdkitIn4096 => Place::Nbd(Box::new(Server::nbdkit(&[
                "-f",
                "--filter=blocksize-policy",
                "file",
                path,
                "blocksize-minimum=4096",
                "blocksize-error-policy=error",
            ]))),
            Self::QemuNbd => Place::Nbd(Server::qemu_nbd_of(disk).into()),
            Self::Rbd => Place::Rbd(Ceph::shared(test)?.image_of(disk)),
        })
    }
}

impl Place {
    #[track_caller]
    pub fn start(&self, disk: &Disk, options: &Options) -> Daemon {
        let uri = match self {
            Self::File(backend) => return Daemon::start(*backend, disk, options),
            Self::Nbd(server) => server.uri(""),
            Self::Rbd(image) => image.uri(),
        };
        let socket = disk.dir.path().join("disk.sock");
        let mut command = bare_vublkd();
        command.arg(format!("--socket-path={}", socket.display())).arg(format!("--disk={uri}"));
        command.args(["--log-level=debug", "--supervise=off"]);
        options.add_to(&mut command);
        let mut daemon = Daemon::spawn(URING, command, socket);
        daemon.wait_listening();
        daemon
    }
}
