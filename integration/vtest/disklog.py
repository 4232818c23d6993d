"""A disk that logs what reaches it: qemu-storage-daemon's blklogwrites under a file of FUSE, and images of what it
holds after power cuts.

A write is in the log once it has ended, and a FLUSH behind the writes that it covers: the export carries out one
request after another. The log is that of dm-log-writes: a superblock, then each entry with its data.
"""

import os
import struct
import subprocess
import time

from .core import Failed, Process, last_line

MAGIC, SECTOR = 0x6A736677736872, 512
FLUSH, FUA, DISCARD = 1, 2, 4


class DiskLog:
    """The disk is at `path`."""

    def __init__(self, case, size):
        self.path, self.log = f"{case.tmp}/logged.raw", f"{case.tmp}/writes.log"
        image = case.file(size, "below")
        for path in (self.path, self.log):
            open(path, "w").close()
        # Should its server be killed, the mount would stay.
        case.stack.callback(lambda: subprocess.run(["umount", "-ql", self.path], stderr=subprocess.DEVNULL))
        self.process = Process(
            case,
            "the logging disk",
            [
                "qemu-storage-daemon",
                "--blockdev", f"driver=file,node-name=image,filename={image}",
                "--blockdev", f"driver=file,node-name=log,filename={self.log}",
                "--blockdev", "driver=blklogwrites,node-name=disk,file=image,log=log,"
                f"log-sector-size={SECTOR},log-super-update-interval=1",
                "--export", f"type=fuse,id=export,node-name=disk,mountpoint={self.path},writable=on",
            ],
            f"{case.logs}/disklog.log",
        )
        deadline = time.monotonic() + 10
        while os.path.getsize(self.path) != size:
            if self.process.reap() or time.monotonic() > deadline:
                raise Failed(f"no logging disk: {last_line(self.process.log)}")
            time.sleep(0.01)

    def entries(self):
        """How many entries the log has now."""
        with open(self.log, "rb") as log:
            return self._superblock(log)

    def _superblock(self, log):
        magic, version, count, sector = struct.unpack("<QQQL", log.read(28))
        if (magic, version, sector) != (MAGIC, 1, SECTOR):
            raise Failed("that is no log of writes")
        return count

    def read(self):
        """All of it, when the disk is no longer used: (flags, start, length, where in the log its data is)."""
        found = []
        with open(self.log, "rb") as log:
            count, at = self._superblock(log), SECTOR
            for _ in range(count):
                log.seek(at)
                sector, sectors, flags, _ = struct.unpack("<QQQQ", log.read(32))
                at += SECTOR
                found.append((flags, sector * SECTOR, sectors * SECTOR, at))
                at += 0 if flags & DISCARD else sectors * SECTOR
        return found

    def stop(self):
        self.process.expected = True
        self.process.end()


class Replay:
    """What the disk holds after cuts, which come in the order of the log."""

    def __init__(self, log, size, durable):
        self.entries, self.log = log.read(), open(log.log, "rb")
        self.durable, self.done = durable, 0
        with open(durable, "wb") as out:
            out.truncate(size)

    def close(self):
        self.log.close()

    def flushes(self):
        return [n for n, (flags, _, _, _) in enumerate(self.entries) if flags & FLUSH]

    def _apply(self, out, entry, wanted=lambda: True):
        flags, start, length, at = entry
        if flags & DISCARD:
            return  # it may hold what it held
        self.log.seek(at)
        data = self.log.read(length)
        for offset in range(0, length, SECTOR):
            if wanted():
                # Contiguous sectors end up in one write of the file's buffer.
                out.seek(start + offset)
                out.write(data[offset : offset + SECTOR])

    def cut(self, count, image, how, dice):
        """The disk, cut off behind `count` entries, as `image`: with all that was not flushed, with none of it, or with
        what is drawn of it, torn at sectors."""
        flushed = max((n for n in range(self.done, count) if self.entries[n][0] & FLUSH), default=self.done)
        with open(self.durable, "r+b", 1 << 20) as out:
            for entry in self.entries[self.done : flushed]:
                self._apply(out, entry)
        self.done = flushed
        subprocess.run(["cp", "--sparse=always", self.durable, image], check=True)
        if how == "none":
            return
        with open(image, "r+b", 1 << 20) as out:
            for entry in self.entries[flushed:count]:
                part = 1 if how == "all" else dice.choice((0, 0.5, 1))
                self._apply(out, entry, lambda: dice.random() < part)
