"""The worker's end: its payload, events that no print can spoil, and no life after the parent's.

Standard library only, so that a worker in any Python environment can use it.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

OUTSIDE = "worker"  # the name of what runs before, between and after stages: imports, mostly
# RFC 7464 (JSON text sequences): a record begins with RS and ends with LF.
RECORD = b"\x1e"
EXIT_ORPHANED = 70
_OOM_SCORE = "500"  # when memory runs out, Linux ends the worker rather than the parent that can report it


class Channel:
    """Opened once per worker by ``channel()``; ``payload`` is what the parent gave. Threads may share it."""

    def __init__(self, payload: Mapping[str, Any], descriptor: int) -> None:
        self.payload = payload
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: Mapping[str, Any]) -> None:
        """Hand ``event`` (plain JSON) to the parent's ``on_event``."""
        waiting = memoryview(RECORD + json.dumps(dict(event)).encode("ascii") + b"\n")
        try:
            with self._lock:
                while waiting:
                    waiting = waiting[os.write(self._descriptor, waiting) :]
        except BrokenPipeError:
            _end_orphan()

    @contextmanager
    def stage(self, name: str, **facts: Any) -> Iterator[None]:
        """Tell the parent that stage ``name`` runs: limits, peak memory and the log are kept per stage."""
        _flush()
        sys.stderr.write(f"--- {name} {' '.join(str(fact) for fact in facts.values())}".rstrip() + "\n")
        self.send({**facts, "stage": name, "state": "start"})
        try:
            yield
        except BaseException:
            self.send({**facts, "stage": name, "state": "end", "ok": False})
            raise
        self.send({**facts, "stage": name, "state": "end", "ok": True})


def channel() -> Channel:
    """Take standard input and output for the parent: call first thing in a worker.

    From here on whatever is printed, by Python or by a native library, goes to the log, and nothing can wait for an
    answer on standard input. When the parent dies, so does this process with all that it has started.
    """
    _flush()
    reading, writing = os.dup(0), os.dup(1)  # not inherited by programs that the worker starts
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    _prefer_for_oom()
    source = os.fdopen(reading, "rb")
    line = source.readline()
    if not line.endswith(b"\n"):
        _end_orphan()
    threading.Thread(target=_await_end_of_parent, args=(source,), daemon=True, name="await-end-of-parent").start()
    return Channel(json.loads(line), writing)


def _await_end_of_parent(source: Any) -> None:
    while source.read(1):
        continue
    _end_orphan()


def _end_orphan() -> None:
    if sys.platform != "win32" and os.getpid() == os.getpgrp():  # the group is this worker's own
        os.killpg(0, signal.SIGKILL)
    os._exit(EXIT_ORPHANED)


def _prefer_for_oom() -> None:
    score = Path("/proc/self/oom_score_adj")
    if sys.platform != "linux" or not score.exists():
        return
    try:
        score.write_text(_OOM_SCORE)
    except OSError:  # forbidden in some containers; only a preference
        return


def leave(code: int) -> NoReturn:
    """End this process now: exit handlers run, but nobody waits for torch's modules to be taken apart (seconds)."""
    atexit._run_exitfuncs()
    _flush()
    os._exit(code)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
