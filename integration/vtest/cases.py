"""The cases in which one daemon serves one guest to its end."""

import hashlib
import os
import shutil

from . import bootdisk
from .core import BACKEND, MIB, OVMF_CODE, OVMF_VARS, Failed, Skipped, allocated, device
from .registry import BOOT, FLAGS, case, finish, say_fio

# --- firmware ------------------------------------------------------------------


def boot_disk(t, uefi):
    disk = bootdisk.build(t, "root")
    backend = t.backend(disk)
    options, bus = [], None
    if uefi:
        if not os.path.exists(OVMF_CODE):
            raise Skipped(f"no {OVMF_CODE}")
        shutil.copy(OVMF_VARS, f"{t.tmp}/vars.fd")
        options = ["-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={OVMF_CODE}"]
        options += ["-drive", f"if=pflash,format=raw,unit=1,file={t.tmp}/vars.fd"]
        # Directly on the root bus the device is a transitional one, and OVMF drives such by the
        # legacy interface, which vhost-user has not. Behind a port it is a modern one.
        options += ["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"]
        bus = "rp0"
    guest = t.guest(devices=[device(backend, num_queues=2, bootindex=0, bus=bus)], options=options)
    guest.expect("boot", 120)
    found = guest.expect("root", 60)
    if found["uefi"] != str(int(uefi)):
        raise Failed(f"the guest says uefi={found['uefi']}")
    finish(guest, backend, 60)
    # e2fsck must find the file system whole on the host too.
    t.run("e2fsck", "-fn", f"{disk}?offset={bootdisk.ROOT_OFFSET}")


case("boot-bios", 180, True, text="SeaBIOS and GRUB boot Linux from the disk", uefi=False)(boot_disk)
case("boot-uefi", 180, True, text="OVMF and GRUB boot Linux from the disk", uefi=True)(boot_disk)


# --- data integrity --------------------------------------------------------------


def fio_flags(t, queues, depths, size="16m"):
    backends = [t.backend(t.file(64 * MIB)) for _ in FLAGS]
    devices = [
        device(b, n, num_queues=queues, event_idx=ev, indirect_desc=ind)
        for n, (b, (ev, ind)) in enumerate(zip(backends, FLAGS))
    ]
    guest = t.guest(
        "fio",
        layers=("base", "fio"),
        mem="1G",
        smp=queues,
        devices=devices,
        args={"disks": "vda,vdb,vdc,vdd", "queues": queues, "depths": ",".join(map(str, depths)), "size": size},
    )
    guest.expect("boot", BOOT)
    say_fio(t, guest, 120, len(FLAGS) * len(depths))
    finish(guest, backends, 60)


_TEXT = "fio crc32c verify, 512..512k: {} queue(s) x depths {} x event_idx x indirect"
for _queues, _depths, _subset in ((1, (1, 8, 32), False), (2, (1, 32), True), (4, (1, 8, 32), False)):
    case(f"fio-q{_queues}", 400, _subset, text=_TEXT.format(_queues, ",".join(map(str, _depths))),
         queues=_queues, depths=_depths)(fio_flags)


def fio_one(t, disk, backend_options=None, device_options=None, queues=2, size="16m", depths="1,32", **guest_options):
    """fio on one disk; returns nothing, fails on any error."""
    backend = t.backend(disk, queues=max(queues, 8), **(backend_options or {}))
    guest = t.guest(
        "fio",
        layers=("base", "fio"),
        smp=guest_options.pop("smp", queues),
        mem=guest_options.pop("mem", "768M"),
        devices=[device(backend, num_queues=queues, **(device_options or {}))],
        args={"disks": "vda", "queues": queues, "depths": depths, "size": size},
        **guest_options,
    )
    guest.expect("boot", BOOT)
    say_fio(t, guest, 200, len(depths.split(",")))
    finish(guest, backend, 60)


@case("queues-8", 240, True)
def queues_8(t):
    """eight queues, eight CPUs in the guest"""
    fio_one(t, t.file(64 * MIB), queues=8, depths="16", size="8m")


@case("ring-1024")
def ring_1024(t):
    """queue size 1024, and 16 in a second run"""
    fio_one(t, t.file(64 * MIB), device_options={"queue_size": 1024}, depths="256")
    t.processes.clear()
    fio_one(t, t.file(64 * MIB), device_options={"queue_size": 16}, depths="64", queues=1)


@case("engine-threads")
def engine_threads(t):
    """fio on the threads engine"""
    t.only_vublkd("only vublkd has engines")
    fio_one(t, t.file(64 * MIB), {"engine": "threads"})


@case("direct-off")
def direct_off(t):
    """fio through the host's page cache"""
    fio_one(t, t.file(64 * MIB), {"direct": False})


@case("write-through")
def write_through(t):
    """fio with the write cache off"""
    t.only_vublkd("the oracle has no such option")
    fio_one(t, t.file(64 * MIB), {"write_cache": "writethrough"}, size="8m")


@case("huge-pages", subset=True)
def huge_pages(t):
    """guest memory on 2 MiB huge pages"""
    t.huge_pages(768)
    memory = ("memory-backend-memfd,id=mem,size={mem},share=on,hugetlb=on,hugetlbsize=2M",)
    fio_one(t, t.file(64 * MIB), memory=memory, depths="32")


@case("block-device", subset=True)
def block_device(t):
    """a block device (loop) instead of a file"""
    fio_one(t, t.loop(t.file(64 * MIB)), depths="32")


@case("block-4k", subset=True)
def block_4k(t):
    """a block device with 4096-byte logical blocks (losetup -b 4096), fio 4k..512k"""
    fio_one(t, t.loop(t.file(64 * MIB), sector=4096), {"block_size": 4096 if BACKEND == "qsd" else None}, depths="32")


@case("zram-4k")
def zram_4k(t):
    """zram with its 4096-byte blocks"""
    fio_one(t, t.zram(64 * MIB), {"block_size": 4096 if BACKEND == "qsd" else None})


@case("file-4k")
def file_4k(t):
    """a file shown with 4096-byte blocks (--logical-block-size)"""
    fio_one(t, t.file(64 * MIB), {"block_size": 4096})


@case("512-on-4k", subset=True)
def emulated_512(t):
    """512-byte blocks on a backing of 4096-byte ones: read-modify-write"""
    t.only_vublkd("the oracle cannot show smaller blocks than the disk's")
    fio_one(t, t.loop(t.file(64 * MIB), sector=4096), {"block_size": 512}, depths="32", size="8m")


# --- file systems ------------------------------------------------------------------


def file_system(t, kind):
    disk = t.file(512 * MIB)
    backend = t.backend(disk)
    guest = t.guest("fs", mem="768M", args={"kind": kind}, devices=[device(backend, num_queues=2)])
    guest.expect("boot", BOOT)
    t.fact(f"{guest.expect('written', 120)['files']} files")
    guest.expect("checked", 120)
    finish(guest, backend, 60)
    check = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n", "-f"], "btrfs": ["btrfs", "check"]}[kind]
    t.run(*check, disk)


for _kind in ("ext4", "xfs", "btrfs"):
    case(f"fs-{_kind}", 200, True, text=f"{_kind}: made, loaded, trimmed, checked in the guest and on the host"
         + (", scrubbed" if _kind == "btrfs" else ""), kind=_kind)(file_system)


# --- requests ------------------------------------------------------------------------


@case("discard", subset=True)
def discard(t):
    """discard and write-zeroes, seen in the file's extents on the host"""
    disk = t.file(64 * MIB, fill=0x5A)
    backend = t.backend(disk)
    guest = t.guest("discard", devices=[device(backend, num_queues=2)])
    guest.expect("boot", BOOT)
    guest.expect("limits", 20)
    finish(guest, backend, 60)

    def blocks(start, end):
        return allocated(disk, start * MIB, end * MIB) / MIB

    # 12 MiB + 128 KiB were written again after the discard.
    for what, start, end, want in (
        ("before the discard", 0, 8, 8),
        ("discarded", 8, 16, 0.125),
        ("zeroed, may not unmap", 24, 32, 8),
        ("zeroed, may unmap", 40, 48, 0),
        ("after the zeroes", 48, 56, 8),
    ):
        got = blocks(start, end)
        if got != want:
            raise Failed(f"{what}: {got} MiB allocated of {start}..{end} MiB, not {want}")
    small = 65536 - allocated(disk, 56 * MIB + 512, 56 * MIB + 512 + 65536)
    if not 61440 <= small <= 65536:
        raise Failed(f"of an unaligned discard of 64 KiB, {small} bytes were freed")
    with open(disk, "rb") as f:
        data = f.read()
    for start, end in ((0, 8), (16, 24), (32, 40), (48, 56)):
        if data[start * MIB : end * MIB].strip(b"Z"):
            raise Failed(f"bytes of {start}..{end} MiB changed")
    if data[56 * MIB : 56 * MIB + 512].strip(b"Z") or data[56 * MIB + 512 + 65536 :].strip(b"Z"):
        raise Failed("the unaligned discard touched its neighbours")
    if any(data[24 * MIB : 32 * MIB]) or any(data[40 * MIB : 48 * MIB]):
        raise Failed("zeroed ranges hold other bytes")


@case("read-only", subset=True)
def read_only(t):
    """a read-only disk refuses writes and stays as it is"""
    disk = t.file(32 * MIB)
    with open(disk, "r+b") as out:
        out.write(os.urandom(32 * MIB))
    want = hashlib.md5(open(disk, "rb").read()).hexdigest()
    backend = t.backend(disk, read_only=True)
    guest = t.guest("readonly", args={"md5": want}, devices=[device(backend, num_queues=2)])
    guest.expect("boot", BOOT)
    finish(guest, backend, 60)
    if hashlib.md5(open(disk, "rb").read()).hexdigest() != want:
        raise Failed("the file changed")


@case("facts", subset=True)
def facts(t):
    """size, block size, serial, cache mode and its switch, the last block"""
    t.only_vublkd("the oracle sets no serial")
    # Not a multiple of 4096.
    size = 64 * MIB + 512 * 3
    backend = t.backend(t.file(size), serial="vublk-0123456789abcd")
    guest = t.guest(
        "facts",
        devices=[device(backend, num_queues=2)],
        args={"bytes": size, "block": 512, "serial": "vublk-0123456789abcd", "cache": "write-back"},
    )
    guest.expect("boot", BOOT)
    finish(guest, backend, 60)


@case("stat", 120, subset=True)
def stat(t):
    """what the daemon counts of a load is what the guest's kernel counts, to the request and the byte"""
    t.only_vublkd("the oracle tells no counts")
    backend = t.backend(t.file(64 * MIB))
    guest = t.guest("stat", layers=("base", "fio"), devices=[device(backend, num_queues=2)])

    def counted():
        told = backend.ask("status")["disk"]["operations"]
        of = lambda name, what: told.get(name, {}).get(what, 0)
        # Linux counts zeroes among the writes, and the flush of an fsync as a write of nothing, too.
        return {
            "reads": of("read", "requests"),
            "read_sectors": of("read", "bytes") // 512,
            "writes": of("write", "requests") + of("zeroes", "requests") + of("flush", "requests"),
            "written_sectors": (of("write", "bytes") + of("zeroes", "bytes")) // 512,
            "discards": of("discard", "requests"),
            "discarded_sectors": of("discard", "bytes") // 512,
            "flushes": of("flush", "requests"),
        }

    guest.expect("boot", BOOT)
    told, own = [], []
    for word, seconds in (("before", 30), ("after", 90)):
        told.append({name: int(count) for name, count in guest.expect(word, seconds).items()})
        own.append(counted())
        guest.tell("counted")
    # Firmware and an earlier kernel may have read before the guest's kernel counted.
    theirs, ours = ({name: after[name] - before[name] for name in before} for before, after in (told, own))
    if theirs != ours or not all(ours.values()):
        raise Failed(f"the guest's kernel counts {theirs}, the daemon {ours}")
    t.facts.append(" ".join(f"{name}={count}" for name, count in ours.items()))
    finish(guest, backend, 60)


# --- memory ----------------------------------------------------------------------------


@case("memory-5g", 200, subset=True)
def memory_5g(t):
    """5 GiB of guest memory: I/O from the region below 4 GiB and from the one above"""
    backend = t.backend(t.file(64 * MIB))
    guest = t.guest(
        "numa",
        layers=("base", "fio"),
        mem="5G",
        machine="q35",
        memory=(
            "memory-backend-memfd,id=m0,size=2G,share=on",
            "memory-backend-memfd,id=m1,size=3G,share=on",
        ),
        options=["-numa", "node,nodeid=0,memdev=m0,cpus=0-1", "-numa", "node,nodeid=1,memdev=m1"],
        args={"nodes": "0,1", "size": "16m"},
        devices=[device(backend, num_queues=2)],
    )
    guest.expect("boot", BOOT)
    say_fio(t, guest, 120, 2)
    finish(guest, backend, 60)


@case("memory-one-5g")
def memory_one_5g(t):
    """5 GiB in one memory file, which the machine cuts in two regions around 4 GiB"""
    fio_one(t, t.file(64 * MIB), mem="5G")


@case("hotplug-memory", 240, subset=True)
def hotplug_memory(t):
    """DIMMs plugged in during I/O, then I/O from their memory"""
    backend = t.backend(t.file(64 * MIB))
    dimms = 4
    guest = t.guest(
        "dimm",
        layers=("base", "fio"),
        mem="768M",
        mem_option="768M,slots=16,maxmem=8G",
        machine="q35",
        options=["-numa", "node,nodeid=0,memdev=mem,cpus=0-1", "-numa", "node,nodeid=1"],
        args={"mib": dimms * 128},
        devices=[device(backend, num_queues=2)],
    )
    guest.expect("boot", BOOT)
    guest.expect("loading", 90)
    for n in range(dimms):
        guest.qmp("object-add", **{"qom-type": "memory-backend-memfd", "id": f"dm{n}", "size": 128 * MIB, "share": True})
        guest.qmp("device_add", driver="pc-dimm", id=f"dimm{n}", memdev=f"dm{n}", node=1)
    guest.tell("plugged")
    t.fact(f"{guest.expect('grown', 120)['mib']} MiB in the end")
    guest.expect("fio", 90)
    finish(guest, backend, 60)
