//! A loop device with a block size of our choice. It is set to clear itself
//! when the last user lets go of it, so a killed test leaves none behind.

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_SET_CAPACITY: libc::c_ulong = 0x4c07;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const READ_ONLY: u32 = 1;
const AUTOCLEAR: u32 = 4;
const DIRECT_IO: u32 = 16;

pub struct LoopDevice {
    pub path: PathBuf,
    held: File,
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        self.take_back();
    }
}

impl LoopDevice {
    /// Gives it to a user for as long as this lives.
    pub fn give(&self, user: u32) {
        chown(&self.path, Some(user), None).unwrap();
    }

    fn take_back(&self) {
        let _not_given = chown(&self.path, Some(rustix::process::geteuid().as_raw()), None);
    }

    /// Has the size of its file as it is now.
    pub fn update_size(&self) {
        // SAFETY: an ioctl without an argument on a descriptor we own.
        let result = unsafe { libc::ioctl(self.held.as_raw_fd(), LOOP_SET_CAPACITY) };
        assert_eq!(result, 0, "LOOP_SET_CAPACITY: {}", std::io::Error::last_os_error());
    }

    /// What sysfs says of it, by the name of the attribute: `queue/max_sectors_kb`.
    pub fn attribute(&self, name: &str) -> String {
        let device = self.path.file_name().unwrap().display();
        let path = format!("/sys/block/{device}/{name}");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        text.trim().to_owned()
    }

    /// A block device over `file`; the reason when there is none to be had.
    pub fn over(file: &Path, block_size: u32) -> Result<Self, String> {
        Self::with_flags(file, block_size, AUTOCLEAR | DIRECT_IO)
    }

    /// One that can only be read.
    pub fn read_only_over(file: &Path, block_size: u32) -> Result<Self, String> {
        Self::with_flags(file, block_size, AUTOCLEAR | DIRECT_IO | READ_ONLY)
    }

    fn with_flags(file: &Path, block_size: u32, flags: u32) -> Result<Self, String> {
        let open = |path: &Path| {
            File::options()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|error| format!("{}: {error}", path.display()))
        };
        let control = open(Path::new("/dev/loop-control"))?;
        let backing = open(file)?;
        // Somebody else may take the free number first.
        for _ in 0..20 {
            // SAFETY: an ioctl without an argument on a descriptor we own.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(std::io::Error::last_os_error().to_string());
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open(&path)?;
            // struct loop_config: fd, block size, loop_info64, reserved words.
            let mut config = [0_u8; 304];
            let fd: RawFd = backing.as_raw_fd();
            config[..4].copy_from_slice(&fd.to_ne_bytes());
            config[4..8].copy_from_slice(&block_size.to_ne_bytes());
            config[60..64].copy_from_slice(&flags.to_ne_bytes());
            // SAFETY: the kernel reads 304 bytes from `config`.
            let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, config.as_ptr()) };
            if result == 0 {
                let made = Self { path, held: device };
                // A test that was killed may have left it to the user to whom it was given.
                made.take_back();
                return Ok(made);
            }
            let error = std::io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EBUSY) {
                return Err(error.to_string());
            }
        }
        Err("no free loop device".to_owned())
    }
}
