#!/bin/sh
# Runs guest tests: run.sh [--list | --subset | --all | CASE...]. See README.md.
here=$(dirname "$0")
"$here/setup.sh" && exec python3 "$here/run.py" "$@"
