"""In a guest: QEMU's own virtio-blk with an iothread, qemu-storage-daemon and vublkd, each a disk of one and the same VM.

The guest is emulated (TCG), so its figures are low: it is the limit, not the disk. They are only for comparing these three
with each other. CPU is that of the iothread, or of the daemon.
"""

import os

from vtest.core import Failed, device

from . import plan

NAMES = {"qemu": "QEMU's virtio-blk, iothread", "qsd": plan.TEXT["qsd"], "vublkd": "vublkd"}
DEPTHS = (1, 32)
BOOT = 90


def cpu_of_thread(pid, thread):
    with open(f"/proc/{pid}/task/{thread}/stat") as f:
        fields = f.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(case, serve, disks, rounds, seconds):
    """[{backing, contender, depth, round, iops, mean_us, cpu}]"""
    devices, who, options = [], [], ["-object", "iothread,id=disks"]
    for n, (backing, disk) in enumerate(disks.items()):
        driver = "host_device" if disk.path.startswith("/dev/") else "file"
        devices.append(["-blockdev", f"driver={driver},node-name=q{n},filename={disk.path},cache.direct=on,aio=io_uring,locking=off",
                        "-device", f"virtio-blk-pci,drive=q{n},iothread=disks,num-queues=1"])
        who.append((backing, "qemu", None))
        for kind in ("qsd", "vublkd"):
            contender = next(c for c in plan.CONTENDERS if c.name == kind)
            daemon = serve(contender, disk, backing, f"guest-{backing}-{kind}")
            devices.append(device(daemon, len(who), num_queues=1))
            who.append((backing, kind, daemon))
    letters = [f"vd{chr(ord('a') + n)}" for n in range(len(who))]
    guest = case.guest("bench", layers=("base", "fio"), smp=1, mem="512M", devices=devices, options=options, args={
        "disks": ",".join(letters), "depths": ",".join(map(str, DEPTHS)), "rounds": rounds, "seconds": seconds})
    guest.expect("boot", BOOT)
    (iothread,) = guest.qmp("query-iothreads")

    def cpu(daemon):
        return daemon.cpu_seconds() if daemon else cpu_of_thread(guest.pid, iothread["thread-id"])

    found = []
    for n in range(rounds * len(DEPTHS) * len(who)):
        backing, kind, daemon = who[n % len(who)]
        guest.expect("ready", 30)
        before = cpu(daemon)
        guest.tell("go")
        said = guest.expect("ran", seconds + 60)
        if said["disk"] != letters[n % len(who)]:
            raise Failed(f"the guest measured {said['disk']}, not {letters[n % len(who)]}")
        iops = float(said["iops"])
        used = (cpu(daemon) - before) / max(iops * seconds, 1) * 1e6
        guest.tell("noted")
        found.append({"backing": backing, "contender": kind, "depth": int(said["depth"]), "round": int(said["round"]),
                      "iops": iops, "mean_us": float(said["mean_us"]), "cpu": used})
        print(f"bench: in a guest: {backing:5} {kind:6} depth {said['depth']:>2} {iops:8.0f} IOPS  cpu {used:6.2f} s/M", flush=True)
    guest.finish(60)
    return found
