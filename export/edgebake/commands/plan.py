"""`edgebake plan`: the fully resolved recipe and what would run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from edgebake.commands import _shared
from edgebake.target import runners_of

_TAKES = {  # kind of samples -> the keys that only it and few others look at
    "file": (),
    "images": ("seed", "pattern", "size", "crops", "mean", "std", "labels"),
    "text": (),
    "python": ("seed", "options"),
    "noise": ("seed", "high"),
}


def run(*, recipes: Sequence[str], settings: Sequence[str], only: Sequence[str], trust: bool, as_json: bool) -> int:
    """Print it; nothing is loaded."""
    from edgebake.check import check
    from edgebake.plan import plan
    from edgebake.selecting import select

    units, warnings = check(_shared.read_recipes(recipes, settings), trust=trust)
    rows = plan(select(units, only))
    if as_json:
        _shared.print_json(rows)
        return 0
    for warning in warnings:
        _shared.say(f"warning: {warning}")
    for component, group in groupby(rows, key=lambda row: f"{row['recipe_name']}/{row['component']}"):
        _print_component(component, list(group))
    return 0


def _print_component(name: str, rows: list[dict[str, Any]]) -> None:
    """What all artifacts of a component share is said once."""
    sections = [_without_empty(row["recipe"]) for row in rows]
    shared = {k: v for k, v in sections[0].items() if len(rows) > 1 and all(s.get(k) == v for s in sections)}
    if shared:
        _shared.say(f"{name}, for all {len(rows)} artifacts")
        _print_yaml(shared)
    for row, own in zip(rows, sections, strict=True):
        _print(row, {key: value for key, value in own.items() if key not in shared})


def _print(row: dict[str, Any], own: dict[str, Any]) -> None:
    _shared.say(f"{row['unit']}  ->  {row['folder']}")
    kinds = " ".join(row["kinds"]) or "the whole graph"
    _shared.say(f"  scheme {row['scheme_shown']} on {kinds}; stages {' > '.join(row['stages'])}")
    for method in row["methods"]:
        schemes = ", ".join(method["schemes"]) or "as a step"
        _shared.say(f"  {method['method']} acts on the {method['acts_on']}: {schemes}")
    usable = {name for name, runner in runners_of(row["target"]) if runner.missing() is None}
    runners = ", ".join(f"{r['name']} ({r['kind']})" for r in row["runners"] if r["name"] in usable)
    _shared.say(f"  runs with: {runners or 'nothing here: outputs will not be measured'}")
    if row["missing"]:
        _shared.say(f"  toolchain missing: {row['missing']['reason']} -> {row['missing']['remedy']}")
    if row["fit"]:
        from edgebake.commands import _fit

        for line in _fit.lines(row["fit"]):
            _shared.say(f"  {line}")
    if row["runs_code"]:
        _shared.say(f"  runs code that the recipe names: {', '.join(row['runs_code'])}")
    _print_yaml({"options": row["options"], **own} if row["options"] else own)


def _print_yaml(sections: dict[str, Any]) -> None:
    import yaml

    if not sections:
        return
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml, where PyYAML was built with it
    text = yaml.dump(sections, Dumper=dumper, sort_keys=False, default_flow_style=None, width=110)
    _shared.say("  " + text.replace("\n", "\n  ").rstrip())


def _without_empty(recipe: dict[str, Any]) -> dict[str, Any]:
    """Sections without what says nothing to a reader: nulls, and what other kinds of samples take. --json has all."""
    shown = {**recipe, "samples": {purpose: _of_its_kind(spec) for purpose, spec in recipe["samples"].items()}}
    return {k: v for k, v in ((k, _plain(v)) for k, v in shown.items()) if v not in ({}, [], None)}


def _of_its_kind(spec: dict[str, Any] | None) -> dict[str, Any]:
    given = spec or {}
    kind = next((kind for kind in _TAKES if given.get(kind)), None)
    return {key: value for key, value in given.items() if kind and key in (kind, "count", "skip", *_TAKES[kind])}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: p for k, v in value.items() if (p := _plain(v)) not in ({}, [], None)}
    return [_plain(v) for v in value] if isinstance(value, list) else value
