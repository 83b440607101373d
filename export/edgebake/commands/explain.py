"""`edgebake explain`: which stages would run again, and what changed since they last ran."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgebake.commands import _shared

STAGES = ("reference", "describe", "trace", "compress", "lower", "validate", "speculate")
_DIGEST = re.compile(r"[0-9a-f]{64}")


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
    from edgebake.keys import keys_of
    from edgebake.selecting import select, within_memory
    from edgebake.store import Store

    files = _shared.read_recipes(recipes, settings)
    units, _ = check(files, trust=trust)
    opened = Store(store)
    chosen = within_memory(select(units, only), None)
    keys, without = keys_of(chosen, files, opened.file_digest)
    found = {unit.id: _stages(opened, unit, out, keys[unit.id]) for unit in chosen if unit.id in keys}
    for error in dict.fromkeys(without.values()):
        _shared.print_problems(error.problems)
    code = next((error.exit_code for error in without.values()), 0)
    if as_json:
        _shared.print_json(found)
        return code
    for name, stages in found.items():
        _shared.say(name)
        for stage, facts in stages.items():
            _shared.say(f"  {stage}: {facts['state']}")
            for line in facts["why"]:
                _shared.say(f"    {line}")
    return code


def _stages(store: Any, unit: Any, out: Path, keys: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    from edgebake.keys import model_part
    from edgebake.last import MODEL, last_parts

    before = last_parts(store, unit, out)
    models = before.get(MODEL), model_part(unit, store.file_digest)
    found = {}
    for stage in _own(keys):
        key = keys[stage]
        if store.find(stage, key.key, verify=False) is not None:
            found[stage] = {"state": "stored", "why": []}
        elif stage == "compress" and not key.parts["methods"]:
            found[stage] = {"state": "nothing to do", "why": []}
        elif stage not in before:
            found[stage] = {"state": "would run", "why": ["it never ran for this output folder"]}
        else:
            changed = list(_reasons(before[stage], key.parts, models))
            why = changed or ["its result was cleaned from the store or was damaged"]
            found[stage] = {"state": "would run", "why": why}
    return found


def _own(keys: Mapping[str, Any]) -> list[str]:
    """The stages that the unit of ``keys`` has: what is lowered from its files is described, not traced."""
    instead = ("trace", "compress") if "describe" in keys else ("describe",)
    return [stage for stage in STAGES if stage in keys and stage not in instead]


def _reasons(old: Mapping[str, Any], new: Mapping[str, Any], models: tuple[Any, Any]) -> Iterator[str]:
    """Why a stage has another key, in the words of the recipe: what went into the digests of its inputs, not these."""
    for key in sorted({*old, *new}):
        if old.get(key) == new.get(key):
            continue
        if key == "model" and models[0] is not None:
            yield from differences(*models, "model")
        elif key in STAGES:
            yield f"what it reads from the stages before it changes ({key})"
        else:
            yield from differences(old.get(key), new.get(key), key)


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """What differs between two trees of plain data, one line each."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new:
        both = all(_DIGEST.fullmatch(str(value)) for value in (old, new))
        yield f"{path}: changed" if both else f"{path}: {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
