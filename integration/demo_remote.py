"""`make demo-remote`: a guest on a Ceph RBD image. Its OSD is killed under it, its daemon is killed, and it moves live to
another host. The hosts are network namespaces."""

import os
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
sys.dont_write_bytecode = True
from vtest.core import BACKEND, CACHE, SCRATCH, Case, Failed, Skipped
from vtest.remote import Cluster, life


def stop(*_):
    raise KeyboardInterrupt


def main():
    signal.signal(signal.SIGTERM, stop)
    logs = f"{CACHE}/logs/demo-remote"
    shutil.rmtree(logs, ignore_errors=True)
    os.makedirs(logs)
    began = time.monotonic()
    print(f"\ndemo-remote: a Linux guest on a Ceph RBD image served by {BACKEND}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="vublk-demo.", dir=SCRATCH) as tmp, Case("demo-remote", tmp, logs) as case:
            life(case, lambda what, text: print(f"  {what:9} {text}", flush=True), Cluster)
    except (Failed, Skipped) as why:
        print(f"demo-remote: FAILED: {why}\n      logs in {logs}")
        return 1
    except KeyboardInterrupt:
        print("demo-remote: stopped")
        return 130
    print(f"demo-remote: done in {time.monotonic() - began:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
