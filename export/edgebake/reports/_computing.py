"""How an artifact computes: rounding modes of an interpreter, units of a device, where operators are placed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edgebake import modes
from edgebake.reports._text import counted, decibels, percent

_SHOWN = 4  # operator types named of each unit


def computing(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, text) of each line; ``found`` is what measurements.json holds."""
    rounded = modes.ordered(found.get("modes") or {})
    if rounded:
        told = ", ".join(f"{mode} {_worst(row)}" for mode, row in rounded)
        yield "modes", f"{told} ({counted(rounded[0][1]['calls'], 'call')} each)"
    for unit, row in (found.get("compute_units") or {}).items():
        yield unit, row["reason"] if "reason" in row else f"{_worst(row)}, {row['median_ms']:.3g} ms"
    delegation = found.get("delegation") or {}
    rows = delegation.get("units") or ()
    if len({row.get("unit") for row in rows}) > 1:
        yield "units", "; ".join(unit_texts(rows, delegation.get("border_bytes")))
    placed = found.get("placement") or {}
    if placed:
        yield "placed", "; ".join(_placed(unit, row) for unit, row in placed.items())


def _worst(row: Mapping[str, Any]) -> str:
    values = [each.get("sqnr_db") for each in row["outputs"].values()]
    return decibels(None if None in values else min(values, default=None))


def _placed(unit: str, row: Mapping[str, Any]) -> str:
    work = "" if row.get("cost") is None else f"{percent(row['cost'])} of the work, "
    return f"{unit}: {work}{operators_text(row['operators'])}"


def operators_text(operators: Mapping[str, int]) -> str:
    """``7 operators (Conv 4, Relu 3)``, the most frequent types first."""
    often = sorted(operators, key=lambda name: (-operators[name], name))
    told = ", ".join(f"{name} {operators[name]}" for name in often[:_SHOWN])
    rest = f" and {counted(len(often) - _SHOWN, 'other type')}" if len(often) > _SHOWN else ""
    return f"{counted(sum(operators.values()), 'operator')} ({told}{rest})"


def unit_texts(rows: Iterable[Mapping[str, Any]], border_bytes: int | None) -> Iterator[str]:
    """What each unit computes of a graph (``types.UnitWork`` as data), then what passes between the parts in a call."""
    for row in rows:
        parts = row.get("subgraphs") or 0
        told = [counted(parts, "part")] if parts else []
        told.append(operators_text(row["operators"]) if row.get("operators") else "operators not shown")
        told += [f"{row['macs']:,} MACs"] if row.get("macs") is not None else []
        yield f"{row.get('unit')} by {row.get('by')}: {', '.join(told)}"
    if border_bytes is not None:
        yield f"{border_bytes:,} bytes pass between parts in a call"
