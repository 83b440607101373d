"""Progress of a build: one live line a worker on a terminal, plain lines when piped, nothing when quiet."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgebake.commands._shared import console
from edgebake.wording import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Observer = Callable[[Mapping[str, Any]], None]


@contextmanager
def watching(*, quiet: bool) -> Iterator[Observer]:
    """An observer for :func:`edgebake.pipeline.build`; warnings and failures show even when quiet."""
    err = console(stderr=True)
    if quiet:
        yield lambda event: _warn(err, event)
    elif err.is_terminal:
        with _bars(err) as progress:
            yield _Live(progress).event
    else:
        yield _Lines(err).event


def _warn(out: Console, event: Mapping[str, Any]) -> None:
    if event["event"] in ("warning", "failed"):
        head = event["event"] if event["event"] == "warning" else f"failed: {event.get('unit')} at {event.get('stage')}"
        out.print(f"{head}: " + "\n".join(visible(line) for line in str(event["text"]).splitlines()))


class _Lines:
    """One line when a stage ends."""

    def __init__(self, out: Console) -> None:
        self.out = out
        self.start = time.monotonic()
        self.began: dict[tuple[str, str], float] = {}
        self.peak: dict[tuple[str, str], float] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        _warn(self.out, event)
        key = (str(event.get("unit")), str(event.get("stage")))
        if event["event"] == "sample":
            self.peak[key] = max(self.peak.get(key, 0.0), event["rss_mib"])
        if event["event"] != "stage":
            return
        if event["state"] == "start":
            self.began[key] = time.monotonic()
            return
        took = time.monotonic() - self.began.get(key, time.monotonic())
        how = "" if event["how"] == "ran" else f" ({event['how']})"
        memory = f" {self.peak[key]:6.0f} MiB" if key in self.peak else ""
        elapsed = time.monotonic() - self.start
        self.out.print(f"[{elapsed:6.1f}s] {event['unit']}: {event['stage']}{how} {took:.1f}s{memory}")


class _Live:
    """One bar per unit being worked on: stage, elapsed, memory."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}
        self.stages: dict[str, list[str]] = {}

    def event(self, event: Mapping[str, Any]) -> None:
        _warn(self.progress.console, event)
        unit = event.get("unit")
        if not isinstance(unit, str):
            return
        kind = event["event"]
        if kind == "unit":
            self.tasks[unit] = self.progress.add_task(unit, total=None, stage="start", memory="")
            self.stages[unit] = []
        elif unit in self.tasks:
            self._update(unit, self.tasks[unit], event)

    def _update(self, unit: str, task: TaskID, event: Mapping[str, Any]) -> None:
        stages = self.stages[unit]
        if event["event"] == "stage":
            if event["state"] == "start":
                stages.append(event["stage"])
            elif stages:
                stages.pop()
            self.progress.update(task, stage=stages[-1] if stages else "")
        elif event["event"] == "sample":
            self.progress.update(task, memory=f"{event['rss_mib']:.0f} MiB")
        elif event["event"] in ("done", "failed"):
            self.progress.update(task, total=1, completed=1, stage=event["event"], memory="")


@contextmanager
def _bars(out: Console) -> Iterator[Progress]:
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[stage]}", style="cyan", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[memory]}", style="dim", markup=False),
    )
    with Progress(*columns, console=out, transient=sys.stderr.isatty()) as progress:
        yield progress
