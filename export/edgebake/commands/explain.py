"""`edgebake explain`: which stages would run again, and what changed since they last ran."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebake.commands import _shared


def run(
    *,
    recipes: Sequence[str],
    settings: Sequence[str],
    only: Sequence[str],
    out: Path,
    store: Path | None,
    trust: bool,
    as_json: bool,
) -> int:
    """Print, per artifact and stage, `stored` or what differs."""
    from edgebake.check import check
    from edgebake.selecting import select
    from edgebake.store import Store

    units, _ = check(_shared.read_recipes(recipes, settings), trust=trust)
    opened = Store(store)
    found = {unit.id: _stages(opened, unit, out) for unit in select(units, only)}
    if as_json:
        _shared.print_json(found)
        return 0
    for name, stages in found.items():
        _shared.say(name)
        for stage, facts in stages.items():
            _shared.say(f"  {stage}: {facts['state']}")
            for line in facts["why"]:
                _shared.say(f"    {line}")
    return 0


def _stages(store: Any, unit: Any, out: Path) -> dict[str, dict[str, Any]]:
    from edgebake import devices
    from edgebake.keys import stage_keys
    from edgebake.last import last_parts

    keys = stage_keys(unit, store.file_digest, devices.row(unit.device))
    before = last_parts(store, unit, out)
    found = {}
    for stage in ("reference", "trace", "compress", "lower", "validate"):
        key = keys[stage]
        if store.find(stage, key.key, verify=False) is not None:
            found[stage] = {"state": "stored", "why": []}
        elif stage == "compress" and not key.parts["methods"]:
            found[stage] = {"state": "nothing to do", "why": []}
        elif stage not in before:
            found[stage] = {"state": "would run", "why": ["it never ran for this output folder"]}
        else:
            changed = list(differences(before[stage], key.parts))
            why = changed or ["its result was cleaned from the store or was damaged"]
            found[stage] = {"state": "would run", "why": why}
    return found


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """What differs between two trees of plain data, one line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        yield f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
