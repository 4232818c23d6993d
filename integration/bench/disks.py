"""The disks that the contenders serve. Each is taken away again with its `Case`."""

import mmap
import os
import time

from vtest.core import MIB, Failed

from . import rbd, remote
from .plan import NBD, RBD

SIZE = 1024 * MIB
CHUNK = 4 * MIB


def half_random():
    """A page-aligned buffer of which 50 % can be compressed: half of each sector is noise."""
    noise = os.urandom(CHUNK // 2)
    rest = b"\x55" * 256
    buffer = mmap.mmap(-1, CHUNK)
    buffer.write(b"".join(noise[at : at + 256] + rest for at in range(0, len(noise), 256)))
    return buffer


def fill(path):
    """Writes all of a disk, past the page cache."""
    fd = os.open(path, os.O_WRONLY | os.O_DIRECT)
    try:
        for at in range(0, SIZE, CHUNK):
            # Other bytes each time: nothing may be shared.
            if at % (64 * MIB) == 0:
                buffer = half_random()
            if os.pwrite(fd, buffer, at) != CHUNK:
                raise Failed(f"short write to {path}")
        os.fsync(fd)
    finally:
        os.close(fd)


def fs_type(case, path):
    return case.run("findmnt", "-n", "-o", "FSTYPE", "-T", path).strip()


def patiently(action):
    """Does what fails while a daemon's last descriptors close: the kernel ends io_uring instances in its own time."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return action()
        except (Failed, OSError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def mount(case, name, *how):
    folder = f"{case.tmp}/{name}"
    os.mkdir(folder)
    case.run("mount", *how, folder)
    case.stack.callback(patiently, lambda: case.run("umount", folder))
    return folder


def zram(case):
    """A zram device of our own."""
    control = "/sys/class/zram-control"
    try:
        with open(f"{control}/hot_add") as f:
            number = f.read().strip()
    except OSError as why:
        raise Failed(f"no zram device ({why}): modprobe zram, or leave it out with --backings") from None

    def remove():
        with open(f"{control}/hot_remove", "w") as out:
            out.write(number)

    case.stack.callback(patiently, remove)
    with open(f"/sys/block/zram{number}/disksize", "w") as out:
        out.write(str(SIZE))
    return f"/dev/zram{number}"


def full_file(path):
    """A file with all its blocks, all of them written."""
    with open(path, "wb") as out:
        os.posix_fallocate(out.fileno(), 0, SIZE)
    fill(path)
    return path


def ext4_folder(case, facts):
    """Where files lie on ext4: the scratch folder, or else an image of our own."""
    kind = fs_type(case, case.tmp)
    if kind == "ext4":
        facts["ext4"] = "the file system of the scratch folder"
        return case.tmp
    image = case.file(3 * SIZE, "ext4-image")
    case.run("mke2fs", "-q", "-F", "-t", "ext4", image)
    facts["ext4"] = f"an image of its own on a loop device with direct I/O, because the scratch folder is on {kind}"
    return mount(case, "ext4", case.loop(image))


class Disk:
    """A backing: its path, its logical block, and what to do before each round."""

    def __init__(self, path, refill=False):
        self.path, self.refill = path, refill
        self.block = 512
        if path.startswith("/dev/"):
            with open(f"/sys/block/{os.path.basename(path)}/queue/logical_block_size") as f:
                self.block = int(f.read())
        driver = "host_device" if path.startswith("/dev/") else "file"
        # All contenders have the disk open at once, one of them works: hence no image locks.
        self.qemu = f"driver={driver},filename={path},cache.direct=on,aio=io_uring,locking=off"
        self.fio_program, self.fio = ["fio"], [f"--filename={path}", "--direct=1"]

    def of(self, _contender):
        return self

    def prepare(self):
        if self.refill:
            fill(self.path)


def make(case, names, facts):
    """The disks of these backings, by name."""
    disks = {}
    folder = ext4_folder(case, facts) if {"ext4", "loop", "null"} & set(names) else None
    for name in names:
        print(f"bench: making the {name} disk", flush=True)
        if name == "ext4":
            disks[name] = Disk(full_file(f"{folder}/plain.raw"))
        elif name == "zram":
            disks[name] = Disk(zram(case), refill=True)
        elif name == "tmpfs":
            mounted = mount(case, "tmpfs", "-t", "tmpfs", "-o", f"size={SIZE + 16 * MIB}", "tmpfs")
            disks[name] = Disk(full_file(f"{mounted}/disk.raw"))
        elif name in (*NBD, *RBD):
            disks[name] = remote.Export(case, name) if name in NBD else rbd.Cluster(case)
            facts[name] = disks[name].facts()
        elif name == "loop":
            disks[name] = Disk(case.loop(full_file(f"{folder}/loop.raw")))
        else:
            disks[name] = Disk(case.file(SIZE, "null"))
    return disks
