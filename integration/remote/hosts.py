"""Hosts as network namespaces on one network, for tests of disks on other machines.

They are in namespaces of mounts and networks that this process has made for itself: no other process sees them, their names
and addresses meet no others, and the kernel takes them away with the last process that is in them, however it ends.
"""

import ctypes
import os
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
