"""The cases. Each is a function of a `Case`; its first line of documentation is its description."""

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import time

from . import bootdisk
from .core import BACKEND, MIB, OVMF_CODE, OVMF_VARS, VUBLK, Failed, Skipped, allocated, device, join_layers, kernel_image

CASES = {}
BOOT = 60  # seconds a guest may take to come up on a busy machine


@dataclasses.dataclass
class Entry:
    name: str
    text: str
    run: object
    timeout: int
    subset: bool
    alone: bool


def case(name, timeout=120, subset=False, alone=False, **fixed):
    """Registers a case; `subset` ones are in `make test`, `alone` ones want both cores."""

    def register(function):
        text = fixed.pop("text", None) or function.__doc__.splitlines()[0]
        CASES[name] = Entry(name, text, lambda t: function(t, **fixed), timeout, subset, alone)
        return function

    return register


def finish(guest, backends, seconds):
    """The guest ends well, and then each daemon on SIGTERM. Says what it cost."""
    if not isinstance(backends, list):
        backends = [backends]
    values = guest.expect("done", seconds)
    bounced = [b.bounced() for b in backends]
    guest.lines.insert(0, ("done", values, ""))
    guest.finish(seconds)
    for backend in backends:
        backend.stop()
    guest.case.fact(f"cpu {sum(b.cpu_seconds() for b in backends):.2f}s")
    if None not in bounced:
        guest.case.fact(f"bounced {sum(bounced)}")
    return bounced


def say_fio(t, guest, seconds, count):
    """Collects `count` results of fio."""
    read = written = 0
    for _ in range(count):
        values = guest.expect("fio", seconds)
        read += int(values["read_kib"])
        written += int(values["written_kib"])
    t.fact(f"{written // 1024} MiB written, {read // 1024} MiB verified")


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

FLAGS = [(ev, ind) for ev in ("on", "off") for ind in ("on", "off")]


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


# --- life cycle ----------------------------------------------------------------------------


def lives(t, how, count):
    disk = t.file(128 * MIB)
    tree = f"{t.tmp}/tree"
    os.makedirs(tree)
    with open(f"{tree}/life", "w") as out:
        out.write("1\n")
    if how == "kexec":
        shutil.copy(kernel_image(), f"{tree}/vmlinuz")
        join_layers(f"{tree}/initrd", ("base",))
    t.run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, disk)
    backend = t.backend(disk)
    guest = t.guest("reboot", mem="768M", args={"how": how, "lives": count}, devices=[device(backend, num_queues=2)])
    for life in range(1, count + 1):
        guest.expect("boot", BOOT)
        if guest.expect("life", 60)["n"] != str(life):
            raise Failed(f"not in life {life}")
    finish(guest, backend, 60)
    t.run("e2fsck", "-fn", disk)
    t.fact(f"{count} lives")


case("reboot", 200, True, text="the guest resets with reads in flight, twice", how="reboot", count=3)(lives)
case("kexec", 200, True, text="a new kernel takes over by kexec, with reads in flight", how="kexec", count=2)(lives)


@case("unplug", 200, subset=True)
def unplug(t):
    """the device is unplugged under load, and a second one plugged in"""
    first, second = t.backend(t.file(64 * MIB), serial="first"), t.backend(t.file(64 * MIB), serial="second")
    guest = t.guest(
        "unplug",
        layers=("base", "fio"),
        mem="768M",
        options=["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"],
        devices=[device(first, 0, bus="rp0", num_queues=2)],
    )
    guest.expect("boot", BOOT)
    guest.expect("loading", 60)
    guest.qmp("device_del", id="disk0")
    guest.event("DEVICE_DELETED", 60, device="disk0")
    guest.qmp("chardev-remove", id="c0")
    guest.expect("gone", 90)
    # The daemon is free again: it must end well, or serve the next.
    first.stop()
    address = {"type": "unix", "data": {"path": second.socket}}
    guest.qmp("chardev-add", id="c1", backend={"type": "socket", "data": {"addr": address, "server": False}})
    guest.qmp("device_add", **{"driver": "vhost-user-blk-pci", "chardev": "c1", "id": "disk1", "bus": "rp0", "num-queues": 2})
    serial = guest.expect("back", 90)["serial"]
    if BACKEND == "vublkd" and serial != "second":
        raise Failed(f"the new disk says its serial is {serial}")
    guest.expect("fio", 90)
    finish(guest, [second], 60)


@case("replug", 200)
def replug(t):
    """the same daemon serves a device again after it was unplugged under load"""
    t.only_vublkd("the oracle ends with its front-end")
    backend = t.backend(t.file(64 * MIB), serial="same")
    guest = t.guest(
        "unplug",
        layers=("base", "fio"),
        mem="768M",
        options=["-device", "pcie-root-port,id=rp0,chassis=1,slot=1"],
        devices=[device(backend, 0, bus="rp0", num_queues=2)],
    )
    guest.expect("boot", BOOT)
    guest.expect("loading", 60)
    guest.qmp("device_del", id="disk0")
    guest.event("DEVICE_DELETED", 60, device="disk0")
    guest.qmp("chardev-remove", id="c0")
    guest.expect("gone", 90)
    address = {"type": "unix", "data": {"path": backend.socket}}
    guest.qmp("chardev-add", id="c1", backend={"type": "socket", "data": {"addr": address, "server": False}})
    guest.qmp("device_add", **{"driver": "vhost-user-blk-pci", "chardev": "c1", "id": "disk1", "bus": "rp0", "num-queues": 2})
    guest.expect("back", 90)
    guest.expect("fio", 90)
    finish(guest, [backend], 60)


def restarts(t, kinds):
    """One back-end after the other under one idle guest, then fio."""
    disk = t.file(64 * MIB)
    serve = lambda kind: t.backend(disk, "restarted", kind=kind)
    backend = serve(kinds[0])
    guest = t.guest(
        "restart",
        layers=("base", "fio"),
        mem="768M",
        args={"rounds": len(kinds) - 1},
        devices=[device(backend, num_queues=2, reconnect=100)],
    )
    guest.expect("boot", BOOT)
    for kind in kinds[1:]:
        guest.expect("idle", 60)
        backend.stop()
        backend = serve(kind)
        guest.tell("restarted")
    guest.expect("fio", 90)
    finish(guest, backend, 60)


@case("restart", 200, subset=True)
def restart(t):
    """the daemon is stopped and started again under an idle guest, three times"""
    restarts(t, [BACKEND] * 4)


@case("turns", 240, subset=True)
def turns(t):
    """vublkd and qemu-storage-daemon take turns on one image under one guest"""
    t.only_vublkd("it runs both")
    # vublkd first: a driver that began with the other has acked SIZE_MAX, which vublkd does not offer.
    restarts(t, ["vublkd", "qsd", "vublkd", "qsd", "vublkd"])


CRASH_SECONDS = int(os.environ.get("CRASH_SECONDS", "15"))


@case("crash", CRASH_SECONDS + 240, subset=True)
def crash(t):
    """the daemon is killed again and again under fio verify (CRASH_SECONDS, 15)"""
    t.only_vublkd("qemu-storage-daemon keeps no in-flight region")
    # With requests in flight a successor has something to answer at once; else it waits for the guest.
    disk, hit, idle = t.file(64 * MIB), [], []
    backend = t.backend(disk, "crashed", write_cache="writethrough")
    guest = t.guest(
        "crash",
        layers=("base", "fio"),
        mem="768M",
        # Longer than it is killed: the last daemon has to answer, too.
        args={"seconds": CRASH_SECONDS + 5},
        devices=[device(backend, num_queues=2, reconnect=100)],
    )
    guest.expect("boot", BOOT)
    end = time.monotonic() + CRASH_SECONDS
    while time.monotonic() < end:
        time.sleep(random.uniform(0.2, 0.8))
        # While the guest is at work: much of the time fio only begins or ends. Then a moment that nothing
        # in the daemon or the guest has chosen.
        backend.first_answer(10, more_than=backend.first_answer(10))
        time.sleep(random.uniform(0, 0.01))
        backend.expected = True
        start = time.monotonic()
        backend.signal(signal.SIGKILL)
        backend.wait(10)
        backend = t.backend(disk, "crashed", write_cache="writethrough")
        backend.first_answer(10)
        (hit if backend.has_logged("an earlier vublkd left in flight") else idle).append(time.monotonic() - start)
    values = guest.expect("crashed", CRASH_SECONDS + 120)
    guest.tell("over")
    seen = sorted(int(ms) for ms in values["longest_ms"].split(","))
    spread = lambda ms: f"{ms[len(ms) // 2]:.0f} ms (median) to {ms[-1]:.0f} ms"
    waits = sorted(wait * 1000 for wait in hit)
    t.fact(f"{len(hit) + len(idle)} kills, {len(hit)} with requests in flight: first answer after {spread(waits)}; "
           f"longest request of each of {values['rounds']} rounds, in the guest: {spread(seen)}")
    # Counted from the journal. A short run may be unlucky.
    kills = len(hit) + len(idle)
    if len(hit) < kills * (0.8 if kills >= 100 else 0.5):
        raise Failed("too few kills found a request in flight")
    finish(guest, backend, 60)


# --- changes under a running guest ------------------------------------------------------------


@case("resize", 200, subset=True)
def resize(t):
    """the disk grows from 64 to 96 MiB under load, and the guest writes to its last sector"""
    t.only_vublkd("the oracle is resized by QMP")
    disk, before, after = t.file(64 * MIB), 64 * MIB, 96 * MIB
    backend = t.backend(disk)
    guest = t.guest(
        "resize",
        layers=("base", "fio"),
        mem="768M",
        args={"before": before, "after": after},
        devices=[device(backend, num_queues=2)],
    )
    guest.expect("boot", BOOT)
    guest.expect("loading", 90)
    t.fact(t.run(VUBLK, "resize", f"{backend.socket}.control", "96M").strip())
    guest.expect("grown", 60)
    want = guest.expect("block", 120)["md5"]
    finish(guest, backend, 60)
    with open(disk, "rb") as f:
        f.seek(after - 512)
        if hashlib.md5(f.read()).hexdigest() != want:
            raise Failed("the last sector of the file is not the guest's")


MOVES = int(os.environ.get("MOVES", "2"))


@case("migrate", MOVES * 90 + 120, subset=True, alone=True)
def migrate(t):
    """live migrations between daemons on one image, with fio verify and a checked page cache (MOVES, 2)"""
    t.only_vublkd("it is vublkd's dirty log")
    image, contents = t.file(64 * MIB), t.file(64 * MIB)
    quarters = [os.urandom(16 * MIB) for _ in range(4)]
    with open(contents, "r+b") as out:
        out.write(b"".join(quarters))
    md5s = ",".join(hashlib.md5(quarter).hexdigest() for quarter in quarters)
    pauses = []

    def host(*options):
        extra = ["--incoming"] if options else []
        backends = [t.backend(image, extra=extra), t.backend(contents, extra=extra)]
        guest = t.guest(
            "migrate",
            layers=("base", "fio"),
            mem="512M",
            args={"md5s": md5s, "moves": MOVES},
            # A kernel that clears its pages has written to them before the device does.
            append="init_on_alloc=0",
            devices=[device(b, n, num_queues=2) for n, b in enumerate(backends)],
            options=options,
        )
        guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        return guest, backends

    guest, backends = host()
    guest.expect("boot", BOOT)
    for move in range(MOVES):
        guest.expect("ready", 120)
        uri = f"unix:{t.tmp}/move{move}"
        target, target_backends = host("-incoming", "defer")
        target.qmp("migrate-incoming", uri=uri)
        # Slowly at first, so that the device fills pages that were sent already; then to the end.
        guest.qmp("migrate-set-parameters", **{"max-bandwidth": 32 * MIB, "downtime-limit": 1})
        guest.qmp("migrate", uri=uri)
        end = time.monotonic() + 60
        while guest.qmp("query-migrate").get("ram", {}).get("dirty-sync-count", 0) < 2:
            if time.monotonic() > end:
                raise Failed("the first pass of the memory does not end")
            time.sleep(0.05)
        guest.tell("sent")
        guest.expect("filled", 60)
        guest.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 1000})
        guest.event("MIGRATION", 120, status="completed")
        target.event("RESUME", 30)
        pauses.append(guest.qmp("query-migrate")["downtime"])
        target.lines += guest.lines
        target.history = guest.history + target.history
        guest.expected = True
        guest.qmp("quit")
        guest.wait(20)
        for backend in backends:
            backend.stop()
        guest, backends = target, target_backends
        guest.tell("moved")
    t.fact(f"{MOVES} moves, paused {min(pauses)} to {max(pauses)} ms, {guest.expect('rounds', 120)['n']} rounds of fio")
    finish(guest, backends, 60)


# --- endurance ----------------------------------------------------------------------------------

SOAK_SECONDS = int(os.environ.get("SOAK_SECONDS", "600"))


@case("soak", SOAK_SECONDS + 300, alone=True)
def soak(t):
    """fio crc32c verify without end on four disks (SOAK_SECONDS, 600)"""
    backends = [t.backend(t.file(256 * MIB)) for _ in FLAGS]
    devices = [
        device(b, n, num_queues=q, event_idx=ev, indirect_desc=ind)
        for n, (b, (ev, ind), q) in enumerate(zip(backends, FLAGS, (1, 2, 3, 4)))
    ]
    guest = t.guest(
        "soak",
        layers=("base", "fio"),
        mem="2G",
        smp=4,
        devices=devices,
        args={"disks": "vda,vdb,vdc,vdd", "seconds": SOAK_SECONDS},
    )
    guest.expect("boot", BOOT)
    values = guest.expect("soaked", SOAK_SECONDS + 200)
    fio = [v for w, v, _ in guest.history if w == "fio"]
    t.fact(f"{values['rounds']} rounds in {values['seconds']} s")
    t.fact(f"{sum(int(v['written_kib']) for v in fio) // 1024} MiB written")
    finish(guest, backends, 60)
