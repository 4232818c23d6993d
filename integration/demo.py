"""`make demo`: a real guest with a vublk disk, from mkfs to power-off, and what it cost."""

import os
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from vtest.core import BACKEND, CACHE, MIB, SCRATCH, Case, Failed, device

SIZE, FILE_MIB, COPIES = 1024 * MIB, 64, 4


def step(text):
    print(f"  {text}", flush=True)


def demo(case):
    start = time.monotonic()
    print(f"\ndemo: a Linux guest on a disk served by {BACKEND}")
    disk = case.file(SIZE, "demo")
    step(f"disk      {SIZE // MIB} MiB raw file, sparse")
    backend = case.backend(disk, "demo", serial="vublk-demo")
    step(f"{BACKEND:9} serving it, pid {backend.pid}")
    guest = case.guest("demo", args={"mib": FILE_MIB, "copies": COPIES}, mem="768M",
                       devices=[device(backend, num_queues=2, queue_size=128)])
    guest.expect("boot", 90)
    facts = guest.expect("disk", 60)
    step(f"guest     Linux {facts['kernel']} up after {time.monotonic() - start:.1f} s (emulated CPU): "
         f"/dev/vda of {int(facts['bytes']) // MIB} MiB, {facts['block']}-byte blocks, {facts['queues']} queues, "
         f"{facts['cache'].replace('_', ' ')}")

    def speed(values):
        return f"{int(values['mib'])} MiB at {int(values['mib']) * 100 / max(int(values['cs']), 1):.0f} MB/s"

    wrote = guest.expect("written", 120)
    step(f"write     mkfs.ext4, then {COPIES} files of {FILE_MIB} MiB, O_DIRECT with fsync: {speed(wrote)}")
    step(f"read      caches dropped, O_DIRECT: {speed(guest.expect('read', 120))}")
    checked = guest.expect("verified", 120)
    step(f"verify    {checked['files']} checksums right in the guest, e2fsck clean")
    want = checked["md5"].split(",")
    bounced = backend.bounced()
    guest.finish(60)
    cpu = backend.cpu_seconds()
    backend.stop()
    step("power     guest powered off, daemon ended with status 0 on SIGTERM")
    # What reached the file must be the same without the daemon.
    case.run("e2fsck", "-fn", disk)
    copy = f"{case.tmp}/copy"
    for n in range(1, COPIES + 1):
        case.run("debugfs", "-R", f"dump /data{n} {copy}", disk)
        got = case.run("md5sum", copy).split()[0]
        if got != want[n - 1]:
            raise Failed(f"data{n} in the file has md5 {got}")
    used = os.stat(disk).st_blocks * 512
    step(f"file      e2fsck clean on the host, {COPIES} checksums right, {used // MIB} MiB allocated")
    moved = 3 * FILE_MIB * COPIES
    step(f"cost      {cpu:.2f} s of daemon CPU for {moved} MiB moved"
         + (f", {bounced} requests bounced" if bounced is not None else ""))
    print(f"demo: done in {time.monotonic() - start:.1f} s", flush=True)


def stop(*_):
    raise KeyboardInterrupt


def main():
    signal.signal(signal.SIGTERM, stop)
    logs = f"{CACHE}/logs/demo"
    shutil.rmtree(logs, ignore_errors=True)
    os.makedirs(logs)
    try:
        with tempfile.TemporaryDirectory(prefix="vublk-demo.", dir=SCRATCH) as tmp, Case("demo", tmp, logs) as case:
            demo(case)
    except Failed as why:
        print(f"demo: FAILED: {why}\n      logs in {logs}")
        return 1
    except KeyboardInterrupt:
        print("demo: stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
