"""Images of a Ceph cluster: one cluster for the run, whose OSD keeps objects in memory, and an image for each contender.

A contender that writes has its image's exclusive lock; each with an image of its own, none has to give it up to another one.
All have the same file of settings. The images are written before the first round.
"""

import json
import os
import re
import select
import subprocess
import threading
import time

from remote.ceph import POOL, USER, Ceph
from remote.ceph import Failed as CephFailed
from vtest.core import REPO, Failed

from . import remote

SIZE = 512 << 20
# What is the same for all contenders. QEMU says by itself that the cache is off, and so does vublkd.
SETTINGS = "[client]\nrbd_cache = false\n"
# Threads whose CPU time is a daemon's own: the first letters of their names. All others are librbd's. `vublk-rbd` opens,
# locks and measures the image; it carries out no request.
OWN = re.compile(r"vublk(?!-rbd$)|qemu-storage|IO |worker$|call_rcu")


class Image:
    """A contender's image. Its `path` is the URI, `qemu` says the same to QEMU, `fio` to fio."""

    block = 512

    def __init__(self, name, conf):
        self.path = f"rbd:{POOL}/{name}:conf={conf}:id={USER}"
        self.qemu = f"driver=rbd,pool={POOL},image={name},conf={conf},user={USER},cache.direct=on"
        self.fio_program = ["env", f"CEPH_CONF={conf}", "fio"]
        self.fio = ["--ioengine=rbd", f"--clientname={USER}", f"--pool={POOL}", f"--rbdname={name}"]


class Cluster:
    """A backing: the cluster, and the contenders' images in it."""

    def __init__(self, case):
        folder = f"{case.tmp}/ceph"
        # It ends with its standard input: also where this program is killed.
        argv = [f"{REPO}/integration/remote/ceph.py", "start", folder, "--memory", "--attached"]
        self.log = f"{case.logs}/ceph.log"
        with open(self.log, "wb") as log:
            self.popen = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        case.stack.callback(self.end)
        ready, _, _ = select.select([self.popen.stdout], [], [], 90)
        if not ready or self.popen.stdout.readline() != "ready\n":
            with open(self.log) as log:
                raise Failed(f"no Ceph cluster: {log.read().strip() or 'not ready after 90 s'}")
        self.ceph, self.conf, self.images = Ceph(folder), f"{folder}/clients.conf", {}
        with open(self.ceph.conf) as given, open(self.conf, "w") as out:
            out.write(given.read() + SETTINGS)

    def end(self):
        self.popen.stdin.close()
        try:
            self.popen.wait(60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()

    def of(self, contender):
        """This contender's image, written whole."""
        if contender not in self.images:
            image = Image(f"of-{contender}", self.conf)
            self.run("rbd", "create", f"--size={SIZE >> 20}M", f"{POOL}/of-{contender}")
            remote.fill(image, SIZE)
            self.images[contender] = image
        return self.images[contender]

    def run(self, *argv):
        try:
            return self.ceph.run(*argv)
        except CephFailed as why:
            raise Failed(str(why)) from None

    def facts(self):
        """What the images are, for the report."""
        version = self.run("ceph", "version", "-f", "json")
        version = json.loads(version)["version"].split()[2]
        return (f"Ceph {version}, one monitor, one OSD that keeps objects in memory, one replica, {SIZE >> 20} MiB for each contender, "
                "objects of 4 MiB, no cache in the client")

    def prepare(self):
        """Before a round."""
        if self.popen.poll() is not None:
            raise Failed(f"the Ceph cluster has ended; see {self.log}")


class Threads(threading.Thread):
    """Looks twice, while a load runs, at what each thread of a daemon has used."""

    def __init__(self, pid, seconds):
        super().__init__(daemon=True)
        self.pid, self.seconds, self.samples = pid, seconds, []
        self.start()

    def run(self):
        for part in (0.25, 0.65):
            time.sleep(part * self.seconds)
            self.samples.append(used(self.pid))

    def share(self):
        """The part of the daemon's CPU time that its own threads used."""
        self.join()
        before, after = self.samples
        spent = [(name, ns - before.get(thread, ("", 0))[1]) for thread, (name, ns) in after.items()]
        every = sum(ns for _, ns in spent)
        return sum(ns for name, ns in spent if OWN.match(name)) / max(every, 1)


def used(pid):
    """{thread: (its name, ns)}"""
    found = {}
    for thread in os.listdir(f"/proc/{pid}/task"):
        try:
            with open(f"/proc/{pid}/task/{thread}/comm") as comm, open(f"/proc/{pid}/task/{thread}/schedstat") as schedstat:
                found[thread] = comm.read().rstrip("\n"), int(schedstat.read().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return found
