"""Disks of an NBD server: for each way to reach it one nbdkit with its memory plugin, to which all contenders are connected.

Its memory is written before the first round: reading what was never written costs a server nothing.
"""

import json
import select
import signal
import socket
import subprocess
import time

from vtest.core import Failed, Process, die_with_parent, last_line

from . import plan

SIZE = "1G"
# System calls are counted in these cells, for so many seconds, of these contenders.
COUNTED = ("randread-4k-d32", "randwrite-4k-d32")
SECONDS = 1.0
CONTENDERS = ("qsd", "vublkd")
# On x86-64 and everywhere else.
IO_URING_ENTER = 426


class Export:
    """What an nbdkit serves. Its `path` is the URI, `qemu` says the same to QEMU."""

    block = 512

    def __init__(self, case, name):
        if name == "nbd-unix":
            where = f"{case.tmp}/{name}.sock"
            self.path, self.qemu = f"nbd+unix:///?socket={where}", f"driver=nbd,server.type=unix,server.path={where}"
            family, address, listen = socket.AF_UNIX, where, ["-U", where]
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = free.getsockname()
            host, port = address
            self.path, self.qemu = f"nbd://{host}:{port}", f"driver=nbd,server.type=inet,server.host={host},server.port={port}"
            family, listen = socket.AF_INET, ["-i", host, "-p", str(port)]
        self.fio_program, self.fio = ["fio"], ["--ioengine=nbd", f"--uri={self.path}"]
        self.argv = ["nbdkit", "--foreground", *listen, "memory", SIZE]
        self.server = Process(case, "nbdkit", self.argv, f"{case.logs}/{name}.log")
        case.processes.remove(self.server)  # which are those of a round
        self.await_server(family, address)
        fill(self, SIZE)

    def of(self, _contender):
        return self

    def facts(self):
        """What the server can do, for the report."""
        told = subprocess.run([plan.VUBLK, "inspect", "--json", self.path], capture_output=True, text=True, timeout=20)
        if told.returncode:
            raise Failed(f"vublk inspect {self.path}: {told.stderr.strip()}")
        said = json.loads(told.stdout)
        version = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True, timeout=20).stdout.split()[1]
        replies = "structured" if said["structured_replies"] else "simple"
        return f"nbdkit {version}, memory plugin, {SIZE}, {replies} replies, {'multi-conn' if said['multi_conn'] else 'no multi-conn'}"

    def await_server(self, family, address):
        deadline = time.monotonic() + 20
        while True:
            with socket.socket(family) as client:
                if client.connect_ex(address) == 0:
                    return
            self.prepare()
            if time.monotonic() > deadline:
                raise Failed("nbdkit does not listen after 20 s")
            time.sleep(0.01)

    def prepare(self):
        """Before a round."""
        if self.server.reap():
            raise Failed(f"nbdkit ended with {self.server.status}: {last_line(self.server.log)}")


def fill(disk, size):
    argv = [*disk.fio_program, "--name=fill", *disk.fio, "--rw=write", "--bs=1m", "--iodepth=4", f"--size={size}",
            "--buffer_compress_percentage=50", "--refill_buffers"]
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    if done.returncode:
        raise Failed(f"fio cannot fill {disk.path}: {done.stdout.strip().splitlines()[-1]}")


class Counter:
    """bpftrace, which counts the system calls of a process by their number."""

    # It prints once its probes are there, which takes it a second or so. They are in tracefs, which may not be mounted.
    PROGRAM = 'tracepoint:raw_syscalls:sys_enter /pid == %d/ { @[args->id] = count(); } interval:ms:20 { printf("counts\\n"); }'
    SCRIPT = 'mount -t tracefs tracefs /sys/kernel/tracing 2>/dev/null; exec bpftrace -f json -e "$1"'

    def __init__(self, pid):
        self.popen = subprocess.Popen(["unshare", "--mount", "sh", "-c", self.SCRIPT, "sh", self.PROGRAM % pid], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=die_with_parent)
        deadline = time.monotonic() + 60
        while '"printf"' not in (line := self.line(deadline)):
            if not line:
                raise Failed(f"bpftrace counts nothing here: {self.end()[1].strip()}")

    def line(self, deadline):
        """"": it ended, or has said nothing for too long."""
        ready, _, _ = select.select([self.popen.stdout], [], [], max(deadline - time.monotonic(), 0))
        return self.popen.stdout.readline() if ready else ""

    def end(self):
        """What it has printed, to both."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGINT)
        try:
            return self.popen.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            return self.popen.communicate()

    def calls(self):
        """{number: count}"""
        maps = [json.loads(line) for line in self.end()[0].splitlines() if '"map"' in line]
        return {int(number): n for told in maps for number, n in told["data"].get("@", {}).items()}


def one(daemon, cell, run):
    """({number: calls}, requests) of a run."""
    counter = Counter(daemon.pid)
    try:
        told = json.loads(run(plan.bench_argv(plan.BY_NAME[cell], daemon.socket, SECONDS), SECONDS))
    finally:
        calls = counter.calls()
    if not calls:
        raise Failed("bpftrace has seen no system call")
    return calls, told["requests"]


def count(serve, exports, run, rounds):
    """[{backing, contender, cell, round, calls, enters}]: system calls for a request, and those of them that are io_uring_enter."""
    found = []
    for backing, export in exports.items():
        for name in CONTENDERS:
            daemon = serve(next(c for c in plan.CONTENDERS if c.name == name), export, backing, f"calls-{backing}-{name}")
            for n, cell in ((n, cell) for n in range(rounds) for cell in COUNTED):
                calls, requests = one(daemon, cell, run)
                found.append({"backing": backing, "contender": name, "cell": cell, "round": n, "calls": sum(calls.values()) / requests,
                              "enters": calls.get(IO_URING_ENTER, 0) / requests})
                print(f"bench: system calls: {backing:8} {cell} {name:6} {found[-1]['calls']:.3f} for a request, "
                      f"{found[-1]['enters']:.3f} of them io_uring_enter", flush=True)
            daemon.finish()
    return found
