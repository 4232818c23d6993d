"""vublkd itself in a guest: on the guest's older kernel, and on a whole host with systemd, libvirt and a VM in it."""

import os
import re
import shutil

from . import initramfs
from .core import CACHE, HERE, MIB, VUBLKD, Failed, Skipped, join_layers, kernel_image
from .libvirt import domain
from .registry import BOOT, case

REPO = os.path.dirname(HERE)
PROGRAMS = [VUBLKD, os.path.join(os.path.dirname(VUBLKD), "vublk")]

UNIT = """\
[Unit]
Wants=libvirtd.service
After=libvirtd.service libvirt-guests.service

[Service]
ExecStart=/srv/test.sh
StandardOutput=file:/dev/ttyS0
StandardError=file:/dev/ttyS0
"""


def install_commands():
    """The commands by which README.md tells how to install and to make the first disk; it becomes a copy of ./vm1.raw."""
    readme = open(f"{REPO}/README.md").read()
    install = re.search(r"^sudo (apt install .*)$", readme, re.M).group(1)
    chapter = re.search(r"^## First disk\n(.*?)^## ", readme, re.S | re.M).group(1)
    first_disk = re.findall(r"^```sh\n(.*?)^```", chapter, re.S | re.M)
    return "\n".join([install, *first_disk, "cp vm1.raw /var/lib/vublk/vm1/disk.raw"])


def tree(t):
    """The files of the host's root file system."""
    archive = f"{CACHE}/libvirt.tar"
    if not os.path.exists(archive):
        raise Skipped("integration/setup.sh roots has not been run")
    if os.geteuid() != 0:
        raise Skipped("the root file system of a host needs root")
    root = f"{t.tmp}/root"
    os.makedirs(root)
    t.run("tar", "-C", root, "-xpf", archive, "--exclude=./dev/*", timeout=300)
    package = f"{root}/srv/vublk"
    os.makedirs(f"{package}/target/debian")
    built = [f"TARGET={os.path.dirname(os.path.dirname(VUBLKD))}", "BUILT=1"]
    t.run("make", "-s", "-C", REPO, "pages", "deb", *built, f"DEB=--output {package}/target/debian/", timeout=900)
    disk = t.file(64 * MIB, "vm1")
    t.run("mke2fs", "-q", "-F", "-t", "ext4", disk)
    shutil.move(disk, f"{package}/vm1.raw")
    shutil.copy(kernel_image(), f"{root}/srv/vmlinuz")
    join_layers(f"{root}/srv/initrd", ("base",))
    shutil.copy(f"{HERE}/host/test.sh", f"{root}/srv/test.sh")
    files = {
        "srv/vublk/install.sh": install_commands(),
        "srv/vm1.xml": domain(folder="/srv", said="/var/log/libvirt", script="writer"),
        "etc/systemd/system/vublk-test.service": UNIT,
        "etc/fstab": "/dev/vda / ext4 defaults 0 0\n",
        "etc/hostname": "host\n",
        "init": "#!/bin/sh\nexec /lib/systemd/systemd\n",
    }
    for path, text in files.items():
        with open(f"{root}/{path}", "w") as out:
            out.write(text)
    for path in ("init", "srv/test.sh"):
        os.chmod(f"{root}/{path}", 0o755)
    os.symlink("../vublk-test.service", f"{root}/etc/systemd/system/multi-user.target.wants/vublk-test.service")
    return root


def take_out(t, image, path):
    """A file of the host's root file system, after its shutdown."""
    out = f"{t.tmp}/{os.path.basename(path)}"
    t.run("debugfs", "-R", f"dump {path} {out}", image)
    return out


@case("host", 3000, alone=True)
def host(t):
    """a Debian with libvirt and the package: install, start, kill, upgrade, shutdown with a guest that writes"""
    t.only_vublkd("the units start vublkd")
    root = tree(t)
    image = t.file(3 << 30, "root")
    t.run("mke2fs", "-q", "-F", "-t", "ext4", "-d", root, image, timeout=600)
    shutil.rmtree(root)
    guest = t.guest(
        "host",
        mem="3G",
        args={"root": "/dev/vda"},
        options=["-drive", f"file={image},format=raw,if=none,id=root,cache=unsafe", "-device", "virtio-blk-pci,drive=root"],
    )
    guest.expect("boot", 600)
    started = guest.expect("writes", 1500)
    t.fact(f"guest writes {started['uptime']} s after the host's boot, AppArmor {started['apparmor']}")
    for _ in ("KILL", "TERM"):
        guest.expect("killed", 200)
    guest.expect("upgraded", 400)
    guest.expected = True
    guest.expect("done", 60)
    guest.wait(600)
    if guest.status != 0:
        raise Failed(f"QEMU ended with {guest.status}")
    # The host is down. Its guest was asked to stop and has unmounted before its disk went away.
    t.run("e2fsck", "-fn", image, timeout=300)
    said = open(take_out(t, image, "/var/log/libvirt/vm1.control"), errors="replace").read()
    if "@@ unmounted" not in said:
        raise Failed(f"the guest did not stop before its disk: it last said {said.splitlines()[-1:]}")
    disk = take_out(t, image, "/var/lib/vublk/vm1/disk.raw")
    t.run("e2fsck", "-fn", disk)
    if "Filesystem state:         clean\n" not in t.run("dumpe2fs", "-h", disk):
        raise Failed("the guest's file system is not clean")
    last = re.findall(r"@@ wrote n=(\d+)", said)[-1]
    written = open(take_out(t, disk, "/count")).read().strip()
    if written != last:
        raise Failed(f"the guest wrote {last} files, its disk has {written}")
    t.fact(f"{last} files, the last one on the disk, its file system clean")


@case("old-kernel", 240, subset=True)
def old_kernel(t):
    """vublkd on Debian 12's kernel: both engines, the sandbox, a crash and an upgrade under verified load"""
    t.only_vublkd("it is vublkd that runs there")
    layer = f"{t.tmp}/vublk.cpio"
    with open(layer, "wb") as out:
        initramfs.build_programs(out, PROGRAMS)
    image = t.file(256 * MIB, "image")
    guest = t.guest(
        "oldkernel",
        layers=("base", layer),
        mem="768M",
        options=["-drive", f"file={image},format=raw,if=none,id=image,cache=unsafe", "-device", "virtio-blk-pci,drive=image"],
    )
    guest.expect("boot", BOOT)
    for engine in ("io_uring", "threads"):
        t.fact(f"{engine} {guest.expect('verified', 90)['requests']} requests")
    guest.finish(60)
