"""Two results held against each other, number by number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edgebake.result import Result

_BETTER_HIGH = ("sqnr_db", "cosine", "agreement", "task", "delegated share")
_BETTER_LOW = ("max_abs", "size bytes", "memory", "latency")
_NUMBERS = {
    "agreement": ("agreement", "value"),
    "task": ("task", "artifact"),
    "size bytes": ("size", "bytes"),
    "size weights": ("size", "weights"),
    "size scales": ("size", "scales"),
    "size graph": ("size", "graph"),
    "memory planned bytes": ("memory", "planned_bytes"),
    "latency median ms": ("latency", "median_ms"),
    "latency ratio to float": ("latency", "ratio"),
    "delegated share": ("delegation", "share"),
}


@dataclass(frozen=True, kw_only=True)
class Change:
    """One number of one unit in two results; None where a side lacks it. ``better``: None when neither is."""

    unit: str
    what: str
    old: float | None
    new: float | None
    better: bool | None


def numbers(measured: Mapping[str, Any]) -> dict[str, float | None]:
    """The numbers of measurements.json that a reader compares; None for what is absent or no number."""
    found: dict[str, float | None] = {}
    outputs = measured.get("outputs")
    for name in outputs if isinstance(outputs, Mapping) else ():
        for metric in ("sqnr_db", "cosine", "max_abs"):
            found[f"{name} {metric}"] = _number(measured, "outputs", name, metric)
    peak, base = (_number(measured, "memory", key) for key in ("run_peak_bytes", "run_base_bytes"))
    run = {"memory of the run bytes": None if peak is None else max(0.0, peak - (base or 0.0))}
    return found | {what: _number(measured, *path) for what, path in _NUMBERS.items()} | run


def _number(value: object, *path: str) -> float | None:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _better(what: str, old: float | None, new: float | None) -> bool | None:
    if old is None or new is None or math.isclose(old, new, rel_tol=1e-9):
        return None
    if any(word in what for word in _BETTER_HIGH):
        return new > old
    return new < old if any(word in what for word in _BETTER_LOW) else None


def compare(old: Mapping[str, Result], new: Mapping[str, Result]) -> Iterator[Change]:
    """Every number that differs, for units in both; by unit id. An output that only one of them has counts, too."""
    for unit in [u for u in old if u in new]:
        before, after = numbers(old[unit].measurements), numbers(new[unit].measurements)
        for what in dict.fromkeys((*before, *after)):
            was, now = before.get(what), after.get(what)
            if was != now and not (was is not None and now is not None and math.isnan(was) and math.isnan(now)):
                yield Change(unit=unit, what=what, old=was, new=now, better=_better(what, was, now))


def flips(old: Mapping[str, Result], new: Mapping[str, Result]) -> Iterator[tuple[str, str, str]]:
    """(unit, state before, state after) of every unit whose state changed, appeared or went."""
    for unit in dict.fromkeys((*old, *new)):
        before = old[unit].state if unit in old else "absent"
        after = new[unit].state if unit in new else "absent"
        if before != after:
            yield unit, before, after
