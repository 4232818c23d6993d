#!/usr/bin/env python3
"""Which lines of the data path and of the succession the tests reach, in `make coverage`.

    integration/coverage.py [WORD...]     all tests, or those whose names hold a word

Fails below BAR per cent for one of PARTS: a file and the folder of its name, without the tests in them.

A daemon is a process of its own here, that most tests end with SIGKILL, and that closes itself in a sandbox in which no file
is opened any more. So the counters are mapped from a file that each program opens before its first line (%c), and every
process of one program counts in the same file (%m). Lines are those of an unoptimised view of the code: what the compiler
removed was still written.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = os.path.join(os.environ.get("CARGO_TARGET_DIR") or os.path.join(REPO, "target"), "coverage")
PROFILES = os.path.join(TARGET, "profiles")
PARTS = ["ring", "chain", "request", "op", "pages", "session", "inflight", "succession"]
BAR = 95.0
# Daemons of other users, or in other places, that may not write the file.
LEFT_OUT = ["user::", "no_threads", "systemd::units", "a_real_systemd", "socket_activate"]


def die(text):
    sys.exit(f"coverage: {text}")


def tool(name):
    """Of the compiler's own LLVM, or of a package of the same version."""
    sysroot = subprocess.check_output(["rustc", "--print", "sysroot"], cwd=REPO, text=True).strip()
    facts = subprocess.check_output(["rustc", "-vV"], cwd=REPO, text=True)
    host = re.search(r"^host: (.*)$", facts, re.M)[1]
    major = re.search(r"^LLVM version: (\d+)", facts, re.M)[1]
    own = os.path.join(sysroot, "lib/rustlib", host, "bin", name)
    for found in (own, shutil.which(f"{name}-{major}")):
        if found and os.access(found, os.X_OK):
            return found
    die(f"{name} of LLVM {major} is needed: apt-get install llvm-{major}, or rustup component add llvm-tools")


def cargo(*words, profiles):
    environment = dict(os.environ)
    environment["CARGO_TARGET_DIR"] = TARGET
    # Counters that can lie in a file.
    environment["RUSTFLAGS"] = "-C instrument-coverage -C llvm-args=-runtime-counter-relocation"
    environment["LLVM_PROFILE_FILE"] = profiles
    return subprocess.run(["cargo", *words], cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True)


def programs(words):
    """The programs that were built, those that are tests apart."""
    built = cargo("test", "--no-run", "--message-format=json", *words, profiles="/dev/null")
    if built.returncode:
        die("the tests do not build")
    found, tests = [], []
    for line in built.stdout.splitlines():
        message = json.loads(line)
        if message.get("executable") and message.get("reason") == "compiler-artifact":
            found.append(message["executable"])
            if message["profile"]["test"]:
                tests.append((message["target"]["name"], message["executable"]))
    return found, tests


def part_of(path):
    parts = os.path.relpath(path, os.path.join(REPO, "src")).split("/")
    if "tests" in parts or "tests.rs" in parts:
        return None
    name = parts[0].removesuffix(".rs")
    return name if name in PARTS else None


def main():
    words = sys.argv[1:]
    profdata, cov = tool("llvm-profdata"), tool("llvm-cov")
    shutil.rmtree(PROFILES, ignore_errors=True)
    os.makedirs(PROFILES)
    found, tests = programs([])
    environment = dict(os.environ, LLVM_PROFILE_FILE=os.path.join(PROFILES, "%m%c.profraw"))
    environment["CARGO_MANIFEST_DIR"] = REPO
    failed = []
    for name, program in tests:
        command = [program, *words]
        if name == "main":
            command += [word for test in LEFT_OUT for word in ("--skip", test)]
        # A build that counts is slower, and its processes have more descriptors: what fails here passes in `make test`.
        if subprocess.run(command, cwd=REPO, env=environment).returncode:
            failed.append(name)
    data = os.path.join(PROFILES, "all.profdata")
    raw = glob.glob(os.path.join(PROFILES, "*.profraw"))
    subprocess.run([profdata, "merge", "--sparse", "--failure-mode=all", "-o", data, *raw], check=True)
    objects = [word for program in found[1:] for word in ("--object", program)]
    report = subprocess.check_output(
        [cov, "export", "--skip-functions", f"--instr-profile={data}", found[0], *objects], text=True
    )
    files = json.loads(report)["data"][0]["files"]
    sums = {part: [0, 0] for part in PARTS}
    missing = []
    for file in sorted(files, key=lambda file: file["filename"]):
        part = part_of(file["filename"])
        if part is None:
            continue
        lines = file["summary"]["lines"]
        sums[part][0] += lines["covered"]
        sums[part][1] += lines["count"]
        path = os.path.relpath(file["filename"], REPO)
        missing.append((path, lines["covered"], lines["count"]))
    print(f"\n{'file':32} {'lines':>6} {'reached':>8}")
    for path, covered, count in missing:
        print(f"{path:32} {count:6} {100 * covered / count:7.2f} %")
    print()
    low = []
    for part, (covered, count) in sums.items():
        share = 100 * covered / count if count else 0.0
        print(f"{part:32} {count:6} {share:7.2f} %")
        if share < BAR:
            low.append(part)
    if os.environ.get("LINES"):
        sources = [os.path.join(REPO, path) for path, covered, count in missing if covered < count]
        subprocess.run([cov, "show", f"--instr-profile={data}", found[0], *objects, *sources])
    if failed:
        print(f"coverage: tests failed while they counted: {', '.join(failed)}")
    if low:
        die(f"below {BAR:g} %: {', '.join(low)} (LINES=1 shows which lines)")


if __name__ == "__main__":
    main()
