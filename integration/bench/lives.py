"""A load over time: vublkd is killed (kill -9) under it, then upgraded; qemu-storage-daemon is killed at the same moment.

vublkd runs as people run it, under its parent, and the load has an in-flight region, as QEMU gives one. Nothing is told to the
load: what it shows is what a guest would see.
"""

import json
import os
import signal
import subprocess
import time

from vtest.core import Failed, Process, die_with_parent

from . import plan

INTERVAL, RUNTIME, KILL, UPGRADE = 0.01, 3.0, 1.0, 2.0
CELL = "randread-4k-d32"


class Life:
    """A load, and what is done to its back-end."""

    def __init__(self, socket, seconds):
        cell = plan.BY_NAME[CELL]
        argv = plan.bench_argv(cell, socket, seconds) + [f"--interval={INTERVAL}"]
        self.points, self.failed = [], None
        self.popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                      preexec_fn=die_with_parent)
        # The load's time begins with its first interval, not with its process.
        self.take(self.popen.stdout.readline())
        self.start = time.monotonic() - (self.points[0][0] if self.points else 0)

    def take(self, line):
        told = json.loads(line) if line.strip() else {}
        if "seconds" in told:
            self.points.append([round(told["seconds"], 4), told["iops"]])

    def sleep_until(self, moment):
        time.sleep(max(self.start + moment - time.monotonic(), 0))
        return time.monotonic() - self.start

    def finish(self):
        out, err = self.popen.communicate(timeout=RUNTIME + 90)
        for line in out.splitlines():
            self.take(line)
        if self.popen.returncode:
            self.failed = err.strip().splitlines()[-1] if err.strip() else f"status {self.popen.returncode}"
        return self.points

    def end(self):
        if self.popen.poll() is None:
            self.popen.kill()
            self.popen.communicate()


def gap(points, after):
    """Milliseconds without a completion, from the first interval after a moment in which nothing ended."""
    quiet = 0
    for at, iops in points:
        if at >= after and iops == 0:
            quiet += 1
        elif quiet and at >= after:
            break
    return quiet * INTERVAL * 1e3


def status(socket):
    told = subprocess.run([plan.VUBLK, "status", "--json", socket], capture_output=True, text=True, timeout=20)
    if told.returncode:
        raise Failed(f"vublk status: {told.stderr.strip()}")
    return json.loads(told.stdout)


def vublkd(case, disk, number):
    socket = f"{case.tmp}/life{number}.sock"
    argv = [plan.VUBLKD, f"--socket-path={socket}", f"--blk-file={disk.path}", "--lock=off", "--log-level=warn"]
    parent = Process(case, "vublkd", argv, f"{case.logs}/life-vublkd{number}.log")
    deadline = time.monotonic() + 20
    while not os.path.exists(f"{socket}.control"):
        if parent.reap() or time.monotonic() > deadline:
            raise Failed("vublkd did not start")
        time.sleep(0.01)
    life = Life(socket, RUNTIME)
    try:
        life.sleep_until(KILL)
        victim = status(socket)["pid"]
        killed = time.monotonic() - life.start
        os.kill(victim, signal.SIGKILL)
        upgraded = life.sleep_until(UPGRADE)
        done = subprocess.run([plan.VUBLK, "upgrade", socket], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise Failed(f"vublk upgrade: {done.stderr.strip()}")
        points = life.finish()
    finally:
        life.end()
    parent.end()
    if life.failed:
        raise Failed(f"the load on vublkd failed: {life.failed}")
    return {"points": points, "kill": killed, "upgrade": upgraded, "kill_gap_ms": gap(points, killed),
            "upgrade_gap_ms": gap(points, upgraded)}


def qsd(case, serve, disk, backing, number):
    daemon = serve(next(c for c in plan.CONTENDERS if c.name == "qsd"), disk, backing, f"life{number}-qsd")
    daemon.expected = True
    life = Life(daemon.socket, RUNTIME)
    try:
        killed = life.sleep_until(KILL)
        daemon.signal(signal.SIGKILL)
        points = life.finish()
    finally:
        life.end()
    return {"points": points, "kill": killed, "said": life.failed}


def measure(case, serve, disk, backing, rounds):
    """Of each contender the life whose gap after the kill is the median."""
    ours = sorted((vublkd(case, disk, n) for n in range(rounds)), key=lambda life: life["kill_gap_ms"])
    theirs = qsd(case, serve, disk, backing, 0)
    found = {"backing": backing, "interval": INTERVAL, "vublkd": ours[len(ours) // 2], "qsd": theirs,
             "kill_gaps_ms": [life["kill_gap_ms"] for life in ours],
             "upgrade_gaps_ms": sorted(life["upgrade_gap_ms"] for life in ours)}
    print(f"bench: over time: {backing}: nothing ended for {found['kill_gaps_ms']} ms after a kill -9, "
          f"{found['upgrade_gaps_ms']} ms at an upgrade; qemu-storage-daemon: {theirs['said']}", flush=True)
    return found
