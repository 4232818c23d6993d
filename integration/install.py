#!/usr/bin/env python3
"""What is installed, where, and what is left of it.

    integration/install.py          `make install` and `make uninstall` into a folder; the man pages' and completions' form
    integration/install.py --deb    the Debian package in a Debian of its own (root; `setup.sh roots`): installed and a disk
                                    served by README.md's commands, upgraded under a load, removed, purged

Needs the release programs (`make build`).
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

sys.dont_write_bytecode = True
from vtest.core import REPO, SCRATCH, Failed, Skipped
from vtest.debian import Debian, read, run, wait

TARGET = os.environ.get("CARGO_TARGET_DIR", f"{REPO}/target")
PROGRAMS = ("vublkd", "vublk")


def expect(holds, text):
    if not holds:
        raise Failed(text)


def files_below(root):
    return sorted(os.path.relpath(os.path.join(folder, name), root) for folder, _, names in os.walk(root) for name in names)


def readme(chapter):
    """The commands in a chapter of README.md: its first block."""
    return re.search(rf"^## {chapter}\n.*?^```sh\n(.*?)^```", read(f"{REPO}/README.md"), re.S | re.M).group(1)


def version():
    return re.search(r'^version = "(.*)"', read(f"{REPO}/Cargo.toml"), re.M).group(1)


# --- files -----------------------------------------------------------------------

def lint_page(path):
    """man(1) and mandoc have nothing to say of a page."""
    said = run("mandoc", "-T", "lint", "-W", "warning", path) if shutil.which("mandoc") else ""
    environment = dict(os.environ, LC_ALL="C.UTF-8", MANROFFSEQ="", MANPAGER="cat")
    done = subprocess.run(["man", "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", path], env=environment, text=True,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60)
    said += done.stderr
    expect(done.returncode == 0 and not said, f"{os.path.basename(path)}: {said}")


def plain(page):
    """The text of a page, in one line."""
    environment = dict(os.environ, LC_ALL="C.UTF-8", MANWIDTH="200", MANPAGER="cat")
    text = run("man", "-l", page, env=environment)
    return re.sub(r"\s+", " ", re.sub("\x1b\\[[0-9;]*m|.\b", "", text))


def check_pages(share):
    for section in ("man1", "man5", "man8"):
        for name in os.listdir(f"{share}/man/{section}"):
            lint_page(f"{share}/man/{section}/{name}")
    page = plain(f"{share}/man/man8/vublkd.8")
    offered = set(re.findall(r"^ +(?:-., )?(--[a-z-]+)", run(f"{TARGET}/release/vublkd", "--help"), re.M))
    expect(len(offered) > 25, f"--help names only {offered}")
    described = page[page.index(" OPTIONS "):page.index(" EXIT STATUS ")]
    for option in sorted(offered):
        expect(re.search(rf"{option}\b", described), f"vublkd(8) lacks {option}")
    for chapter in ("SIGNALS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"):
        expect(f" {chapter} " in page, f"vublkd(8) lacks the chapter {chapter}")
    file = plain(f"{share}/man/man5/vublk.toml.5")
    # These are not for a file, or are no options that do anything.
    for option in sorted(offered - {"--config", "--check-config", "--fd", "--help", "--print-capabilities", "--version"}):
        expect(re.search(rf" {option[2:]} =", file), f"vublk.toml(5) lacks {option[2:]}")
    constants = read(f"{REPO}/src/supervise.rs") + read(f"{REPO}/src/bin/vublkd.rs")
    codes = re.findall(r"^(?:pub )?const (?:RESTART|GAVE_UP|CANNOT_SERVE|USAGE|TURNED_AWAY): u8 = (\d+);", constants, re.M)
    expect(len(codes) == 5, f"the exit codes in src are {codes}")
    exits = page[page.index(" EXIT STATUS "):page.index(" SIGNALS ")]
    for code in codes:
        expect(re.search(rf" {code} [A-Z]", exits), f"vublkd(8) lacks the exit code {code}")
    commands = re.findall(r"^  ([a-z-]+) ", run(f"{TARGET}/release/vublk", "--help"), re.M)
    for command in set(commands) - {"help"}:
        expect(os.path.exists(f"{share}/man/man1/vublk-{command}.1"), f"there is no vublk-{command}(1)")


def check_completions(share):
    offered = re.search(r"sandbox", read(f"{share}/bash-completion/completions/vublkd"))
    expect(offered, "the completions lack options")
    for shell, folder, name in (
        ("bash", "bash-completion/completions", "{}"),
        ("zsh", "zsh/site-functions", "_{}"),
        ("fish", "fish/vendor_completions.d", "{}.fish"),
    ):
        for program in PROGRAMS:
            path = f"{share}/{folder}/{name.format(program)}"
            text = read(path)
            expect("io-uring-refuse" not in text, f"{path} offers an option that is for tests")
            if shutil.which(shell):
                run(shell, "-n", path)


def check_files():
    run("make", "-s", "-C", REPO, "pages", seconds=900)
    with tempfile.TemporaryDirectory(prefix="vublk-install-", dir=SCRATCH) as root:
        where = [f"DESTDIR={root}", "PREFIX=/opt/vublk", "BUILT=1"]
        run("make", "-s", "-C", REPO, "install", *where)
        files = files_below(root)
        check_pages(f"{root}/opt/vublk/share")
        check_completions(f"{root}/opt/vublk/share")
        for unit in ("vublk@.service", "vublk@.socket"):
            text = read(f"{root}/opt/vublk/lib/systemd/system/{unit}")
            expect("/opt/vublk/bin/vublkd" in text, f"{unit} does not name the installed program")
            expect("/usr/bin/vublk" not in text and "/usr/share" not in text, f"{unit} names a program that is not installed")
        described = json.loads(read(f"{root}/opt/vublk/share/qemu/vhost-user/50-vublk.json"))
        expect(described["binary"] == "/opt/vublk/bin/vublkd", "50-vublk.json does not name the installed program")
        expect(run(f"{root}/opt/vublk/bin/vublkd", "--version") == f"vublkd {version()}\n", "vublkd has another version")
        run("make", "-s", "-C", REPO, "uninstall", *where)
        left = files_below(root)
        expect(not left, f"make uninstall leaves {left}")
    print(f"install: {len(files)} files installed and removed, man pages lint clean")


# --- the package -----------------------------------------------------------------

def make_package(*settings):
    return run("make", "-s", "-C", REPO, "deb", "BUILT=1", *settings, seconds=900).splitlines()[-1]


class Installed(Debian):
    """A Debian that the package is installed in."""

    # What no package answers for.
    VOLATILE = re.compile(r"(dev|proc|sys|run|tmp|mnt|root|var/(log|cache|tmp)|var/lib/(dpkg|apt|systemd|private))(/|$)|etc/.*-$"
                          r"|etc/(\.pwd\.lock|machine-id|\.updated)$|var/\.updated$")

    def __init__(self, stack):
        super().__init__(stack, "debian")
        self.start()

    def daemon(self):
        return int(self.run("systemctl", "show", "-p", "MainPID", "--value", "vublk@vm1.service"))

    def requests(self):
        return json.loads(self.run("vublk", "status", "--json", "/run/vublk/vm1/control"))["counters"]["requests"]

    def files(self):
        """Each file that a package may answer for, and the users and groups."""
        found = set()
        for folder, folders, names in os.walk(self.root):
            inside = os.path.relpath(folder, self.root)
            for name in [*folders, *names]:
                path = os.path.normpath(os.path.join(inside, name))
                if not self.VOLATILE.match(path):
                    found.add(path)
            folders[:] = [name for name in folders if not self.VOLATILE.match(os.path.normpath(os.path.join(inside, name)))]
        for name in ("passwd", "group", "shadow", "gshadow"):
            lines = read(f"{self.root}/etc/{name}").splitlines()
            # That of /dev/kvm stays.
            found |= {f"{name}: {line}" for line in lines if not line.startswith("kvm:")}
        return found


def check_package():
    with contextlib.ExitStack() as stack:
        debian = Installed(stack)
        run("make", "-s", "-C", REPO, "pages", seconds=900)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vublk-later-", dir=SCRATCH))
        later = make_package(f"DEB=--deb-version 999.0-1 --output {folder}/")
        package = make_package()
        try:
            check_life(debian, package, later)
        except Failed:
            print(debian.journal(), file=sys.stderr)
            raise


def check_life(debian, package, later):
    before = debian.files()
    # README.md's commands, where README.md has the package.
    place = f"{debian.root}/root/target/debian"
    os.makedirs(place)
    for path in (package, later):
        shutil.copy(path, place)
    command = re.search(r"sudo (apt install \S+)", readme("Install")).group(1)
    expect(os.path.exists(f"{debian.root}/root/{command.split()[-1]}"), f"README.md: {command}: there is no such package")
    debian.run("sh", "-exc", command.replace("apt install", "apt-get install -y"))
    expect(debian.run("vublkd", "--version") == f"vublkd {version()}\n", "another vublkd is installed")
    said = debian.run("systemd-analyze", "verify", "--man=no", "vublk@vm1.service", "vublk@vm1.socket")
    expect("vublk" not in said, f"systemd-analyze verify: {said}")
    profile = "include <tunables/global>\nprofile vublk-test {\n  include <abstractions/vublk>\n}\n"
    with open(f"{debian.root}/root/profile", "w", encoding="utf-8") as out:
        out.write(profile)
    debian.run("apparmor_parser", "--skip-kernel-load", "--skip-cache", "--quiet", "/root/profile")

    debian.run("sh", "-exc", readme("First disk"))
    expect(debian.state("vublk@vm1.service") == "inactive", "the daemon runs before a connection")
    disk = f"{debian.root}/var/lib/vublk/vm1/disk.raw"
    os.truncate(disk, 64 << 20)  # a small one that a load fills
    load = ["vublk", "bench", "/run/vublk/vm1.sock", "--rw=randrw", "--verify", "--destroy-data", "--json"]
    # The first connection starts the daemon.
    first = json.loads(debian.run(*load, "--runtime=1"))
    print(f"install: first I/O after {command.split()[0]} install and README.md's commands: {first}")
    owner = next(line.split(":")[2] for line in read(f"{debian.root}/etc/passwd").splitlines() if line.startswith("vublk:"))
    expect(os.stat(disk).st_uid == int(owner), "the disk does not belong to vublk")

    # An upgrade of the package under a load: nothing stops; then one of the daemon.
    running = subprocess.Popen(debian.inside(*load, "--runtime=20"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait("the load", lambda: debian.state("vublk@vm1.service") == "active" and debian.requests() > 0)
        daemon, count = debian.daemon(), debian.requests()
        said = debian.run("dpkg", "-i", f"/root/target/debian/{os.path.basename(later)}")
        expect("systemctl restart 'vublk@*.service'" in said, f"the upgrade does not say what to type: {said}")
        expect(debian.daemon() == daemon, "the package's upgrade restarted the daemon")
        wait("requests after the package's upgrade", lambda: debian.requests() > count)
        debian.run("sh", "-c", "systemctl restart 'vublk@*.service'")
        expect(debian.daemon() not in (0, daemon), "the daemon was not restarted")
        count = debian.requests()
        wait("requests after the restart", lambda: debian.requests() > count)
        expect(running.poll() is None, "the load ended too early to see the upgrade")
        out, _ = running.communicate(timeout=60)
        expect(running.returncode == 0, f"the load over the upgrade: {out}")
    finally:
        if running.poll() is None:
            running.kill()
            running.wait()

    # Removed: nothing serves. Purged: the disk and its owner stay.
    os.makedirs(f"{debian.root}/etc/systemd/system/vublk@vm1.service.d")
    shutil.copy(f"{REPO}/dist/systemd/examples/limits.conf", f"{debian.root}/etc/systemd/system/vublk@vm1.service.d")
    with open(f"{debian.root}/etc/vublk/vm1.env", "w", encoding="utf-8") as out:
        out.write("VUBLKD_OPTIONS=--serial=vm1-root\n")
    debian.run("dpkg", "-r", "vublk")
    expect(not debian.run("sh", "-c", "cat /proc/[0-9]*/comm | grep vublkd || true"), "a daemon goes on after the removal")
    expect(debian.run("sh", "-c", "ls /run/vublk") == "", "sockets are left after the removal")
    expect(os.path.exists(f"{debian.root}/etc/vublk/vm1.env"), "a removal took the settings")
    debian.run("dpkg", "-P", "vublk")
    left = debian.files() - before
    users = {line for line in left if re.match(r"g?(passwd|shadow|group): vublk:|gshadow: vublk:", line)}
    expect(left - users == {"var/lib/vublk", "var/lib/vublk/vm1", "var/lib/vublk/vm1/disk.raw"}, f"a purge leaves {sorted(left)}")
    expect(users and os.stat(disk).st_size == 64 << 20, "a purge took the disk or its owner")
    # Without a disk nothing is left.
    os.remove(disk)
    debian.run("dpkg", "-i", f"/root/target/debian/{os.path.basename(package)}")
    debian.run("dpkg", "-P", "vublk")
    after = debian.files()
    expect(after == before, f"a purge leaves {sorted(after - before)}, and took {sorted(before - after)}")
    print("install: the package was installed, upgraded under a load, removed and purged")


def main():
    parser = argparse.ArgumentParser(description="What is installed, where, and what is left of it.")
    parser.add_argument("--deb", action="store_true", help="the Debian package, in a Debian of its own")
    try:
        check_package() if parser.parse_args().deb else check_files()
    except Skipped as why:
        print(f"SKIPPED install --deb: {why}")
    except Failed as why:
        print(f"install: {why}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
