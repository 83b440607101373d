"""`edgebake verify`: judge existing artifacts again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.commands import _shared

if TYPE_CHECKING:
    from edgebake.result import Result

TIMEOUT_S = 3600.0


def run(
    *,
    folders: Sequence[Path],
    timeout: float,
    memory: float | None,
    strict: bool,
    reports: Sequence[Path],
    as_json: bool,
) -> int:
    """Verify every artifact at or below ``folders``; returns the exit code."""
    from edgebake.result import exit_code

    _shared.check_report_paths(reports)
    results = verified(folders, timeout_s=timeout, memory_mib=memory)
    _shared.write_reports(results, reports, "verify")
    _shared.show(results, "verify", as_json=as_json)
    return exit_code(results, strict=strict)


def verified(folders: Sequence[Path], *, timeout_s: float = TIMEOUT_S, memory_mib: float | None = None) -> list[Result]:
    """A result per artifact at or below ``folders``, each judged in a process with limits on memory and time."""
    import psutil

    from edgebake.commands import _isolated
    from edgebake.commands._results import from_json, unreadable
    from edgebake.errors import EdgebakeError

    found = _shared.artifact_folders(folders)
    limit = memory_mib or 0.75 * psutil.virtual_memory().total / 2**20
    jobs = [{"folder": str(folder)} for folder in found]
    answers = _isolated.run("verify", jobs, timeout_s=timeout_s, memory_mib=limit)
    return [
        unreadable(folder, "verify", answer) if isinstance(answer, EdgebakeError) else from_json(answer)
        for folder, answer in zip(found, answers, strict=True)
    ]


def isolated(folder: str) -> dict[str, Any]:
    """In the worker: judge one artifact."""
    from edgebake.commands._results import to_json
    from edgebake.verify import verify

    return to_json(verify(Path(folder)))
