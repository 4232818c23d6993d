"""What `make bench` runs: cells, contenders, and which contender runs which cell."""

import os
import functools
import re
import subprocess
from dataclasses import dataclass, field

from vtest.core import REPO, VUBLKD

TARGET = os.path.dirname(VUBLKD)
VUBLK = f"{TARGET}/vublk"
STOCK = f"{TARGET}/examples/stock"
# The most queues that a cell of the matrix uses; the cost-of-scale cell is vublkd's alone.
QUEUES = 4


@dataclass(frozen=True)
class Cell:
    rw: str
    bs: int
    depth: int
    queues: int = 1
    # What it is for, when not every contender runs it: "plug" or "scale".
    purpose: str = ""

    @property
    def name(self):
        size = f"{self.bs >> 20}m" if self.bs >= 1 << 20 else f"{self.bs >> 10}k"
        return f"{self.rw}-{size}-d{self.depth}" + (f"-q{self.queues}" if self.queues > 1 else "")


CELLS = [
    *(Cell(rw, 4096, depth) for rw in ("randread", "randwrite") for depth in (1, 4, 32, 128)),
    *(Cell(rw, bs, 8) for bs in (65536, 1 << 20) for rw in ("read", "write")),
    Cell("randrw", 4096, 32),
    Cell("randread", 4096, 32, 2),
    Cell("randread", 4096, 32, 4),
    Cell("read", 4096, 32, purpose="plug"),
    Cell("write", 4096, 32, purpose="plug"),
    Cell("randread", 4096, 256, purpose="scale"),
    Cell("randread", 4096, 4, 64, purpose="scale"),
]
BY_NAME = {cell.name: cell for cell in CELLS}
QUICK_CELLS = r"^rand(read|write)-4k-d(1|32)$"


# The name of an earlier vublkd, with which this one is compared.
BEFORE = "vublkd-before"


@dataclass
class Contender:
    name: str
    text: str
    kind: str  # fio, qsd, stock or vublkd
    extra: list = field(default_factory=list)
    # An option that `vublkd --help` must know.
    option: str = ""
    # Another vublkd than this one.
    program: str = VUBLKD

    def runs(self, cell, backing):
        if backing in REMOTE:
            contenders, cells = (RBD_CONTENDERS, RBD_CELLS) if backing in RBD else (NBD_CONTENDERS, NBD_CELLS)
            return self.name in (*contenders, BEFORE) and cell.name in cells
        if self.name in (*FIO_NBD, *FIO_RBD):
            return False
        if cell.purpose == "plug":
            return self.name in ("vublkd", "vublkd-plug-off", BEFORE) and backing != "null"
        if cell.purpose == "scale":
            return self.name in ("vublkd", BEFORE) and backing == "ext4"
        if self.name == "vublkd-plug-off":
            return False
        if backing == "null":
            return self.kind == "vublkd" and self.name not in ("vublkd-threads", "vublkd-pin")
        if self.name == "fio-psync":
            return cell.bs == 4096 and cell.depth in (1, 32) and cell.queues == 1 and cell.rw != "randrw"
        return True


CONTENDERS = [
    Contender("fio-io_uring", "fio, io_uring, no daemon", "fio", ["--ioengine=io_uring", "--registerfiles=1"]),
    Contender("fio-psync", "fio, psync, one at a time", "fio", ["--ioengine=psync"]),
    Contender("fio-nbd", "fio, its nbd engine (libnbd), no daemon", "fio"),
    Contender("fio-rbd", "fio, its rbd engine (librbd), no daemon", "fio"),
    Contender("qsd", "qemu-storage-daemon", "qsd"),
    Contender("qsd-iothread", "qemu-storage-daemon, iothread", "qsd", ["iothread"]),
    Contender("stock", "stock framework, preadv", "stock"),
    Contender("vublkd", "vublkd", "vublkd"),
    Contender("vublkd-poll0", "vublkd --poll-us=0", "vublkd", ["--poll-us=0"], "--poll-us"),
    Contender("vublkd-pin", "vublkd --pin-memory", "vublkd", ["--pin-memory"], "--pin-memory"),
    Contender("vublkd-threads", "vublkd --engine=threads", "vublkd", ["--engine=threads"]),
    Contender("vublkd-plug-off", "vublkd --plug=off", "vublkd", ["--plug=off"], "--plug"),
]
TEXT = {c.name: c.text for c in CONTENDERS}
FIO = ("fio-io_uring", "fio-psync")
FIO_NBD = ("fio-nbd",)
FIO_RBD = ("fio-rbd",)
QSD = ("qsd", "qsd-iothread")
# What runs on a disk of an NBD server.
NBD_CONTENDERS = ("fio-nbd", "qsd", "qsd-iothread", "vublkd")
NBD_CELLS = ("randread-4k-d1", "randread-4k-d32", "randread-4k-d128", "randwrite-4k-d1", "randwrite-4k-d32", "randwrite-4k-d128",
             "read-1m-d8", "write-1m-d8", "randread-4k-d32-q4")
# The same for images of a Ceph cluster.
RBD_CONTENDERS = ("fio-rbd", "qsd", "qsd-iothread", "vublkd")
RBD_CELLS = ("randread-4k-d1", "randread-4k-d32", "randread-4k-d128", "randwrite-4k-d1", "randwrite-4k-d32", "randwrite-4k-d128",
             "read-1m-d8")

NBD = ("nbd-unix", "nbd-tcp")
RBD = ("rbd",)
REMOTE = (*NBD, *RBD)
BACKINGS = ["ext4", "zram", "tmpfs", "loop", "null", *REMOTE]
QUICK_BACKINGS = ["ext4", "zram", "tmpfs", "nbd-unix"]
BACKING_TEXT = {
    "ext4": "a preallocated, fully written file on ext4",
    "zram": "a zram block device, 50 % compressible data",
    "tmpfs": "a file on tmpfs",
    "loop": "a loop device with direct I/O over a preallocated file on ext4",
    "null": "`--engine=null`: nothing is read or written",
    "nbd-unix": "nbdkit's memory plugin, over a Unix socket",
    "nbd-tcp": "nbdkit's memory plugin, over TCP on the loopback interface",
    "rbd": "images of a Ceph cluster on this host, whose one OSD keeps objects in memory",
}


def available(contenders):
    """(those whose options this vublkd has, notes about the others)"""
    text = subprocess.run([VUBLKD, "--help"], capture_output=True, text=True, timeout=20).stdout
    known = set(re.findall(r"--[a-z][a-z-]*", text))
    left, notes = [], []
    for c in contenders:
        if c.option and c.option not in known:
            notes.append(f"{c.name}: left out, this vublkd has no {c.option}")
        else:
            left.append(c)
    return left, notes


@functools.cache
def alone(program):
    """What makes the process that is started the one whose CPU time counts; an earlier vublkd needs nothing."""
    text = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20).stdout
    return ["--supervise=off"] if "--supervise[=<on|off>]" in text else []


def daemon_argv(contender, disk, sock, backing):
    """The command that serves `disk` on `sock`."""
    if contender.kind == "qsd":
        argv = ["qemu-storage-daemon"]
        export = f"type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={sock},num-queues={QUEUES}"
        export += f",logical-block-size={disk.block}"
        if "iothread" in contender.extra:
            argv += ["--object", "iothread,id=t"]
            export += ",iothread=t"
        return [*argv, "--blockdev", f"node-name=d,{disk.qemu}", "--export", export]
    if contender.kind == "stock":
        return [STOCK, sock, disk.path, str(QUEUES)]
    which = [f"--disk={disk.path}"] if backing in REMOTE else [f"--blk-file={disk.path}", "--lock=off"]
    argv = [contender.program, f"--socket-path={sock}", *which, "--log-level=warn"]
    argv += [*alone(contender.program), *contender.extra]
    return argv + (["--engine=null"] if backing == "null" else [])


def bench_argv(cell, sock, runtime):
    return [VUBLK, "bench", sock, "--json", "--wait", "--destroy-data", f"--rw={cell.rw}", f"--bs={cell.bs}",
            f"--qd={cell.depth}", f"--queues={cell.queues}", f"--runtime={runtime}"]


def fio_argv(contender, cell, disk, runtime):
    return [*disk.fio_program, "--name=bare", *disk.fio, *contender.extra, f"--rw={cell.rw}",
            *(["--rwmixread=70"] if cell.rw == "randrw" else []), f"--bs={cell.bs}", f"--iodepth={cell.depth}",
            f"--numjobs={cell.queues}", "--group_reporting", "--unified_rw_reporting=1", "--time_based",
            f"--runtime={round(runtime * 1000)}ms", "--norandommap", "--buffer_compress_percentage=50",
            "--lat_percentiles=1", "--clat_percentiles=0", "--percentile_list=50:99:99.9", "--output-format=json"]
