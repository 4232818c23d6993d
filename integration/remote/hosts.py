"""Hosts as network namespaces on one network, for tests of disks on other machines.

They are in namespaces of mounts and networks that this process has made for itself: no other process sees them, their names
and addresses meet no others, and the kernel takes them away with the last process that is in them. What is left in them when
this process ends, as when it is killed, is killed by a guard.
"""

import contextlib
import ctypes
import os
import signal
import subprocess

NEWNS, NEWUSER, NEWNET = 0x20000, 0x10000000, 0x40000000
NETWORK = "10.77.0."


class Failed(Exception):
    """The hosts cannot be made here; the text says why."""


def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(argv)}: {done.stdout.strip()}")


def leave():
    """Moves this process, which has one thread, into namespaces of its own; who is not root is root there."""
    user, group = os.geteuid(), os.getegid()
    flags = NEWNS | NEWNET | (NEWUSER if user else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags):
        raise Failed(f"unshare: {os.strerror(ctypes.get_errno())}; run it as root")
    if user:
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as out:
                out.write(text)
    # `ip netns` keeps names in /run.
    run("mount", "--make-rprivate", "/")
    run("mount", "-t", "tmpfs", "hosts", "/run")
    ended, _held_until_the_end = os.pipe()
    if os.fork() == 0:
        guard(ended)


def guard(ended):
    """Waits for the end of its parent, and kills what is in its hosts then: a daemon serves on without its parent."""
    try:
        os.setsid()
        nothing = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(nothing, fd)
        os.dup2(ended, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        os.read(3, 1)
        names = [entry.stat() for entry in os.scandir("/run/netns")]
        for pid in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended
                # The number may be another process's by now: this one is held before its namespace is read.
                fd = os.pidfd_open(int(pid))
                if any(os.path.samestat(os.stat(f"/proc/{pid}/ns/net"), name) for name in names):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
                os.close(fd)
    finally:
        os._exit(0)


def connect(names):
    """Makes these hosts, each with a link to one switch, which the first host has; their addresses, by name. The process
    must have called `leave`."""
    addresses = {name: f"{NETWORK}{number}" for number, name in enumerate(names, 1)}
    first = names[0]
    for name in names:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "set", "dev", "lo", "up")
    run("ip", "-n", first, "link", "add", "name", "eth0", "type", "bridge")
    for name in names[1:]:
        run("ip", "-n", name, "link", "add", "name", "eth0", "type", "veth", "peer", "name", f"to-{name}", "netns", first)
        run("ip", "-n", first, "link", "set", "dev", f"to-{name}", "master", "eth0", "up")
    for name, address in addresses.items():
        run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        run("ip", "-n", name, "link", "set", "dev", "eth0", "up")
    return addresses
