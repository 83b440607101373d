"""Two results held against each other, number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgebake.result import Result

_BETTER_HIGH = ("sqnr_db", "cosine", "agreement", "task", "delegated share")


@dataclass(frozen=True, kw_only=True)
class Change:
    """One number of one unit in two results; None where a side lacks it. ``better``: None when neither is."""

    unit: str
    what: str
    old: float | None
    new: float | None
    better: bool | None


def numbers(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of measurements.json that a reader compares."""
    found: dict[str, float | None] = {}
    for name, output in (measured.get("outputs") or {}).items():
        for metric in ("sqnr_db", "cosine", "max_abs"):
            found[f"{name} {metric}"] = output.get(metric)
    found["agreement"] = (measured.get("agreement") or {}).get("value")
    found["task"] = (measured.get("task") or {}).get("artifact")
    size = measured.get("size") or {}
    for kind in ("bytes", "weights", "scales", "graph"):
        found[f"size {kind}"] = size.get(kind)
    memory = measured.get("memory") or {}
    found["memory planned bytes"] = memory.get("planned_bytes")
    found["memory peak bytes"] = memory.get("run_peak_bytes")
    latency = measured.get("latency") or {}
    found["latency median ms"] = latency.get("median_ms")
    found["latency ratio to float"] = latency.get("ratio")
    found["delegated share"] = (measured.get("delegation") or {}).get("share")
    return found


def _better(what: str, old: float | None, new: float | None) -> bool | None:
    if old is None or new is None or math.isclose(old, new, rel_tol=1e-9):
        return None
    high = any(word in what for word in _BETTER_HIGH)
    return new > old if high else new < old


def compare(old: Mapping[str, Result], new: Mapping[str, Result]) -> Iterator[Change]:
    """Every number that differs, for units in both; by unit id."""
    for unit in [u for u in old if u in new]:
        before, after = numbers(old[unit].measurements), numbers(new[unit].measurements)
        for what in before:
            if before[what] != after.get(what):
                change = _better(what, before[what], after.get(what))
                yield Change(unit=unit, what=what, old=before[what], new=after.get(what), better=change)


def flips(old: Mapping[str, Result], new: Mapping[str, Result]) -> Iterator[tuple[str, str, str]]:
    """(unit, state before, state after) of every unit whose state changed, appeared or went."""
    for unit in dict.fromkeys((*old, *new)):
        before = old[unit].state if unit in old else "absent"
        after = new[unit].state if unit in new else "absent"
        if before != after:
            yield unit, before, after
