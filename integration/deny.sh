#!/bin/bash
# cargo-deny with the rules of deny.toml: licences, sources, duplicates, and advisories where their database can be had.
# The first time it builds cargo-deny, into .cache, which takes some minutes: so this is no part of `make test`, where
# supply.py checks the same but for advisories.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Of the compiler that builds vublk, so that a new version of it is asked for on purpose.
version=0.20.2
tool=$repo/.cache/cargo-deny-$version
cd "$repo"
if [ ! -x "$tool/bin/cargo-deny" ]; then
    echo "deny: building cargo-deny $version"
    cargo install --quiet --locked --root "$tool" --target-dir "$tool/target" "cargo-deny@$version"
    rm -rf "$tool/target"
fi
export PATH=$tool/bin:$PATH
for manifest in Cargo.toml fuzz/Cargo.toml; do
    echo "deny: $manifest"
    cargo deny --manifest-path "$manifest" --config "$repo/deny.toml" --locked check bans licenses sources
done
if why=$(cargo deny --manifest-path Cargo.toml --config "$repo/deny.toml" fetch db 2>&1); then
    cargo deny --manifest-path Cargo.toml --config "$repo/deny.toml" --locked check --disable-fetch advisories
else
    echo "$why" | tail -n 3
    echo "SKIPPED deny advisories: the database (github.com/rustsec/advisory-db) cannot be fetched from here"
fi
