"""A Debian with its systemd in namespaces of its own: what install.py installs into, and the hosts of the case `libvirt`.

It has the machine's kernel, a root file system that is unpacked for it, one cgroup, and no network but what is made for it.
With its first process all others in it end, and its mounts.
"""

import contextlib
import os
import subprocess
import tempfile
import time

from .core import CACHE, HERE, SCRATCH, Failed, Skipped, die_with_parent

CGROUPS = [tree for tree in ("/sys/fs/cgroup/systemd", "/sys/fs/cgroup") if os.path.exists(f"{tree}/cgroup.procs")]


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def wait(what, asks, seconds=60):
    """Until `asks()` gives something."""
    end = time.monotonic() + seconds
    while True:
        answer = asks()
        if answer:
            return answer
        if time.monotonic() >= end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.02)


def run(*words, seconds=60, **how):
    """A command to its end; what it printed, its complaints included."""
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True,
                              errors="replace", timeout=seconds, **how)
    except subprocess.TimeoutExpired as late:
        raise Failed(f"{' '.join(words)} did not end within {seconds} s: {late.stdout}") from None
    if done.returncode != 0:
        raise Failed(f"{' '.join(words)} ended with {done.returncode}: {done.stdout.strip()[-2000:]}")
    return done.stdout


def remove_cgroup(cgroup):
    """With those below it, once what ran in them has ended."""
    for entry in os.scandir(cgroup):
        if entry.is_dir(follow_symlinks=False):
            remove_cgroup(entry.path)

    def removed():
        with contextlib.suppress(OSError):
            os.rmdir(cgroup)
            return True

    wait(f"{cgroup} to be empty", removed)


class Debian:
    """`stack` takes it away."""

    def __init__(self, stack, name, folder=SCRATCH, in_memory=False):
        """`name`: of the root file system, one of `setup.sh roots`. In memory it is gone in a moment, and on some disks in a minute."""
        archive = f"{CACHE}/{name}.tar"
        if os.geteuid() != 0 or not os.path.exists(archive):
            raise Skipped("a Debian of its own needs root, and integration/setup.sh roots")
        if not CGROUPS:
            raise Skipped("no cgroup can be made here")
        self.root = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"vublk-{name}-", dir=folder))
        if in_memory:
            run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", self.root)
            stack.callback(lambda: run("umount", self.root))
        run("tar", "-C", self.root, "-xpf", archive, "--exclude=./dev/*", seconds=300)
        self.cgroup = f"{CGROUPS[0]}/{os.path.relpath(self.root, SCRATCH).replace('/', '.')}"
        self.log = f"{self.root}/var/log/systemd.log"
        self.stack, self.unshare = stack, None

    def start(self, shared=None):
        """Boots; `shared`: a folder of this machine that is /srv/vms there."""
        os.mkdir(self.cgroup)
        self.stack.callback(remove_cgroup, self.cgroup)
        with open(self.log, "w", encoding="utf-8") as log:
            self.unshare = subprocess.Popen(["sh", f"{HERE}/install/root.sh", self.root, self.cgroup, *([shared] if shared else [])],
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)
        self.stack.callback(self.end)
        self.pid = wait("systemd", self.find_systemd)
        wait("basic.target", lambda: self.state("basic.target") == "active")

    def find_systemd(self):
        if self.unshare.poll() is not None:
            raise Failed(f"the Debian did not start: {read(self.log)[-2000:]}")
        with contextlib.suppress(OSError):
            children = read(f"/proc/{self.unshare.pid}/task/{self.unshare.pid}/children").split()
            return next((pid for pid in children if read(f"/proc/{pid}/comm").strip() == "systemd"), None)

    def end(self):
        # With its first process all others in it end.
        if self.unshare.poll() is None:
            self.unshare.kill()
        self.unshare.wait(30)

    def inside(self, *words):
        path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
        return ["nsenter", "--target", self.pid, "--mount", "--pid", "--net", "--ipc", "--uts",
                "env", "-i", "-C", "/root", path, "DEBIAN_FRONTEND=noninteractive", *words]

    def run(self, *words, seconds=60):
        return run(*self.inside(*words), seconds=seconds)

    def journal(self, unit="vublk@*"):
        words = self.inside("journalctl", "--no-pager", "-n", "50", "-u", unit)
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
        return f"{read(self.log)[-2000:]}\n{done.stdout}"

    def state(self, unit):
        words = self.inside("systemctl", "show", "-p", "ActiveState", "--value", unit)
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=30)
        return done.stdout.strip()
