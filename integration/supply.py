#!/usr/bin/env python3
"""What vublk is made of, in `make test`: the rules of deny.toml, and two lists that people read.

    integration/supply.py     checks; says what is wrong and how to put it right

- deny.toml: licences, sources and duplicate versions, of every crate that is built or tested with. `make deny` asks
  cargo-deny the same and for advisories; that takes minutes to install, so this is what every change has to pass.
- docs/dependencies.md: each direct dependency with its version, and how many crates it brings.
- docs/unsafe.md: each file with `unsafe` in it, and how many times. (That each block says why is clippy's to check.)
"""

import json
import os
import re
import subprocess
import sys
import tomllib

REPO = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TARGET = "x86_64-unknown-linux-gnu"
wrong = []


def complain(text):
    wrong.append(text)


def read(*path):
    with open(os.path.join(REPO, *path), encoding="utf-8") as file:
        return file.read()


def metadata(folder):
    command = ["cargo", "metadata", "--format-version=1", "--locked", f"--filter-platform={TARGET}"]
    done = subprocess.run(command, cwd=os.path.join(REPO, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        complain(f"{folder}/Cargo.lock: {done.stderr.strip()}")
        return None
    return json.loads(done.stdout)


def is_allowed(expression, allowed):
    """An SPDX expression: OR needs one, AND all of its parts."""
    words = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))
    at = 0

    def take():
        nonlocal at
        at += 1
        return words[at - 1] if at <= len(words) else None

    def one():
        nonlocal at
        word = take()
        if word == "(":
            value = either()
            take()
            return value
        if at < len(words) and words[at].upper() == "WITH":
            at += 1
            word = f"{word} WITH {take()}"
        return word in allowed

    def joined(word, part, judge):
        nonlocal at
        values = [part()]
        while at < len(words) and words[at].upper() == word:
            at += 1
            values.append(part())
        return judge(values)

    def both():
        return joined("AND", one, all)

    def either():
        return joined("OR", both, any)

    return either()


def check_rules(found, folder):
    rules = tomllib.loads(read("deny.toml"))
    allowed = set(rules["licenses"]["allow"])
    exceptions = {rule["crate"]: set(rule["allow"]) for rule in rules["licenses"].get("exceptions", [])}
    skipped = {rule["crate"] for rule in rules["bans"]["skip"]}
    versions = {}
    for crate in found["packages"]:
        name, version, source = crate["name"], crate["version"], crate["source"]
        if source is None:
            continue  # our own
        if source != "registry+https://github.com/rust-lang/crates.io-index":
            complain(f"{folder}: {name} {version} comes from {source}, and not from crates.io")
        licence = crate["license"] or ""
        if not is_allowed(licence, allowed | exceptions.get(name, set())):
            complain(f"{folder}: {name} {version} has the licence {licence or 'of a file'}, which deny.toml does not allow")
        versions.setdefault(name, set()).add(version)
    used = set()
    for name, several in sorted(versions.items()):
        names = {f"{name}@{version}" for version in several}
        used |= names & skipped
        if len(several) > 1 and len(names - skipped) > 1:
            complain(f"{folder}: {name} is there as {', '.join(sorted(several))}: deny.toml skips none of these")
    return skipped - used


def normal_tree(found):
    """For each crate the crates that it needs to run, itself among them."""
    nodes = {node["id"]: node for node in found["resolve"]["nodes"]}
    known = {}

    def of(number, kinds):
        if (number, kinds) not in known:
            known[number, kinds] = set()  # no circles
            needs = [
                dep["pkg"]
                for dep in nodes[number]["deps"]
                if any(kind["kind"] in kinds for kind in dep["dep_kinds"])
            ]
            known[number, kinds] = {number}.union(*(of(need, (None,)) for need in needs))
        return known[number, kinds]

    return of


def table(path, columns):
    """The rows of the tables of a document whose head has these columns."""
    rows = []
    head = None
    for line in read(path).splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip().strip("|").split("|")] if line.startswith("|") else None
        if cells is None:
            head = None
        elif head is None:
            head = cells
        elif not set(line) <= set("|-: ") and set(columns) <= set(head):
            rows.append(dict(zip(head, cells)))
    return rows


def check_dependencies(found):
    root = next(crate for crate in found["packages"] if crate["id"] == found["resolve"]["root"])
    tree = normal_tree(found)
    node = next(node for node in found["resolve"]["nodes"] if node["id"] == root["id"])
    crates = {crate["id"]: crate for crate in found["packages"]}
    wanted = {}
    for dep in node["deps"]:
        crate = crates[dep["pkg"]]
        wanted[crate["name"]] = (crate["version"], str(len(tree(dep["pkg"], (None,))) - 1))
    listed = {row["crate"]: (row["version"], row["brings"]) for row in table("docs/dependencies.md", ["crate", "version", "brings"])}
    for name in sorted(set(wanted) - set(listed)):
        complain(f"docs/dependencies.md lacks {name} {wanted[name][0]}, which brings {wanted[name][1]} crates")
    for name in sorted(set(listed) - set(wanted)):
        complain(f"docs/dependencies.md has {name}, on which nothing depends directly")
    for name in sorted(set(listed) & set(wanted)):
        if listed[name] != wanted[name]:
            complain(f"docs/dependencies.md says {listed[name]} of {name}, and it is {wanted[name]} (version, crates that it brings)")
    shipped = len(tree(root["id"], (None,))) - 1
    everything = sum(crate["source"] is not None for crate in found["packages"])
    sentence = f"{shipped} crates are in the programs, {everything} where what tests them is counted too"
    if sentence not in read("docs/dependencies.md"):
        complain(f"docs/dependencies.md has to say: {sentence}")
    return sentence


# What is no code: comments (of one line, and nested ones of one level), strings, characters.
NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|r(#*)".*?"\1|"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])\'', re.S)


def unsafe_in(path):
    code = NO_CODE.sub(" ", read(path))
    return len(re.findall(r"\bunsafe\s*\{", code)), len(re.findall(r"\bunsafe\s+(?:extern|fn|impl|trait)\b", code))


def check_unsafe():
    listed = {row["file"]: (row["blocks"], row["items"]) for row in table("docs/unsafe.md", ["file", "blocks", "items"])}
    blocks = 0
    for folder, _, files in os.walk(os.path.join(REPO, "src")):
        for name in sorted(files):
            if not name.endswith(".rs"):
                continue
            path = os.path.relpath(os.path.join(folder, name), REPO)
            counted = unsafe_in(path)
            blocks += counted[0]
            said = listed.pop(path, None)
            if counted == (0, 0) and said is None:
                continue
            if said is None:
                complain(f"{path} has `unsafe` {counted} times (blocks, items), and is not in docs/unsafe.md")
            elif said != tuple(map(str, counted)):
                complain(f"docs/unsafe.md says {said} of {path}, and it has {counted} (blocks, items)")
    for path in sorted(listed):
        complain(f"docs/unsafe.md has {path}, which is not there")
    return blocks


def main():
    found = metadata(".")
    if found:
        unused = check_rules(found, ".")
        sentence = check_dependencies(found)
        fuzz = metadata("fuzz")
        if fuzz:
            unused &= check_rules(fuzz, "fuzz")
        for name in sorted(unused):
            complain(f"deny.toml skips {name}, which is not there")
    blocks = check_unsafe()
    for text in wrong:
        print(f"supply: {text}", file=sys.stderr)
    if wrong:
        sys.exit(1)
    print(f"supply: {sentence}; {blocks} blocks of `unsafe`, each with its reason")


if __name__ == "__main__":
    main()
