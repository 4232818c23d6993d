#!/bin/bash
# step.sh NAME COMMAND...: announces a step, runs it, and says how long it took.
# Used by the Makefile so that a long `make test` shows where its time goes.
name=$1
shift
echo "== $name"
SECONDS=0
"$@"
status=$?
if [ $status = 0 ]; then
    echo "== $name: ok, ${SECONDS} s"
else
    echo "== $name: FAILED with status $status after ${SECONDS} s" >&2
fi
exit $status
