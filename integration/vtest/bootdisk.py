"""A disk that boots: GRUB for SeaBIOS and for UEFI, a kernel, and a root file system.

    sector 0        GRUB's boot.img with a partition table
    sector 1..      GRUB's core image for the BIOS, its configuration built in
    1 MiB           partition 1, FAT: kernel, initramfs, EFI/BOOT/BOOTX64.EFI
    then            partition 2, ext4: the root file system

Everything is written into the file itself, with no mount and no loop device.
"""

import os
import shutil
import struct
import subprocess

from . import initramfs
from .core import CACHE, HERE, MIB, kernel_image

FAT_MIB, ROOT_MIB = 64, 48
ROOT_OFFSET = (1 + FAT_MIB) * MIB
MODULES = "part_msdos fat linux normal boot echo".split()
# boot.img loads the core image from sector 1 unless told otherwise, and the core image
# expects the rest of itself from sector 2 on: no block list has to be patched.
GRUB = """\
set root=(hd0,msdos1)
echo vublk: GRUB reads the kernel from the disk
linux /vmlinuz {append}
initrd /initrd
boot
"""


def _partition(kind, start, length, active=False):
    return struct.pack("<B3sB3sII", 0x80 if active else 0, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", start // 512, length // 512)


def build(case, script):
    append = f"console=ttyS0 earlycon=uart8250,io,0x3f8 loglevel=6 panic=-1 mitigations=off nokaslr vt={script} vt.root=/dev/vda2"
    disk = case.file(ROOT_OFFSET + ROOT_MIB * MIB, "boot")
    core = {}
    # Under UEFI the firmware's console is the serial port already, and GRUB driving it too would hang.
    serial = "serial --unit=0\nterminal_output serial\n"
    for target, extra, first in (("i386-pc", ["biosdisk", "serial", "terminal"], serial), ("x86_64-efi", [], "")):
        with open(f"{case.tmp}/grub.cfg", "w") as out:
            out.write(first + GRUB.format(append=append))
        core[target] = f"{case.tmp}/{target}.img"
        case.run("grub-mkimage", "-O", target, "-o", core[target], "-p", "/grub", "-c", f"{case.tmp}/grub.cfg", *MODULES, *extra)

    with open(disk, "r+b") as out:
        out.write(initramfs.read("/usr/lib/grub/i386-pc/boot.img")[:440])
        out.seek(446)
        out.write(_partition(0xEF, MIB, FAT_MIB * MIB, active=True))
        out.write(_partition(0x83, ROOT_OFFSET, ROOT_MIB * MIB))
        out.seek(510)
        out.write(b"\x55\xaa" + initramfs.read(core["i386-pc"]))

    initrd = f"{case.tmp}/boot.initrd"
    with open(initrd, "wb") as out, open(f"{CACHE}/base.cpio", "rb") as base:
        shutil.copyfileobj(base, out, MIB)
        initramfs.add_scripts(out, f"{HERE}/guest")
    fat = f"{case.tmp}/fat"
    with open(fat, "wb") as out:
        out.truncate(FAT_MIB * MIB)
    case.run("mkfs.vfat", "-F", "32", fat)
    case.run("mmd", "-i", fat, "::/EFI", "::/EFI/BOOT")
    for source, target in ((kernel_image(), "vmlinuz"), (initrd, "initrd"), (core["x86_64-efi"], "EFI/BOOT/BOOTX64.EFI")):
        case.run("mcopy", "-i", fat, source, f"::/{target}")
    with open(fat, "rb") as source, open(disk, "r+b") as out:
        out.seek(MIB)
        shutil.copyfileobj(source, out, MIB)

    tree = f"{case.tmp}/root"
    for folder in "bin proc sys dev tmp mnt root etc vt".split():
        os.makedirs(f"{tree}/{folder}")
    shutil.copy("/bin/busybox", f"{tree}/bin/busybox")
    for applet in subprocess.check_output(["busybox", "--list"], text=True).split():
        if applet != "busybox":
            os.symlink("busybox", f"{tree}/bin/{applet}")
    for name in os.listdir(f"{HERE}/guest"):
        shutil.copy(f"{HERE}/guest/{name}", f"{tree}/{'init' if name == 'init' else 'vt/' + name}")
    os.chmod(f"{tree}/init", 0o755)
    open(f"{tree}/etc/on-disk", "w").close()
    case.run("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, "-E", f"offset={ROOT_OFFSET}", disk, f"{ROOT_MIB}M")
    for path in (fat, initrd):
        os.unlink(path)
    return disk
