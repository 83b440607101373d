"""A unit lowered from its files as a worker does it, in a process that may be killed in the middle of a tensor."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from edgebake import devices, streamed
from edgebake.check import check
from edgebake.keys import stage_keys
from edgebake.recipe_yaml import read
from edgebake.store import Store
from edgebake.workbench import Bench
from edgebake_targets._genai_weights import WeightWriter


def lower(recipe: Path, root: Path, last: int = -1) -> tuple[dict[str, str], int]:
    """Digests of the artifact's files and how many tensors were written; killed behind tensor number ``last``."""
    (unit,), _ = check([read(recipe)], trust=False)
    store, written, write = Store(root), [], WeightWriter._written  # type: ignore[var-annotated]

    def counted(writer: WeightWriter, chunks: Any) -> Any:
        made = write(writer, chunks)
        written.append(made)
        if len(written) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    bench = Bench(store=store, emit=lambda *_, **__: None, trust=False, device=devices.row)
    keys = stage_keys(unit, store.file_digest, devices.row(unit.device))
    with mock.patch.object(WeightWriter, "_written", counted):
        _, entry = streamed.lower(bench, unit, keys)
    return dict(entry.files), len(written)


if __name__ == "__main__":
    lower(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
