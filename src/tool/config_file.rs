//! The file of `vublkd --config` as `vublk add` and `vublk remove` edit it.
//!
//! What it is: its text with a `[[disk]]` table more or less, and the way in which a text takes another's place.
//!
//! What it is not: what a text means is [`crate::args`]' to say, which the daemon asks, too.
//!
//! Invariants: what people wrote around a table (comments, order, blank lines) stays. A reader finds the whole text from
//! before or the whole one from after, also after a power cut; owner, mode, access list and label stay. One process edits files
//! of a folder at a time.

use std::ffi::{CStr, CString, OsString};
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    FlockOperation, Gid, Uid, XattrFlags, fchown, fgetxattr, flistxattr, flock, fremovexattr, fsetxattr,
};
use rustix::io::Errno;
use toml_edit::{ArrayOfTables, DocumentMut, Item, Table, Value};

use crate::args::file::text_of;
use crate::args::{self, Read, Unreadable};

/// The kernel's limits: bytes of a list of names, and of a value.
const XATTR_LIST_MAX: usize = 65_536;
const XATTR_SIZE_MAX: usize = 65_536;

/// See the head of the file.
#[derive(Debug)]
pub(super) struct ConfigFile {
    /// Where it is, no symbolic link.
    pub(super) path: PathBuf,
    /// What is in it.
    pub(super) text: String,
    /// Its folder, which is locked.
    folder: File,
}

impl ConfigFile {
    /// Opens it to be edited.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let failed = |e: io::Error| format!("{}: cannot edit it: {e}", path.display());
        let path = path.canonicalize().map_err(failed)?;
        let folder = File::open(path.parent().unwrap_or(Path::new("/"))).map_err(failed)?;
        // Where the file system has no locks there is nothing to wait for.
        if let Err(Errno::WOULDBLOCK) = flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            let why = "another vublk edits a file of this folder now; try again when it has ended";
            return Err(format!("{}: {why}", path.display()));
        }
        let text = text_of(&path).map_err(failed)?;
        Ok(Self { path, text, folder })
    }

    /// Its text with another table at the end.
    pub(super) fn with_disk(&self, keys: Vec<(String, Value)>) -> String {
        let (mut document, mut tables) = (DocumentMut::new(), ArrayOfTables::new());
        tables.push(keys.into_iter().map(|(key, value)| (key, Item::Value(value))).collect::<Table>());
        document.insert("disk", Item::ArrayOfTables(tables));
        // Not into the document: comments at its end would move behind the table.
        let before = self.text.trim_end_matches('\n');
        let between = if before.is_empty() { "" } else { "\n\n" };
        format!("{before}{between}{document}")
    }

    /// Its text without its `at`th table, and without the comment that stands right above that.
    ///
    /// # Errors
    /// A sentence: there is no such table.
    pub(super) fn without_disk(&self, at: usize) -> Result<String, String> {
        let wrong = |why: &str| format!("{}: {why}", self.path.display());
        let mut document: DocumentMut =
            self.text.parse().map_err(|e: toml_edit::TomlError| wrong(e.message()))?;
        let tables = document.get_mut("disk").and_then(Item::as_array_of_tables_mut);
        let tables =
            tables.filter(|tables| at < tables.len()).ok_or_else(|| wrong("there is no such table"))?;
        let above = |table: Option<&Table>| -> String {
            let prefix = table.and_then(|table| table.decor().prefix()?.as_str());
            prefix.unwrap_or_default().to_owned()
        };
        let whole = above(tables.get(at));
        tables.remove(at);
        // What a blank line parts from the table is about more than that.
        let lines: Vec<&str> = whole.split_inclusive('\n').collect();
        if let Some(blank) = lines.iter().rposition(|line| line.trim().is_empty()) {
            let kept = lines.get(..blank).unwrap_or_default().concat();
            let below = above(tables.get(at));
            match tables.get_mut(at) {
                Some(next) => {
                    next.decor_mut().set_prefix(format!("{kept}\n{}", below.trim_start_matches('\n')))
                }
                None => {
                    let below = document.trailing().as_str().unwrap_or_default();
                    let between = if below.is_empty() { "" } else { "\n" };
                    let all = format!("{kept}{between}{below}");
                    document.set_trailing(all);
                }
            }
        }
        let text = document.to_string();
        Ok(if self.text.starts_with('\n') { text } else { text.trim_start_matches('\n').to_owned() })
    }

    /// Looks at a text as `vublkd --check-config` does.
    ///
    /// # Errors
    /// A sentence that names line and key.
    pub(super) fn check(&self, text: &str) -> Result<args::File, String> {
        let mut option = OsString::from("--config=");
        option.push(&self.path);
        let read = Read::new(&["vublkd".into(), option], Some(text)).map_err(|e| match e {
            Unreadable::File(why) => why,
            Unreadable::CommandLine(e) => e.to_string(),
        })?;
        let file = read.file.clone().ok_or("--config names no file")?;
        read.check()?;
        Ok(file)
    }

    /// Puts a text in the place of the one that is there.
    ///
    /// # Errors
    /// A sentence; then the file is as it was.
    pub(super) fn replace(&self, text: &str) -> Result<(), String> {
        let replaced = || -> io::Result<()> {
            let old = std::fs::metadata(&self.path)?;
            let beside = self.path.parent().unwrap_or(Path::new("/"));
            let mut new = tempfile::Builder::new().prefix(".vublk-").tempfile_in(beside)?;
            new.write_all(text.as_bytes())?;
            let made = new.as_file().metadata()?;
            if (made.uid(), made.gid()) != (old.uid(), old.gid()) {
                let (uid, gid) = (Uid::from_raw(old.uid()), Gid::from_raw(old.gid()));
                fchown(new.as_file(), Some(uid), Some(gid))?;
            }
            new.as_file().set_permissions(Permissions::from_mode(old.mode() & 0o7777))?;
            keep_attributes(&File::open(&self.path)?, new.as_file())?;
            new.as_file().sync_all()?;
            new.persist(&self.path)?;
            self.folder.sync_all()
        };
        replaced().map_err(|e| {
            let hint = "Run vublk as its owner, or as root";
            match e.kind() {
                io::ErrorKind::PermissionDenied => {
                    format!("{}: cannot replace it: {e}. {hint}", self.path.display())
                }
                _ => format!("{}: cannot replace it: {e}", self.path.display()),
            }
        })
    }

    /// Puts the text back that was there when it was opened, unless `written` is not there any more.
    ///
    /// # Errors
    /// A sentence.
    pub(super) fn put_back(&self, written: &str) -> Result<(), String> {
        if text_of(&self.path).is_ok_and(|there| there == written) {
            return self.replace(&self.text);
        }
        Err(format!("{}: has been changed meanwhile by another program, and stays so", self.path.display()))
    }
}

/// The access list of a file, which says more than its mode.
const ACCESS: &CStr = c"system.posix_acl_access";

/// Gives a file the extended attributes of another: its access list, its label, and what people have put there. After its
/// mode, which setting the list sets again.
fn keep_attributes(from: &File, to: &File) -> io::Result<()> {
    let unsupported = |e: &Errno| *e == Errno::OPNOTSUPP;
    let mut names = vec![0; XATTR_LIST_MAX];
    let got = match flistxattr(from, &mut names) {
        Err(e) if unsupported(&e) => return Ok(()),
        got => got?,
    };
    names.truncate(got);
    let names: Vec<CString> =
        names.split(|&byte| byte == 0).filter(|name| !name.is_empty()).flat_map(CString::new).collect();
    for name in &names {
        let mut value = vec![0; XATTR_SIZE_MAX];
        let got = fgetxattr(from, name.as_c_str(), &mut value)?;
        value.truncate(got);
        let set = fsetxattr(to, name.as_c_str(), &value, XattrFlags::empty());
        // Who may not label files may edit them.
        let is_list_or_note =
            [&b"system."[..], b"user."].iter().any(|kind| name.to_bytes().starts_with(kind));
        if is_list_or_note {
            set?;
        }
    }
    if names.iter().any(|name| name.as_c_str() == ACCESS) {
        return Ok(());
    }
    // The folder may give one to what is made in it.
    match fremovexattr(to, ACCESS) {
        Err(e) if e != Errno::NODATA && !unsupported(&e) => Err(e.into()),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> ConfigFile {
        ConfigFile { path: "/vm.toml".into(), text: text.into(), folder: File::open("/").expect("the root") }
    }

    const BOTH: &str = "# disks of vm1\ncontrol = \"c\" # here\n\n# the first\n[[disk]]\nname = \"a\" # one\n\n\
                        # of both\n\n# the second\n[[disk]]\nname = \"b\"\n# the end\n";

    #[test]
    fn a_table_comes_last() {
        let with =
            file(BOTH).with_disk(vec![("name".into(), "x\"y".into()), ("num-queues".into(), 4.into())]);
        assert_eq!(with, format!("{BOTH}\n[[disk]]\nname = 'x\"y'\nnum-queues = 4\n"));
        assert_eq!(file("").with_disk(vec![("name".into(), "a".into())]), "[[disk]]\nname = \"a\"\n");
        assert_eq!(file("a = 1").with_disk(vec![]), "a = 1\n\n[[disk]]\n");
    }

    #[test]
    fn a_table_goes() {
        let first = "# disks of vm1\ncontrol = \"c\" # here\n\n# of both\n\n# the second\n[[disk]]\nname = \"b\"\n# the end\n";
        assert_eq!(file(BOTH).without_disk(0).as_deref(), Ok(first));
        let second = "# disks of vm1\ncontrol = \"c\" # here\n\n# the first\n[[disk]]\nname = \"a\" # one\n\n# of both\n\n# the end\n";
        assert_eq!(file(BOTH).without_disk(1).as_deref(), Ok(second));
        let header = file("# of all\n\n[[disk]]\nname = \"a\"\n\n[[disk]]\nname = \"b\"\n");
        assert_eq!(header.without_disk(0).as_deref(), Ok("# of all\n\n[[disk]]\nname = \"b\"\n"));
        let plain = file("[[disk]]\nname = \"a\"\n\n[[disk]]\nname = \"b\"\n");
        assert_eq!(plain.without_disk(0).as_deref(), Ok("[[disk]]\nname = \"b\"\n"));
        assert_eq!(plain.without_disk(1).as_deref(), Ok("[[disk]]\nname = \"a\"\n"));
        assert!(plain.without_disk(2).is_err());
    }

    /// What was added and removed again leaves no trace.
    #[test]
    fn there_and_back() {
        for text in [BOTH, "a = 1\n\n[[disk]]\nname = \"a\"\n"] {
            let with = file(text).with_disk(vec![("name".into(), "c".into())]);
            let at = with.matches("[[disk]]").count() - 1;
            assert_eq!(file(&with).without_disk(at).as_deref(), Ok(text));
        }
    }
}
