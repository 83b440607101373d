"""Wall time of a build where nothing changed: six shipped recipes on all their targets, no torch imported.

The first build fills store and output folder and takes long; give --work to keep both for the next time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RECIPES = (
    "minilm-l6",
    "silero-vad",
    "efficientnet-lite0",
    "mobilenet-v2-random",
    "mobilevit-xxs-random",
    "mobilevit-s-random",
)
LIMIT_S = 1.5
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "coremltools", "executorch", "torchao")
_MAIN = "from edgebake.cli import main; main()"
_WITH_MODULES = f"""
import sys
try:
    {_MAIN}
finally:
    print("heavy:", *sorted(set(sys.modules) & set({HEAVY!r})), file=sys.stderr)
"""


def command(program: str, recipes: Sequence[str], work: Path, *options: str) -> list[str]:
    """Argv of one build."""
    folders = ("--store", str(work / "store"), "--out", str(work / "dist"))
    return [sys.executable, "-c", program, "build", *recipes, *folders, *options]


def checked(recipes: Sequence[str], work: Path) -> dict[str, Any]:
    """One build where nothing changes: how many artifacts there are, stages that ran, heavy modules imported."""
    done = subprocess.run(command(_WITH_MODULES, recipes, work, "--json"), capture_output=True, text=True, check=False)
    heavy = next(line for line in done.stderr.splitlines() if line.startswith("heavy:")).split()[1:]
    results = json.loads(done.stdout)["results"]
    built = [r for r in results if r["state"] not in ("failed", "toolchain missing")]
    ran = sorted({s for r in built for s, how in r["stages"].items() if how != "unchanged"})
    return {"artifacts": len(built), "without": len(results) - len(built), "ran": ran, "heavy": heavy}


def main() -> int:
    """Print the numbers; 1 when the limit or a condition is not met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--work", type=Path, help="folder with the store and the output of an earlier run")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgebake-no-change-") as scratch:
        work = options.work or Path(scratch)
        subprocess.run(command(_MAIN, options.recipes, work), stdout=sys.stderr, check=False)
        found = checked(options.recipes, work)
        took = []
        for _ in range(options.repetitions):
            start = time.perf_counter()
            subprocess.run(command(_MAIN, options.recipes, work, "--quiet"), stdout=subprocess.DEVNULL, check=False)
            took.append(time.perf_counter() - start)
    wall = statistics.median(took)
    print(json.dumps({**found, "wall_s": wall, "fastest_s": min(took), "limit_s": LIMIT_S}, indent=2))
    met = wall < LIMIT_S and found["artifacts"] and not found["ran"] and not found["heavy"]
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
