"""From results.json to Markdown and plots."""

import os
from statistics import median

from . import plan, svg
from .plan import BACKING_TEXT, BACKINGS, BY_NAME, FIO, QSD, TEXT

HEAD = """# Benchmarks

Made by `make bench`; do not edit. Ratios first: they hold on other machines better than figures do.
"""

HOW = """## How to repeat

```
make bench            # all of it; says at the start how long it takes
make bench QUICK=1    # under 5 minutes, leaves this file alone
python3 integration/bench.py --help     # some backings, contenders or cells only
python3 integration/bench.py --report target/bench/results.json --write     # this file again
```

Needs Debian, root (zram, loop devices, a tmpfs mount) and some 5 GiB of disk. Nothing is pinned to a CPU.

- All daemons of a backing run at once, one of them works: each cell runs on every contender in turn, another one first in
  each round. A ratio is taken within a round; its median over the rounds is shown, and the least and the greatest in
  brackets.
- The generator is `vublk bench`, one thread on a driver of its own (the `virtio-driver` crate) that sleeps until it is
  interrupted, as a guest does. fio drives the same disk without a daemon, so its figures are a limit, not a contender.
- *CPU* is the daemon's CPU time for a million requests; kernel threads that work for all (block layer, loop device) are in
  nobody's account. fio's includes its generating the load.
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
        return {r: run[key] for r, run in self.runs.get((backing, cell, name), {}).items() if run[key] is not None}

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

    def backings(self):
        return [b for b in BACKINGS if any(key[0] == b for key in self.runs)]

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


def bars_text(r):
    rows, reached, known = [], 0, 0
    for what, where, ratio, target, least in bars(r):
        if ratio:
            known += 1
            good = ratio[0] >= target if least else ratio[0] <= target
            reached += good
        verdict = "not run" if not ratio else "yes" if good else "**no**"
        rows.append([what, where, spread(ratio), f"{'≥' if least else '≤'} {target:.2f}", verdict])
    text = f"## Bars\n\nvublkd with its default settings, unless it says otherwise. Reached: {reached} of {known}.\n\n"
    text += table(["what", "where", "ratio (least–greatest)", "bar", "reached"], rows)
    return text + "\nAllocations, instructions and system calls per request, and an idle daemon's cost, are not measured by this script.\n"


# --- tables ----------------------------------------------------------------------


def backing_text(r, backing, plots):
    names = [n for n in TEXT if any(k[0] == backing and k[2] == n and not BY_NAME[k[1]].purpose for k in r.runs)]
    cells = r.cells(backing)
    text = f"## {backing}\n\n{BACKING_TEXT[backing][0].upper()}{BACKING_TEXT[backing][1:]}.\n\n"
    for name, words in plots:
        text += f"![{words}]({name})\n\n"
    number = lambda v, scale=1.0: "–" if v is None else f"{v / scale:.1f}" if v / scale < 100 else f"{v / scale:.0f}"
    others = [n for n in names if n != "vublkd"]
    if "vublkd" in names and others:
        for key, words in (("iops", "IOPS, vublkd ÷ the other (more is better)"),
                           ("cpu", "CPU for a million requests, vublkd ÷ the other (less is better)")):
            rows = [[c.name, *(spread(r.ratio(backing, c.name, "vublkd", n, key)) for n in others)] for c in cells]
            text += f"{words}:\n\n" + table(["cell", *others], rows) + "\n"
    for key, words, scale in (("iops", "Thousand IOPS, medians", 1e3), ("cpu", "CPU seconds for a million requests, medians", 1),
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


# --- plots -----------------------------------------------------------------------


def points(r, backing, name, cells, key, scale=1.0):
    """[(x, median, least, greatest)] of one contender; `cells`: x -> cell."""
    found = []
    for x, cell in cells.items():
        values = [v / scale for v in r.values(backing, cell, name, key).values()]
        if values:
            found.append((x, median(values), min(values), max(values)))
    return found


def plot(r, backing, folder):
    """Writes the backing's figures; [(file, words)]"""
    names = [n for n in TEXT if n in svg.COLOURS]
    depths = (1, 4, 32, 128)
    figures = {"iops": [], "cpu": [], "latency": []}
    for rw, words in (("randread", "4k random read"), ("randwrite", "4k random write")):
        cells = {d: f"{rw}-4k-d{d}" for d in depths if r.have(backing, f"{rw}-4k-d{d}", *names)}
        if not cells:
            continue
        for key, unit, scale in (("iops", "thousand IOPS", 1e3), ("cpu", "CPU seconds for a million", 1)):
            lines = {n: got for n in names if (got := points(r, backing, n, cells, key, scale))}
            figures[key].append(svg.Panel(words, "requests in flight", unit, list(cells), lines))
    keys = {"p50": "p50_us", "p99": "p99_us", "p99.9": "p999_us"}
    for depth in (1, 32):
        cell = f"randread-4k-d{depth}"
        lines = {n: [p for x, key in keys.items() for p in points(r, backing, n, {x: cell}, key)]
                 for n in r.have(backing, cell, *names)}
        if lines:
            figures["latency"].append(
                svg.Panel(f"4k random read, depth {depth}", "percentile", "microseconds", list(keys), lines, log=True))
    titles = {"iops": "IOPS", "cpu": "CPU of the daemon", "latency": "latency"}
    written = []
    for kind, panels in figures.items():
        if panels:
            shown = {n: TEXT[n] for n in names if any(n in p.lines for p in panels)}
            path = f"{folder}/{backing}-{kind}.svg"
            with open(path, "w") as f:
                f.write(svg.figure(f"{backing}: {titles[kind]}", panels, shown))
            written.append((os.path.basename(path), f"{backing}: {titles[kind]}"))
    return written


def write(results, folder, notes, plots):
    """Writes FOLDER/BENCHMARKS.md and FOLDER/PLOTS/*.svg; the Markdown's path."""
    r = Results(results)
    os.makedirs(f"{folder}/{plots}", exist_ok=True)
    machine = [[key, str(value)] for key, value in results["machine"].items()]
    machine += [[f"{key} disks", value] for key, value in results["facts"].items()]
    minutes = f"{results['seconds'] / 60:.0f} min" if results["seconds"] >= 90 else f"{results['seconds']:.0f} s"
    machine.append(["runs", f"{len(results['runs'])} of {results['runtime']} s in {results['rounds']} rounds, {minutes}"
                    + ("" if results["complete"] else "; **stopped early**")])
    text = [HEAD, bars_text(r), "## Machine\n\n" + table(["", ""], machine)]
    text.append("Contenders: " + "; ".join(f"`{n}` {t}" for n, t in TEXT.items() if any(k[2] == n for k in r.runs)) + ".\n")
    text += [f"Note: {note}.\n" for note in results["notes"]]
    for backing in r.backings():
        made = [(f"{plots}/{name}", words) for name, words in plot(r, backing, f"{folder}/{plots}")]
        text.append(backing_text(r, backing, made).rstrip() + "\n")
    if os.path.exists(notes):
        with open(notes) as f:
            text.append("## What did not pay\n\n" + f.read().strip() + "\n")
    text.append(HOW)
    lines = [f"{key:22} {words}" for key, words in results["commands"].items()]
    text.append("The commands, each as it first ran:\n\n```\n" + "\n".join(lines) + "\n```\n")
    path = f"{folder}/BENCHMARKS.md"
    with open(path, "w") as f:
        f.write("\n".join(text))
    return path
