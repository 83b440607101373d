"""`edgebake sweep`: one recipe in several schemes, which meet the limits, size against agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.errors import RecipeError

if TYPE_CHECKING:
    from edgebake.recipe import Component, TargetRule
    from edgebake.recipe_yaml import RecipeFile
    from edgebake.result import Result


def run(
    *,
    recipe: str,
    schemes: Sequence[str],
    targets: Sequence[str],
    settings: Sequence[str],
    out: Path,
    store: Path | None,
    trust: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Build all and print the table; 0 when at least one scheme of every target meets the limits."""
    from edgebake.commands._progress import watching
    from edgebake.pipeline import BuildOptions, build
    from edgebake.result import exit_code

    (file,) = _shared.read_recipes([recipe], settings)
    swept = _swept(file, schemes, targets)
    with watching(quiet=quiet or as_json) as observe:
        results = build([swept], BuildOptions(out=out / "sweep", store=store, trust=trust), observe)
    rows = table(results)
    if as_json:
        _shared.print_json(rows)
    else:
        _print(rows)
    by_target = {r.target for r in results}
    met = {r.target for r in results if r.state in ("pass", "not measured")}
    return 0 if by_target == met else exit_code(results)


def _swept(file: RecipeFile, schemes: Sequence[str], targets: Sequence[str]) -> RecipeFile:
    components = {
        name: component.model_copy(update={"targets": _rules(component, schemes, targets)})
        for name, component in file.recipe.components.items()
    }
    return replace(file, recipe=file.recipe.model_copy(update={"components": components}))


def _rules(component: Component, schemes: Sequence[str], targets: Sequence[str]) -> tuple[TargetRule, ...]:
    from edgebake.recipe import TargetRule
    from edgebake.scheme import canonical, parse
    from edgebake.target import find_target

    wanted = [canonical(s) for s in schemes]
    calibrated = component.samples.calibration is not None
    rules: dict[tuple[str, str | None, str], TargetRule] = {}
    known = {rule.target: rule for rule in component.targets}
    for name in targets or known:
        rows = [row for row in find_target(name).SUPPORTS if not row.override_only]
        able = [row.scheme for row in rows if calibrated or not parse(row.scheme).needs_calibration]
        base = known.get(name) or TargetRule(target=name)
        for scheme in wanted or able:
            if scheme in able:
                changes: dict[str, Any] = {"scheme": scheme, "name": None, "compress": {}}
                rules[name, base.device, scheme] = base.model_copy(update=changes)
    if not rules:
        raise RecipeError(
            f"none of {', '.join(wanted)} is supported by {', '.join(targets or known)}",
            fix="`edgebake targets` lists what each can do; w8a8 also needs calibration samples",
        )
    return tuple(rules.values())


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows by target, smallest first; ``pareto``: no other artifact of the target is smaller and agrees as well."""
    rows = [_row(r) for r in results]
    for row in rows:
        row["pareto"] = row["state"] in ("pass", "fail") and not any(
            other is not row
            and other["target"] == row["target"]
            and other["quality"] is not None
            and row["quality"] is not None
            and other["bytes"] <= row["bytes"]
            and other["quality"] >= row["quality"]
            and (other["bytes"], other["quality"]) != (row["bytes"], row["quality"])
            for other in rows
        )
    return sorted(rows, key=lambda row: (row["target"], row["bytes"] or float("inf")))


def _row(result: Result) -> dict[str, Any]:
    measured = result.measurements
    agreement = (measured.get("agreement") or {}).get("value")
    outputs = [o.get("cosine") for o in (measured.get("outputs") or {}).values()]
    cosine = min((c for c in outputs if c is not None), default=None)
    return {
        "target": result.target,
        "scheme": result.scheme,
        "state": result.state,
        "bytes": (measured.get("size") or {}).get("bytes"),
        "of_float": (measured.get("size") or {}).get("of_float"),
        "agreement": agreement,
        "cosine": cosine,
        "quality": agreement if agreement is not None else cosine,
        "why": "; ".join(
            [f"{v.limit} {v.value} (limit {v.bound})" for v in result.verdicts if v.state == "fail"]
            + ([str(result.failure.problems[0])] if result.failure else [])
        ),
    }


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for title in ("target", "scheme", "state", "MiB", "of float", "agreement", "cosine", "Pareto", "why"):
        shown.add_column(title, justify="right" if title in ("MiB", "of float", "agreement", "cosine") else "left")
    for row in rows:
        shown.add_row(
            row["target"],
            row["scheme"],
            row["state"],
            "" if row["bytes"] is None else f"{row['bytes'] / 2**20:.2f}",
            "" if row["of_float"] is None else f"{row['of_float']:.3f}",
            "" if row["agreement"] is None else f"{row['agreement']:.4f}",
            "" if row["cosine"] is None else f"{row['cosine']:.5f}",
            "*" if row["pareto"] else "",
            row["why"],
        )
    _shared.console().print(shown)
