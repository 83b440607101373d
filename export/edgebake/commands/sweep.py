"""`edgebake sweep`: one recipe in several schemes, which meet the limits, size against agreement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from edgebake.recipe import Component, TargetRule
    from edgebake.recipe_yaml import RecipeFile
    from edgebake.result import Result
    from edgebake.target import Support


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

    file, *others = _shared.read_recipes([recipe], settings)
    if others:
        raise UsageError(f"{recipe!r} names {1 + len(others)} recipes", fix="sweep one at a time")
    _shared.check_folder(out, "--out")
    swept = _swept(file, schemes, targets)
    with watching(quiet=quiet or as_json) as observe:
        results = build([swept], BuildOptions(out=out, store=store, trust=trust), observe)
    rows = table(results)
    if as_json:
        _shared.print_json(rows)
    else:
        _print(rows)
        _shared.say(f"artifacts in {out}")
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
    from edgebake.scheme import parse
    from edgebake.target import find_target

    wanted = [_scheme(s) for s in schemes]
    _refuse_unknown(wanted, targets or [rule.target for rule in component.targets])
    calibrated = component.samples.calibration is not None
    rules: dict[tuple[str, str | None, str], TargetRule] = {}
    known = {rule.target: rule for rule in component.targets}
    for name in targets or known:
        rows = [row for row in find_target(name).SUPPORTS if not row.override_only]
        base = known.get(name) or TargetRule(target=name)
        able = [row.scheme for row in rows if calibrated or not parse(row.scheme).needs_calibration]
        if not wanted:  # one that is named goes on to the check, which says what it needs
            able = [row.scheme for row in rows if row.scheme in able and _allowed(name, row, base)]
        for scheme in wanted or able:
            if scheme in able:
                changes: dict[str, Any] = {"scheme": scheme, "name": None, "compress": {}}
                rules[name, base.device, scheme] = base.model_copy(update=changes)
    if not rules:
        raise RecipeError(
            f"none of {', '.join(wanted)} can be tried on {', '.join(targets or known)}",
            fix="`edgebake targets` lists what each can do; static activations (w8a8) need calibration samples",
        )
    return tuple(rules.values())


def _allowed(name: str, row: Support, rule: TargetRule) -> bool:
    from edgebake.checks.targets import options_of
    from edgebake.target import find_target, unmet

    return not list(unmet(name, row, options_of(find_target(name), rule.options)))


def _scheme(name: str) -> str:
    from edgebake.scheme import parse

    try:
        return parse(name).name
    except ValueError as error:
        raise UsageError(f"--scheme: {error}", fix="edgebake targets lists what each target supports") from None


def _refuse_unknown(schemes: Sequence[str], targets: Sequence[str]) -> None:
    """A scheme that no target can do would otherwise be missing from the table without a word."""
    from edgebake.target import find_target, support_of

    for scheme in schemes:
        rows = [row for name in targets if (row := support_of(find_target(name), scheme)) is not None]
        if all(row.override_only for row in rows):
            able = {row.scheme: None for name in targets for row in find_target(name).SUPPORTS if not row.override_only}
            raise UsageError(f"{scheme} is supported by none of {', '.join(targets)}", fix=f"known: {', '.join(able)}")


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Rows by target, smallest first; ``pareto``: no other artifact of the target is smaller and agrees as well."""
    rows = [_row(r) for r in results]
    for row in rows:
        row["pareto"] = row["quality"] is not None and not any(
            other is not row
            and other["target"] == row["target"]
            and other["quality"] is not None
            and other["bytes"] <= row["bytes"]
            and other["quality"] >= row["quality"]
            and (other["bytes"], other["quality"]) != (row["bytes"], row["quality"])
            for other in rows
        )
    return sorted(rows, key=lambda row: (row["target"], row["bytes"] or float("inf")))


def _row(result: Result) -> dict[str, Any]:
    from edgebake.reports._rows import verdict_text

    measured = result.measurements
    agreement = (measured.get("agreement") or {}).get("value")
    outputs = [o.get("cosine") for o in (measured.get("outputs") or {}).values()]
    unmeasured = dict.fromkeys(v.limit for v in result.verdicts if v.state == "not measured")
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
            [f"missed: {verdict_text(v)}" for v in result.verdicts if v.state == "fail"]
            + ([str(result.failure.problems[0])] if result.failure else [])
            + ([f"not measured: {', '.join(unmeasured)}"] if unmeasured else [])
        ),
    }


_COLUMNS = ("target", "scheme", "state", "size", "of float", "agreement", "cosine", "Pareto")


def _print(rows: Sequence[dict[str, Any]]) -> None:
    cells = [_COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_COLUMNS))]
    for row, facts in zip(cells, [None, *rows], strict=True):
        padded = (
            cell.rjust(w) if 3 <= i <= 6 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        _shared.say("  ".join(padded).rstrip())
        if facts and facts["why"]:
            _shared.say("    " + facts["why"].replace("\n", "\n    "))


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    from edgebake.reports._text import floored

    return (
        row["target"],
        row["scheme"],
        row["state"],
        "" if row["bytes"] is None else _shared.kib_or_mib(row["bytes"]),
        "" if row["of_float"] is None else f"{row['of_float']:.3f}",
        "" if row["agreement"] is None else floored(row["agreement"], 4),
        "" if row["cosine"] is None else floored(row["cosine"], 5),
        "*" if row["pareto"] else "",
    )
