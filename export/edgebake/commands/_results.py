"""Results as plain data and back: out of a worker, out of a JSON report, out of artifact folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from edgebake.errors import EdgebakeError, Problem, UsageError, problem_to_json
from edgebake.reports.json import VERSION
from edgebake.result import Failure, Result
from edgebake.target import TARGETS
from edgebake.types import Verdict

MAX_REPORT = 256 << 20  # bytes
_TEXTS = ("unit", "recipe", "component", "target", "scheme")


def to_json(result: Result) -> dict[str, Any]:
    """Plain data of ``result``; numbers that are not finite stay as they are."""
    failure = result.failure
    return {
        **{f.name: getattr(result, f.name) for f in fields(result)},
        "folder": None if result.folder is None else str(result.folder),
        "stages": dict(result.stages),
        "measurements": dict(result.measurements),
        "verdicts": [asdict(verdict) for verdict in result.verdicts],
        "failure": failure
        and {
            "stage": failure.stage,
            "exit_code": failure.exit_code,
            "log": None if failure.log is None else str(failure.log),
            "problems": [problem_to_json(problem) for problem in failure.problems],
        },
    }


def from_json(data: Mapping[str, Any]) -> Result:
    """The result that :func:`to_json` or a JSON report wrote. TypeError, KeyError when it is neither."""
    known = {f.name for f in fields(Result)}
    given = {key: value for key, value in data.items() if key in known}
    if not all(isinstance(given[key], str) for key in _TEXTS) or not isinstance(given["measurements"], Mapping):
        raise TypeError("names are text, measurements a mapping")
    failure = given["failure"]
    if failure is not None:
        log = failure["log"]
        problems = tuple(Problem(**p) for p in failure["problems"])
        code = int(failure["exit_code"])
        failure = Failure(stage=failure["stage"], exit_code=code, problems=problems, log=Path(log) if log else None)
    folder = given["folder"]
    return Result(
        **{
            **given,
            "folder": None if folder is None else Path(folder),
            "verdicts": tuple(Verdict(**v) for v in given["verdicts"]),
            "failure": failure,
        }
    )


def from_report(path: Path) -> list[Result]:
    """The results in a JSON report; UsageError when the file is none."""
    fix = "give a report that `edgebake build --report FILE.json` wrote, or a folder of artifacts"
    if path.stat().st_size > MAX_REPORT:
        raise UsageError(f"{path} has {path.stat().st_size >> 20} MiB: no report is as large", fix=fix)
    try:
        document = json.loads(path.read_bytes())
        newer = document["version"] > VERSION
        results = [] if newer else [from_json(row) for row in document["results"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(f"{path} is no JSON report of edgebake", fix=fix) from None
    if newer:
        what = f"{path} has version {document['version']}, this edgebake reads up to {VERSION}"
        raise UsageError(what, fix="install a newer edgebake, or write the report again")
    return results


def recorded(folder: Path) -> Result:
    """The result that ``folder`` records: its limits judged on its own measurements, nothing run."""
    from edgebake.artifacts import limits_of, manifest_of, measurements_of, not_ours
    from edgebake.limits import judge

    manifest, measured = manifest_of(folder), measurements_of(folder)
    limits = limits_of(manifest, folder)
    try:
        verdicts = judge(limits, measured)
        stages = {name: stage["state"] for name, stage in measured.get("stages", {}).items()}
    except (TypeError, KeyError, AttributeError) as error:
        raise not_ours("measurements", folder, error) from None
    return Result(
        **{key: manifest[key] for key in _TEXTS},
        device=manifest.get("device"),
        name=manifest.get("name"),
        folder=folder,
        verdicts=verdicts,
        measurements=measured,
        stages=stages,
    )


def unreadable(folder: Path, stage: str, error: EdgebakeError) -> Result:
    """The result of an artifact that cannot be judged; what it was follows from where it lies."""
    parts = ("", "", "", "", *folder.absolute().parts)[-5:]
    recipe, component, target, device, scheme = parts
    if target not in TARGETS.names():  # it lies where no build put it
        recipe, component, target, device, scheme = str(folder.parent), folder.name, "unknown", "any", "unknown"
    failure = Failure(stage=stage, problems=tuple(error.problems), exit_code=error.exit_code)
    return Result(
        unit=str(folder),
        recipe=recipe,
        component=component,
        target=target,
        device=None if device in ("", "any") else device,
        scheme=scheme,
        folder=folder,
        failure=failure,
    )
