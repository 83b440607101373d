"""What a worker's end means to a person."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.errors import Problem
from edgebake.worker_channel import OUTSIDE

if TYPE_CHECKING:
    from edgebake.worker import Exit

_TAIL_LINES = 12
_TAIL_BYTES = 16384
_LINE_CHARACTERS = 300
_SIGNALS = {
    "SIGSEGV": "segmentation fault",
    "SIGBUS": "bus error: a mapped file was cut short, or the disk is full",
    "SIGABRT": "abort: a native library gave up",
    "SIGILL": "illegal instruction: a library was built for another CPU",
    "SIGFPE": "arithmetic error",
    "SIGKILL": "killed from outside",
    "SIGTERM": "terminated from outside",
}
_WINDOWS = {
    0xC0000005: "access violation",
    0xC00000FD: "stack overflow",
    0xC000001D: "illegal instruction: a library was built for another CPU",
    0xC0000409: "abort: a native library gave up",
    0xC0000017: "out of memory",
}


def describe(end: Exit) -> Problem:
    """What happened, where its log is, what to do. ValueError for an end that is no failure."""
    if end.reason == "finished":
        raise ValueError("the worker finished: there is nothing to describe")
    what, fix = {"timeout": _timeout, "memory": _memory, "interrupted": _interrupted, "crashed": _crash}[end.reason](
        end
    )
    tail = log_tail(end.log)
    if tail:
        what += "\nlast lines of its log:\n" + "\n".join(f"  {line}" for line in tail)
    return Problem(what=what, where=str(end.log), fix=fix)


def log_tail(log: Path, lines: int = _TAIL_LINES) -> list[str]:
    """The last lines of ``log``, safe to print: no control characters, no endless line."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    kept = [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    shown = ["".join(c if c.isprintable() else "?" for c in line.expandtabs())[:_LINE_CHARACTERS] for line in kept]
    return [line for line in shown if line][-lines:]


def _where(end: Exit) -> str:
    return "the worker, outside any stage," if end.stage == OUTSIDE else f"stage {end.stage}"


def _timeout(end: Exit) -> tuple[str, str]:
    bound = end.limits.timeout_s or 0.0
    what = f"{_where(end)} ran longer than {bound:g} s (--timeout)"
    return what, "raise --timeout if the work is just slow; the end of the log shows where it was"


def _memory(end: Exit) -> tuple[str, str]:
    used, bound = end.peak_mib.get(end.stage, 0.0), end.limits.memory_mib or 0.0
    what = f"{_where(end)} used {_amount(used, bound)}, the limit is {_amount(bound, used)} (--memory)"
    return what, "raise --memory, run fewer workers at once (-j 1), or calibrate with fewer samples"


def _interrupted(end: Exit) -> tuple[str, str]:
    return f"{_where(end)} was interrupted", "run the same command again: finished stages are kept"


def _crash(end: Exit) -> tuple[str, str]:
    place = "outside any stage" if _where(end) != f"stage {end.stage}" else f"in stage {end.stage}"
    if end.signal is not None:
        name = _signal_name(end.signal)
        meaning = _SIGNALS.get(name, name)
        fix = "the log shows where; run the same command again: finished stages are kept"
        if name == "SIGKILL":
            peak = max(end.peak_mib.values(), default=0.0)
            fix = f"most likely the system ran out of memory (it held {_amount(peak, 0.0)}): close programs or use -j 1"
        return f"the worker was killed by signal {end.signal} ({meaning}) {place}", fix
    code = end.code or 0
    if code in _WINDOWS:
        return f"the worker crashed {place}: {_WINDOWS[code]} (0x{code:X})", "the log shows where"
    return f"the worker ended with code {code} {place} without saying why", "the log shows where"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _amount(mib: float, beside: float) -> str:
    """``mib`` in GiB or MiB, with enough digits to differ from ``beside``."""
    unit, size = ("GiB", 1024.0) if max(mib, beside) >= 1024.0 else ("MiB", 1.0)
    digits = next((d for d in (1, 2, 3) if f"{mib / size:.{d}f}" != f"{beside / size:.{d}f}"), 3)
    return f"{mib / size:.{digits}f} {unit}"
