"""A disk that logs what reaches it: a file of FUSE that this process serves, run as a program.

    fusedisk.py PATH IMAGE LOG

The file at PATH, which must be there to be mounted on, shows IMAGE until SIGTERM. Each write, each range of zeroes and
each FLUSH (fsync) is an entry of LOG before it is answered. Requests are carried out one after another, so a FLUSH is
behind the writes that it covers. (qemu-storage-daemon's own FUSE export cannot stand below a daemon with many requests
under way: that of 10.0.2 mixes up their data, as fio shows on it alone.)

LOG: the number of entries (8 bytes), then each entry: kind, offset, length, and for a write its data.
"""

import ctypes
import errno
import os
import signal
import struct
import sys

WRITE, ZEROES, FLUSH = b"W", b"Z", b"F"
ENTRY = struct.Struct("<cQQ")
COUNT = struct.Struct("<Q")

GETATTR, OPEN, READ, W, STATFS, FSYNC, INIT, FALLOCATE = 3, 14, 15, 16, 17, 20, 26, 43
SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET have no answer
MAX_WRITE = 128 << 10
FLAGS = 1 << 15 | 1 | 1 << 5  # asynchronous direct I/O and reads; more than a page at once
DIRECT_IO, PARALLEL_DIRECT_WRITES = 1, 1 << 6
PUNCH_HOLE, ZERO_RANGE = 0x2, 0x10


class Disk:
    def __init__(self, image, log):
        self.image = os.open(image, os.O_RDWR)
        self.size = os.fstat(self.image).st_size
        self.log, self.count, self.end = os.open(log, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), 0, COUNT.size
        os.pwrite(self.log, COUNT.pack(0), 0)

    def note(self, kind, offset=0, length=0, data=b""):
        entry = ENTRY.pack(kind, offset, length) + data
        os.pwrite(self.log, entry, self.end)
        self.end, self.count = self.end + len(entry), self.count + 1
        os.pwrite(self.log, COUNT.pack(self.count), 0)

    def answer(self, opcode, body):
        """What a request gets; an OSError for one that fails."""
        if opcode == INIT:
            fields = (7, 31, MAX_WRITE, struct.unpack_from("<L", body, 12)[0] & FLAGS, 64 << 16 | 64, MAX_WRITE, 1)
            return struct.pack("<7L", *fields).ljust(64, b"\0")
        if opcode == GETATTR:
            # Valid for an hour; inode, size, blocks, times; mode, links, owner, group, device, block size.
            return struct.pack("<9Q8L", 3600, 0, 1, self.size, self.size // 512, 0, 0, 0, 0, 0, 0o100600, 1, 0, 0, 0, 4096, 0)
        if opcode == OPEN:
            return struct.pack("<QLL", 0, DIRECT_IO | PARALLEL_DIRECT_WRITES, 0)
        if opcode == STATFS:
            return struct.pack("<5Q3L", self.size // 4096, 0, 0, 1, 0, 4096, 255, 4096).ljust(80, b"\0")
        if opcode == FSYNC:
            self.note(FLUSH)
            return b""
        offset, length = struct.unpack_from("<QQ" if opcode == FALLOCATE else "<QL", body, 8)
        if opcode == READ:
            return os.pread(self.image, length, offset)
        if opcode == W:
            data = body[40 : 40 + length]
            self.note(WRITE, offset, length, data)
            os.pwrite(self.image, data, offset)
            return struct.pack("<LL", length, 0)
        if opcode == FALLOCATE and struct.unpack_from("<L", body, 24)[0] & (PUNCH_HOLE | ZERO_RANGE):
            self.note(ZEROES, offset, length)
            os.pwrite(self.image, bytes(length), offset)
            return b""
        raise OSError(errno.ENOSYS, "")

    def serve(self, fuse):
        while True:
            try:
                request = os.read(fuse, MAX_WRITE + 8192)
            except OSError as why:
                if why.errno == errno.ENODEV:
                    return  # unmounted
                if why.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue  # taken back
                raise
            _, opcode, unique = struct.unpack_from("<LLQ", request)
            if opcode in SILENT:
                continue
            error, payload = 0, b""
            try:
                payload = self.answer(opcode, request[40:])
            except OSError as why:
                error = -why.errno
            try:
                os.write(fuse, struct.pack("<LlQ", 16 + len(payload), error, unique) + payload)
            except OSError as why:
                if why.errno != errno.ENOENT:  # the one who asked is gone
                    raise


def main(path, image, log):
    libc = ctypes.CDLL(None, use_errno=True)
    disk = Disk(image, log)
    fuse = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={fuse},rootmode=100600,user_id=0,group_id=0".encode()
    if libc.mount(b"vublk-log", path.encode(), b"fuse", 6, options) != 0:  # MS_NOSUID, MS_NODEV
        sys.exit(f"mount of FUSE: {os.strerror(ctypes.get_errno())}")
    signal.signal(signal.SIGTERM, lambda *_: libc.umount2(path.encode(), 2))  # MNT_DETACH
    disk.serve(fuse)


if __name__ == "__main__":
    main(*sys.argv[1:])
