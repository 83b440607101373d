"""`edgebake report`: show again what was measured when the artifacts were built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgebake.commands import _shared
from edgebake.result import Result, exit_code


def recorded(folder: Path) -> Result:
    """The result that ``folder`` records: its limits judged on its own measurements, nothing run."""
    from edgebake import delivery
    from edgebake.limits import judge
    from edgebake.recipe import Limits
    from edgebake.types import Verdict

    manifest = delivery.read_manifest(folder)
    measured = delivery.read_measurements(folder)
    limits = Limits.model_validate(manifest["limits"])
    structure = tuple(Verdict(**v) for v in measured.get("structure", ()))
    return Result(
        unit=manifest["unit"],
        recipe=manifest["recipe"],
        component=manifest["component"],
        target=manifest["target"],
        scheme=manifest["scheme"],
        device=manifest["device"],
        name=manifest["name"],
        folder=folder,
        verdicts=(*judge(limits, measured), *structure),
        measurements=measured,
        stages={name: stage["state"] for name, stage in measured.get("stages", {}).items()},
    )


def run(*, folders: Sequence[Path], reports: Sequence[Path], strict: bool, as_json: bool) -> int:
    """Render; the exit code is that of the recorded verdicts."""
    _shared.check_report_paths(reports)
    results = [recorded(folder) for folder in _shared.artifact_folders(folders)]
    _shared.write_reports(results, reports, "report")
    _shared.show(results, "report", as_json=as_json)
    return exit_code(results, strict=strict)
