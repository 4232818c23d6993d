#!/usr/bin/env python3
"""The gate of `make test`: does a request cost more instructions than it did?

Runs benches/turn.rs under callgrind and compares with benches/instructions.toml. More than
3 % over a figure there fails. The counts are the same to the instruction however busy the
machine is; they change with the compiler, so with another one than the pinned one nothing
is compared, and a line says so.

    benches/turn_gate.py            compare
    benches/turn_gate.py --update   take what is measured now as the figures
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
REPO = os.path.dirname(HERE)
FIGURES = os.path.join(HERE, "instructions.toml")
ALLOWED = 0.03
UPDATE = "benches/turn_gate.py --update"

HEAD = """\
# Instructions of one request on the device's side, null engine, batches of 32: what the gate of
# `make test` compares with. Written by `benches/turn_gate.py --update`; a change that raises one
# of these says in its commit message why that is worth it.

"""


def say(text):
    print(f"gate: {text}", flush=True)


def fail(text):
    say(text)
    sys.exit(1)


def load(*path):
    with open(os.path.join(REPO, *path), "rb") as file:
        return tomllib.load(file)


def output(*command):
    return subprocess.run(command, cwd=REPO, check=True, stdout=subprocess.PIPE, text=True).stdout


def compiler():
    """What the counts depend on: compiler, target, and how it is told to build."""
    facts = dict(line.split(": ", 1) for line in output("rustc", "-vV").splitlines() if ": " in line)
    profile = load("Cargo.toml")["profile"]["release"]
    return {
        "rustc": f"{facts['release']} ({facts.get('commit-hash', 'unknown')[:9]})",
        "target": facts["host"],
        "profile": " ".join(f"{key}={json.dumps(profile[key])}" for key in sorted(profile)),
    }


def version(built_with):
    return built_with["rustc"].split()[0]


def overridden():
    """What in the environment makes cargo build something else than the profile says."""
    for name in sorted(os.environ):
        flags = name in ("RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_RUSTFLAGS", "CARGO_BUILD_TARGET")
        if flags or name.startswith(("CARGO_PROFILE_RELEASE_", "CARGO_PROFILE_BENCH_")):
            return name
    return None


def runner(target):
    """The folder of the harness's runner, a program of exactly the library's version."""
    locked = load("Cargo.lock")["package"]
    version = next(package["version"] for package in locked if package["name"] == "gungraun")
    root = os.path.join(target, "tools", f"gungraun-runner-{version}")
    if not os.access(os.path.join(root, "bin", "gungraun-runner"), os.X_OK):
        say(f"installing gungraun-runner {version} into {root}")
        # Not optimised: it starts valgrind and reads a few lines of its output.
        build = os.path.join(root, "build")
        command = ["cargo", "install", "--quiet", "--locked", "--debug", f"--version=={version}"]
        command += ["--root", root, "--target-dir", build, "gungraun-runner"]
        # Not on PATH, on purpose: the warning that says so is no help.
        found = os.path.join(root, "bin") + os.pathsep + os.environ["PATH"]
        subprocess.run(command, cwd=REPO, check=True, env=os.environ | {"CARGO_PROFILE_DEV_DEBUG": "0", "PATH": found})
        shutil.rmtree(build, ignore_errors=True)
    return os.path.join(root, "bin")


def measure():
    """Instructions per request of each case."""
    if not shutil.which("valgrind"):
        fail("valgrind is not installed; `make setup` installs it")
    target = json.loads(output("cargo", "metadata", "--format-version=1", "--no-deps"))["target_directory"]
    environment = os.environ | {"PATH": runner(target) + os.pathsep + os.environ["PATH"]}
    bench = subprocess.run(
        ["cargo", "bench", "--bench=turn", "--", "--output-format=json"],
        cwd=REPO, env=environment, stdout=subprocess.PIPE, text=True,
    )
    if bench.returncode:
        print(bench.stdout, end="")
        fail(f"benches/turn.rs failed with status {bench.returncode}")
    counts = {}
    for case in map(json.loads, bench.stdout.splitlines()):
        requests = int(re.fullmatch(r"requests_(\d+)", case["id"])[1])
        total = case["profiles"][0]["data"]["total"]["metrics"]["Ir"]["values"]["new"]
        counts[case["function_name"]] = round(total / requests, 1)
    if not counts or not all(counts.values()):
        fail(f"benches/turn.rs counted nothing: {counts}; is device_turn still a function of its own?")
    return counts


def write(built_with, counts):
    with open(FIGURES, "w") as file:
        file.write(HEAD + "[built-with]\n")
        file.writelines(f"{key} = {value!r}\n" for key, value in built_with.items())
        file.write("\n[instructions-per-request]\n")
        file.writelines(f"{name} = {count}\n" for name, count in counts.items())


def compare(figures, counts):
    """Says how each case is; gives those that cost too much, and those that cost less."""
    over, under = [], []
    say(f"instructions per request, at most {ALLOWED:.0%} over benches/instructions.toml:")
    for name in sorted(figures.keys() | counts.keys()):
        if name not in figures or name not in counts:
            fail(f"{name} is in one of benches/turn.rs and benches/instructions.toml only; run {UPDATE}")
        change = counts[name] / figures[name] - 1
        print(f"  {name:<26}{counts[name]:>9.1f}   figure {figures[name]:>9.1f}   {change:>+7.2%}")
        if change > ALLOWED:
            over.append(name)
        elif change < -ALLOWED:
            under.append(name)
    return over, under


def main():
    if sys.argv[1:] not in ([], ["--update"]):
        sys.exit(__doc__)
    update = bool(sys.argv[1:])
    now = compiler()
    pinned = load("rust-toolchain.toml")["toolchain"]["channel"]
    reason = None
    if version(now) != pinned:
        reason = f"rustc is {now['rustc']}, and counts are comparable only under the pinned one, {pinned}"
    elif name := overridden():
        reason = f"{name} is set, and counts are comparable only as Cargo.toml has cargo build"
    if update:
        if reason:
            fail(f"not updated: {reason}")
        counts = measure()
        write(now, counts)
        say("benches/instructions.toml is written; commit it with the change that made it necessary")
        return
    committed = load("benches", "instructions.toml")
    built_with = committed["built-with"]
    if not reason and now["target"] != built_with["target"]:
        reason = f"this is {now['target']}, the figures are of {built_with['target']}"
    if not reason and now["rustc"] != built_with["rustc"] and version(built_with) == pinned:
        reason = f"rustc is {now['rustc']}, the figures are of {built_with['rustc']}"
    if reason:
        say(f"SKIPPED: {reason}")
        return
    # Not another machine's affair: the pin or the profile was changed here.
    for key in ("rustc", "profile"):
        if now[key] != built_with[key]:
            fail(f"{key} is now {now[key]}, the figures are of {built_with[key]}; take them anew: {UPDATE}")
    over, under = compare(committed["instructions-per-request"], measure())
    if under:
        say(f"cheaper than it was: {', '.join(under)}. Keep it that way: {UPDATE}, and commit the figures")
    if over:
        fail(
            f"FAILED: {', '.join(over)} cost too many instructions.\n"
            "  Find what got slower: callgrind_annotate --inclusive=yes on the files under target/gungraun,\n"
            "  here and at the last commit that passed. A branch, a bound check or a call that is no longer\n"
            "  inlined, once a request, is enough.\n"
            f"  If the change is worth it: {UPDATE}, commit benches/instructions.toml with it, say why."
        )


main()
