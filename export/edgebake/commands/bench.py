"""`edgebake bench`: time artifacts here and weigh their memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgebake.commands import _shared
from edgebake.errors import EXIT_NOT_MEASURED, EdgebakeError, Problem, problem_to_json

TIMEOUT_S = 3600.0


def run(*, folders: Sequence[Path], repetitions: int, as_json: bool) -> int:
    """Measure every artifact at or below ``folders``; the code of a failure, 6 when none could be measured."""
    import psutil

    from edgebake.commands import _isolated

    found = _shared.artifact_folders(folders)
    jobs = [{"folder": str(folder), "repetitions": repetitions} for folder in found]
    memory = 0.75 * psutil.virtual_memory().total / 2**20
    answers = _isolated.run("bench", jobs, timeout_s=TIMEOUT_S, memory_mib=memory)
    rows = [
        {"folder": str(folder), "failed": [problem_to_json(p) for p in answer.problems]}
        if isinstance(answer, EdgebakeError)
        else answer
        for folder, answer in zip(found, answers, strict=True)
    ]
    if as_json:
        _shared.print_json(rows)
    else:
        for row in rows:
            _shared.say(_line(row))
    failed = [answer.exit_code for answer in answers if isinstance(answer, EdgebakeError)]
    if failed:
        return failed[0]
    return EXIT_NOT_MEASURED if all("not_measured" in row for row in rows) else 0


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        problems = "\n".join(str(Problem(**p)) for p in row["failed"])
        return f"{row['folder']}: failed\n    " + problems.replace("\n", "\n    ")
    if "not_measured" in row:
        return f"{row['unit']}: not measured ({row['not_measured']})"
    return (
        f"{row['unit']}: {row['median_ms']:.3g} ms (10 % below {row['p10_ms']:.3g}, 10 % above {row['p90_ms']:.3g}), "
        f"peak {row['peak_bytes'] / 2**20:.1f} MiB, {row['runner']['name']} ({row['runner']['kind']}), "
        f"{row['repetitions']} runs"
    )


def isolated(folder: str, repetitions: int) -> dict[str, Any]:
    """In the worker: latency in ms on the recorded sample of median size, and what load and run added to
    the peak memory of a process that holds the runtime."""
    from edgebake import runclient, validate
    from edgebake.reference import Reference
    from edgebake.verify import subject_of

    subject = subject_of(Path(folder))
    runner = validate.choose_runner(subject.target)
    if isinstance(runner, str):
        return {"unit": subject.unit, "folder": folder, "not_measured": runner}
    if runner[1] == "interpreted":
        reason = f"{runner[0]} interprets the artifact: neither its speed nor its memory are the artifact's"
        return {"unit": subject.unit, "folder": folder, "not_measured": reason}
    recorded = Reference(subject.reference)
    sample = validate.median_sample(recorded)
    with runclient.opened(runner[0], subject.entry, subject.lowered["signature"], subject.reference) as client:
        client.time(sample, 3)
        took = client.time(sample, repetitions)
        deciles = statistics.quantiles(took, n=10)
        return {
            "unit": subject.unit,
            "folder": folder,
            "runner": {"name": runner[0], "kind": runner[1]},
            "median_ms": statistics.median(took),
            "p10_ms": deciles[0],
            "p90_ms": deciles[8],
            "repetitions": repetitions,
            "peak_bytes": max(0, client.opened["peak_bytes"] - client.opened["base_bytes"]),
        }
