"""The Core ML interpreter against torch eager: speed as a ratio of medians, parity in dB, peak memory.

Each network (shipped recipes and small ones of other families, tests/helpers/whole_models.py) is lowered at fp32 and
fp16. Interpreter and eager float model take turns on the same input, so that a noisy machine disturbs both alike. Peak
memory is that of a process of its own that opens the package and predicts once, beyond what torch takes (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "export"), str(ROOT / "targets")]

SPEED_LIMIT = 3.0
HELD = ("minilm-l6", "mobilevit-s-random")  # networks that SPEED_LIMIT is about
SHIPPED = ("minilm-l6", "mobilevit-s-random", "mobilevit-xxs-random", "mobilenet-v2-random", "efficientnet-lite0")
OTHERS = ("silero-vad", "unet", "whisper")

_WEIGH = """
import json, pickle, sys
from pathlib import Path
from edgebake_targets.mil import MilModel
from edgebake_targets.mil.operators import operators
def held(key):
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(key))
    return int(line.split()[1]) * 1024
operators()
before = held("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = MilModel(sys.argv[1])
model.predict(pickle.loads(Path(sys.argv[2]).read_bytes()))
print(json.dumps(held("VmHWM") - before))
"""


def seconds(call: Callable[[], Any]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def turns(eager: Callable[[], Any], interpreted: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each, taken in turns after a warm-up."""
    for call in (eager, interpreted, eager, interpreted):
        call()
    pairs = [(seconds(eager), seconds(interpreted)) for _ in range(rounds)]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def added_bytes(package: Path, inputs: Any, scratch: Path) -> int:
    """Peak memory of a process that opens the package and predicts once, beyond torch and the operators."""
    import pickle

    file = scratch / "inputs.pickle"
    file.write_bytes(pickle.dumps({name: value.numpy() for name, value in inputs.items()}))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", _WEIGH, str(package), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def measure(name: str, rounds: int, scratch: Path) -> list[dict[str, Any]]:
    """One row per scheme."""
    import whole_models
    from edgebake.metrics import CAP_DB, sqnr_db, to_json
    from edgebake_targets.mil import MilModel

    whole = getattr(whole_models, name)() if hasattr(whole_models, name) else whole_models.shipped(name)
    *_, inputs = whole.calls()
    expected = whole.outputs(inputs)
    rows = []
    for scheme in ("fp32", "fp16"):
        package = whole.package(scratch / f"{name}-{scheme}", scheme)
        size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file())
        model = MilModel(package)
        found = {mode: model.predict(inputs, mode=mode) for mode in ("fp32", "declared")}
        eager, interpreted = turns(
            lambda: whole.outputs(inputs),
            lambda model=model: model.predict(inputs),
            rounds,  # type: ignore[misc]
        )
        rows.append(
            {
                "network": name,
                "scheme": scheme,
                "sqnr_db": {
                    mode: to_json(min(sqnr_db(v, outputs[output]) for output, v in expected.items()), CAP_DB)
                    for mode, outputs in found.items()
                },
                "eager_ms": statistics.median(eager) * 1e3,
                "interpreter_ms": statistics.median(interpreted) * 1e3,
                "ratio": statistics.median(interpreted) / statistics.median(eager),
                "package_mib": size / 2**20,
                "added_peak_mib": added_bytes(package, inputs, scratch) / 2**20,
            }
        )
    return rows


def main() -> int:
    """Print JSON; 1 when a limit is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=[*SHIPPED, *OTHERS])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="edgebake-interpreter-") as scratch:
        for name in arguments.networks:
            rows += measure(name, arguments.rounds, Path(scratch))
            for row in rows[-2:]:
                print(json.dumps(row), file=sys.stderr)
    missed = [r["network"] for r in rows if r["scheme"] == "fp32" and r["network"] in HELD and r["ratio"] > SPEED_LIMIT]
    print(json.dumps({"load": os.getloadavg(), "rows": rows, "missed": missed}, indent=1))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
