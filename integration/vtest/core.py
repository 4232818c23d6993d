"""Processes, disks and guests of one test case, and their orderly end.

A case owns one `Case`. Everything it starts is registered there and ended in reverse
order, whatever happens. All waiting goes through `Case.wait`, which watches the guest's
control line, QMP and the life of each process at once: a process that dies ends the
wait at once, and no wait is without a time-out.
"""

import contextlib
import ctypes
import fcntl
import glob
import json
import os
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import time

from . import initramfs

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPO = os.path.dirname(HERE)
CACHE = f"{REPO}/.cache"
BACKEND = os.environ.get("BACKEND", "vublkd")
VUBLKD = os.environ.get("VUBLKD") or os.path.join(
    os.environ.get("CARGO_TARGET_DIR", f"{REPO}/target"), "release/vublkd"
)
VUBLK = os.path.join(os.path.dirname(VUBLKD), "vublk")
OVMF_CODE = "/usr/share/OVMF/OVMF_CODE_4M.fd"
OVMF_VARS = "/usr/share/OVMF/OVMF_VARS_4M.fd"
MIB = 1 << 20
# The QEMU that setup.sh unpacks for the tests comes before the host's.
os.environ["PATH"] = f"{CACHE}/qemu/bin{os.pathsep}{os.environ['PATH']}"
# /tmp is often in memory, where files have no extents and no direct I/O worth testing.
SCRATCH = os.environ.get("TMPDIR", "/var/tmp")

_libc = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """The case failed; the text is the reason on its line."""


class Skipped(Exception):
    """The case cannot run here; the text says why."""


def die_with_parent():
    # A harness killed outright takes its guests with it.
    _libc.prctl(1, signal.SIGKILL)


def kernel_image():
    return glob.glob(f"{CACHE}/kernel/boot/vmlinuz-*")[0]


class Process:
    """A child with its log file, ended by its pid and reaped with its resource use; `netns` names its network namespace."""

    def __init__(self, case, what, argv, log, pass_fds=(), netns=None):
        # ip becomes the program: the pid is that of the program.
        argv = ["ip", "netns", "exec", netns, *argv] if netns else argv
        self.what, self.log, self.status, self.usage = what, log, None, None
        with open(log, "ab") as out:
            self.log_start = out.tell()  # others of this name wrote before it
            out.write(("$ " + " ".join(argv) + "\n").encode())
            out.flush()
            try:
                self.popen = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    pass_fds=pass_fds,
                    preexec_fn=die_with_parent,
                )
            except FileNotFoundError:
                raise Failed(f"{what}: {argv[0]} does not exist") from None
        self.pid = self.popen.pid
        self.pidfd = os.pidfd_open(self.pid)
        self.expected = False
        case.stack.callback(self.end)
        case.processes.append(self)

    def reap(self, block=False):
        """True once the process is gone; its exit status and resource use are then known."""
        if self.status is None:
            pid, status, usage = os.wait4(self.pid, 0 if block else os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
                self.popen.returncode = self.status
                self.usage = usage
                os.close(self.pidfd)
        return self.status is not None

    def signal(self, number):
        if not self.reap():
            os.kill(self.pid, number)

    def wait(self, seconds):
        if not self.reap():
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            if not poll.poll(seconds * 1000):
                raise Failed(f"{self.what} did not end within {seconds} s")
            self.reap(block=True)
        return self.status

    def end(self):
        self.expected = True
        if self.reap():
            return
        os.kill(self.pid, signal.SIGTERM)
        try:
            self.wait(3)
        except Failed:
            os.kill(self.pid, signal.SIGKILL)
            self.reap(block=True)

    def cpu_seconds(self):
        if self.usage is not None:
            return self.usage.ru_utime + self.usage.ru_stime
        fields = open(f"/proc/{self.pid}/stat").read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Backend(Process):
    """One vhost-user-blk back-end serving one disk on one socket."""

    def __init__(
        self,
        case,
        disk,
        name=None,
        *,
        direct=True,
        read_only=False,
        serial=None,
        block_size=None,
        write_cache=None,
        engine=None,
        workers=None,
        queues=8,
        extra=(),
        kind=BACKEND,
        supervise=False,
        netns=None,
    ):
        name = name or case.serial("backend")
        self.disk, self.socket = disk, f"{case.tmp}/{name}.sock"
        if kind == "qsd":
            driver = "host_device" if disk.startswith("/dev/") else "file"
            onoff = lambda flag: "on" if flag else "off"
            argv = [
                "qemu-storage-daemon",
                "--blockdev",
                f"driver={driver},node-name=d,filename={disk},discard=unmap,cache.direct={onoff(direct)},"
                f"aio={'io_uring' if direct else 'threads'},read-only={onoff(read_only)}",
                "--export",
                f"type=vhost-user-blk,id=e,node-name=d,writable={onoff(not read_only)},addr.type=unix,"
                f"addr.path={self.socket},num-queues={queues}"
                + (f",logical-block-size={block_size}" if block_size else ""),
            ]
        elif kind == "vublkd":
            argv = [VUBLKD, f"--socket-path={self.socket}"]
            argv += [f"--disk={disk}" if disk.startswith(("rbd:", "nbd:", "nbd+unix:")) else f"--blk-file={disk}"]
            # The daemon alone, in most cases: they kill it themselves, and start the next.
            argv += ["--supervise=off"] if not supervise else []
            argv += ["--direct=off"] if not direct else []
            argv += ["--read-only"] if read_only else []
            argv += [f"--serial={serial}"] if serial else []
            argv += [f"--logical-block-size={block_size}"] if block_size else []
            argv += [f"--write-cache={write_cache}"] if write_cache else []
            argv += [f"--engine={engine}"] if engine else []
            argv += [f"--workers={workers}"] if workers else []
            argv += list(extra)
        else:
            raise Failed(f"BACKEND={kind}: it is vublkd or qsd")
        super().__init__(case, kind, argv, f"{case.logs}/{name}.log", netns=netns)
        self.await_socket(10)

    def await_socket(self, seconds):
        """Until the socket listens. Read from the kernel's tables: a trial connection would count as a front-end. The
        name there may be another one: vublkd makes its socket in a folder beside its place, and moves it there."""
        deadline = time.monotonic() + seconds
        folder, name = os.path.split(self.socket)
        while True:
            moved = not any(entry.startswith(f".{name}.") for entry in os.listdir(folder))
            if moved and os.path.exists(self.socket) and self.listens():
                return
            if self.reap():
                raise Failed(f"{self.what} ended with {self.status} at start: {last_line(self.log)}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.what} does not listen after {seconds} s")
            time.sleep(0.01)

    def listens(self):
        """Whether the process has a listening socket."""
        own = set()
        with contextlib.suppress(OSError):  # its end is noticed elsewhere
            for fd in os.listdir(f"/proc/{self.pid}/fd"):
                with contextlib.suppress(OSError):
                    own.add(os.readlink(f"/proc/{self.pid}/fd/{fd}"))
        # Of its own network namespace.
        with open(f"/proc/{self.pid}/net/unix") as table:
            lines = [line.split() for line in table][1:]
        return any(int(fields[3], 16) & 0x10000 and f"socket:[{fields[6]}]" in own for fields in lines)

    def stop(self, seconds=5):
        """SIGTERM, which must end it in time and with status 0."""
        self.expected = True
        self.signal(signal.SIGTERM)
        status = self.wait(seconds)
        if status != 0:
            raise Failed(f"{self.what} ended with {status} on SIGTERM: {last_line(self.log)}")

    def ask(self, method, seconds=10):
        """The result of a call of the control socket."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(seconds)
            control.connect(self.socket + ".control")
            control.sendall(json.dumps({"jsonrpc": "2.0", "id": 1, "method": method}).encode() + b"\n")
            return json.loads(control.makefile().readline())["result"]

    def first_answer(self, seconds, more_than=0):
        """Until the daemon has answered a request of its guest, or more; gives how many it has."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with socket.socket(socket.AF_UNIX) as control, contextlib.suppress(OSError, ValueError):
                control.settimeout(seconds)
                control.connect(self.socket + ".control")
                lines = control.makefile("rw")
                while time.monotonic() < deadline:
                    lines.write('{"jsonrpc":"2.0","id":1,"method":"status"}\n')
                    lines.flush()
                    count = json.loads(lines.readline())["result"]["counters"]["requests"]
                    if count > more_than:
                        return count
                    time.sleep(0.002)
            time.sleep(0.002)
        raise Failed(f"{self.what} answers nothing within {seconds} s")

    def has_logged(self, words):
        with open(self.log, "rb") as log:
            log.seek(self.log_start)
            return words in log.read().decode(errors="replace")

    def bounced(self):
        """The number of bounced requests that SIGUSR1 makes the daemon log; None when it does not say."""
        if BACKEND != "vublkd" or self.reap():
            return None
        before = os.path.getsize(self.log)
        os.kill(self.pid, signal.SIGUSR1)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            with open(self.log, "rb") as log:
                log.seek(before)
                text = re.sub(r"\x1b\[[0-9;]*m", "", log.read().decode(errors="replace"))
            found = re.findall(r"bounced?\w*[\"']?[=: ]+(\d+)", text)
            if found and text.endswith("\n"):
                return sum(map(int, found))
            time.sleep(0.02)
        return None


def last_line(path):
    with open(path, errors="replace") as log:
        lines = [line.strip() for line in log if line.strip()]
    return lines[-1][:200] if lines else "(nothing logged)"


class Guest(Process):
    """QEMU with a Linux guest. The test script in the guest talks on a control line
    (its second serial port): it sends `@@ word key=value ...`, and reads whole lines."""

    def __init__(
        self,
        case,
        script=None,
        *,
        args=None,
        smp=2,
        mem="512M",
        memory=("memory-backend-memfd,id=mem,size={mem},share=on",),
        machine="q35,memory-backend=mem",
        layers=("base",),
        devices=(),
        options=(),
        mem_option=None,
        append="",
        netns=None,
    ):
        self.case, self.lines, self.events, self.replies = case, [], [], []
        self.history = []  # every line, also those already waited for
        name = case.serial("guest")
        self.console = f"{case.logs}/{name}.serial"
        ours, theirs = zip(*(socket.socketpair() for _ in range(2)))
        self.control, self.monitor = ours
        self._partial = {self.control: b"", self.monitor: b""}
        argv = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none"]
        argv += ["-machine", machine, "-accel", "tcg,thread=multi", "-cpu", "max"]
        argv += ["-smp", str(smp), "-m", mem_option or mem]
        for backend in memory:
            argv += ["-object", backend.format(mem=mem)]
        argv += ["-serial", f"file:{self.console}"]
        argv += ["-chardev", f"socket,id=ctl,fd={theirs[0].fileno()}", "-serial", "chardev:ctl"]
        argv += ["-chardev", f"socket,id=qmp,fd={theirs[1].fileno()}", "-mon", "chardev=qmp,mode=control"]
        if script:
            initrd = f"{case.tmp}/{name}.initrd"
            join_layers(initrd, layers)
            words = [f"vt={script}"] + [f"vt.{k}={v}" for k, v in (args or {}).items()]
            # mitigations=off and nokaslr save seconds of boot under emulation. What the kernel says is
            # kept short, but enough to see how far a boot came that hung.
            self.append = f"console=ttyS0 earlycon=uart8250,io,0x3f8 loglevel=6 panic=-1 mitigations=off nokaslr {append} {' '.join(words)}"
            argv += ["-kernel", kernel_image(), "-initrd", initrd, "-append", self.append]
        argv += list(options)
        for device in devices:
            argv += device
        super().__init__(case, "QEMU", argv, f"{case.logs}/{name}.log", [s.fileno() for s in theirs], netns)
        for s in theirs:
            s.close()
        for s in ours:
            case.stack.callback(s.close)
            s.setblocking(False)
        self.qmp("qmp_capabilities")

    # --- waiting ---------------------------------------------------------------

    def _pump(self, timeout):
        """Take in whatever arrives within `timeout`; fail when a process died that should live."""
        poll = select.poll()
        for s in (self.control, self.monitor):
            if self._partial[s] is not None:
                poll.register(s, select.POLLIN)
        for process in self.case.processes:
            if process.status is None:
                poll.register(process.pidfd, select.POLLIN)
        poll.poll(max(timeout, 0) * 1000)
        for s in (self.control, self.monitor):
            while self._partial[s] is not None:
                try:
                    data = s.recv(65536)
                except BlockingIOError:
                    break
                except ConnectionError:
                    data = b""
                if not data:
                    self._partial[s] = None
                    break
                *lines, self._partial[s] = (self._partial[s] + data).split(b"\n")
                for line in lines:
                    self._line(s, line.decode(errors="replace").strip())
        for process in self.case.processes:
            if process is not self and not process.expected and process.reap():
                raise Failed(f"{process.what} died with {process.status}: {last_line(process.log)}")

    def _line(self, s, line):
        if s is self.monitor:
            message = json.loads(line)
            if "event" in message:
                self.case.note(f"qmp event {message['event']} {message.get('data', '')}")
                self.events.append(message)
            elif "return" in message or "error" in message:
                self.replies.append(message)
        elif line.startswith("@@ "):
            self.case.note(f"guest: {line}")
            words = line[3:].split()
            said = (words[0], dict(w.partition("=")[::2] for w in words[1:]), line[3:])
            self.lines.append(said)
            self.history.append(said)
        elif line:
            self.case.note(f"guest says {line!r}")

    def until(self, take, what, seconds):
        """Wait until `take()` gives something."""
        deadline = time.monotonic() + seconds
        while True:
            for word, _, line in self.lines:
                if word == "fail":
                    raise Failed(f"in the guest: {line[5:]}")
            got = take()
            if got is not None:
                return got
            if self.reap():
                if self._partial[self.control] is not None:  # its last words
                    self._pump(0)
                    continue
                raise Failed(f"QEMU ended with {self.status} while waiting for {what}: {last_line(self.log)}")
            left = deadline - time.monotonic()
            if left <= 0:
                self.diagnose()
                raise Failed(f"no {what} within {seconds} s")
            self._pump(left)

    def diagnose(self):
        """After a time-out: where the guest's CPUs are and what the daemons have counted, into the logs."""
        for process in self.case.processes:
            if isinstance(process, Backend):
                process.bounced()
        for query in ("info registers -a", "info status", "info qtree -b"):
            message = {"execute": "human-monitor-command", "arguments": {"command-line": query}}
            with contextlib.suppress(OSError, Failed):
                self.monitor.send(json.dumps(message).encode() + b"\n")
                deadline = time.monotonic() + 5
                while not self.replies and time.monotonic() < deadline and self._partial[self.monitor] is not None:
                    self._pump(deadline - time.monotonic())
                while self.replies:
                    self.case.note(f"{query}:\n{self.replies.pop(0).get('return')}")

    def expect(self, word, seconds):
        """The next line of the guest that starts with `word`, as a dictionary."""

        def take():
            for i, (first, values, _) in enumerate(self.lines):
                if first == word:
                    del self.lines[: i + 1]
                    return values

        return self.until(take, f"'{word}' from the guest", seconds)

    def event(self, name, seconds, **data):
        def take():
            for i, event in enumerate(self.events):
                values = event.get("data", {})
                if event["event"] == name and all(values.get(k) == v for k, v in data.items()):
                    return self.events.pop(i)

        return self.until(take, f"QMP event {name}", seconds)

    def qmp(self, command, seconds=20, **arguments):
        message = {"execute": command, "arguments": arguments}
        self.monitor.send(json.dumps(message).encode() + b"\n")
        reply = self.until(lambda: self.replies.pop(0) if self.replies else None, f"reply to {command}", seconds)
        if "error" in reply:
            raise Failed(f"QMP {command}: {reply['error']['desc']}")
        return reply["return"]

    def tell(self, line):
        self.case.note(f"to guest: {line}")
        self.control.send(line.encode() + b"\n")

    def finish(self, seconds):
        """The script must report success, and QEMU must end by itself with status 0."""
        self.expected = True
        values = self.expect("done", seconds)
        if values.get("rc") != "0":
            raise Failed(f"guest script ended with {values.get('rc')}")

        def ended():
            return True if self.reap() else None

        deadline = time.monotonic() + 20
        while not self.reap():
            if time.monotonic() > deadline:
                raise Failed("the guest did not power off within 20 s")
            self._pump(deadline - time.monotonic())
        if self.status != 0:
            raise Failed(f"QEMU ended with {self.status}: {last_line(self.log)}")
        return values


def join_layers(path, layers):
    """One initramfs: the cached layers (by name) or a case's own (by path), then the guest scripts as they are now."""
    with open(path, "wb") as out:
        for layer in layers:
            with open(layer if layer.startswith("/") else f"{CACHE}/{layer}.cpio", "rb") as source:
                shutil.copyfileobj(source, out, MIB)
        initramfs.add_scripts(out, f"{HERE}/guest")


def device(backend, n=0, *, reconnect=0, bus=None, **props):
    """QEMU options for one vhost-user-blk device in front of a back-end."""
    chardev = f"socket,id=c{n},path={backend.socket}" + (f",reconnect-ms={reconnect}" if reconnect else "")
    words = {"chardev": f"c{n}", "id": f"disk{n}", **props}
    if bus:
        words["bus"] = bus
    options = ",".join(f"{k.replace('_', '-') if k in DASHED else k}={v}" for k, v in words.items())
    return ["-chardev", chardev, "-device", f"vhost-user-blk-pci,{options}"]


# Properties QEMU spells with a dash; event_idx and indirect_desc keep their underscore.
DASHED = {"num_queues", "queue_size", "config_wce"}


class Case:
    """What one running case owns."""

    def __init__(self, name, tmp, logs):
        self.name, self.tmp, self.logs = name, tmp, logs
        self.stack = contextlib.ExitStack()
        self.processes, self._serial = [], {}
        self._log = open(f"{logs}/case.log", "w", buffering=1)
        self._start = time.monotonic()
        self.facts = []

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        # A second ^C must not interrupt the clean-up.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in self.processes:
            process.expected = True
        self.stack.close()
        self._log.close()

    def serial(self, kind):
        self._serial[kind] = self._serial.get(kind, -1) + 1
        return f"{kind}{self._serial[kind]}"

    def note(self, text):
        self._log.write(f"{time.monotonic() - self._start:8.3f} {text}\n")

    def fact(self, text):
        """Something worth showing on the case's line."""
        self.facts.append(text)
        self.note(text)

    def run(self, *argv, ok=(0,), timeout=60):
        """A short host command; its output goes to the case's log and is returned."""
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", timeout=timeout,
        )
        self.note(f"$ {' '.join(argv)} -> {done.returncode}\n{done.stdout.strip()[:4000]}")
        if done.returncode not in ok:
            raise Failed(f"{argv[0]} ended with {done.returncode}: {done.stdout.strip()[-200:]}")
        return done.stdout

    # --- disks -------------------------------------------------------------------

    def file(self, size, name=None, fill=None):
        """A raw image under the case's folder: sparse, or filled with one byte value."""
        path = f"{self.tmp}/{name or self.serial('disk')}.raw"
        with open(path, "wb") as out:
            if fill is None:
                out.truncate(size)
            else:
                block = bytes([fill]) * MIB
                for _ in range(size // MIB):
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
        return path

    def loop(self, path, sector=None):
        """A loop device over a file, with direct I/O to it, detached at the end."""
        if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
            raise Skipped("loop devices need root")
        argv = ["losetup", "--find", "--show", "--direct-io=on"]
        argv += ["-b", str(sector)] if sector else []
        node = self.run(*argv, path).strip()
        self.stack.callback(lambda: self.run("losetup", "-d", node))
        return node

    def zram(self, size):
        control = "/sys/class/zram-control"
        if not os.access(f"{control}/hot_add", os.R_OK) or os.geteuid() != 0:
            raise Skipped("zram needs root and the zram driver")
        number = open(f"{control}/hot_add").read().strip()

        def remove():
            with open(f"{control}/hot_remove", "w") as out:
                out.write(number)

        self.stack.callback(remove)
        with open(f"/sys/block/zram{number}/disksize", "w") as out:
            out.write(str(size))
        return f"/dev/zram{number}"

    def huge_pages(self, mib):
        """Reserve this much more memory as 2 MiB pages, and give it back afterwards."""
        knob = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
        if not os.access(knob, os.W_OK):
            raise Skipped("reserving huge pages needs root")
        add = mib // 2

        def change(delta):
            # Two cases may run at once: the sum must come out right.
            with open(f"{CACHE}/hugepages.lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                before = int(open(knob).read())
                with open(knob, "w") as out:
                    out.write(str(before + delta))
                return int(open(knob).read()) - before

        self.stack.callback(lambda: change(-got))
        got = change(add)
        if got < add:
            raise Skipped(f"the kernel gave {got} of {add} huge pages")

    # --- shorthands ----------------------------------------------------------------

    def backend(self, disk, name=None, **options):
        return Backend(self, disk, name, **options)

    def guest(self, script=None, **options):
        return Guest(self, script, **options)

    def only_vublkd(self, why):
        if BACKEND != "vublkd":
            raise Skipped(why)


FIEMAP = 0xC020660B
LAST, UNWRITTEN = 0x1, 0x800


def extents(path):
    """The allocated extents of a file as (start, end, unwritten) in bytes."""
    found, start = [], 0
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        while start < size:
            room = 128
            head = struct.pack("=QQLLLL", start, size - start, 1, 0, room, 0)
            buffer = bytearray(head + b"\0" * (56 * room))
            fcntl.ioctl(f.fileno(), FIEMAP, buffer)
            count = struct.unpack_from("=L", buffer, 20)[0]
            if count == 0:
                break
            for i in range(count):
                logical, _, length, _, _, flags = struct.unpack_from("=QQQQQL", buffer, 32 + 56 * i)
                found.append((logical, logical + length, bool(flags & UNWRITTEN)))
                start = logical + length
            if flags & LAST:
                break
    return found


def allocated(path, start, end):
    """How many bytes of a range of a file have blocks."""
    return sum(max(0, min(e, end) - max(s, start)) for s, e, _ in extents(path))
