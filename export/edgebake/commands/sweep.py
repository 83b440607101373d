"""`edgebake sweep`: one recipe in several schemes, which meet the limits, size against agreement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared
from edgebake.errors import UsageError

if TYPE_CHECKING:
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
    from edgebake.commands import _sweeping
    from edgebake.commands._progress import watching
    from edgebake.pipeline import BuildOptions, build
    from edgebake.result import exit_code

    file, *others = _shared.read_recipes([recipe], settings)
    if others:
        raise UsageError(f"{recipe!r} names {1 + len(others)} recipes", fix="sweep one at a time")
    _shared.check_folder(out, "--out")
    swept, results = _sweeping.swept(file, schemes, targets, trust=trust)
    if swept is not None:
        with watching(quiet=quiet or as_json) as observe:
            results += build([swept], BuildOptions(out=out, store=store, trust=trust), observe)
    rows = table(results)
    if as_json:
        _shared.print_json(rows)
    else:
        _print(rows)
        _shared.say("limits of a scheme: its own where the recipe builds it, else the loosest of its target")
        _shared.say(f"artifacts in {out}")
    by_target = {r.target for r in results}
    met = {r.target for r in results if r.state in ("pass", "not measured")}
    return 0 if by_target == met else exit_code(results)


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
