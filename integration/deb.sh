#!/bin/bash
# The Debian package: what `make install` would install, with the scripts in dist/debian.
# The first time it builds cargo-deb, into .cache, which takes some minutes.
#
#   deb.sh [cargo-deb's options]      prints the package's path
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
version=3.8.0
tool=$repo/.cache/cargo-deb-$version
cd "$repo"
if [ ! -x "$tool/bin/cargo-deb" ]; then
    echo "deb: building cargo-deb $version" >&2
    cargo install --quiet --locked --root "$tool" --target-dir "$tool/target" "cargo-deb@$version"
    rm -rf "$tool/target"
fi
# Cargo.toml names what is in this folder.
rm -rf .cache/package
trap 'rm -rf .cache/package' EXIT
make --no-print-directory -s copy DESTDIR="$repo/.cache/package" PREFIX=/usr ZSH=/usr/share/zsh/vendor-completions
# cargo-deb is asked to build nothing: --no-build.
PATH=$tool/bin:$PATH cargo deb --quiet --no-build --no-strip --no-dbgsym "$@"
