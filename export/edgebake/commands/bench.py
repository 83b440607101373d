"""`edgebake bench`: time artifacts here and weigh their memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgebake.commands import _shared
from edgebake.errors import EXIT_NOT_MEASURED


def measure(folder: Path, repetitions: int) -> dict[str, Any]:
    """Latency in ms on the recorded sample of median size, and peak memory of load and run, in a process of its own."""
    from edgebake import runclient, validate
    from edgebake.reference import Reference
    from edgebake.verify import subject_of

    subject = subject_of(folder)
    runner = validate.choose_runner(subject.target)
    if isinstance(runner, str):
        return {"unit": subject.unit, "folder": str(folder), "not_measured": runner}
    recorded = Reference(subject.reference)
    sample = validate.median_sample(recorded)
    with runclient.opened(runner[0], subject.entry, subject.lowered["signature"], subject.reference) as client:
        client.time(sample, 3)
        took = client.time(sample, repetitions)
        deciles = statistics.quantiles(took, n=10)
        return {
            "unit": subject.unit,
            "folder": str(folder),
            "runner": {"name": runner[0], "kind": runner[1]},
            "median_ms": statistics.median(took),
            "p10_ms": deciles[0],
            "p90_ms": deciles[8],
            "repetitions": repetitions,
            "peak_bytes": client.opened["peak_bytes"] - client.opened["base_bytes"],
        }


def run(*, folders: Sequence[Path], repetitions: int, as_json: bool) -> int:
    """Measure every artifact at or below ``folders``; 6 when none of them could be measured."""
    rows = [measure(folder, repetitions) for folder in _shared.artifact_folders(folders)]
    if as_json:
        _shared.print_json(rows)
    else:
        out = _shared.console()
        for row in rows:
            if "not_measured" in row:
                out.print(f"{row['unit']}: not measured ({row['not_measured']})")
                continue
            out.print(
                f"{row['unit']}: {row['median_ms']:.2f} ms ({row['p10_ms']:.2f} to {row['p90_ms']:.2f}), "
                f"peak {row['peak_bytes'] / 2**20:.1f} MiB, {row['runner']['name']} ({row['runner']['kind']}), "
                f"{row['repetitions']} runs"
            )
    return EXIT_NOT_MEASURED if all("not_measured" in row for row in rows) else 0
