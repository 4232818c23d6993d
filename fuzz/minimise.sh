#!/bin/bash
# minimise.sh TARGET...: makes the corpus of a target as small as it can be without losing a covered edge, out of what is
# in fuzz/corpus/TARGET and what fuzz/run.sh has added in fuzz/new/TARGET. It needs what run.sh installs.
set -euo pipefail

repo=$(dirname "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)")
export PATH=$repo/.cache/cargo-fuzz/bin:$PATH
cd "$repo"
for target in "$@"; do
    mkdir -p "fuzz/new/$target"
    new=$(mktemp -d "fuzz/new/$target.XXXXXX")
    # Counters of how often an edge is taken would keep ten times as many files.
    cargo +nightly fuzz run "$target" "$new" "fuzz/new/$target" "fuzz/corpus/$target" -- \
        -set_cover_merge=1 -use_counters=0 -detect_leaks=0
    rm -rf "fuzz/corpus/$target"
    mv "$new" "fuzz/corpus/$target"
    chmod 755 "fuzz/corpus/$target"
    du -sh --apparent-size "fuzz/corpus/$target"
done
