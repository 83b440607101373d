"""`edgebake diff`: compare two results."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.commands import _shared
from edgebake.errors import EXIT_LIMIT

if TYPE_CHECKING:
    from edgebake.result import Result


def _results(path: Path) -> dict[str, Result]:
    """Units by id, from artifact folders; one artifact alone is keyed by what it is compared as."""
    from edgebake.commands.report import recorded

    found = [recorded(folder) for folder in _shared.artifact_folders([path])]
    return {"artifact" if len(found) == 1 else r.unit: r for r in found}


def run(*, old: Path, new: Path, as_json: bool) -> int:
    """Print what differs; 5 when a unit that passed no longer does."""
    from edgebake.comparing import compare, flips

    before, after = _results(old), _results(new)
    if len(before) != 1 or len(after) != 1:
        before = {r.unit: r for r in before.values()}
        after = {r.unit: r for r in after.values()}
    changes, states = list(compare(before, after)), list(flips(before, after))
    worse = any(was == "pass" and now != "pass" for _, was, now in states)
    if as_json:
        _shared.print_json({"states": [list(s) for s in states], "changes": [asdict(c) for c in changes]})
        return EXIT_LIMIT if worse else 0
    out = _shared.console()
    for unit, was, now in states:
        out.print(f"{unit}: {was} -> {now}")
    for change in changes:
        sign = {True: "better", False: "worse", None: ""}[change.better]
        out.print(f"{change.unit}: {change.what} {_number(change.old)} -> {_number(change.new)} {sign}".rstrip())
    if not states and not changes:
        out.print("no difference")
    return EXIT_LIMIT if worse else 0


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.5g}"
