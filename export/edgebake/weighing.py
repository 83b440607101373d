"""Peak memory of one piece of work inside a process that has used more before."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import psutil

_FORGET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def forgets() -> bool:
    """Whether this system lets a process forget its peak (Linux); elsewhere only a fresh process can be weighed."""
    return _FORGET.exists()


def start() -> int:
    """Resident bytes now, with what was freed before handed back, so that later use of it counts."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc, not musl
    if trim is not None:
        trim(0)
    if forgets():
        _FORGET.write_text("5")  # man proc_pid_clear_refs: reset the peak to the present
    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """Most resident bytes since :func:`start`; since the process began where the system does not forget."""
    if _STATUS.exists():
        line = next(ln for ln in _STATUS.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
