"""Builds the guests' initramfs layers, and writes cpio archives.

The kernel takes several archives one after the other as one initramfs, so what is
big and rarely wanted (fio drags in 80 MB of libraries) is a layer of its own, and
the test scripts are a tiny layer made afresh for each run.

    base.cpio   busybox, kernel modules, file-system tools, kexec-load
    fio.cpio    fio with its libraries
"""

import glob
import os
import re
import stat
import subprocess
import sys
import tempfile

# Loaded by the guest's init or by the kernel on demand; their dependencies follow.
MODULES = """
    virtio_pci virtio_blk button evdev
    xfs btrfs vfat nls_ascii nls_cp437 nls_utf8 msdos
    crc32c-intel crc32-pclmul crc32_generic blake2b_generic xxhash_generic sha256-ssse3
""".split()

TOOLS = """
    mke2fs mkfs.ext4 e2fsck mkfs.xfs xfs_repair mkfs.btrfs btrfs blkdiscard fallocate blockdev
""".split()


class Cpio:
    """A newc archive, written member by member."""

    def __init__(self, out):
        self.out, self.ino, self.dirs = out, 0, set()

    def _member(self, name, mode, data=b"", rdev=(0, 0)):
        self.ino += 1
        name = name.encode() + b"\0"
        fields = (self.ino, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name), 0)
        head = b"070701" + b"".join(b"%08X" % f for f in fields) + name
        self.out.write(head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4))

    def mkdir(self, path):
        path = path.strip("/")
        if path and path not in self.dirs:
            self.mkdir(os.path.dirname(path))
            self.dirs.add(path)
            self._member(path, stat.S_IFDIR | 0o755)

    def add(self, path, data, mode=0o644):
        self.mkdir(os.path.dirname(path.strip("/")))
        self._member(path.strip("/"), stat.S_IFREG | mode, data)

    def link(self, path, target):
        self.mkdir(os.path.dirname(path.strip("/")))
        self._member(path.strip("/"), stat.S_IFLNK | 0o777, target.encode())

    def close(self):
        self._member("TRAILER!!!", 0)
        # The kernel finds the next layer at any multiple of four.
        self.out.write(b"\0" * (-self.out.tell() % 512))


def read(path):
    with open(path, "rb") as f:
        return f.read()


def which(name):
    for folder in ("/sbin", "/usr/sbin", "/bin", "/usr/bin"):
        if os.access(f"{folder}/{name}", os.X_OK):
            return f"{folder}/{name}"
    sys.exit(f"initramfs: {name} is not installed")


def libraries(program):
    """Where the dynamic linker finds each library of a program, the linker itself included."""
    out = subprocess.run(["ldd", program], capture_output=True, text=True).stdout
    return set(re.findall(r"(/\S+) \(0x", out))


def with_dependencies(names, modules_dir):
    """modules.dep of the unpacked kernel, asked for these modules: every file needed."""
    deps, by_name = {}, {}
    for line in open(f"{modules_dir}/modules.dep"):
        path, _, needs = line.partition(":")
        deps[path] = needs.split()
        by_name[os.path.basename(path).split(".ko")[0].replace("-", "_")] = path
    found = set()

    def take(path):
        if path not in found:
            found.add(path)
            for need in deps[path]:
                take(need)

    for name in names:
        if name.replace("-", "_") in by_name:  # else it is built in
            take(by_name[name.replace("-", "_")])
    return found


def build_base(cache, out):
    cpio = Cpio(out)
    for folder in "proc sys dev tmp run mnt root etc lib lib64 bin sbin usr/bin usr/sbin vt".split():
        cpio.mkdir(folder)
    cpio.add("bin/busybox", read(which("busybox")), 0o755)
    taken = set(TOOLS)
    for applet in subprocess.check_output(["busybox", "--list"], text=True).split():
        if applet not in taken and applet != "busybox":
            cpio.link(f"bin/{applet}", "busybox")
    # What the kernel calls when it wants a module.
    cpio.link("sbin/modprobe", "/bin/busybox")

    programs = {f"sbin/{name}": which(name) for name in TOOLS}
    needed = set()
    for target, source in programs.items():
        cpio.add(target, read(source), 0o755)
        needed |= libraries(source)
    # libgcc_s is opened at run time when a thread of xfs_repair is cancelled.
    needed |= set(glob.glob("/lib/x86_64-linux-gnu/libgcc_s.so.1"))
    cpio.add("sbin/kexec-load", read(f"{cache}/kexec-load"), 0o755)
    for path in sorted(needed):
        cpio.add(path, read(path), 0o755)

    release = os.path.basename(glob.glob(f"{cache}/kernel/boot/vmlinuz-*")[0]).removeprefix("vmlinuz-")
    with tempfile.TemporaryDirectory() as tmp:
        os.makedirs(f"{tmp}/lib/modules")
        full = f"{cache}/kernel/lib/modules/{release}"
        os.symlink(full, f"{tmp}/lib/modules/{release}")
        subprocess.run(["busybox", "depmod", "-b", tmp, release], check=True)
    chosen = with_dependencies(MODULES, full)
    base = f"lib/modules/{release}"
    for path in sorted(chosen):
        cpio.add(f"{base}/{path}", read(f"{full}/{path}"))
    keep = {os.path.basename(p).split(".ko")[0].replace("-", "_") for p in chosen}
    dep = "".join(line for line in open(f"{full}/modules.dep") if line.partition(":")[0] in chosen)
    cpio.add(f"{base}/modules.dep", dep.encode())
    alias = "".join(
        line for line in open(f"{full}/modules.alias") if line.split()[-1].replace("-", "_") in keep
    )
    cpio.add(f"{base}/modules.alias", alias.encode())
    cpio.close()
    return needed


def build_fio(out, have):
    build_programs(out, [which("fio")], have)


def build_programs(out, programs, have=frozenset()):
    """A layer with programs and their libraries."""
    cpio = Cpio(out)
    for program in programs:
        cpio.add(f"usr/bin/{os.path.basename(program)}", read(program), 0o755)
    for path in sorted(set().union(*map(libraries, programs)) - have):
        cpio.add(path, read(path), 0o755)
    cpio.close()


def add_scripts(out, folder):
    """The guest's init and the test scripts as a layer of their own."""
    cpio = Cpio(out)
    for name in sorted(os.listdir(folder)):
        cpio.add("init" if name == "init" else f"vt/{name}", read(f"{folder}/{name}"), 0o755)
    cpio.close()


def main(cache):
    with open(f"{cache}/base.cpio.new", "wb") as out:
        have = build_base(cache, out)
    with open(f"{cache}/fio.cpio.new", "wb") as out:
        build_fio(out, have)
    for name in ("base.cpio", "fio.cpio"):
        os.rename(f"{cache}/{name}.new", f"{cache}/{name}")


if __name__ == "__main__":
    main(sys.argv[1])
