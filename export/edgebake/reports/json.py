"""The report as one JSON document with a version: everything the other formats show, and every measurement."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from edgebake.errors import problem_to_json
from edgebake.result import Result, exit_code

VERSION = 1  # fields may be added under the same version; one that goes or changes its meaning raises it


def render(results: Sequence[Result], *, title: str) -> str:
    """Strict JSON (no NaN, ASCII only), two spaces of indentation, a newline at the end."""
    return json.dumps(document(results, title=title), indent=2, allow_nan=False) + "\n"


def document(results: Sequence[Result], *, title: str) -> dict[str, Any]:
    """The report as plain data; numbers that are not finite are null."""
    states = Counter(result.state for result in results)
    verdicts = Counter(verdict.state for result in results for verdict in result.verdicts)
    found = {
        "version": VERSION,
        "title": title,
        "exit_code": exit_code(results),
        "exit_code_strict": exit_code(results, strict=True),
        "artifacts": dict(sorted(states.items())),
        "limits": {state: verdicts[state] for state in ("pass", "fail", "not measured")},
        "results": [_result(result) for result in results],
    }
    cleaned: dict[str, Any] = _clean(found)
    return cleaned


def _result(result: Result) -> dict[str, Any]:
    failure = result.failure
    return {
        "unit": result.unit,
        "recipe": result.recipe,
        "component": result.component,
        "target": result.target,
        "device": result.device,
        "scheme": result.scheme,
        "name": result.name,
        "optional": result.optional,
        "state": result.state,
        "folder": result.folder,
        "seconds": result.seconds,
        "stages": result.stages,
        "verdicts": [vars(verdict) for verdict in result.verdicts],
        "failure": failure
        and {
            "stage": failure.stage,
            "exit_code": failure.exit_code,
            "log": failure.log,
            "problems": [problem_to_json(problem) for problem in failure.problems],
        },
        "measurements": result.measurements,
    }


def _clean(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.as_posix() if isinstance(value, PurePath) else value
