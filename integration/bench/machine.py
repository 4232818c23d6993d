"""What the figures were measured on. No names of hosts."""

import os
import re
import subprocess

from vtest.core import REPO


def first(argv, pattern):
    """What a command's output says, or None."""
    try:
        out = subprocess.run(argv, capture_output=True, text=True, timeout=20).stdout
    except OSError:
        return None
    found = re.search(pattern, out)
    return found and found.group(1)


def describe():
    with open("/proc/cpuinfo") as f:
        cpu = f.read()
    with open("/proc/meminfo") as f:
        kib = int(re.search(r"MemTotal:\s+(\d+)", f.read()).group(1))
    git = ["git", "-C", REPO]
    changed = first([*git, "status", "--porcelain", "--untracked-files=no", "src", "Cargo.toml", "Cargo.lock"], "(.)")
    return {
        "CPU": re.search(r"model name\s*: (.*)", cpu).group(1),
        "cores": os.cpu_count(),
        "memory": f"{kib / (1 << 20):.0f} GiB",
        "virtualised": "yes" if re.search(r"^flags.*\bhypervisor\b", cpu, re.M) else "no",
        # The number without what the one who built it added.
        "kernel": "Linux " + re.match(r"[0-9.]+", os.uname().release).group(0).rstrip("."),
        "QEMU": first(["qemu-storage-daemon", "--version"], r"version (\S+)"),
        "fio": first(["fio", "--version"], r"fio-(\S+)"),
        "Rust": first(["rustc", "--version"], r"rustc (\S+)"),
        "vublk": (first([*git, "rev-parse", "--short=12", "HEAD"], r"(\w+)") or "no commit")
        + (" with changes" if changed else ""),
    }
