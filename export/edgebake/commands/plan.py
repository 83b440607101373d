"""`edgebake plan`: the fully resolved recipe and what would run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgebake.commands import _shared


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
    out = _shared.console()
    for warning in warnings:
        out.print(f"warning: {warning}")
    for row in rows:
        _print(out, row)
    return 0


def _print(out: Any, row: dict[str, Any]) -> None:
    import yaml

    out.print(f"{row['unit']}  ->  {row['folder']}")
    kinds = " ".join(row["kinds"]) or "the whole graph"
    out.print(f"  scheme {row['scheme_shown']} on {kinds}; stages {' > '.join(row['stages'])}")
    for method in row["methods"]:
        schemes = ", ".join(method["schemes"]) or "as a step"
        out.print(f"  {method['method']} acts on the {method['acts_on']}: {schemes}")
    runners = ", ".join(f"{r['name']} ({r['kind']})" for r in row["runners"])
    out.print(f"  runs with: {runners or 'nothing here: outputs will not be measured'}")
    if row["missing"]:
        out.print(f"  toolchain missing: {row['missing']['reason']} -> {row['missing']['remedy']}")
    if row["runs_code"]:
        out.print(f"  runs code that the recipe names: {', '.join(row['runs_code'])}")
    resolved = {"options": row["options"], **_without_empty(row["recipe"])}
    text = yaml.safe_dump(resolved, sort_keys=False, default_flow_style=None, width=110)
    out.print("  " + text.replace("\n", "\n  ").rstrip())


def _without_empty(recipe: dict[str, Any]) -> dict[str, Any]:
    """Sections that hold nothing but nulls say nothing to a reader; ``--json`` has them all."""
    return {k: v for k, v in ((k, _plain(v)) for k, v in recipe.items()) if v not in ({}, [], None)}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: p for k, v in value.items() if (p := _plain(v)) not in ({}, None)}
    return [_plain(v) for v in value] if isinstance(value, list) else value
