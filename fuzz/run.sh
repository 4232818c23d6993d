#!/bin/bash
# run.sh [TARGET...]: fuzzes each target (all of them) for TIME seconds, beginning with its corpus.
#
# What it needs and does not find it installs: a nightly compiler (rustup), cargo-fuzz (into .cache, not for the user).
# New inputs go to fuzz/new/TARGET; a case that fails is written to fuzz/artifacts/TARGET, and its name is told. The other
# targets are run all the same.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(dirname "$here")
tools=$repo/.cache/cargo-fuzz
time=${TIME:-60}

die() { echo "fuzz: $*" >&2; exit 1; }

command -v c++ >/dev/null || die "no C++ compiler was found, and libFuzzer is built from source; make setup installs one"
command -v rustup >/dev/null || die "rustup was not found, and fuzzing needs a nightly compiler. Install rustup, or run cargo fuzz yourself"
if ! rustup run nightly rustc --version >/dev/null 2>&1; then
    echo "fuzz: installing a nightly compiler"
    rustup toolchain install nightly --profile minimal
fi
if [ ! -x "$tools/bin/cargo-fuzz" ]; then
    echo "fuzz: installing cargo-fuzz in $tools"
    (cd / && cargo +nightly install --quiet --locked cargo-fuzz --root "$tools")
fi
export PATH=$tools/bin:$PATH

cd "$repo"
[ $# -gt 0 ] || mapfile -t targets < <(cargo +nightly fuzz list)
[ $# = 0 ] || targets=("$@")
failed=()
for target in "${targets[@]}"; do
    mkdir -p "fuzz/new/$target" "fuzz/found/$target"
    echo "== $target, $time s"
    # The first folder gets what is new, the others are only read. Leaks are looked for at the end of the process only:
    # each case would cost a hundred times as much.
    cargo +nightly fuzz run "$target" "fuzz/new/$target" "fuzz/corpus/$target" "fuzz/found/$target" -- \
        -max_total_time="$time" -max_len=1024 -len_control=0 -timeout=30 -detect_leaks=0 -print_final_stats=1 ||
        failed+=("$target")
done
[ ${#failed[@]} = 0 ] || die "failed: ${failed[*]}; fuzz/README.md says what to do with the cases in fuzz/artifacts"
