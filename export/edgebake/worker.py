"""Processes under supervision: limits on time and memory, events, samples, a log, and no survivors. Knows no stage."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from edgebake.errors import ToolchainMissing
from edgebake.store_files import storage_errors
from edgebake.worker_channel import OUTSIDE, RECORD, Channel, channel, leave
from edgebake.worker_texts import describe, log_tail
from edgebake.worker_tree import end_guard, end_tree, family, resident_mib, start_guard

__all__ = [
    "OUTSIDE",
    "Channel",
    "Exit",
    "Limits",
    "Reason",
    "channel",
    "command",
    "describe",
    "leave",
    "log_tail",
    "supervise",
]

Reason = Literal["finished", "crashed", "timeout", "memory", "interrupted"]

_SAMPLE_S = 0.05
_FAMILY_S = 0.5  # looking for new descendants reads the whole process table
_DRAIN_S = 2.0


@dataclass(frozen=True)
class Limits:
    """``timeout_s``: how long a stage may take to end or to start another; ``memory_mib``: descendants included."""

    timeout_s: float | None = None
    memory_mib: float | None = None


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a worker ended: in which ``stage``, with what ``code`` or by which ``signal``.

    ``peak_mib``: highest resident memory of the process and its descendants seen while the stage ran, sampled every
    50 ms (pages of mapped files count, shared pages count once per process). ``seconds``: summed over the stage's runs.
    Both include what ran inside the stage; OUTSIDE stands for the time when none was open.
    """

    reason: Reason
    stage: str
    code: int | None
    signal: int | None
    peak_mib: Mapping[str, float]
    seconds: Mapping[str, float]
    log: Path
    limits: Limits


def command(module: str, *arguments: str) -> tuple[str, ...]:
    """Argv that runs ``module`` in this Python: crashes print the Python stack, the current folder is not searched."""
    return (sys.executable, "-P", "-X", "faulthandler", "-m", module, *arguments)


def supervise(
    argv: Sequence[str],
    *,
    payload: Mapping[str, Any] | None,
    log: Path,
    limits: Limits,
    on_event: Callable[[Mapping[str, Any]], None] = lambda _: None,
    on_sample: Callable[[float, float], None] = lambda _rss_mib, _elapsed_s: None,
    env: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
) -> Exit:
    """Run ``argv`` to its end, or to the limit it breaks; nothing that it started is alive when this returns or raises.

    ``payload`` goes to standard input as one line of JSON (None: nothing does). Events, sent by ``Channel.send``, go
    to ``on_event`` in this thread; ``{"stage": name, "state": "start" | "end"}`` tells which stage runs, and its "end"
    gets ``seconds`` and ``peak_mib`` added. All other output goes to ``log``, which is written anew. ``on_sample`` gets
    resident MiB and seconds since the start. ``stop`` ends the worker from another thread: reason "interrupted".
    StoreError when the log cannot be written, ToolchainMissing when ``argv[0]`` cannot be started.
    """
    with storage_errors("write the log", log):
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        writing = log.open("ab", buffering=0)
    with writing:
        process = _start(argv, payload, writing, env)
        watch = _Watch(process.pid)
        guard = None
        try:
            guard = start_guard(process)
            lines = _read_lines(process, writing)
            _give(process, payload)
            reason = _follow(process, lines, watch, limits=limits, on_event=on_event, on_sample=on_sample, stop=stop)
        finally:
            end_tree(process, watch.family)
            if guard is not None:
                end_guard(guard)
        stopped_in = watch.stage if reason is not None else ""
        _drain(lines, watch, on_event)
    code, stage = process.returncode, stopped_in or watch.failed or watch.stage
    return Exit(
        reason=reason or ("finished" if code == 0 else "crashed"),
        stage=stage,
        code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        peak_mib=dict(watch.peak_mib),
        seconds=watch.closed_seconds(),
        log=log,
        limits=limits,
    )


@dataclass
class _Open:
    """A stage that has started and not ended; ``unit`` is what its events say of it besides its name."""

    name: str
    unit: Any
    begun: float
    peak_mib: float = 0.0


@dataclass
class _Watch:
    """What has been seen of one process: its stages, its memory, its descendants."""

    pid: int
    begun: float = field(default_factory=time.monotonic)
    changed: float = field(default_factory=time.monotonic)  # when a stage last started or ended
    opened: list[_Open] = field(default_factory=list)
    failed: str = ""  # the stage that an exception has just left
    peak_mib: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    family: list[psutil.Process] = field(default_factory=list)
    family_at: float = float("-inf")

    @property
    def stage(self) -> str:
        return self.opened[-1].name if self.opened else OUTSIDE

    def sample(self) -> float:
        """Resident MiB of the process and its descendants now."""
        now = time.monotonic()
        if now - self.family_at > _FAMILY_S:
            self.family, self.family_at = family(self.pid), now
        rss = resident_mib(self.family)
        for stage in self.opened:
            stage.peak_mib = max(stage.peak_mib, rss)
        for name in {stage.name for stage in self.opened} or {OUTSIDE}:
            self.peak_mib[name] = max(self.peak_mib.get(name, 0.0), rss)
        return rss

    def see(self, event: Mapping[str, Any]) -> Mapping[str, Any]:
        """Note the change of stage that ``event`` tells, if any; returns the event with what was measured."""
        name, state, unit = event.get("stage"), event.get("state"), event.get("unit")
        if not isinstance(name, str) or state not in ("start", "end"):
            return event
        self.sample()
        now = time.monotonic()
        if not self.opened:
            self._count(OUTSIDE, now - self.changed)
        self.changed = now
        if state == "start":
            self.failed = ""
            self._close_while(lambda open_: open_.unit != unit, now)  # an exception has left them without an "end"
            self.opened.append(_Open(name, unit, now))
            return event
        self.failed = name if event.get("ok") is False else ""
        self._close_while(lambda open_: open_.name != name, now)
        if not self.opened:
            return event
        ended = self.opened[-1]
        self._close(now)
        return {**event, "seconds": now - ended.begun, "peak_mib": ended.peak_mib}

    def closed_seconds(self) -> dict[str, float]:
        """Seconds per stage, with those that are open."""
        now = time.monotonic()
        if not self.opened:
            self._count(OUTSIDE, now - self.changed)
        self._close_while(lambda _: True, now)
        return dict(self.seconds)

    def _close_while(self, condition: Callable[[_Open], bool], now: float) -> None:
        while self.opened and condition(self.opened[-1]):
            self._close(now)

    def _close(self, now: float) -> None:
        ended = self.opened.pop()
        self._count(ended.name, now - ended.begun)

    def _count(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def _start(
    argv: Sequence[str], payload: Mapping[str, Any] | None, log: IO[bytes], env: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    group = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)  # Windows; elsewhere the session does it
    try:
        return subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if payload is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=None if env is None else dict(env),
            start_new_session=os.name == "posix",
            creationflags=group,
        )
    except OSError as error:
        raise ToolchainMissing(
            f"cannot start {argv[0]}: {error.strerror}", fix="`edgebake doctor` says more"
        ) from error


def _give(process: subprocess.Popen[bytes], payload: Mapping[str, Any] | None) -> None:
    """Write the payload in a thread, since a process that never reads it would block; the pipe then stays open."""
    stream = process.stdin
    if payload is None or stream is None:
        return
    line = json.dumps(dict(payload)).encode("ascii") + b"\n"

    def write() -> None:
        try:
            stream.write(line)
            stream.flush()
        except (OSError, ValueError):  # it has ended without reading; its exit says why
            return

    threading.Thread(target=write, daemon=True, name="worker-payload").start()


def _read_lines(process: subprocess.Popen[bytes], log: IO[bytes]) -> queue.SimpleQueue[bytes | None]:
    """Records from the worker's standard output, then None; what is no record goes to the log."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    stream = process.stdout
    assert stream is not None

    def read() -> None:
        with stream:
            for line in stream:
                stray, record, event = line.partition(RECORD)
                with suppress(ValueError):  # the log is closed: a stranger has kept the pipe for longer than we wait
                    log.write(stray)
                if record:
                    lines.put(event)
        lines.put(None)

    threading.Thread(target=read, daemon=True, name="worker-events").start()
    return lines


def _follow(
    process: subprocess.Popen[bytes],
    lines: queue.SimpleQueue[bytes | None],
    watch: _Watch,
    *,
    limits: Limits,
    on_event: Callable[[Mapping[str, Any]], None],
    on_sample: Callable[[float, float], None],
    stop: threading.Event | None,
) -> Reason | None:
    """Follow the process until it ends (None) or must be ended (why)."""
    due = 0.0
    while process.poll() is None:
        now = time.monotonic()
        if now >= due:
            rss = watch.sample()
            on_sample(rss, now - watch.begun)
            due = now + _SAMPLE_S
            if limits.memory_mib is not None and rss > limits.memory_mib:
                return "memory"
        if limits.timeout_s is not None and now - watch.changed > limits.timeout_s:
            return "timeout"
        if stop is not None and stop.is_set():
            return "interrupted"
        try:
            line = lines.get(timeout=max(0.0, due - time.monotonic()))
        except queue.Empty:
            continue
        if line is not None:
            on_event(watch.see(json.loads(line)))
        else:  # standard output is closed: it is about to end, or has taken its leave of us
            lines.put(None)  # the end of the events, for _drain
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLE_S)
    return None


def _drain(
    lines: queue.SimpleQueue[bytes | None], watch: _Watch, on_event: Callable[[Mapping[str, Any]], None]
) -> None:
    """Events that were sent before the end; the last one may have been cut."""
    until = time.monotonic() + _DRAIN_S
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            return
        if line is None:
            return
        if line.endswith(b"\n"):
            on_event(watch.see(json.loads(line)))
