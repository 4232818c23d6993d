#!/usr/bin/env python3
"""What the documents say is so: README.md, CONTRIBUTING.md, SECURITY.md and docs/.

    integration/docs.py             needs the release programs (`make build`)

A block of code is checked as its first line says:

    ```sh run      carried out, with the real programs, in a folder of its own. /run/vublk, /var/lib/vublk and /etc/vublk are folders
                   there. vublkd goes on until the end of the page, once its disks are served; QEMU ends once it has the disk
    <!-- sh run    the same, and no reader sees it: what the page's commands need around them, up to -->
    ```sh          not carried out: the shell understands it, and vublk and vublkd understand their words (options, values);
                   targets of make exist. Of other programs' words nothing is known here
    ```toml        `vublkd --check-config` takes it. One that begins with `# /etc/vublk/…` is that file for the page's commands
    ```json        each line, or all of it, is JSON
    ```xml         is well-formed
    ```ini, ```yaml, ```text     are not checked

Also: `vublk …` and `vublkd …` in a line of text, and options that begin one; links within the documents; the names of tests and
guest cases. README.md's chapters "Install" and "First disk" are carried out by `install.py --deb` and by the guest case host.
"""

import functools
import glob
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
TARGET = os.environ.get("CARGO_TARGET_DIR", f"{REPO}/target")
# The one that setup.sh unpacked where the host has none that will do.
QEMU = shutil.which("qemu-system-x86_64", path=f"{REPO}/.cache/qemu/bin{os.pathsep}{os.environ['PATH']}")
PROGRAMS = ("vublkd", "vublk")
# Programs whose words are not checked. A word that is none of them is a mistake, or new.
OTHERS = set("""apt bpftrace cargo cat chown cloud-hypervisor cmp cp curl dd echo install journalctl kill lvcreate make mkdir printf qemu-system-x86_64
             sudo systemctl truncate virsh nbdkit ceph rbd umask""".split())
KEYWORDS = {"while", "do", "done", "if", "then", "fi", "for", "in", "read"}
# Options that --help does not tell of.
HIDDEN = {"--print-state-version"}
QUIT = '{"execute": "qmp_capabilities"} {"execute": "quit"}'
PATIENCE = 20
wrong = []


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def call(*words, **how):
    return subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True, timeout=60, **how)


def program(name):
    return f"{TARGET}/release/{name}"


class Page:
    """A document, and the daemons that its commands have started."""

    def __init__(self, path, folder):
        self.path, self.folder, self.running, self.carried_out = path, folder, [], 0
        self.mounted = None
        self.text = read(f"{REPO}/{path}")

    def complain(self, line, why):
        wrong.append(f"{self.path}:{line}: {why}")

    def blocks(self):
        """Line, kind and text of each block of code."""
        for found in re.finditer(r"^(?:```|<!-- (?=sh run))([^\n]*)\n(.*?)^(?:```|-->)$", self.text, re.S | re.M):
            yield self.text.count("\n", 0, found.start()) + 2, found[1].strip(), found[2]

    def prose(self):
        """The lines of the text, with their numbers; those of blocks are empty."""
        text = re.sub(r"^(?:```|<!--).*?^(?:```|-->)$", lambda found: "\n" * found[0].count("\n"), self.text, flags=re.S | re.M)
        return enumerate(text.splitlines(), 1)

    # --- commands --------------------------------------------------------------

    def check_words(self, line, words):
        """A command of which nothing is carried out."""
        while words and (words[0] in KEYWORDS or re.match(r"\w+=", words[0])):
            words = words[1:] if words[0] != "read" else []
        if words[:1] == ["sudo"]:
            words = words[1:]
        if not words:
            return
        name = os.path.basename(words[0])
        if name in PROGRAMS:
            # The parser reads words in their order, and reaches the last one only if it has taken those before it.
            last = "--version" if name == "vublkd" else "--help"
            done = call(program(name), *words[1:], last)
            if done.returncode:
                self.complain(line, f"{shlex.join(words)}: {done.stdout.splitlines()[0]}")
        elif name == "make":
            for target in words[1:]:
                if "=" not in target and not re.search(rf"^{re.escape(target)}:", read(f"{REPO}/Makefile"), re.M):
                    self.complain(line, f"make {target}: there is no such target")
        elif name not in OTHERS:
            self.complain(line, f"{name}: this program is unknown to integration/docs.py")

    def check_commands(self, line, text):
        done = call("sh", "-n", "-c", text)
        if done.returncode:
            self.complain(line, done.stdout)
            return
        for offset, command in commands(text):
            for words in simple_commands(command):
                self.check_words(line + offset, words)

    def local(self, text):
        for there, here in (("/run/vublk", "run"), ("/var/lib/vublk", "disks"), ("/etc/vublk", "etc"), ("/backup", "backup")):
            os.makedirs(f"{self.folder}/{here}", exist_ok=True)
            text = text.replace(there, f"{self.folder}/{here}")
        # This host may have a disk of that name.
        return re.sub(r"\bvublk ([a-z]+) vm1\b", rf"vublk \1 {self.folder}/run/vm1.sock", text)

    def mount(self):
        """A page about snapshots has its disks on a file system that can clone files."""
        if "vublk snapshot" not in self.text:
            return
        disks, image = f"{self.folder}/disks", f"{self.folder}/xfs"
        os.makedirs(disks)
        with open(image, "wb") as out:
            out.truncate(320 << 20)
        for words in (["mkfs.xfs", "-q", image], ["mount", "-o", "loop", image, disks]):
            done = call(*words)
            if done.returncode:
                sys.exit(f"docs: {self.path}: {shlex.join(words)}: {done.stdout.strip()} (this page's commands need root)")
        self.mounted = disks

    def carry_out(self, line, text):
        environment = dict(os.environ, PATH=f"{TARGET}/release:{os.environ['PATH']}")
        for offset, command in commands(text):
            at, command = line + offset, self.local(command)
            words = shlex.split(command.replace("\\\n", " "), comments=True)
            try:
                if words[0] == "vublkd" and "--check-config" not in words:
                    daemon = self.start([program(words[0]), *words[1:]])
                    self.wait(daemon, "serving ", disks_of(words))
                elif words[0] == "qemu-system-x86_64":
                    if not QEMU:
                        print(f"docs: {self.path}:{at}: left out, `make setup` has unpacked no QEMU")
                        continue
                    # It answers QMP once its devices are there; its guest need not run.
                    quiet = ["-S", "-accel", "tcg", "-display", "none", "-qmp", "stdio"]
                    done = subprocess.run([QEMU, *words[1:], *quiet], input=QUIT, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT, text=True, timeout=60, cwd=self.folder)
                    if done.returncode:
                        raise OSError(f"ended with {done.returncode}: {done.stdout.strip()}")
                    self.wait(self.running[0], "a front-end connected", 1)
                else:
                    done = call("sh", "-ec", command, cwd=self.folder, env=environment)
                    if done.returncode:
                        raise OSError(f"ended with {done.returncode}: {done.stdout.strip()}")
            except (OSError, subprocess.TimeoutExpired) as why:
                self.complain(at, f"{command}: {why}")
                return
            self.carried_out += 1

    def start(self, words):
        log = open(f"{self.folder}/log{len(self.running)}", "w", encoding="utf-8")
        process = subprocess.Popen(words, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.running.append((process, log))
        return self.running[-1]

    def wait(self, running, sign, times):
        """Until the log has the sign so many times; no process that was started ends before."""
        _, log = running
        end = time.monotonic() + PATIENCE
        while read(log.name).count(sign) < times:
            ended = [process.args[0] for process, _ in self.running if process.poll() is not None]
            if ended or time.monotonic() > end:
                said = "".join(read(log.name)[-500:] for _, log in self.running)
                raise OSError(f"{sign!r} was not logged {times} times; ended: {ended}: {said}")
            time.sleep(0.02)

    def stop(self):
        for process, log in reversed(self.running):
            if process.poll() is not None:
                wrong.append(f"{self.path}: {process.args[0]} ended early: {read(log.name)[-500:]}")
            process.terminate()
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                wrong.append(f"{self.path}: {process.args[0]} did not end")
            log.close()
        if self.mounted:
            end = time.monotonic() + PATIENCE
            # The kernel ends the io_uring instances of a process in its own time.
            while (done := call("umount", self.mounted)).returncode:
                if time.monotonic() > end:
                    sys.exit(f"docs: {done.stdout.strip()}")
                time.sleep(0.05)

    # --- other blocks ----------------------------------------------------------

    def check_toml(self, line, text):
        named = re.match(r"# (/etc/vublk/\S+)\n", text)
        path = self.local(named[1]) if named else f"{self.folder}/block.toml"
        with open(path, "w", encoding="utf-8") as out:
            out.write(self.local(text))
        done = call(program("vublkd"), f"--config={path}", "--check-config")
        if done.returncode:
            self.complain(line, done.stdout)

    def check_json(self, line, text):
        try:
            json.loads(text)
        except ValueError:
            for offset, one in enumerate(text.splitlines()):
                try:
                    json.loads(one)
                except ValueError as why:
                    self.complain(line + offset, why)

    def check_xml(self, line, text):
        try:
            xml.etree.ElementTree.fromstring(f"<block>{text}</block>")
        except xml.etree.ElementTree.ParseError as why:
            self.complain(line, why)

    def check_blocks(self):
        checks = {"sh": self.check_commands, "toml": self.check_toml, "json": self.check_json, "xml": self.check_xml}
        for line, kind, text in self.blocks():
            if kind == "sh run":
                self.check_commands(line, text)
                self.carry_out(line, text)
            elif kind in checks:
                checks[kind](line, text)
            elif kind not in ("ini", "yaml", "text"):
                self.complain(line - 1, f"a block begins with ```{kind}: say what it is, see integration/docs.py")

    # --- text ------------------------------------------------------------------

    def check_prose(self, options):
        for number, line in self.prose():
            for code in re.findall(r"`([^`]+)`", line):
                if re.match(r"vublkd? \S", code) and "…" not in code:
                    self.check_words(number, shlex.split(code))
                option = re.match(r"--[a-z][a-z-]*", code)
                if option and option[0] not in options | HIDDEN:
                    self.complain(number, f"{option[0]}: neither vublk nor vublkd has this option")

    def check_links(self):
        for number, line in self.prose():
            for link in re.findall(r"\]\(([^)\s]+)\)", line):
                if "://" in link:
                    continue
                path, _, anchor = link.partition("#")
                there = os.path.normpath(os.path.join(os.path.dirname(self.path), path)) if path else self.path
                if not os.path.exists(f"{REPO}/{there}"):
                    self.complain(number, f"{link}: there is no {there}")
                elif anchor and anchor not in anchors(read(f"{REPO}/{there}")):
                    self.complain(number, f"{link}: {there} has no such heading")

    def check_tests(self):
        """In tables names with :: are of tests; lists after "guest case" are of guest tests."""
        for number, line in self.prose():
            for name in re.findall(r"`([a-z_]+(?:::[a-z_*]+)+)`", line if line.startswith("|") else ""):
                if not test_exists(name.split("::")):
                    self.complain(number, f"{name}: there is no such test")
            for names in re.findall(r"guest cases? ((?:`[a-z0-9-]+\*?`(?:, )?)+)", line):
                for name in re.findall(r"`([^`]+)`", names):
                    if not any(re.fullmatch(name.replace("*", ".*"), case) for case in guest_cases()):
                        self.complain(number, f"{name}: there is no such guest case")


def commands(text):
    """Line and text of each command of a block, its lines joined; a loop is one command."""
    at, lines = 0, text.splitlines()
    while at < len(lines):
        start, command = at, lines[at]
        while at + 1 < len(lines) and (command.endswith("\\") or call("sh", "-n", "-c", command).returncode):
            at += 1
            command += "\n" + lines[at]
        at += 1
        if command.strip() and not command.lstrip().startswith("#"):
            yield start, command


def simple_commands(command):
    """The words of each command in a line or a loop; redirections left out."""
    lexer = shlex.shlex(command.replace("\\\n", " ").replace("\n", ";"), posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, "#"
    words, skip = [], False
    for word in lexer:
        if skip:
            skip = False
        elif word in ("<", ">", ">>"):
            skip = True
        elif set(word) <= set(";&|()"):
            yield words
            words = []
        else:
            words.append(word)
    yield words


def disks_of(words):
    """How many disks a command line of vublkd names."""
    files = [word.split("=", 1)[1] for word in words if word.startswith("--config=")]
    return sum(read(file).count("[[disk]]") for file in files) or 1


def anchors(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_exists(parts):
    for depth in range(len(parts), 0, -1):
        module = f"{REPO}/tests/{'/'.join(parts[:depth])}"
        files = [path for path in (f"{module}.rs", f"{module}/mod.rs") if os.path.exists(path)]
        if files:
            rest = parts[depth:]
            if not rest or rest == ["*"]:
                return True
            pattern = rest[0].replace("*", "[a-z_0-9]*")
            return len(rest) == 1 and any(re.search(rf"fn {pattern}\(", read(path)) for path in files)
    return False


@functools.cache
def guest_cases():
    return re.findall(r"^[* ] (\S+)", call(sys.executable, f"{HERE}/run.py", "--list").stdout, re.M)


def options_of(*words):
    return set(re.findall(r"(--[a-z][a-z-]*)", call(*words, "--help").stdout))


def main():
    missing = [name for name in PROGRAMS if not os.path.exists(program(name))]
    if missing:
        sys.exit(f"docs: {program(missing[0])} is missing: make build")
    options = options_of(program("vublkd"))
    for command in re.findall(r"^  ([a-z-]+) ", call(program("vublk"), "--help").stdout, re.M):
        options |= options_of(program("vublk"), command)
    pages = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
    pages += sorted(os.path.relpath(path, REPO) for path in glob.glob(f"{REPO}/docs/*.md"))
    carried_out = 0
    for path in pages:
        with tempfile.TemporaryDirectory(prefix="vublk-docs-") as folder:
            page = Page(path, folder)
            page.check_links()
            page.check_tests()
            page.check_prose(options)
            try:
                page.mount()
                page.check_blocks()
            finally:
                page.stop()
            carried_out += page.carried_out
    for line in wrong:
        print(f"docs: {line}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"docs: {len(pages)} pages, {carried_out} commands carried out")


if __name__ == "__main__":
    main()
