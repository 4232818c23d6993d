"""The disk of `fusedisk`, and images of what it may hold after power cuts."""

import os
import subprocess
import sys
import time

from . import fusedisk
from .core import Failed, Process, last_line

SECTOR = 512


class DiskLog:
    """The disk is at `path`."""

    def __init__(self, case, size):
        self.path, self.log = f"{case.tmp}/logged.raw", f"{case.tmp}/writes.log"
        image = case.file(size, "below")
        open(self.path, "w").close()
        # Should its server be killed, the mount would stay.
        case.stack.callback(lambda: subprocess.run(["umount", "-ql", self.path], stderr=subprocess.DEVNULL))
        argv = [sys.executable, fusedisk.__file__, self.path, image, self.log]
        self.process = Process(case, "the logging disk", argv, f"{case.logs}/disklog.log")
        deadline = time.monotonic() + 10
        while os.path.getsize(self.path) != size:
            if self.process.reap() or time.monotonic() > deadline:
                raise Failed(f"no logging disk: {last_line(self.process.log)}")
            time.sleep(0.01)

    def entries(self):
        """How many entries the log has now."""
        with open(self.log, "rb") as log:
            return fusedisk.COUNT.unpack(log.read(fusedisk.COUNT.size))[0]

    def read(self):
        """All of them: kind, offset, length, and where in the log its data is."""
        found = []
        with open(self.log, "rb") as log:
            (count,) = fusedisk.COUNT.unpack(log.read(fusedisk.COUNT.size))
            for _ in range(count):
                kind, offset, length = fusedisk.ENTRY.unpack(log.read(fusedisk.ENTRY.size))
                found.append((kind, offset, length, log.tell()))
                log.seek(length if kind == fusedisk.WRITE else 0, os.SEEK_CUR)
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
        return [n for n, (kind, _, _, _) in enumerate(self.entries) if kind == fusedisk.FLUSH]

    def _apply(self, out, entry, wanted):
        """Those sectors of a change for which `wanted` says so."""
        kind, start, length, at = entry
        self.log.seek(at)
        data = self.log.read(length) if kind == fusedisk.WRITE else bytes(length)
        for offset in range(0, length, SECTOR):
            if wanted():
                out.seek(start + offset)
                out.write(data[offset : offset + SECTOR])

    def cut(self, count, image, how, dice):
        """The disk, cut off behind `count` entries, as `image`: with all that was not flushed, with none of it, or with
        what is drawn of it, torn at sectors."""
        flushed = max((n for n in range(self.done, count) if self.entries[n][0] == fusedisk.FLUSH), default=self.done)
        with open(self.durable, "r+b", 1 << 20) as out:
            for entry in self.entries[self.done : flushed]:
                self._apply(out, entry, lambda: True)
        self.done = flushed
        subprocess.run(["cp", "--sparse=always", self.durable, image], check=True)
        if how == "none":
            return
        with open(image, "r+b", 1 << 20) as out:
            for entry in self.entries[flushed:count]:
                part = 1 if how == "all" else dice.choice((0, 0.5, 1))
                self._apply(out, entry, lambda: dice.random() < part)
