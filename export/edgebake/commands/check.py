"""`edgebake check`: refuse everything refusable before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from edgebake.commands import _shared


def run(*, recipes: Sequence[str], settings: Sequence[str], trust: bool, as_json: bool) -> int:
    """Print warnings and the number of artifacts; problems are raised."""
    from edgebake.check import check

    units, warnings = check(_shared.read_recipes(recipes, settings), trust=trust)
    if as_json:
        _shared.print_json({"artifacts": [u.id for u in units], "warnings": [asdict(w) for w in warnings]})
        return 0
    for warning in warnings:
        _shared.say(f"warning: {warning}")
    _shared.say(f"ok: {_shared.counted(len(units), 'artifact')} would be built")
    return 0
