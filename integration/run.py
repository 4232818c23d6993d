"""Runs the guest tests, each case in a process of its own, two at a time.

A case that hangs, crashes or is interrupted cannot take others with it: the runner ends
it by its pid, and afterwards looks for loop devices it may have left.
"""

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from vtest import cases as _cases, host as _host, libvirt as _libvirt, lives as _lives, power as _power, remote as _remote  # they register themselves
from vtest.registry import CASES
from vtest.debian import CGROUPS, remove_cgroup
from vtest.core import BACKEND, CACHE, SCRATCH, VUBLKD, Case, Failed, Skipped


def interrupt(*_):
    raise KeyboardInterrupt


def child(name, tmp, logs):
    """Runs one case here; the verdict goes to a file, its logs stay."""
    signal.signal(signal.SIGTERM, interrupt)
    verdict, reason, facts = "FAIL", "interrupted", []
    try:
        with Case(name, tmp, logs) as case:
            try:
                CASES[name].run(case)
                verdict, reason = "PASS", ""
            finally:
                facts = case.facts
    except Failed as why:
        reason = str(why)
    except Skipped as why:
        verdict, reason = "SKIP", str(why)
    except KeyboardInterrupt:
        pass
    except Exception as why:
        with open(f"{logs}/case.log", "a") as log:
            traceback.print_exc(file=log)
        reason = f"{type(why).__name__}: {why}"
    with open(f"{tmp}/verdict", "w") as out:
        json.dump({"verdict": verdict, "reason": reason, "facts": facts}, out)


class Running:
    def __init__(self, name):
        self.name, self.start = name, time.monotonic()
        self.logs = f"{CACHE}/logs/{name}"
        shutil.rmtree(self.logs, ignore_errors=True)
        os.makedirs(self.logs)
        self.tmp = tempfile.mkdtemp(prefix=f"vublk-{name}.", dir=SCRATCH)
        self.deadline = self.start + CASES[name].timeout
        # A session of its own: ^C reaches only the runner, which ends its cases in order.
        self.popen = subprocess.Popen(
            [sys.executable, __file__, "--child", name, self.tmp, self.logs], start_new_session=True
        )
        self.pidfd = os.pidfd_open(self.popen.pid)

    def stop(self, number):
        if self.popen.poll() is None:
            os.kill(self.popen.pid, number)

    def close(self):
        """Waits for the process, removes what is left, and returns the verdict."""
        status = self.popen.wait()
        os.close(self.pidfd)
        try:
            result = json.load(open(f"{self.tmp}/verdict"))
        except (OSError, ValueError):
            result = {"verdict": "FAIL", "reason": f"the case's process ended with {status}", "facts": []}
        self.sweep()
        result["seconds"] = time.monotonic() - self.start
        return result

    def sweep(self):
        """What a case that was killed outright could not take away itself."""
        with open("/proc/self/mounts") as mounts:
            for path in [line.split()[1] for line in mounts]:
                if path.startswith(self.tmp + "/"):
                    subprocess.run(["umount", "-ql", path])
        listing = subprocess.run(["losetup", "-n", "-O", "NAME,BACK-FILE"], capture_output=True, text=True).stdout
        for line in listing.splitlines():
            node, _, path = line.strip().partition(" ")
            if path.strip().startswith(self.tmp + "/"):
                # One that is being detached already is listed until it is gone.
                subprocess.run(["losetup", "-d", node], stderr=subprocess.DEVNULL)
        for tree in CGROUPS:
            for entry in os.scandir(tree):
                if entry.name.startswith(f"{os.path.basename(self.tmp)}."):
                    remove_cgroup(entry.path)
        shutil.rmtree(self.tmp, ignore_errors=True)


def report(run, result):
    facts = f"  {'; '.join(result['facts'])}" if result["facts"] else ""
    name, verdict = run.name, result["verdict"]
    if verdict == "PASS":
        print(f"PASS {name} {result['seconds']:.1f}s{facts}", flush=True)
    elif verdict == "SKIP":
        print(f"SKIP {name}: {result['reason']}", flush=True)
    else:
        print(f"FAIL {name} {result['reason']} (log: {os.path.relpath(run.logs)})", flush=True)


def lost_a_timer(run):
    """Whether a guest's kernel has said so, as it does under emulation once in some hundred boots."""
    for log in (entry for entry in os.scandir(run.logs) if entry.name.endswith(".serial")):
        with open(log.path, errors="replace") as text:
            if "Possible timer handling issue on cpu" in text.read():
                return True
    return False


def run_all(names, jobs):
    waiting, running, again, count = list(names), [], set(), {"PASS": 0, "FAIL": 0, "SKIP": 0}

    def startable():
        """The next case that gets on with those that run."""
        if len(running) >= jobs or any(CASES[r.name].alone for r in running):
            return None
        for name in waiting:
            if not (CASES[name].alone and running):
                return name
        return None

    def collect(run):
        running.remove(run)
        result = run.close()
        if time.monotonic() > run.deadline and result["verdict"] != "PASS":
            result["reason"] = f"over its time limit of {CASES[run.name].timeout} s: {result['reason']}"
        if result["verdict"] == "FAIL" and run.name not in again and lost_a_timer(run):
            # Without a timer the guest's kernel waits for ever, whatever its disk does. Twice is no coincidence.
            again.add(run.name)
            waiting.append(run.name)
            kept = f"{run.logs}.lost-timer"
            shutil.rmtree(kept, ignore_errors=True)
            os.rename(run.logs, kept)
            print(f"AGAIN {run.name} {result['reason']}: the emulated CPU lost a timer (log: {os.path.relpath(kept)})", flush=True)
            return
        count[result["verdict"]] += 1
        report(run, result)

    try:
        while waiting or running:
            while (name := startable()) is not None:
                waiting.remove(name)
                running.append(Running(name))
            poll = select.poll()
            for run in running:
                poll.register(run.pidfd, select.POLLIN)
            nearest = min(run.deadline for run in running) - time.monotonic()
            poll.poll(max(nearest, 0) * 1000 + 1)
            for run in list(running):
                if run.popen.poll() is not None:
                    collect(run)
                elif time.monotonic() > run.deadline + 15:
                    run.stop(signal.SIGKILL)
                    run.popen.wait()
                    collect(run)
                elif time.monotonic() > run.deadline:
                    # It gets a while to clean up.
                    run.stop(signal.SIGTERM)
                    end = select.poll()
                    end.register(run.pidfd, select.POLLIN)
                    end.poll(15000)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for run in running:
            run.stop(signal.SIGTERM)
        for run in running:
            end = select.poll()
            end.register(run.pidfd, select.POLLIN)
            if not end.poll(15000):
                run.stop(signal.SIGKILL)
            run.close()
        print("interrupted", flush=True)
        return 130
    print(f"{count['PASS']} passed, {count['FAIL']} failed, {count['SKIP']} skipped", flush=True)
    return 1 if count["FAIL"] else 0


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description="Guest tests of vublkd; BACKEND=qsd runs them on qemu-storage-daemon.")
    parser.add_argument("case", nargs="*", help="names of cases; none: the subset")
    parser.add_argument("--list", action="store_true", help="list the cases; * marks the subset")
    parser.add_argument("--subset", action="store_true", help="the representative half that `make test` runs")
    parser.add_argument("--all", action="store_true", help="every case")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (2)")
    options = parser.parse_args()
    if options.list:
        for case in CASES.values():
            print(f"{'*' if case.subset else ' '} {case.name:18} {case.text}")
        return 0
    names = options.case or [c.name for c in CASES.values() if options.all or c.subset]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no such case: {' '.join(unknown)} (--list shows all)")
    if BACKEND == "vublkd" and not os.access(VUBLKD, os.X_OK):
        parser.error(f"{VUBLKD} is not there: cargo build --release")
    signal.signal(signal.SIGTERM, interrupt)
    return run_all(names, max(options.jobs, 1))


if __name__ == "__main__":
    sys.exit(main())
