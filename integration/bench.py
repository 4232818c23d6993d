"""`make bench`: vublkd beside what a user would pick instead, and beside no daemon at all.

For each backing of a round, every contender's daemon is started; then each cell runs on all
of them in turn, so that whatever the machine does besides hits all alike. Ratios are taken
within a round, and their median over the rounds. The null engine's disk is never touched.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from bench import disks, guest, lives, machine, plan, rbd, remote, report
from vtest.core import REPO, SCRATCH, Backend, Case, Failed, Process, die_with_parent, last_line

# Seconds that a run, a daemon and a round's zram disk take besides; for the estimate.
OVERHEAD = {"fio": 0.7, "other": 0.1}
START, FILL = 0.15, 4.0


class Daemon(Process):
    """One contender serving one disk."""

    await_socket, listens = Backend.await_socket, Backend.listens

    def __init__(self, case, contender, disk, backing, name):
        self.socket = f"{case.tmp}/{name}.sock"
        argv = plan.daemon_argv(contender, disk, self.socket, backing)
        super().__init__(case, contender.name, argv, f"{case.logs}/{name}.log")
        self.argv = argv
        self.await_socket(20)

    def finish(self):
        if self.reap():
            raise Failed(f"{self.what} died with {self.status}: {last_line(self.log)}")
        self.end()


def run(argv, seconds):
    """A load generator; what it printed. It has a process group of its own, and none of it outlives the call."""
    p = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         start_new_session=True, preexec_fn=die_with_parent)
    try:
        out, err = p.communicate(timeout=seconds + 60)
    except subprocess.TimeoutExpired:
        raise Failed(f"{os.path.basename(argv[0])} did not end within {seconds + 60:.0f} s") from None
    finally:
        if p.poll() is None:
            os.killpg(p.pid, signal.SIGKILL)
            p.communicate()
    if p.returncode:
        said = [line for line in err.splitlines() if line.strip()]
        raise Failed(f"{' '.join(argv)}\n  ended with {p.returncode}: {said[-1] if said else '(nothing said)'}")
    return out


def from_bench(out):
    r = json.loads(out)
    return {"iops": r["iops"], "mb_per_s": r["mb_per_s"], "mean_us": r["mean_us"], "p50_us": r["p50_us"],
            "p99_us": r["p99_us"], "p999_us": r["p999_us"], "cpu": r["backend_cpu_s_per_million"],
            "switches": r["backend_switches_per_request"]}


def from_fio(out):
    (job,) = json.loads(out[out.index("{") :])["jobs"]
    if job["error"]:
        raise Failed(f"fio reports error {job['error']}")
    mixed = job["mixed"]
    n, latency = max(mixed["total_ios"], 1), mixed["lat_ns"]
    at = lambda p: latency["percentile"][p] / 1e3
    cpu = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3
    return {"iops": mixed["iops"], "mb_per_s": mixed["bw_bytes"] / 1e6, "mean_us": latency["mean"] / 1e3,
            "p50_us": at("50.000000"), "p99_us": at("99.000000"), "p999_us": at("99.900000"),
            "cpu": cpu / n * 1e6, "switches": job["ctx"] / n}


def series(backings, contenders, cells):
    """[(backing, [(cell, [contender])])] of a round, without what nobody runs."""
    found = []
    for backing in backings:
        rows = [(cell, [c for c in contenders if c.runs(cell, backing)]) for cell in cells]
        rows = [row for row in rows if row[1]]
        if rows:
            found.append((backing, rows))
    return found


class Bench:
    def __init__(self, case, options, work, disks_, results):
        self.case, self.options, self.work, self.disks, self.results = case, options, work, disks_, results
        self.total = options.rounds * sum(len(cs) for _, rows in work for _, cs in rows)
        self.first = self.done = len(results["runs"])
        self.start = time.monotonic()

    def round(self, n):
        for backing, rows in self.work:
            disk = self.disks[backing]
            disk.prepare()
            who = list({c.name: c for _, cs in rows for c in cs}.values())
            daemons = {c.name: Daemon(self.case, c, disk.of(c.name), backing, f"r{n}-{backing}-{c.name}")
                       for c in who if c.kind != "fio"}
            for cell, contenders in rows:
                # Another one goes first in each round.
                for i in range(len(contenders)):
                    self.one(n, backing, disk, cell, contenders[(i + n) % len(contenders)], daemons)
            for daemon in daemons.values():
                daemon.finish()
            self.case.processes.clear()

    def one(self, n, backing, disk, cell, contender, daemons):
        seconds = self.options.runtime
        try:
            if contender.kind == "fio":
                argv = plan.fio_argv(contender, cell, disk.of(contender.name), seconds)
                found = from_fio(run(argv, seconds))
                if backing in plan.RBD:  # what fio tells is without the threads of the library
                    found["own_cpu"], found["cpu"] = found["cpu"], None
            else:
                daemon = daemons[contender.name]
                self.remember(f"serve {contender.name}", daemon.argv)
                argv = plan.bench_argv(cell, daemon.socket, seconds)
                threads = rbd.Threads(daemon.pid, seconds) if backing in plan.RBD else None
                found = from_bench(self.load(contender, cell, argv, seconds))
                if threads:
                    found["own_cpu"] = threads.share() * found["cpu"]
                if daemon.reap():
                    raise Failed(f"the daemon died with {daemon.status}: {last_line(daemon.log)}")
        except Failed as why:
            raise Failed(f"round {n + 1}, {backing}, {cell.name}, {contender.name}: {why}") from None
        self.remember(f"load {'' if contender.kind != 'fio' else contender.name}".strip(), argv)
        self.results["runs"].append(
            {"round": n, "backing": backing, "cell": cell.name, "contender": contender.name, **found})
        self.done += 1
        left = (time.monotonic() - self.start) / (self.done - self.first) * (self.total - self.done)
        print(f"[{self.done:4}/{self.total} {left / 60:4.1f} min left] round {n + 1} {backing:5} {cell.name:17} "
              f"{contender.name:15} {found['iops'] / 1e3:8.1f} kIOPS  p50 {found['p50_us']:8.1f} us  "
              f"p99.9 {found['p999_us']:8.1f}  cpu {found['cpu'] or 0:6.2f} s/M", flush=True)

    def load(self, contender, cell, argv, seconds):
        """Another's daemon that fails once is tried again, and the report says so; ours may not fail."""
        try:
            return run(argv, seconds)
        except Failed as why:
            if contender.name.startswith("vublkd"):
                raise
            said = str(why).splitlines()[-1].strip()
            self.results["notes"].append(f"{contender.name} failed in {cell.name} and was run again: {said}")
            return run(argv, seconds)

    def remember(self, key, argv):
        """An example of each command, for the report."""
        if key not in self.results["commands"]:
            words = [os.path.basename(argv[0]), *argv[1:]]
            self.results["commands"][key] = " ".join(words).replace(self.case.tmp, "$TMP")


def save(results, out):
    with open(f"{out}/results.json.new", "w") as f:
        json.dump(results, f, indent=1)
    os.replace(f"{out}/results.json.new", f"{out}/results.json")


def bench(case, options, contenders, notes):
    work = series(options.backings, contenders, options.cells)
    if not work:
        raise Failed("no contender runs these cells on these backings")
    count = {kind: sum((c.kind == "fio") == (kind == "fio") for _, rows in work for _, cs in rows for c in cs)
             for kind in OVERHEAD}
    daemons = sum(len({c.name for _, cs in rows for c in cs if c.kind != "fio"}) for _, rows in work)
    estimate = options.rounds * (sum(n * (options.runtime + OVERHEAD[kind]) for kind, n in count.items())
                                 + daemons * START + FILL) + 3 * FILL
    print(f"bench: {options.rounds} rounds × {sum(count.values())} runs of {options.runtime} s, "
          f"about {estimate / 60:.0f} min", flush=True)
    start, facts = time.monotonic(), {}
    made = disks.make(case, [backing for backing, _ in work], facts)
    results = {"machine": machine.describe(), "facts": facts, "notes": notes, "rounds": options.rounds,
               "runtime": options.runtime, "complete": False, "commands": {}, "runs": [], "seconds": 0}
    if options.resume:
        results = resumed(options, results)
    b = Bench(case, options, work, made, results)
    before, first = results["seconds"], len({run["round"] for run in results["runs"]})
    for n in range(first, options.rounds):
        b.round(n)
        results["seconds"] = before + time.monotonic() - start
        results["complete"] = n + 1 == options.rounds
        save(results, options.out)
    if not options.before:
        serve = lambda *args: Daemon(case, *args)
        shown = {name: made[name] for name in ("ext4", "tmpfs") if name in made}
        if shown and not options.quick:
            results["guest"] = guest.measure(case, serve, shown, min(options.rounds, 3), 3)
        fast = next((name for name in ("tmpfs", "zram", "ext4") if name in made), None)
        if fast:
            results["lives"] = lives.measure(case, serve, made[fast], fast, options.rounds)
        exports = {name: made[name] for name in plan.NBD if name in made}
        if exports and not options.quick:
            results["calls"] = remote.count(serve, exports, run, min(options.rounds, 3))
        save(results, options.out)
    print(f"bench: {b.done} runs in {results['seconds'] / 60:.1f} min, in {os.path.relpath(options.out)}/results.json")
    return results


def resumed(options, fresh):
    """The whole rounds of an earlier run of the same programs on the same machine."""
    with open(f"{options.out}/results.json") as f:
        earlier = json.load(f)
    for what in ("machine", "rounds", "runtime"):
        if earlier[what] != fresh[what]:
            raise Failed(f"{options.out}/results.json is of another {what}: {earlier[what]}, not {fresh[what]}")
    return earlier


def names(text, known, parser, what):
    picked = [word for word in text.split(",") if word]
    for word in picked:
        if word not in known:
            parser.error(f"no such {what}: {word} (there are {', '.join(known)})")
    return [word for word in known if word in picked]


def parse():
    parser = argparse.ArgumentParser(description="vublkd beside qemu-storage-daemon, a device on the stock framework, "
                                     "and fio without a daemon. Needs root for all backings but ext4, null and rbd.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, cells and backings, in under 5 minutes")
    parser.add_argument("--backings", help=f"some of {','.join(plan.BACKINGS)}")
    parser.add_argument("--contenders", help=f"some of {','.join(plan.TEXT)}")
    parser.add_argument("--cells", help="a regular expression; cells are named like randread-4k-d32-q2")
    parser.add_argument("--rounds", type=int, help="rounds (5)")
    parser.add_argument("--runtime", type=float, help="seconds of a run (0.8)")
    parser.add_argument("--out", default=f"{REPO}/target/bench", help="folder for results.json and the daemons' logs")
    parser.add_argument("--resume", action="store_true", help="go on with the rounds that OUT/results.json has not")
    parser.add_argument("--before", metavar="VUBLKD", help="compare this vublkd with that one, in nothing else")
    parser.add_argument("--write", action="store_true", help="write BENCHMARKS.md and docs/bench/*.svg, not OUT/; with backings on other machines alone, their chapters of it")
    parser.add_argument("--report", metavar="RESULTS", help="only make the report again, from a results.json")
    options = parser.parse_args()
    quick = options.quick
    options.rounds = max(options.rounds or (2 if quick else 5), 1)
    options.runtime = options.runtime or (0.3 if quick else 0.8)
    options.backings = names(options.backings, plan.BACKINGS, parser, "backing") if options.backings else (
        plan.QUICK_BACKINGS if quick else plan.BACKINGS)
    options.contenders = names(options.contenders or ",".join(plan.TEXT), list(plan.TEXT), parser, "contender")
    pattern = re.compile(options.cells or (plan.QUICK_CELLS if quick else ""))
    options.cells = [cell for cell in plan.CELLS if pattern.search(cell.name)]
    options.out = os.path.abspath(options.out)
    if not options.report:
        if os.geteuid() != 0 and set(options.backings) - {"ext4", "null", "rbd"}:
            parser.error("zram, tmpfs and loop disks, and counting the system calls on an NBD server's, need root; --backings=ext4,null,rbd does not")
        for path in (plan.VUBLKD, plan.VUBLK, plan.STOCK):
            if not os.access(path, os.X_OK):
                parser.error(f"{path} is not there: cargo build --release --bins --example stock")
    return options


def compare(results):
    """This vublkd against the one before: medians over the rounds of what a round says, the worst cell first."""
    pairs = {}
    for run in results["runs"]:
        pairs.setdefault((run["backing"], run["cell"]), {}).setdefault(run["round"], {})[run["contender"]] = run
    rows = []
    for (backing, cell), rounds in pairs.items():
        ratios = lambda what: statistics.median(r["vublkd"][what] / max(r[plan.BEFORE][what] or 0, 1e-9) for r in rounds.values())
        rows.append((ratios("iops"), ratios("cpu"), ratios("p50_us"), ratios("p999_us"), backing, cell))
    print(f"{'backing':8} {'cell':18} {'IOPS':>7} {'CPU':>7} {'p50':>7} {'p99.9':>7}   (this one / the one before)")
    for iops, cpu, p50, p999, backing, cell in sorted(rows):
        print(f"{backing:8} {cell:18} {iops:7.3f} {cpu:7.3f} {p50:7.3f} {p999:7.3f}")


def interrupt(*_):
    raise KeyboardInterrupt


def main():
    options = parse()
    # Also SIGINT: what a shell starts in the background ignores it otherwise.
    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    os.makedirs(options.out, exist_ok=True)
    try:
        if options.report:
            with open(options.report) as f:
                results = json.load(f)
        else:
            contenders, notes = plan.available([c for c in plan.CONTENDERS if c.name in options.contenders])
            if options.before:
                before = plan.Contender(plan.BEFORE, "an earlier vublkd", "vublkd", program=options.before)
                contenders = [c for c in contenders if c.name == "vublkd"] + [before]
            for note in notes:
                print(f"bench: {note}", flush=True)
            with tempfile.TemporaryDirectory(prefix="vublk-bench.", dir=SCRATCH) as tmp:
                with Case("bench", tmp, options.out) as case:
                    results = bench(case, options, contenders, notes)
        if options.before and not options.report:
            compare(results)
            return 0
        written = report.write(results, REPO if options.write else options.out, f"{REPO}/integration/bench/notes.md",
                               plots="docs/bench" if options.write else "plots")
        print(f"bench: {os.path.relpath(written)} written")
    except Failed as why:
        print(f"bench: FAILED: {why}\n       logs in {options.out}", flush=True)
        return 1
    except KeyboardInterrupt:
        print("bench: stopped", flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
