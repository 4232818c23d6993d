"""A guest whose disk is on another machine, and what happens to it: the server dies, the daemon dies, and the guest moves to
another host. `make demo-remote` shows it, and the cases run it. The hosts are network namespaces (remote/hosts.py)."""

import contextlib
import glob
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time

from remote import hosts
from remote.ceph import POOL, PROGRAMS, USER, Ceph
from remote.ceph import Failed as CephFailed

from .core import HERE, MIB, Failed, Process, Skipped, device
from .registry import BOOT, case

SIZE = 1024 * MIB
# Of each writer.
FILES = 6
MOVE_PORT, NBD_PORT = 4000, 10809


class Cluster(Ceph):
    """A Ceph that ends with this process, and an image in it."""

    server = "OSD"
    options = ()

    def __init__(self, t, host, address):
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        if missing:
            raise Skipped(f"no {', '.join(missing)}: run integration/setup.sh")
        folder, self.copied, self.image = f"{t.tmp}/ceph", f"{t.tmp}/export.raw", f"{POOL}/guest"
        argv = ["start", folder, "--attached", "--namespace", host, "--address", address]
        with open(f"{t.logs}/ceph.log", "ab") as log:
            keeper = subprocess.Popen(
                [sys.executable, f"{HERE}/remote/ceph.py", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )

        def end():
            # They go with the folder.
            for log in (*glob.glob(f"{folder}/*.log"), *glob.glob(f"{folder}/*.out")):
                with contextlib.suppress(OSError):
                    shutil.copy(log, t.logs)
            keeper.stdin.close()
            keeper.stdout.close()
            keeper.wait(60)

        t.stack.callback(end)
        poll = select.poll()
        poll.register(keeper.stdout, select.POLLIN)
        if not poll.poll(90 * 1000) or keeper.stdout.readline() != b"ready\n":
            raise Failed(f"no Ceph: see {t.logs}/ceph.log")
        super().__init__(folder)
        self.run("rbd", "create", self.image, "--size", f"{SIZE // MIB}M")
        self.uri = f"rbd:{self.image}:conf={self.conf}:id={USER}"
        self.text = f"Ceph: a monitor, a manager, an OSD; image {self.image} of {SIZE // MIB} MiB"

    def restart_server(self):
        self.kill_osd()
        self.start_osd()

    def holder(self):
        """The client that has the image's lock; None: no client has it."""
        locks = json.loads(self.run("rbd", "lock", "ls", self.image, "--format", "json"))
        return locks[0]["address"] if locks else None

    def must_refuse(self, client):
        # A line each: address, and until when. Its JSON is two texts.
        if client not in self.run("ceph", "osd", "blocklist", "ls").split():
            raise Failed(f"the cluster does not refuse {client}, the client of the daemon that was killed")
        return "; the cluster refuses the dead client"

    def copy(self):
        """A file with what the disk holds."""
        self.run("rbd", "export", "--no-progress", self.image, self.copied, timeout=120)
        return self.copied


class Nbdkit:
    """nbdkit with a file."""

    server = "nbdkit"
    # After its server was started anew every FLUSH fails, unless nothing was answered that was not durable.
    options = ("--write-cache=writethrough",)

    def __init__(self, t, host, address):
        if not shutil.which("nbdkit"):
            raise Skipped("no nbdkit: run integration/setup.sh")
        self.case, self.host, self.address, self.file = t, host, address, t.file(SIZE, "export")
        self.uri = f"nbd://{address}:{NBD_PORT}/"
        self.text = f"nbdkit with a file of {SIZE // MIB} MiB"
        self.start()

    def start(self):
        argv = ["nbdkit", "-f", "-i", self.address, "-p", str(NBD_PORT), "file", self.file]
        self.process = Process(self.case, "nbdkit", argv, f"{self.case.logs}/nbdkit.log", netns=self.host)
        end = time.monotonic() + 20
        while not self.listens():
            if self.process.reap() or time.monotonic() > end:
                raise Failed(f"nbdkit does not listen: see {self.process.log}")
            time.sleep(0.01)

    def listens(self):
        with open(f"/proc/{self.process.pid}/net/tcp") as table:
            return any(line.split()[1].endswith(f":{NBD_PORT:04X}") and line.split()[3] == "0A" for line in list(table)[1:])

    def restart_server(self):
        self.process.expected = True
        self.process.signal(signal.SIGKILL)
        self.process.wait(10)
        self.start()

    def holder(self):
        return None

    def must_refuse(self, client):
        return ""

    def copy(self):
        return self.file


def kill_daemon(backend, seconds):
    """Kills the daemon while requests are in flight; gives how long its successor took to answer a request of the guest,
    which goes on writing, and how many requests it has repeated."""
    deadline = time.monotonic() + seconds
    while not (status := backend.ask("status"))["disk"]["in_flight"]:
        if time.monotonic() > deadline:
            raise Failed(f"the guest has sent no request for {seconds} s")
    dead, start, first = status["pid"], time.monotonic(), None
    os.kill(dead, signal.SIGKILL)
    while time.monotonic() < deadline:
        try:
            status = backend.ask("status", seconds)
        except (OSError, ValueError):  # no daemon has the control socket, or one died that had it
            status = {}
        if status.get("pid", dead) != dead and "counters" in status:
            count = status["counters"]["requests"]
            first = count if first is None else first
            if count > first:
                return time.monotonic() - start, status["disk"]["replayed"]
        time.sleep(0.002)
    raise Failed(f"no successor of vublkd answers within {seconds} s")


def stamp(event):
    """When QEMU sent it, as time.time() has it."""
    return event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6


def life(t, tell, storage_of):
    """The guest's life on a disk of another machine. `tell(what, text)` is told each step."""
    t.only_vublkd("it kills vublkd, and its successor goes on")
    began = time.monotonic()
    try:
        hosts.leave()
        at = hosts.connect(("storage", "a", "b"))
        tell("hosts", f"storage {at['storage']}, a {at['a']}, b {at['b']}: network namespaces, connected by veth")
        storage = storage_of(t, "storage", at["storage"])
        tell("storage", f"{storage.text}; up after {time.monotonic() - began:.1f} s")
        live(t, tell, storage, at)
    except (hosts.Failed, CephFailed) as why:
        raise Failed(str(why)) from None


def live(t, tell, storage, at):
    def host(name, *incoming):
        extra = [*storage.options, *(["--incoming"] if incoming else [])]
        backend = t.backend(storage.uri, f"vublkd-{name}", netns=name, supervise=True, extra=extra)
        devices = [device(backend, num_queues=2)]
        guest = t.guest("remote", args={"files": FILES}, netns=name, devices=devices, options=incoming)
        guest.qmp("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        return backend, guest

    def load(guest):
        """How many files were written, and how long the slowest took since the last time."""
        guest.tell("look")
        values = guest.expect("load", 150)
        return values["files"], int(values["longest_ms"]) / 1000

    start = time.monotonic()
    backend, guest = host("a")
    guest.expect("boot", BOOT)
    facts = guest.expect("disk", 60)
    tell("host a", f"vublkd serves it; Linux {facts['kernel']} up after {time.monotonic() - start:.1f} s (emulated CPU)")
    guest.expect("loading", 90)
    files, longest = load(guest)
    tell("load", f"mkfs.ext4; three writers, each file of 1 MiB synced and read back: {files} files, the slowest took {longest:.2f} s")

    start = time.monotonic()
    storage.restart_server()
    down = time.monotonic() - start
    files, longest = load(guest)
    tell(storage.server, f"killed, started, up after {down:.1f} s; the guest waited, the slowest file took {longest:.1f} s; {files} files")

    waits, replayed, holder = [], 0, None
    # The guest often computes, and has nothing in flight.
    while not replayed:
        if len(waits) == 10:
            raise Failed("10 kills found no request in flight")
        holder = storage.holder()
        waited, replayed = kill_daemon(backend, 40)
        waits.append(f"{waited * 1000:.0f}")
    files, longest = load(guest)
    tell("vublkd", f"kill -9; its successor answered after {', then '.join(waits)} ms, and repeated what was in flight ({replayed})"
                   f"{storage.must_refuse(holder)}; {files} files")

    before = storage.holder()
    target_backend, target = host("b", "-incoming", "defer")
    move = f"tcp:{at['b']}:{MOVE_PORT}"
    target.qmp("migrate-incoming", uri=move)
    guest.qmp("migrate-set-parameters", **{"max-bandwidth": 1 << 30, "downtime-limit": 300})
    start = time.monotonic()
    guest.qmp("migrate", uri=move)
    guest.event("MIGRATION", 120, status="completed")
    target_backend.first_answer(40)
    answered, stopped = time.time(), stamp(guest.event("STOP", 10))
    target.event("RESUME", 30)
    took, moved = time.monotonic() - start, guest.qmp("query-migrate")
    target.lines += guest.lines
    target.history = guest.history + target.history
    guest.expected = True
    guest.qmp("quit")
    guest.wait(20)
    backend.stop()
    files, longest = load(target)
    after = storage.holder()
    tell("host b", f"moved live in {took:.1f} s, {moved['ram']['transferred'] // MIB} MiB; down for {moved['downtime']} ms as QEMU says, "
                   f"{(answered - stopped) * 1000:.0f} ms until a request was answered on b; {files} files")
    if holder:
        if not (before and before.startswith(f"{at['a']}:") and after and after.startswith(f"{at['b']}:")):
            raise Failed(f"the lock was {before}'s and is {after}'s")
        tell("lock", f"from {before} to {after}")

    target.tell("over")
    checked = target.expect("verified", 120)
    target.expect("fsck", 60)
    tell("verify", f"{checked['files']} checksums right in the guest, of {checked['written']} files written; e2fsck clean")
    target.finish(60)
    target_backend.stop()
    if storage.holder():
        raise Failed("the image is locked after the end of vublkd")
    copy = storage.copy()
    t.run("e2fsck", "-fn", copy)
    os.makedirs(f"{t.tmp}/files")
    t.run("debugfs", "-R", f"rdump / {t.tmp}/files", copy)
    t.run("sh", "-c", f"cd '{t.tmp}/files' && md5sum --quiet -c sums")
    tell("power", "guest powered off, vublkd ended; what storage holds: e2fsck clean, the same checksums")


def in_notes(t):
    """The steps of a case: all in its log, some on its line."""
    return lambda what, text: t.fact(text) if what in ("vublkd", "host b", "verify") else t.note(f"{what}: {text}")


@case("remote-rbd", 300)
def remote_rbd(t):
    """a guest on RBD: its OSD is killed, its daemon is killed, and it moves live to another host"""
    life(t, in_notes(t), Cluster)


@case("remote-nbd", 300)
def remote_nbd(t):
    """the same on an NBD export, whose server is killed"""
    life(t, in_notes(t), Nbdkit)
