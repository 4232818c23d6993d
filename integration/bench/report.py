"""From results.json to Markdown and plots."""

import json
import os
import subprocess
from statistics import median

from vtest.core import Failed

from . import guest, plan, remote
from .plan import BACKING_TEXT, BACKINGS, BY_NAME, FIO, FIO_NBD, FIO_RBD, NBD, QSD, RBD, REMOTE, TEXT

HEAD = """# Benchmarks

Made by `make bench`; do not edit.
"""

HOW = """## How to repeat

```
make bench            # all of it; says at the start how long it takes
make bench QUICK=1    # under 5 minutes, leaves this file alone
python3 integration/bench.py --backings=nbd-unix,nbd-tcp    # disks of NBD servers alone
python3 integration/bench.py --backings=rbd    # images of a Ceph cluster alone
python3 integration/bench.py --help     # some backings, contenders or cells only
python3 integration/bench.py --report target/bench/results.json --write     # this file again
```

Needs Debian, root (zram, loop devices, a tmpfs mount, counting system calls), some 5 GiB of disk, 8 GiB of memory (the Ceph cluster's objects are in it),
Ceph, and matplotlib for the figures (python3-matplotlib); `make bench` installs both. Nothing is pinned to a CPU.

- All daemons of a backing run at once, one of them works: each cell runs on every contender in turn, another one first in
  each round. A ratio is taken within a round; its median over the rounds is shown, and the least and the greatest in
  brackets.
- The generator is `vublk bench`, one thread with a virtio-blk driver of its own that sleeps until it is interrupted, as a
  guest does. fio drives the same disk without a daemon, so its figures are a limit, not a contender.
- *CPU* is the daemon's CPU time for a million requests; kernel threads that work for all (block layer, loop device) are in
  nobody's account. fio's includes its generating the load.
- The offsets of a load come from a fixed seed, fio's and `vublk bench`'s. `vublk bench` has an in-flight region where the back-end offers one,
  as QEMU has.
- System calls are counted by bpftrace, in runs of their own.
- "Better" of two variants: the one whose median is better in that very cell.
- The zram disk is written anew before each round with data that compresses to half; the generators write such data as well.
"""


class Results:
    def __init__(self, results):
        self.raw, self.runs = results, {}
        for run in results["runs"]:
            self.runs.setdefault((run["backing"], run["cell"], run["contender"]), {})[run["round"]] = run

    def have(self, backing, cell, *names):
        return [n for n in names if (backing, cell, n) in self.runs]

    def values(self, backing, cell, name, key):
        return {r: run[key] for r, run in self.runs.get((backing, cell, name), {}).items() if run.get(key) is not None}

    def median(self, backing, cell, name, key):
        values = self.values(backing, cell, name, key)
        return median(values.values()) if values else None

    def better(self, backing, cell, names, key):
        """The variant with the better median; fewer is better for all but IOPS."""
        have = [n for n in names if self.median(backing, cell, n, key) is not None]
        pick = max if key == "iops" else min
        return pick(have, key=lambda n: self.median(backing, cell, n, key)) if have else None

    def ratio(self, backing, cell, name, other, key, other_cell=None):
        """(median, least, greatest) of the rounds' ratios, or None."""
        a, b = self.values(backing, cell, name, key), self.values(backing, other_cell or cell, other, key)
        found = [a[r] / b[r] for r in a if b.get(r)]
        return (median(found), min(found), max(found)) if found else None

    def against(self, backing, cell, names, key, name="vublkd"):
        other = self.better(backing, cell, names, key)
        return other and self.ratio(backing, cell, name, other, key)

    def backings(self, among=tuple(b for b in BACKINGS if b not in REMOTE)):
        return [b for b in among if any(key[0] == b for key in self.runs)]

    def cells(self, backing, purpose=""):
        return [c for c in plan.CELLS if c.purpose == purpose and any(k[:2] == (backing, c.name) for k in self.runs)]


def spread(ratio):
    if ratio is None:
        return "–"
    digits = lambda v: f"{v:.0f}" if v >= 99.5 else f"{v:.1f}" if v >= 9.95 else f"{v:.2f}"
    return f"{digits(ratio[0])} ({digits(ratio[1])}–{digits(ratio[2])})"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


# --- bars ------------------------------------------------------------------------


def bars(r):
    """(what, where, ratio or None, target, the ratio must be at least it)"""
    found = []
    bar = lambda what, where, ratio, target, least=True: found.append((what, where, ratio, target, least))
    d1, d32, w32 = "randread-4k-d1", "randread-4k-d32", "randwrite-4k-d32"
    for backing in ("zram", "tmpfs"):
        bar("IOPS against qemu-storage-daemon's better variant", f"{backing}, {d32}",
            r.against(backing, d32, QSD, "iops"), 4.0)
    for backing in ("zram", "tmpfs"):
        for cell in (d32, w32):
            bar("IOPS against bare fio's best", f"{backing}, {cell}", r.against(backing, cell, FIO, "iops"), 0.85)
    matrix = [(c.name, r.against("ext4", c.name, QSD, "iops")) for c in r.cells("ext4")]
    matrix = [(cell, ratio) for cell, ratio in matrix if ratio]
    if matrix:
        cell, worst = min(matrix, key=lambda m: m[1][0])
        middle = sorted(matrix, key=lambda m: m[1][0])
        what = "IOPS against qemu-storage-daemon's better variant"
        bar(f"{what}, worst cell", f"ext4, {cell}", worst, 0.95)
        whole = (median(m[1][0] for m in middle), middle[0][1][0], middle[-1][1][0])
        bar(f"{what}, median of {len(matrix)} cells", "ext4", whole, 1.3)
    bar("IOPS against qemu-storage-daemon's better variant", f"ext4, {w32}", r.against("ext4", w32, QSD, "iops"), 1.6)
    for cell in (d32, w32):
        bar("CPU per million against qemu-storage-daemon's better variant", f"zram, {cell}",
            r.against("zram", cell, QSD, "cpu"), 0.16, False)
    bar("p50 against qemu-storage-daemon's better variant", f"zram, {d1}", r.against("zram", d1, QSD, "p50_us"), 0.25, False)
    bar("the same with `--poll-us=0`", f"zram, {d1}", r.against("zram", d1, QSD, "p50_us", "vublkd-poll0"), 0.75, False)
    for cell in (d1, "randwrite-4k-d1"):
        bar("p50 against bare fio's best", f"ext4, {cell}", r.against("ext4", cell, FIO, "p50_us"), 1.2, False)
    for cell in (d1, d32):
        bar("p99.9 against qemu-storage-daemon's better variant", f"zram, {cell}",
            r.against("zram", cell, QSD, "p999_us"), 0.8, False)
    for backing in ("loop", "ext4"):
        for cell in ("read-4k-d32", "write-4k-d32"):
            bar("IOPS with plugging against without", f"{backing}, {cell}",
                r.ratio(backing, cell, "vublkd", "vublkd-plug-off", "iops"), 1.5)
    every = [(b, c, r.ratio(b, c.name, "vublkd", "stock", "iops")) for b in BACKINGS for c in r.cells(b)]
    every = [(b, c, ratio) for b, c, ratio in every if ratio]
    if every:
        b, c, worst = min(every, key=lambda e: e[2][0])
        bar(f"IOPS against the stock device, worst of {len(every)} cells", f"{b}, {c.name}", worst, 0.95)
        deep = [e for e in every if e[1].depth == 32 and e[1].queues == 1]
        for b, c, ratio in deep:
            bar("IOPS against the stock device", f"{b}, {c.name}", ratio, 1.5)
            bar("CPU per million against the stock device", f"{b}, {c.name}",
                r.ratio(b, c.name, "vublkd", "stock", "cpu"), 0.6, False)
    bar("IOPS, 64 queues × depth 4 against 1 × depth 256", "ext4, randread-4k",
        r.ratio("ext4", "randread-4k-d4-q64", "vublkd", "vublkd", "iops", "randread-4k-d256"), 0.9)
    return found


def bars_table(bars):
    """(the table, bars that are reached, bars that were measured)"""
    rows, reached, known = [], 0, 0
    for what, where, ratio, target, least in bars:
        if ratio:
            known += 1
            good = ratio[0] >= target if least else ratio[0] <= target
            reached += good
        verdict = "not run" if not ratio else "yes" if good else "**no**"
        rows.append([what, where, spread(ratio), f"{'≥' if least else '≤'} {target:.2f}", verdict])
    return table(["what", "where", "ratio (least–greatest)", "bar", "reached"], rows), reached, known


def bars_text(r):
    text, reached, known = bars_table(bars(r))
    text = f"## Bars\n\nvublkd with its default settings, unless it says otherwise. Reached: {reached} of {known}.\n\n" + text
    return text + ("\nAllocations and instructions per request, system calls per request on disks of this machine, and an idle daemon's cost, are "
                   "not measured by this script.\n")


# --- tables ----------------------------------------------------------------------


def backing_text(r, backing, plots, level="##"):
    names = [n for n in TEXT if any(k[0] == backing and k[2] == n and not BY_NAME[k[1]].purpose for k in r.runs)]
    cells = r.cells(backing)
    text = f"{level} {backing}\n\n{BACKING_TEXT[backing][0].upper()}{BACKING_TEXT[backing][1:]}.\n\n"
    text += "".join(f"{plot}\n" for plot in plots)
    number = lambda v, scale=1.0: "–" if v is None else f"{v / scale:.1f}" if v / scale < 100 else f"{v / scale:.0f}"
    others = [n for n in names if n != "vublkd"]
    own = backing in RBD
    if "vublkd" in names and others:
        for key, words in (("iops", "IOPS, vublkd ÷ the other (more is better)"),
                           *([("own_cpu", "CPU of its own threads for a million requests, vublkd ÷ the other (less is better)")] if own else []),
                           ("cpu", "CPU for a million requests, vublkd ÷ the other (less is better)")):
            rows = [[c.name, *(spread(r.ratio(backing, c.name, "vublkd", n, key)) for n in others)] for c in cells]
            text += f"{words}:\n\n" + table(["cell", *others], rows) + "\n"
    for key, words, scale in (("iops", "Thousand IOPS, medians", 1e3),
                              *([("own_cpu", "CPU seconds of its own threads for a million requests, medians", 1)] if own else []),
                              ("cpu", "CPU seconds for a million requests, medians", 1),
                              ("switches", "Sleeps of the daemon's threads for a request, medians", 1)):
        text += f"{words}:\n\n" + table(["cell", *names], [
            [c.name, *(f"{v:.2f}" if key == "switches" and v is not None else number(v, scale)
                       for v in (r.median(backing, c.name, n, key) for n in names))] for c in cells]) + "\n"
    rows = []
    for c in cells:
        if c.bs == 4096 and c.depth in (1, 32) and c.queues == 1:
            for key, words in (("p50_us", "p50"), ("p999_us", "p99.9")):
                rows.append([f"{c.name} {words}", *(number(r.median(backing, c.name, n, key)) for n in names)])
    if rows:
        text += "Latency in µs, medians:\n\n" + table(["cell", *names], rows) + "\n"
    special = r.cells(backing, "plug") + r.cells(backing, "scale")
    if special:
        rows = [[c.name, *(number(r.median(backing, c.name, n, "iops"), 1e3) for n in ("vublkd", "vublkd-plug-off"))]
                for c in special]
        text += "Thousand IOPS of cells that only vublkd runs, medians:\n\n" + table(["cell", "vublkd", "vublkd-plug-off"], rows) + "\n"
    return text


# --- disks of an NBD server ---------------------------------------------------------


def calls_of(r, backing, cell, name, key="calls"):
    """(median, least, greatest) for a request, or None."""
    found = [run[key] for run in r.raw.get("calls", []) if (run["backing"], run["cell"], run["contender"]) == (backing, cell, name)]
    return (median(found), min(found), max(found)) if found else None


def nbd_bars(r):
    """As `bars`, of one backing after another."""
    found = []
    bar = lambda what, where, ratio, target, least=True: found.append((what, where, ratio, target, least))
    for backing in r.backings(NBD):
        cells = [c for c in r.cells(backing) if c.bs == 4096 and c.queues == 1]
        for depth, target in ((32, 2.0), (1, 1.2)):
            for c in (c for c in cells if c.depth == depth):
                bar("IOPS against qemu-storage-daemon's better variant", f"{backing}, {c.name}", r.against(backing, c.name, QSD, "iops"), target)
        for c in cells:
            bar("CPU per million against qemu-storage-daemon's better variant", f"{backing}, {c.name}",
                r.against(backing, c.name, QSD, "cpu"), 0.6, False)
        for c in cells:
            bar("IOPS against fio's nbd engine", f"{backing}, {c.name}", r.against(backing, c.name, FIO_NBD, "iops"), 0.9)
        bar("IOPS against qemu-storage-daemon's better variant", f"{backing}, read-1m-d8", r.against(backing, "read-1m-d8", QSD, "iops"), 1.2)
        for cell in remote.COUNTED:
            bar("system calls for a request", f"{backing}, {cell}", calls_of(r, backing, cell, "vublkd"), 0.25, False)
    return found


def nbd_text(r, plot):
    backings = r.backings(NBD)
    if not backings:
        return ""
    text = ("## Disks of an NBD server\n\nAll contenders are connected to the same nbdkit, whose memory was written before. fio's nbd engine "
            "(libnbd) has the server to itself and no guest: a limit. vublkd has a connection for each worker, and with one queue one of them "
            "works; qemu-storage-daemon and each job of fio have one. The server, the load and the daemon share the CPUs.\n\n")
    text += f"{plot}\n" if plot else ""
    bars, reached, known = bars_table(nbd_bars(r))
    text += f"Reached: {reached} of {known} bars.\n\n{bars}\n"
    rows = [[backing, cell, *(spread(calls_of(r, backing, cell, name, key)) for name in remote.CONTENDERS for key in ("calls", "enters"))]
            for backing in backings for cell in remote.COUNTED if calls_of(r, backing, cell, "vublkd")]
    if rows:
        head = [words for name in remote.CONTENDERS for words in (name, f"{name}: io_uring_enter")]
        text += "System calls of the daemon for a request, all its threads:\n\n" + table(["disk", "cell", *head], rows) + "\n"
    return text + "\n".join(backing_text(r, backing, [], "###") for backing in backings)


def nbd_figure(r, folder, where):
    panels = [{**panel, "title": f"{backing}: {panel['title']}"} for backing in r.backings(NBD) for panel in over_depths(r, backing, PEERS)]
    if not panels:
        return None
    caption = f"nbdkit's memory plugin, one queue. {where}"
    return {"path": f"{folder}/nbd.svg", "alt": "Disks of an NBD server: I/O and CPU", "names": PEERS, "panels": panels, "caption": caption}


# --- images of a Ceph cluster -------------------------------------------------------


def rbd_bars(r):
    """As `bars`."""
    cells = [cell for cell in plan.RBD_CELLS if r.have("rbd", cell, "vublkd")]
    iops = [("IOPS against qemu-storage-daemon's better variant", f"rbd, {cell}", r.against("rbd", cell, QSD, "iops"), 1.1, True) for cell in cells]
    return iops + [("CPU of its own threads per million against qemu-storage-daemon's better variant", f"rbd, {cell}",
                    r.against("rbd", cell, QSD, "own_cpu"), 0.5, False) for cell in cells]


def rbd_text(r, plot):
    if not r.backings(RBD):
        return ""
    text = ("## Images of a Ceph cluster\n\nAll contenders use the same librbd, without its cache, and each has an image of its own in the same cluster, "
            "written before: none waits for the image's lock. The cluster runs on this machine, and its OSD keeps objects in memory, so "
            "that no drive is measured; on few cores that OSD takes most of the CPU, and what the contenders differ in is a small part of a "
            "request. fio's rbd engine has no guest and is a limit.\n\n"
            "A daemon's *own threads* are those that librbd did not start: qemu-storage-daemon's main thread and its iothread, vublkd's "
            "worker. The time in which they call librbd, to submit requests and to copy what is written, is in them. Of fio the time of its "
            "own threads alone is known; it includes generating the load.\n\n")
    text += f"{plot}\n" if plot else ""
    bars, reached, known = bars_table(rbd_bars(r))
    return text + f"Reached: {reached} of {known} bars.\n\n{bars}\n" + backing_text(r, "rbd", [], "###")


def rbd_figure(r, folder, where):
    panels = over_depths(r, "rbd", PEERS, ("own_cpu", "own CPU s for a million"))
    if not panels:
        return None
    caption = f"A Ceph cluster on this machine, objects in memory; own CPU: without librbd's threads. {where}"
    return {"path": f"{folder}/rbd.svg", "alt": "Images of a Ceph cluster: I/O and CPU", "names": PEERS, "panels": panels, "caption": caption}


# --- in a guest --------------------------------------------------------------------


def guest_text(results):
    found = results.get("guest")
    if not found:
        return ""
    text = ("## In a guest\n\n4k random reads by fio in an emulated VM (TCG) with one CPU, each contender a disk of it. The emulated CPU "
            "is the limit, so the figures are low, and only good for comparing these three with each other. CPU is that of QEMU's "
            "iothread, or of the daemon, in seconds for a million requests.\n\n")
    rows = []
    for backing in dict.fromkeys(run["backing"] for run in found):
        for depth in guest.DEPTHS:
            for name, words in guest.NAMES.items():
                runs = [r for r in found if (r["backing"], r["depth"], r["contender"]) == (backing, depth, name)]
                if runs:
                    middle = lambda key: median(r[key] for r in runs)
                    rows.append([backing, str(depth), words, f"{middle('iops'):,.0f}", f"{middle('mean_us'):.0f}", f"{middle('cpu'):.1f}"])
    return text + table(["disk", "depth", "contender", "IOPS", "mean µs", "CPU"], rows)


# --- plots -----------------------------------------------------------------------

HIGHER, LOWER = "higher", "lower"
# What is told apart in a figure: at most four.
PEERS = {"fio": "fio, no daemon", "vublkd": "vublkd", "qsd": "qemu-storage-daemon", "stock": "stock framework"}
MODES = ("vublkd", "vublkd-poll0", "vublkd-pin", "vublkd-threads")
DEPTHS = (1, 4, 32, 128)
DIRECTIONS = (("randread", "4k random read"), ("randwrite", "4k random write"))


def variant(r, backing, cell, name, key):
    """The contender that stands for a peer in a cell: of two variants the better one."""
    # psync has one request in flight, whatever the depth.
    fio = FIO_NBD if backing in NBD else FIO_RBD if backing in RBD else FIO[:1] if key.startswith("p") and BY_NAME[cell].depth > 1 else FIO
    variants = {"fio": fio, "qsd": QSD}.get(name, (name,))
    return r.better(backing, cell, variants, key)


def point(r, backing, cell, name, key, scale=1.0):
    """[median, least, greatest], or None."""
    name = variant(r, backing, cell, name, key)
    values = [v / scale for v in r.values(backing, cell, name, key).values()] if name else []
    return [median(values), min(values), max(values)] if values else None


def over_depths(r, backing, names, cpu=("cpu", "CPU s for a million")):
    panels = []
    for key, unit, scale, better in (("iops", "thousand IOPS", 1e3, HIGHER), (*cpu, 1, LOWER)):
        for rw, words in DIRECTIONS:
            found = {}
            for name in names:
                points = [[d, *p] for d in DEPTHS if (p := point(r, backing, f"{rw}-4k-d{d}", name, key, scale))]
                if points:
                    found[name] = points
            if found:
                panels.append({"title": words, "x": "requests in flight", "y": unit, "better": better, "log": True, "lines": found})
    return panels


def latencies(r, backing, names):
    panels = []
    for depth in (1, 32):
        cell, found = f"randread-4k-d{depth}", {}
        for name in names:
            keys = (("p50", "p50_us"), ("p99", "p99_us"), ("p99.9", "p999_us"))
            points = [[word, *p] for word, key in keys if (p := point(r, backing, cell, name, key))]
            if points:
                found[name] = points
        if found:
            panels.append({"title": f"4k random read, depth {depth}", "x": "percentile", "y": "microseconds", "better": LOWER, "log": True,
                           "lines": found})
    return panels


def first_figures(r, folder, where):
    """The two pictures of the first page: vublkd beside each peer, and its I/O through a kill and an upgrade."""
    made, cell = [], "randread-4k-d32"
    panels = []
    for key, unit, scale, better in (("iops", "thousand IOPS", 1e3, HIGHER), ("cpu", "CPU s for a million requests", 1, LOWER)):
        groups = {}
        for backing in ("tmpfs", "ext4"):
            found = {name: p for name in PEERS if (p := point(r, backing, cell, name, key, scale))}
            if found:
                groups[backing] = found
        if groups:
            panels.append({"title": "I/O" if key == "iops" else "CPU of the daemon", "y": unit, "better": better, "bars": groups})
    if panels:
        made.append({"path": f"{folder}/peers.svg", "alt": "I/O and CPU of each contender", "names": PEERS, "panels": panels,
                     "caption": f"4k random reads, 32 in flight, one queue; tmpfs: the CPU is the limit, ext4: the disk is. {where}"})
    lives = r.raw.get("lives")
    if lives:
        ours, theirs = lives["vublkd"], lives["qsd"]
        scaled = lambda points: [[at, iops / 1e3] for at, iops in points]
        # What has ended stays at nothing.
        theirs = scaled(theirs["points"]) + [[theirs["points"][-1][0] + 1e-3, 0], [scaled(ours["points"])[-1][0], 0]]
        marks = [[ours["kill"], "kill -9"], [ours["upgrade"], "upgrade (vublkd)"]]
        panel = {"title": "A back-end that is killed under its load", "x": "seconds", "y": "thousand IOPS", "better": HIGHER, "marks": marks,
                 "series": {"vublkd": scaled(ours["points"]), "qsd": theirs}}
        made.append({"path": f"{folder}/time.svg", "alt": "I/O over time, with a kill -9 and an upgrade", "names": PEERS, "panels": [panel], "columns": 1,
                     "caption": f"4k random reads, 32 in flight, {lives['backing']}, intervals of {lives['interval'] * 1e3:.0f} ms. {where}"})
    return made


def figures(r, folder, machine):
    """All of them: those of the first page, {backing: [figure]}, then the one of NBD servers and the one of Ceph, or None."""
    where = f"{machine['cores']} cores of {machine['CPU']}, {machine['kernel']}; bars and points are medians, whiskers the least and the greatest"
    first, by_backing = first_figures(r, folder, where), {}
    for backing in r.backings():
        caption = f"{BACKING_TEXT[backing]}. {where}"
        names = {**PEERS, **{n: TEXT[n] for n in MODES}}
        kinds = (("peers", "I/O and CPU", over_depths(r, backing, PEERS)), ("latency", "latency", latencies(r, backing, PEERS)),
                 ("modes", "modes of vublkd", over_depths(r, backing, MODES)))
        by_backing[backing] = [{"path": f"{folder}/{backing}-{kind}.svg", "alt": f"{backing}: {words}", "names": names, "panels": panels, "caption": caption}
                               for kind, words, panels in kinds if panels]
    return first, by_backing, nbd_figure(r, folder, where), rbd_figure(r, folder, where)


def draw(drawn):
    """Has them drawn by a Python that has matplotlib."""
    for python in ("/usr/bin/python3", "python3"):
        if subprocess.run([python, "-c", "import matplotlib"], capture_output=True).returncode == 0:
            done = subprocess.run([python, f"{os.path.dirname(os.path.abspath(__file__))}/plots.py"], input=json.dumps(drawn),
                                  text=True, capture_output=True)
            if done.returncode:
                raise Failed(f"the figures were not drawn: {done.stderr.strip().splitlines()[-1]}")
            return
    raise Failed("no Python here has matplotlib: apt-get install python3-matplotlib")


# --- the first page ----------------------------------------------------------------


def summary(r):
    """Where vublk stands, in a few sentences."""
    cell, said = "randread-4k-d32", []
    pair = lambda backing, key: r.against(backing, cell, QSD, key)
    if pair("tmpfs", "iops"):
        said.append(f"With 32 random reads of 4 KiB in flight on a disk in memory, where the CPU is the limit, vublkd does "
                    f"{pair('tmpfs', 'iops')[0]:.1f} times the I/O of qemu-storage-daemon with {pair('tmpfs', 'cpu')[0]:.2f} of its CPU time a request, "
                    f"and {r.against('tmpfs', cell, FIO, 'iops')[0]:.2f} of what fio reaches without any daemon.")
    if pair("ext4", "iops"):
        said.append(f"On a file on ext4, where the disk is the limit, it does {pair('ext4', 'iops')[0]:.2f} times the I/O with "
                    f"{pair('ext4', 'cpu')[0]:.2f} of the CPU time, and {r.against('ext4', cell, FIO, 'iops')[0]:.2f} of fio's.")
    if pair("nbd-unix", "iops"):
        said.append(f"On a disk of an NBD server on this host it does {pair('nbd-unix', 'iops')[0]:.1f} times the I/O with "
                    f"{pair('nbd-unix', 'cpu')[0]:.2f} of the CPU time.")
    if pair("rbd", "iops") and pair("rbd", "own_cpu"):
        said.append(f"On an image of a Ceph cluster on this host it does {pair('rbd', 'iops')[0]:.2f} times the I/O, its own threads with "
                    f"{pair('rbd', 'own_cpu')[0]:.2f} of the CPU time of qemu-storage-daemon's own.")
    lives = r.raw.get("lives")
    if lives:
        kill, upgrade = median(lives["kill_gaps_ms"]), median(lives["upgrade_gaps_ms"])
        told = lambda ms: f"{ms:.0f} ms" if ms else f"less than {2 * lives['interval'] * 1e3:.0f} ms"
        said.append(f"When it is killed with kill -9 in the middle of that load, no request ends for {told(kill)}, at an upgrade for {told(upgrade)}, "
                    "and then all go on where they were; the guest of a qemu-storage-daemon that is killed has no disk until the daemon is started anew.")
    return " ".join(said) + "\n"


def write(results, folder, notes, plots):
    """Writes FOLDER/BENCHMARKS.md and FOLDER/PLOTS/*.svg; the Markdown's path."""
    r = Results(results)
    os.makedirs(f"{folder}/{plots}", exist_ok=True)
    machine = [[key, str(value)] for key, value in results["machine"].items()]
    machine += [[f"{key} disks", value] for key, value in results["facts"].items()]
    minutes = f"{results['seconds'] / 60:.0f} min" if results["seconds"] >= 90 else f"{results['seconds']:.0f} s"
    machine.append(["runs", f"{len(results['runs'])} of {results['runtime']} s in {results['rounds']} rounds, {minutes}"
                    + ("" if results["complete"] else "; **stopped early**")])
    first, by_backing, nbd, rbd = figures(r, f"{folder}/{plots}", results["machine"])
    draw([*first, *(figure for some in by_backing.values() for figure in some), *filter(None, [nbd, rbd])])
    shown = lambda figure: f"![{figure['alt']}]({plots}/{os.path.basename(figure['path'])})\n"
    remotes = [chapter.rstrip() + "\n" for chapter in (nbd_text(r, nbd and shown(nbd)), rbd_text(r, rbd and shown(rbd))) if chapter]
    path = f"{folder}/BENCHMARKS.md"
    if not r.backings() and os.path.exists(path):
        return replace(path, remotes, table(["", ""], machine))
    text = [HEAD, summary(r), *map(shown, first), "Ratios hold on other machines better than figures do. A ratio is taken within a "
            "round of runs in which each contender has its turn; the tables have its median, and the least and the greatest in brackets.\n"]
    text.append("Contenders: " + "; ".join(f"`{n}` {t}" for n, t in TEXT.items() if any(k[2] == n for k in r.runs)) + ".\n")
    text.append("## Machine\n\n" + table(["", ""], machine))
    text += [f"Note: {note}.\n" for note in results["notes"]]
    text += filter(None, [guest_text(results)])
    for backing in r.backings():
        text.append(backing_text(r, backing, map(shown, by_backing[backing])).rstrip() + "\n")
    text += remotes
    text.append(bars_text(r))
    if os.path.exists(notes):
        with open(notes) as f:
            text.append("## What did not pay\n\n" + f.read().strip() + "\n")
    text.append(HOW)
    lines = [f"{key:22} {words}" for key, words in results["commands"].items()]
    text.append("The commands, each as it first ran:\n\n```\n" + "\n".join(lines) + "\n```\n")
    with open(path, "w") as f:
        f.write("\n".join(text))
    return path


def replace(path, chapters, machine):
    """Puts chapters of disks on other machines, which were measured alone, into an earlier report, before its bars."""
    with open(path) as f:
        text = f.read()
    for chapter in chapters:
        title, rest = chapter.split("\n", 1)
        chapter = f"{title}\n\nMeasured by itself:\n\n{machine}{rest}"
        if title in text:
            start = text.index(title)
            text = text[:start] + text[text.index("\n## ", start) + 1:]
        bars = text.index("## Bars\n")
        text = f"{text[:bars]}{chapter}\n{text[bars:]}"
    with open(path, "w") as f:
        f.write(text)
    return path
