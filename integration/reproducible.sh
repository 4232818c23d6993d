#!/bin/bash
# Builds the release twice, in two folders with two homes of Cargo, and compares what came out: who builds a version
# gets the programs that everybody gets who builds it with the same compiler.
#
#   reproducible.sh          builds what is committed; prints the hashes
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/vublk-reproducible-XXXXXX")
trap 'rm -rf "$work"' EXIT
home=${CARGO_HOME:-$HOME/.cargo}

# The second one elsewhere, by a longer path, later, as one job, and with another home.
for at in one a-second/and-a-longer-one; do
    folder=$work/$at
    mkdir -p "$folder/source"
    git -C "$repo" archive HEAD | tar -x -C "$folder/source"
done
# A copy, since Cargo looks through links.
mkdir -p "$work/a-second/home/registry"
for name in cache index; do
    [ ! -e "$home/registry/$name" ] || cp -r "$home/registry/$name" "$work/a-second/home/registry/"
done
for name in config.toml config; do
    [ ! -e "$home/$name" ] || cp "$home/$name" "$work/a-second/home/"
done

build() { # FOLDER HOME JOBS
    # The build that is compared is the one of `make release`.
    CARGO_HOME=$2 make -s -C "$1/source" release JOBS="$3" CARGO_TARGET_DIR="$1/target" >&2
    (cd "$1/target/release" && sha256sum vublk vublkd)
}
first=$(build "$work/one" "$home" "$(nproc)")
second=$(build "$work/a-second/and-a-longer-one" "$work/a-second/home" 1)
echo "$first"
if [ "$first" != "$second" ]; then
    echo "reproducible: two builds of one commit differ:" >&2
    echo "$second" >&2
    exit 1
fi
echo "reproducible: two builds in two folders gave the same programs"
