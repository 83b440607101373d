"""`edgebake report`: show again what was measured when the artifacts were built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgebake.commands import _shared
from edgebake.errors import ArtifactDamaged, StoreError

if TYPE_CHECKING:
    from edgebake.result import Result


def run(*, folders: Sequence[Path], reports: Sequence[Path], strict: bool, as_json: bool) -> int:
    """Render; the exit code is that of the recorded verdicts, 4 when a record is damaged."""
    from edgebake.result import exit_code

    _shared.check_report_paths(reports)
    results = [_recorded(folder) for folder in _shared.artifact_folders(folders)]
    _shared.write_reports(results, reports, "report")
    _shared.show(results, "report", as_json=as_json)
    return exit_code(results, strict=strict)


def _recorded(folder: Path) -> Result:
    from edgebake.commands._results import recorded, unreadable

    try:
        return recorded(folder)
    except (ArtifactDamaged, StoreError) as error:  # shown in its row: the others are worth seeing
        return unreadable(folder, "report", error)
