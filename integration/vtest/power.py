"""Power cuts under a guest's file system: it mounts, checks clean, and holds what the guest was told is durable.

The disk below the daemon logs what reaches it. The guest says what it has made durable by fsync, and how long the log
is then is noted: at every cut that is not before that, it has to be there. While the guest works its daemons are killed
and upgraded. Afterwards the log is replayed to cuts, and each image is mounted and checked.
"""

import os
import random
import signal
import time

from .core import MIB, Failed, Skipped, device
from .disklog import DiskLog, Replay
from .registry import BOOT, case, finish

CUTS = int(os.environ.get("POWER_CUTS", "24"))
FILES = 40 if CUTS <= 24 else 200
SIZE = 320 * MIB  # mkfs.xfs makes nothing smaller than 300

# In a mount namespace of its own, so that nothing stays behind. The kernel remembers devices of btrfs, and would refuse
# an older state of one.
LOOK = """
set -e
[ $2 != btrfs ] || btrfs device scan --forget >/dev/null
mount -t $2 -o loop "$1" "$3"
(cd "$3" && find kept -type f -exec md5sum {} + && if [ -e current ]; then uniq -c current; fi)
umount "$3"
"""
CHECK = {"ext4": ["e2fsck", "-fn"], "xfs": ["xfs_repair", "-n", "-f"], "btrfs": ["btrfs", "check"]}


def daemon_of(parent):
    """The daemon that a parent process has now."""
    with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as children:
        return int((children.read().split() or ["0"])[0])


def succeed(backend, how):
    """The daemon is killed or upgraded, and another goes on."""
    before = daemon_of(backend)
    if how == "kill":
        os.kill(before, signal.SIGKILL)
    else:
        backend.signal(signal.SIGUSR2)
    deadline = time.monotonic() + 20
    while daemon_of(backend) in (before, 0):
        if time.monotonic() > deadline:
            raise Failed(f"no successor after a {how}")
        time.sleep(0.01)


def look(t, kind, image, cut, promises):
    """Mounts an image and looks for what was promised by this cut, then checks it."""
    out = t.run("unshare", "-m", "sh", "-c", LOOK, "look", image, kind, f"{t.tmp}/mnt")
    lines = [line.split() for line in out.splitlines()]
    sums = {name: md5 for md5, name in (fields for fields in lines if fields[1].startswith("kept/"))}
    current = [(int(count), int(n)) for count, n in (fields for fields in lines if not fields[1].startswith("kept/"))]
    oldest = 0
    for entries, name, value in promises:
        if entries > cut:
            break
        if name == "current":
            oldest = value
        elif sums.get(f"kept/{name}") != value:
            raise Failed(f"cut {cut}: {name} was durable after {entries} entries, and is {sums.get(f'kept/{name}', 'not there')}")
    if oldest and not (len(current) == 1 and current[0][0] == 2000 and current[0][1] >= oldest):
        raise Failed(f"cut {cut}: the file that is replaced was {oldest}, and is {current}")
    t.run(*CHECK[kind], image)


def power(t, kind):
    t.only_vublkd("its daemons are killed and upgraded")
    with open("/proc/filesystems") as known:
        if kind not in known.read().split():
            raise Skipped(f"this host's kernel has no {kind}")
    if os.geteuid() != 0:
        raise Skipped("mounts need root")
    disk = DiskLog(t, SIZE)
    backend = t.backend(disk.path, extra=["--supervise=on"])
    guest = t.guest("power", mem="768M", args={"kind": kind, "files": FILES}, devices=[device(backend, num_queues=2)])
    guest.expect("boot", BOOT)
    guest.expect("mounted", 60)
    first, promises, ends = disk.entries(), [], {"kill": 0, "upgrade": 0}
    for n in range(1, FILES + 1):
        values = guest.expect("kept", 60)
        promises.append((disk.entries(), values["name"], values["md5"]))
        if n % 4 == 0:
            guest.expect("replaced", 60)
            promises.append((disk.entries(), "current", n))
        if n % 5 == 0:
            how = "upgrade" if n % 15 == 0 else "kill"
            succeed(backend, how)
            ends[how] += 1
    finish(guest, backend, 60)
    disk.stop()

    os.mkdir(f"{t.tmp}/mnt")
    replay, image, dice = Replay(disk, SIZE, f"{t.tmp}/durable.raw"), f"{t.tmp}/cut.raw", random.Random(kind)
    flushes, last = replay.flushes(), len(replay.entries)
    if len(flushes) < FILES:
        raise Failed(f"only {len(flushes)} flushes have reached the disk")
    # A third of them just behind a flush.
    cuts = [dice.choice(flushes) + 1 if n % 3 == 0 else dice.randint(first, last) for n in range(CUTS)]
    for n, cut in enumerate(sorted(max(cut, first) for cut in cuts)):
        replay.cut(cut, image, ("all", "drawn", "none", "drawn")[n % 4], dice)
        look(t, kind, image, cut, promises)
    replay.close()
    t.fact(f"{CUTS} cuts in {last} entries with {len(flushes)} flushes, {ends['kill']} kills, {ends['upgrade']} upgrades, "
           f"{len(promises)} promises")


for _kind in ("ext4", "xfs", "btrfs"):
    case(f"power-{_kind}", 240 + 8 * CUTS, _kind == "ext4",
         text=f"{_kind} after power cuts (POWER_CUTS, 24), with kills and upgrades: mounts, checks clean, holds what was fsynced",
         kind=_kind)(power)
