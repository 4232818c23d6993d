"""The cases in which guest, daemon or disk is another one in the end: boots, restarts, kills, migrations."""

import hashlib
import os
import random
import shutil
import signal
import time

from .core import BACKEND, MIB, VUBLK, Failed, device, join_layers, kernel_image
from .registry import BOOT, FLAGS, case, finish

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


def plugs(t, first, second):
    """The device is unplugged under load, and one plugged in; gives the serial that the guest sees."""
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
    if second is not first:
        first.stop()  # it is free again, and must end well
    address = {"type": "unix", "data": {"path": second.socket}}
    guest.qmp("chardev-add", id="c1", backend={"type": "socket", "data": {"addr": address, "server": False}})
    guest.qmp("device_add", **{"driver": "vhost-user-blk-pci", "chardev": "c1", "id": "disk1", "bus": "rp0", "num-queues": 2})
    serial = guest.expect("back", 90)["serial"]
    guest.expect("fio", 90)
    finish(guest, [second], 60)
    return serial


@case("unplug", 200, subset=True)
def unplug(t):
    """the device is unplugged under load, and a second one plugged in"""
    first, second = t.backend(t.file(64 * MIB), serial="first"), t.backend(t.file(64 * MIB), serial="second")
    serial = plugs(t, first, second)
    if BACKEND == "vublkd" and serial != "second":
        raise Failed(f"the new disk says its serial is {serial}")


@case("replug", 200)
def replug(t):
    """the same daemon serves a device again after it was unplugged under load"""
    t.only_vublkd("the oracle ends with its front-end")
    backend = t.backend(t.file(64 * MIB), serial="same")
    plugs(t, backend, backend)


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
    if len(hit) < kills * 0.5:  # 9 of 10 on an idle machine
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
