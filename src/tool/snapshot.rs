//! `vublk snapshot`, `changed`, `pause` and `resume`: copies of a disk that a guest uses.
//!
//! What it is: the tool's side. It opens both files itself, for the daemon opens nothing.
//!
//! What it is not: it freezes no file system of the guest; its agent does (fsfreeze).
//!
//! Invariant: a file that is left is a snapshot: all of it was cloned within one pause.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::{WhichDisk, told};
use crate::changes::GRAIN;
use crate::disk::uri::Uri;
use crate::find::Place;

impl Place {
    fn say(&self, method: &str, params: Value) -> Result<Value, String> {
        self.ask(method, params).map_err(|e| e.to_string())
    }

    /// Pauses the disk for `time` at most; gives the number of the pause.
    ///
    /// # Errors
    /// Why it is not paused.
    pub(super) fn pause(&self, time: Duration) -> Result<Value, String> {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.say("pause", json!({ "timeout_ms": ms }))
    }

    /// Ends a pause; gives how long it was, milliseconds.
    ///
    /// # Errors
    /// It had ended.
    pub(super) fn resume(&self, pause: Option<&Value>) -> Result<Value, String> {
        self.say("resume", pause.map_or(json!({}), |pause| json!({ "pause": pause })))
    }

    /// Makes `file` a copy of the disk that shares its blocks, as it is at one moment.
    ///
    /// # Errors
    /// Why there is none; then `file` is not there.
    pub(super) fn snapshot(&self, file: &Path, time: Duration) -> Result<Value, String> {
        let status = self.say("status", json!({}))?;
        let path = status.pointer("/disk/path").and_then(Value::as_str).map(PathBuf::from);
        let path = path.ok_or("the daemon does not say which disk it serves")?;
        if let Some(uri) = path.to_str().filter(|text| Uri::is_meant(text)) {
            return Err(elsewhere(&self.name(), &Uri::parse(uri)?));
        }
        let of_file = |e: std::io::Error| {
            let hint = match e.kind() {
                ErrorKind::NotFound => ". Make its folder first, on the disk's own file system",
                ErrorKind::AlreadyExists => ". Use another name, or remove it",
                ErrorKind::PermissionDenied => {
                    ". Run vublk as root, or use a folder in which this user may make files"
                }
                _ => "",
            };
            format!("{}: {e}{hint}", file.display())
        };
        let source = File::open(&path).map_err(|e| {
            let hint = match e.kind() {
                ErrorKind::PermissionDenied => ". Run vublk as root, or as the disk's owner",
                ErrorKind::NotFound => {
                    ". It is where its vublkd found it: run vublk there, not in another container"
                }
                _ => "",
            };
            format!("{}: {e}{hint}", path.display())
        })?;
        if !source.metadata().is_ok_and(|meta| meta.is_file()) {
            return Err(format!(
                "{}: a block device cannot be cloned. Make the snapshot with what manages it (LVM, ZFS, the array), \
                 between vublk pause and vublk resume",
                path.display()
            ));
        }
        let copy = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file).map_err(of_file)?;
        let made = self.clone_paused(&source, &copy, time).and_then(|made| {
            copy.sync_all().map_err(of_file)?;
            Ok(made)
        });
        match made {
            Ok((number, ms)) => Ok(json!({ "file": file, "snapshot": number, "waited_ms": ms })),
            Err(why) => {
                let _gone = std::fs::remove_file(file);
                Err(format!("no snapshot: {why}"))
            }
        }
    }

    fn clone_paused(&self, source: &File, copy: &File, time: Duration) -> Result<(Value, Value), String> {
        let pause = self.pause(time)?;
        let cloned = rustix::fs::ioctl_ficlone(copy, source).map_err(|e| {
            let hint = match e {
                rustix::io::Errno::XDEV => ". FILE has to be on the disk's own file system",
                rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL => {
                    ". Files are cloned on XFS (mkfs.xfs -m reflink=1) and btrfs"
                }
                _ => "",
            };
            format!("cannot clone the disk's file: {}{hint}", std::io::Error::from(e))
        });
        let counted = cloned.and_then(|()| self.say("snapshot", json!({ "pause": pause })));
        let resumed = self.resume(Some(&pause));
        // Counted, it was whole within the pause, whenever that has ended.
        let number = counted?;
        Ok((number, resumed.unwrap_or_default()))
    }

    /// What has changed since the last snapshot, or between it and the one before it.
    ///
    /// # Errors
    /// It is not known.
    pub(super) fn changed(&self, previous: bool) -> Result<Value, String> {
        let since = if previous { "previous" } else { "last" };
        let mut whole = self.say("changed", json!({ "since": since }))?;
        let mut next = whole.get_mut("next").map(Value::take).unwrap_or_default();
        while let Some(from) = next.as_u64() {
            let mut more = self.say("changed", json!({ "since": since, "from": from }))?;
            next = more.get_mut("next").map(Value::take).unwrap_or_default();
            let same = |key: &str| more.get(key) == whole.get(key);
            if !same("from") || !same("to") {
                return Err("a snapshot was made meanwhile; ask again".into());
            }
            let extents = more.get_mut("extents").and_then(Value::as_array_mut).map(std::mem::take);
            if let Some(all) = whole.get_mut("extents").and_then(Value::as_array_mut) {
                all.extend(extents.unwrap_or_default());
            }
        }
        if let Some(whole) = whole.as_object_mut() {
            whole.remove("next");
            whole.insert("grain".into(), GRAIN.into());
        }
        Ok(whole)
    }
}

/// How a disk on another machine gets a snapshot.
fn elsewhere(disk: &str, uri: &Uri) -> String {
    match uri {
        Uri::Rbd(rbd) => {
            let what = format!("{uri}: vublk cannot clone an image of a Ceph cluster");
            if rbd.snapshot.is_some() {
                return format!("{what}, and this one is a snapshot, which does not change");
            }
            let (name, options) = (rbd.name(), rbd.options());
            let image = name.trim_start_matches("rbd:");
            format!(
                "{what}; the cluster makes snapshots. Type: vublk pause {disk} && rbd{options} snap create {image}@NAME; vublk \
                 resume {disk}"
            )
        }
        Uri::Nbd(_) => format!(
            "{uri}: vublk cannot clone a disk on another machine. Type vublk pause {disk}, make the snapshot there with what \
             has the server's disk (LVM, ZFS, a reflink copy), and then type vublk resume {disk}"
        ),
    }
}

/// A line for each extent: offset and length in bytes.
fn lines(changed: &Value) -> String {
    let extents = changed.get("extents").and_then(Value::as_array).into_iter().flatten();
    let line = |extent: &Value| {
        let [offset, len] = [0, 1].map(|at| extent.get(at).and_then(Value::as_u64).unwrap_or(0));
        format!("{offset} {len}\n")
    };
    extents.map(line).collect()
}

/// The commands of the tool.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Commands {
    /// Makes FILE a copy of a disk that a guest uses, as it is at one moment, sharing its blocks (XFS, btrfs)
    ///
    /// The disk is paused: what is in flight ends, what was answered is made durable, the file is cloned, and the guest
    /// goes on; it notices a pause. What the guest has not flushed yet is not in the copy: have its agent freeze the file
    /// systems first (virsh domfsfreeze) where that matters. From then on vublkd marks what changes, for vublk changed. A disk
    /// on another machine cannot be cloned: its server or cluster makes the snapshot, between vublk pause and vublk resume.
    Snapshot {
        #[command(flatten)]
        disk: WhichDisk,
        /// The copy, which must not be there yet, on the disk's own file system
        file: PathBuf,
        /// How long the pause may take, in seconds, 1 to 600: after that the guest goes on, and there is no snapshot
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = crate::args::number::<u64>(1, 600))]
        time: u64,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Tells which parts of a disk have changed since its last snapshot: offset and length in bytes, a line each
    ///
    /// Parts are multiples of 64 KiB. An incremental backup of the last snapshot copies those of --previous out of it.
    /// After vublkd was stopped and started nothing is known, which is an error; crashes and upgrades change nothing.
    Changed {
        #[command(flatten)]
        disk: WhichDisk,
        /// Between the last snapshot and the one before it
        #[arg(long)]
        previous: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Pauses a disk: what is in flight ends, what was answered is made durable, and the guest waits
    Pause {
        #[command(flatten)]
        disk: WhichDisk,
        /// How long, in seconds, 1 to 600, if vublk resume does not end it
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = crate::args::number::<u64>(1, 600))]
        time: u64,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Ends a pause
    Resume {
        #[command(flatten)]
        disk: WhichDisk,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

impl Commands {
    /// Does it; gives what to print.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn run(self) -> Result<String, String> {
        let (Self::Snapshot { disk, .. }
        | Self::Changed { disk, .. }
        | Self::Pause { disk, .. }
        | Self::Resume { disk, .. }) = &self;
        let of = disk.find()?;
        Ok(match &self {
            Self::Snapshot { file, time, json, .. } => {
                let made = of.snapshot(file, Duration::from_secs(*time))?;
                told(made, *json, |made| {
                    let [number, ms] =
                        ["snapshot", "waited_ms"].map(|name| made.get(name).unwrap_or(&Value::Null));
                    format!("{}: snapshot {number}; the guest waited {ms} ms\n", file.display())
                })
            }
            Self::Changed { previous, json, .. } => told(of.changed(*previous)?, *json, lines),
            Self::Pause { time, json, .. } => {
                let pause = of.pause(Duration::from_secs(*time))?;
                told(json!({ "pause": pause, "seconds": time }), *json, |_| {
                    format!("paused; it goes on in {time} s, or with vublk resume\n")
                })
            }
            Self::Resume { json, .. } => {
                let ms = of.resume(None)?;
                let words = format!("goes on; the guest waited {ms} ms\n");
                told(json!({ "waited_ms": ms }), *json, |_| words)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_elsewhere() {
        let says = |text: &str| elsewhere("vm1", &Uri::parse(text).unwrap_or_else(|e| panic!("{e}")));
        for (text, words) in [
            ("rbd:vms/a", "vublk pause vm1 && rbd snap create vms/a@NAME; vublk resume vm1"),
            ("rbd:vms/n/a:id=u:conf=/c d", "rbd --conf='/c d' --id=u snap create vms/n/a@NAME"),
            ("rbd:vms/a@monday", "is a snapshot"),
            ("nbd://host/x", "vublk pause vm1, make the snapshot there"),
        ] {
            assert!(says(text).contains(words), "{}", says(text));
        }
    }
}
