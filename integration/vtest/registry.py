"""What a case is. Each is a function of a `Case`; its first line of documentation is its description."""

import dataclasses

CASES = {}
BOOT = 60  # seconds a guest may take to come up on a busy machine
# EVENT_IDX and INDIRECT_DESC.
FLAGS = [(ev, ind) for ev in ("on", "off") for ind in ("on", "off")]


@dataclasses.dataclass
class Entry:
    name: str
    text: str
    run: object
    timeout: int
    subset: bool
    alone: bool


def case(name, timeout=120, subset=False, alone=False, **fixed):
    """Registers a case; `subset` ones are in `make test`, `alone` ones want both cores."""

    def register(function):
        text = fixed.pop("text", None) or function.__doc__.splitlines()[0]
        CASES[name] = Entry(name, text, lambda t: function(t, **fixed), timeout, subset, alone)
        return function

    return register


def finish(guest, backends, seconds):
    """The guest ends well, and then each daemon on SIGTERM. Says what it cost."""
    if not isinstance(backends, list):
        backends = [backends]
    values = guest.expect("done", seconds)
    bounced = [b.bounced() for b in backends]
    guest.lines.insert(0, ("done", values, ""))
    guest.finish(seconds)
    for backend in backends:
        backend.stop()
    guest.case.fact(f"cpu {sum(b.cpu_seconds() for b in backends):.2f}s")
    if None not in bounced:
        guest.case.fact(f"bounced {sum(bounced)}")
    return bounced


def say_fio(t, guest, seconds, count):
    """Collects `count` results of fio."""
    read = written = 0
    for _ in range(count):
        values = guest.expect("fio", seconds)
        read += int(values["read_kib"])
        written += int(values["written_kib"])
    t.fact(f"{written // 1024} MiB written, {read // 1024} MiB verified")
