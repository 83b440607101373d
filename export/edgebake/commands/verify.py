"""`edgebake verify`: judge existing artifacts again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgebake.commands import _shared


def run(*, folders: Sequence[Path], strict: bool, reports: Sequence[Path], as_json: bool) -> int:
    """Verify every artifact at or below ``folders``; returns the exit code."""
    from edgebake.result import exit_code
    from edgebake.verify import verify

    _shared.check_report_paths(reports)
    results = [verify(folder) for folder in _shared.artifact_folders(folders)]
    _shared.write_reports(results, reports, "verify")
    _shared.show(results, "verify", as_json=as_json)
    return exit_code(results, strict=strict)
