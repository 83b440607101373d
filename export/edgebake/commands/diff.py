"""`edgebake diff`: compare two results."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.commands import _shared
from edgebake.errors import EXIT_LIMIT, UsageError

if TYPE_CHECKING:
    from edgebake.result import Result

ONE = "artifact"  # what two artifacts with different names are compared as


def run(*, old: Path, new: Path, as_json: bool) -> int:
    """Print what differs; 5 when a unit that passed no longer does."""
    from edgebake.comparing import compare, flips

    was, now = _results(old), _results(new)
    before, after = {r.unit: r for r in was}, {r.unit: r for r in now}
    pair = ""
    if len(was) == len(now) == 1 and was[0].unit != now[0].unit:
        pair = f"{was[0].unit} -> {now[0].unit}"
        before, after = {ONE: was[0]}, {ONE: now[0]}
    changes, states = list(compare(before, after)), list(flips(before, after))
    worse = any(b == "pass" and a != "pass" for _, b, a in states)
    if as_json:
        document = {
            "compared": [unit for unit in before if unit in after],
            "states": [{"unit": unit, "old": b, "new": a} for unit, b, a in states],
            "changes": [asdict(change) for change in changes],
        }
        _shared.print_json(document)
        return EXIT_LIMIT if worse else 0
    if pair:
        _shared.say(pair)
    for unit, b, a in states:
        _shared.say(f"{unit}: {b} -> {a}")
    for change in changes:
        sign = {True: "better", False: "worse", None: ""}[change.better]
        _shared.say(f"{change.unit}: {change.what} {_number(change.old)} -> {_number(change.new)} {sign}".rstrip())
    if not states and not changes:
        _shared.say(f"no difference in {_shared.counted(len(before), 'artifact')}")
    return EXIT_LIMIT if worse else 0


def _results(path: Path) -> list[Result]:
    from edgebake.commands._results import from_report, recorded

    if not path.exists():
        raise UsageError(f"{path} does not exist", fix="give an artifact folder, dist, or a JSON report")
    found = from_report(path) if path.is_file() else [recorded(f) for f in _shared.artifact_folders([path])]
    twice = sorted({r.unit for r in found if sum(other.unit == r.unit for other in found) > 1})
    if twice:
        raise UsageError(f"{path} holds {twice[0]} more than once", fix="name one of the folders that hold it")
    return found


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
