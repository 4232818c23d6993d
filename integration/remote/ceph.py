#!/usr/bin/env python3
"""A Ceph of one node for tests: a monitor, a manager, an OSD, the pool `vms` and the user `client.vublk`.

Everything (configuration, keys, data, sockets, logs, pid files) is in one folder; nothing outside it is used, so several
clusters run side by side, as any user, without systemd. cephx is on, and the OSD writes through BlueStore to a sparse file
with real syncs; with `memory` it keeps objects in memory, for benchmarks.

    ceph.py start FOLDER [--address ADDR] [--namespace NAME] [--memory] [--attached]
    ceph.py run FOLDER rbd create vms/disk --size 1G
    ceph.py kill-osd FOLDER; ceph.py start-osd FOLDER      also -mon, and restart-osd, restart-mon (SIGTERM)
    ceph.py freeze-osd FOLDER; ceph.py thaw-osd FOLDER     SIGSTOP, SIGCONT
    ceph.py stop FOLDER [--remove]

A client needs only FOLDER/ceph.conf (`CEPH_CONF`, `conf=`) and the user `vublk`: the configuration names its keyring.
"""

import argparse
import base64
import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import uuid

POOL, USER = "vms", "vublk"
PROGRAMS = ("ceph-mon", "ceph-mgr", "ceph-osd", "ceph", "rbd", "rados", "monmaptool")
# Below the range from which the kernel takes ports of connections: a monitor that is down does not lose its port to one.
PORTS = range(10000, 30000)
GIB = 1 << 30
# A daemon is asked this often while it starts; Ceph has no event for it.
POLL = 0.1

MODULES = (
    "alerts cephadm dashboard diskprediction_local influx insights iostat k8sevents localpool mirroring nfs osd_perf_query "
    "osd_support prometheus restful rook selftest snap_schedule stats telegraf test_orchestrator zabbix"
).split()

CONF = """\
[global]
fsid = {fsid}
mon_host = [v2:{address}:{port}]
public_addr = {address}
cluster_addr = {address}
ms_bind_msgr1 = false
ms_bind_ipv4 = {ipv4}
ms_bind_ipv6 = {ipv6}
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {folder}/$name.keyring
run_dir = {folder}
crash_dir = {folder}/crash
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true

[mon]
ms_async_op_threads = 2
debug_rocksdb = 1/1
mon_initial_members = a
mon_data = {folder}/mon
mon_warn_on_pool_no_redundancy = false
# A monitor ends itself on a file system that is nearly full; the tests need little of it.
mon_data_avail_warn = 1
mon_data_avail_crit = 0
# Changes of the cluster's maps are not collected for a second: a start takes a dozen of them.
paxos_propose_interval = 0.02

[mgr]
ms_async_op_threads = 2
mgr_data = {folder}/mgr
mgr_initial_modules =
# Each module costs start-up time; those that are not named here cannot be left out.
mgr_disabled_modules = {modules}
mgr_stats_period = 1
mgr_tick_period = 1

[osd]
ms_async_op_threads = 2
debug_rocksdb = 1/1
osd_data = {folder}/osd
osd_objectstore = {store}
osd_memory_target = 939524096
bluestore_block_size = {size}
bluestore_cache_autotune = false
bluestore_cache_size = 134217728
# An OSD that was killed reads these logs again, twice: short ones let it start in seconds.
bluestore_rocksdb_options_annex = write_buffer_size=8388608,max_total_wal_size=16777216
bluefs_log_compact_min_size = 1048576
bluefs_max_log_runway = 1048576
bluefs_min_log_runway = 262144
# What is fast and what is slow must not depend on the drive below the file.
bluestore_debug_enforce_settings = ssd
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 2
{memory}\

[mon.a]
{daemon}
[mgr.x]
{daemon}
[osd.0]
{daemon}
"""

# An OSD that keeps objects in memory. Without pages an object becomes a longer list with each write, and with long logs of
# the placement groups writes take longer and longer, until the logs are full: a load that is measured first would do best.
MEMORY = """\
memstore_device_bytes = {size}
memstore_page_set = true
osd_min_pg_log_entries = 100
osd_max_pg_log_entries = 200
osd_pg_log_dups_tracked = 200
"""

# Not in [global]: clients would make such sockets and logs too.
DAEMON = """\
admin_socket = {folder}/$name.asok
log_file = {folder}/$name.log
pid_file =
"""


class Failed(Exception):
    """The cluster cannot do what was asked; the text says why."""


def new_key():
    """A cephx key: type AES, when it was made, its length, 16 random bytes."""
    return base64.b64encode(struct.pack("<HIIH", 1, int(time.time()), 0, 16) + os.urandom(16)).decode()


def keyring_entry(name, key, caps):
    return "".join([f"[{name}]\n\tkey = {key}\n", *(f'\tcaps {of} = "{what}"\n' for of, what in caps.items())])


class Daemon:
    """One daemon of the cluster, known by its pid file: the process that started it may have ended since."""

    def __init__(self, cluster, name, program):
        self.cluster, self.name, self.program = cluster, name, program
        self.pid_file = f"{cluster.folder}/{name}.pid"
        self.socket = f"{cluster.folder}/{name}.asok"
        self.popen = None

    def pidfd(self):
        """A descriptor of the process, or None where it does not run."""
        if self.popen is not None and self.popen.poll() is not None:
            self.popen = None
        try:
            pid = int(open(self.pid_file).read())
            fd = os.pidfd_open(pid)
        except (FileNotFoundError, ProcessLookupError):
            return None
        if self.popen is not None:
            return fd  # a child's number is its own; and while it executes its program it has no command line
        # The number may belong to another process by now: the descriptor was opened before its command line is read.
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            words = []
        if self.cluster.conf.encode() in words and self.program.encode() in words:
            return fd
        os.close(fd)
        return None

    def running(self):
        fd = self.pidfd()
        if fd is None:
            return False
        os.close(fd)
        return True

    def start(self):
        if self.running():
            raise Failed(f"{self.name} runs already")
        if os.path.exists(self.socket):
            os.unlink(self.socket)  # of a daemon that was killed
        argv = [self.program, "-f", "-i", self.name.partition(".")[2], "-c", self.cluster.conf]
        with open(f"{self.cluster.folder}/{self.name}.out", "ab") as out:
            self.popen = subprocess.Popen(
                [*self.cluster.prefix, *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=allow_files,
            )
        with open(f"{self.pid_file}.new", "w") as out:
            out.write(f"{self.popen.pid}\n")
        os.rename(f"{self.pid_file}.new", self.pid_file)

    def signal(self, number):
        fd = self.pidfd()
        if fd is None:
            raise Failed(f"{self.name} does not run")
        try:
            signal.pidfd_send_signal(fd, number)
        finally:
            os.close(fd)

    def end(self, number, seconds):
        """Ends the process with this signal and waits until it is gone; False where it did not run."""
        fd = self.pidfd()
        if fd is not None:
            try:
                signal.pidfd_send_signal(fd, number)
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                if not poll.poll(seconds * 1000):
                    raise Failed(f"{self.name} did not end within {seconds} s of signal {number}")
            finally:
                os.close(fd)
        if self.popen is not None:
            self.popen.wait()
            self.popen = None
        if os.path.exists(self.pid_file):
            os.unlink(self.pid_file)
        return fd is not None

    def ask(self, prefix):
        """What the daemon answers on its admin socket, or None where it does not answer (yet)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as link:
            link.settimeout(5)
            try:
                link.connect(self.socket)
                link.sendall(json.dumps({"prefix": prefix, "format": "json"}).encode() + b"\0")
                answer = link.makefile("rb")
                head = answer.read(4)
                return json.loads(answer.read(struct.unpack(">I", head)[0]))
            except (OSError, ValueError, struct.error):
                return None

    def wait(self, what, ready, end):
        """Waits until its answer to `what` is `ready`."""
        while True:
            answer = self.ask(what)
            if answer is not None and ready(answer):
                return
            if not self.running():
                raise Failed(f"{self.name} ended; see {self.cluster.folder}/{self.name}.log and .out")
            if time.monotonic() > end:
                raise Failed(f"{self.name} was not ready in time; see {self.cluster.folder}/{self.name}.log")
            time.sleep(POLL)


def allow_files():
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


class Ceph:
    """A cluster in a folder: a new one, or one that `start` made there earlier."""

    def __init__(self, folder, address="127.0.0.1", memory=False, namespace=None, size=16 * GIB):
        self.folder = os.path.abspath(folder)
        self.conf = f"{self.folder}/ceph.conf"
        self.keyring = f"{self.folder}/client.{USER}.keyring"
        self.settings = {"address": address, "memory": memory, "namespace": namespace, "size": size}
        if os.path.exists(f"{self.folder}/cluster.json"):
            self.settings = json.load(open(f"{self.folder}/cluster.json"))
        self.mon = Daemon(self, "mon.a", "ceph-mon")
        self.mgr = Daemon(self, "mgr.x", "ceph-mgr")
        self.osd = Daemon(self, "osd.0", "ceph-osd")

    @property
    def prefix(self):
        """What every program of the cluster, and every client of it, is started with."""
        name = self.settings["namespace"]
        return ["ip", "netns", "exec", name] if name else []

    def run(self, *argv, user="admin", timeout=60):
        """Runs a client (`rbd`, `ceph`, `rados` …) as this user, or a tool that is none; its standard output."""
        env = {**os.environ, "CEPH_CONF": self.conf, "CEPH_ARGS": f"--name client.{user}" if user else ""}
        try:
            done = subprocess.run(
                [*self.prefix, *argv], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"{' '.join(argv)}: no end within {timeout} s") from None
        if done.returncode:
            raise Failed(f"{' '.join(argv)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
        return done.stdout

    def start(self, timeout=60):
        """Makes the cluster, or starts the one that is in the folder; returns when it carries out requests."""
        end = time.monotonic() + timeout
        missing = [program for program in PROGRAMS if not shutil.which(program)]
        if missing:
            raise Failed(f"{', '.join(missing)} not found: run integration/setup.sh")
        if len(self.mgr.socket) > 100:
            raise Failed(f"{self.folder}: too long a name for the sockets in it")
        if any(daemon.running() for daemon in (self.mon, self.mgr, self.osd)):
            raise Failed(f"{self.folder}: the cluster runs already")
        new = not os.path.exists(f"{self.folder}/cluster.json")
        if not new:
            self.must_survive_its_end()
        if new and os.path.isdir(self.folder) and os.listdir(self.folder):
            raise Failed(f"{self.folder} is not empty, and holds no whole cluster")
        try:
            if new:
                self.make()
            self.start_mon(end)
            self.mgr.start()
            if new:
                self.make_osd()
            self.osd.start()
            if new:
                self.run("ceph", "osd", "pool", "create", POOL, "8")
            self.wait_osd(end)
            if new:
                self.run("rbd", "pool", "init", POOL)
            self.wait_clean(end)
            # Only now: a start that was killed half way is not gone on with.
            with open(f"{self.folder}/cluster.json", "w") as out:
                json.dump(self.settings, out)
        except BaseException:
            self.stop()
            raise

    def make(self):
        """Configuration, keys, and the data of the monitor."""
        os.makedirs(f"{self.folder}/crash")
        os.chmod(self.folder, 0o755)
        address = self.settings["address"]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        host = f"[{address}]" if family == socket.AF_INET6 else address
        self.settings["fsid"] = str(uuid.uuid4())
        self.settings["port"] = self.free_port(family, address)
        store = "memstore" if self.settings["memory"] else "bluestore"
        with open(self.conf, "w") as out:
            out.write(
                CONF.format(
                    folder=self.folder,
                    fsid=self.settings["fsid"],
                    address=host,
                    port=self.settings["port"],
                    ipv4=str(family == socket.AF_INET).lower(),
                    ipv6=str(family == socket.AF_INET6).lower(),
                    store=store,
                    modules=" ".join(MODULES),
                    memory=MEMORY.format(size=self.settings["size"]) if self.settings["memory"] else "",
                    size=self.settings["size"],
                    daemon=DAEMON.format(folder=self.folder),
                )
            )
        rbd = {"mon": "profile rbd", "osd": f"profile rbd pool={POOL}", "mgr": f"profile rbd pool={POOL}"}
        everything = dict.fromkeys(("mon", "osd", "mgr", "mds"), "allow *")
        users = {
            "mon.": {"mon": "allow *"},
            "client.admin": everything,
            "mgr.x": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
            f"client.{USER}": rbd,
        }
        known = ""
        for name, caps in users.items():
            entry = keyring_entry(name, new_key(), caps)
            known += entry
            if name != "mon.":
                self.write_keyring(name, entry)
        # The monitor takes over all users of this file when its data is made.
        self.write_keyring("initial", known)
        monmap = f"{self.folder}/monmap"
        where = f"[v2:{host}:{self.settings['port']}]"
        keyring = f"{self.folder}/initial.keyring"
        self.run("monmaptool", "--create", "--fsid", self.settings["fsid"], "--addv", "a", where, monmap, user=None)
        self.run("ceph-mon", "--mkfs", "-i", "a", "-c", self.conf, "--monmap", monmap, "--keyring", keyring, user=None)

    def free_port(self, family, address):
        while True:
            port = random.choice(PORTS)
            if self.settings["namespace"]:
                return port  # nothing else is there
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                try:
                    probe.bind((address, port))
                    return port
                except OSError as why:
                    if why.errno != errno.EADDRINUSE:
                        raise Failed(f"{address}: {why.strerror}") from None

    def write_keyring(self, name, text):
        with open(os.open(f"{self.folder}/{name}.keyring", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            out.write(text)

    def make_osd(self):
        """The OSD's number, its key and its data."""
        ident, key = str(uuid.uuid4()), new_key()
        secret = f"{self.folder}/osd.secret"
        with open(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
            json.dump({"cephx_secret": key}, out)
        self.write_keyring("osd.0", keyring_entry("osd.0", key, {}))
        self.run("ceph", "osd", "new", ident, "0", "-i", secret)
        os.unlink(secret)
        os.makedirs(f"{self.folder}/osd")
        self.run("ceph-osd", "--mkfs", "-i", "0", "-c", self.conf, "--osd-uuid", ident, user=None)

    def stop(self, remove=False):
        """Ends all daemons, those of a cluster that did not start too."""
        for daemon in (self.osd, self.mgr, self.mon):
            try:
                daemon.end(signal.SIGTERM, 10)
            except Failed:
                daemon.end(signal.SIGKILL, 10)
        if remove and os.path.exists(self.folder):
            shutil.rmtree(self.folder)

    def start_mon(self, end=None):
        self.mon.start()
        self.mon.wait("mon_status", lambda is_: is_.get("state") == "leader", end or time.monotonic() + 30)

    def must_survive_its_end(self):
        if self.settings["memory"]:
            raise Failed("an OSD that keeps its objects in memory cannot be started again")

    def start_osd(self):
        """Starts the OSD; returns when it carries out requests."""
        self.must_survive_its_end()
        self.osd.start()
        self.wait_osd(time.monotonic() + 60)
        self.run("rados", "-p", POOL, "stat", "rbd_info", timeout=60)

    def wait_osd(self, end):
        self.osd.wait("status", lambda is_: is_.get("state") == "active", end)

    def wait_clean(self, end):
        """Waits until the manager has seen every placement group at work."""
        while True:
            groups = json.loads(self.run("ceph", "pg", "stat", "-f", "json"))["pg_summary"]
            states = {of["name"]: of["num"] for of in groups["num_pg_by_state"]}
            if states.get("active+clean", 0) == groups["num_pgs"] >= 8:
                return
            if time.monotonic() > end:
                raise Failed(f"placement groups are not clean: {states}")
            time.sleep(POLL)

    def kill_osd(self):
        return self.osd.end(signal.SIGKILL, 10)

    def kill_mon(self):
        return self.mon.end(signal.SIGKILL, 10)

    def freeze_osd(self):
        """It receives what is sent to it, and does nothing of it before it is thawed."""
        self.osd.signal(signal.SIGSTOP)

    def thaw_osd(self):
        self.osd.signal(signal.SIGCONT)

    def restart_osd(self):
        self.must_survive_its_end()
        self.osd.end(signal.SIGTERM, 20)
        self.start_osd()

    def restart_mon(self):
        self.mon.end(signal.SIGTERM, 20)
        self.start_mon()


def stay(cluster):
    """Keeps the cluster until standard input ends: also when the process that has its other end is killed."""
    try:
        print("ready", flush=True)
        while os.read(0, 4096):
            pass
    finally:
        cluster.stop(remove=True)


def interrupt(number, _):
    sys.exit(128 + number)


def main():
    signal.signal(signal.SIGTERM, interrupt)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("start", help="make a cluster in FOLDER, or start the one that is there")
    start.add_argument("--address", default="127.0.0.1", metavar="ADDR", help="where it listens")
    start.add_argument("--namespace", metavar="NAME", help="the network namespace in which it runs (needs root)")
    start.add_argument("--attached", action="store_true", help="print `ready`, and stop and remove it when standard input ends")
    start.add_argument("--memory", action="store_true", help="keep objects in memory: fast, and gone when the OSD ends")
    stop = commands.add_parser("stop", help="end all daemons of FOLDER")
    stop.add_argument("--remove", action="store_true", help="remove FOLDER too")
    others = [commands.add_parser(f"{what}-{of}") for what in ("kill", "start", "restart") for of in ("osd", "mon")]
    others += [commands.add_parser(f"{what}-osd") for what in ("freeze", "thaw")]
    run = commands.add_parser("run", help="run a client of the cluster: rbd, ceph, rados …")
    for command in (start, stop, *others, run):
        command.add_argument("folder", metavar="FOLDER")
    run.add_argument("argv", nargs=argparse.REMAINDER, metavar="ARGUMENT")
    typed = parser.parse_args()
    try:
        if typed.command == "start":
            cluster = Ceph(typed.folder, typed.address, typed.memory, typed.namespace)
            cluster.start()
            if typed.attached:
                stay(cluster)
        elif not os.path.exists(f"{typed.folder}/ceph.conf"):
            raise Failed(f"there is no cluster in {typed.folder}")
        elif typed.command == "stop":
            Ceph(typed.folder).stop(typed.remove)
        elif typed.command == "run":
            print(Ceph(typed.folder).run(*typed.argv), end="")
        else:
            getattr(Ceph(typed.folder), typed.command.replace("-", "_"))()
    except Failed as why:
        sys.exit(f"ceph.py: {why}")


if __name__ == "__main__":
    main()
