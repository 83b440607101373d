"""Peak memory of the Core ML interpreter on large packages: file + largest decompressed tensor + activations + 1 GB.

A stack of linear layers with random weights, in float16 and in int4 with a scale per 32 (iOS 18), is written value by
value; a process of its own opens it, predicts twice and says its peak (Linux). The file counts as its pages are mapped;
a weight counts as float32, which is what the interpreter computes in.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "export"), str(ROOT / "targets")]

GIB = 2**30
ROWS = 128
_ENTRY = struct.Struct("<IIQQQ")
_KINDS = {"float16": 1, "int4": 8}  # BlobDataType of coremltools' MILBlob

_WEIGH = """
import json, sys, time
from pathlib import Path
import numpy as np
from edgebake_targets.mil import MilModel
from edgebake_targets.mil.operators import operators
def held(key):
    line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith(key))
    return int(line.split()[1]) * 1024
operators()
before = held("VmRSS")
model = MilModel(sys.argv[1])
x = {"x": np.random.default_rng(0).standard_normal((int(sys.argv[2]), int(sys.argv[3]))).astype(np.float32)}
start = time.perf_counter()
finite = [bool(np.isfinite(model.predict(x)["y"]).all()) for _ in range(2)]
seconds = (time.perf_counter() - start) / 2
print(json.dumps({"peak": held("VmHWM"), "before": before, "finite": all(finite), "seconds": seconds}))
"""


@dataclass(frozen=True, kw_only=True)
class Size:
    """``layers`` of ``width`` x ``width``, then one of ``width`` x ``classes``."""

    layers: int
    width: int
    classes: int


class Weights:
    """A weight file, written one random tensor after another."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.count, self.random = file, 0, np.random.default_rng(0)
        file.write(b"\0" * 64)

    def add(self, dtype: str, data: bytes) -> int:
        """The offset of the entry."""
        self.file.write(b"\0" * (-self.file.tell() % 64))
        start = self.file.tell()
        self.file.write(_ENTRY.pack(0xDEADBEEF, _KINDS[dtype], len(data), start + 64, 0).ljust(64, b"\0"))
        self.file.write(data)
        self.count += 1
        return start

    def close(self) -> None:
        """The header says how many there are."""
        self.file.seek(0)
        self.file.write(struct.pack("<II", self.count, 2))


def weight(weights: Weights, name: str, rows: int, columns: int, scheme: str) -> Any:
    """The operation that gives ``name``: (rows, columns) float16, stored as ``scheme``."""
    from mil_packages import constant, operation, stored

    random = weights.random
    if scheme == "fp16":
        values = (random.standard_normal((rows, columns), np.float32) / columns**0.5).astype(np.float16)
        return constant(name, stored("float16", (rows, columns), weights.add("float16", values.tobytes())))
    packed = weights.add("int4", random.bytes(rows * columns // 2))
    scales = np.full((rows, columns // 32), 0.02 / columns**0.5, np.float16)  # no mean grows
    return operation(
        "constexpr_blockwise_shift_scale",
        {name: ("float16", (rows, columns))},
        data=stored("int4", (rows, columns), packed),
        scale=stored("float16", scales.shape, weights.add("float16", scales.tobytes())),
    )


def package(path: Path, size: Size, scheme: str) -> Path:
    """Write the package."""
    from edgebake_targets._coreml_package import write_package
    from mil_packages import function, model, operation

    shapes = [(size.width, size.width)] * size.layers + [(size.classes, size.width)]
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        weights = Weights(file.file)
        value = "h"
        operations = [operation("cast", {"h": ("float16", (ROWS, size.width))}, x="%x", dtype="fp16")]
        for number, (rows, columns) in enumerate(shapes):
            operations.append(weight(weights, f"w{number}", rows, columns, scheme))
            made = {f"y{number}": ("float16", (ROWS, rows))}
            operations.append(operation("linear", made, x=f"%{value}", weight=f"%w{number}"))
            value = f"y{number}"
        operations.append(operation("cast", {"y": ("float32", (ROWS, size.classes))}, x=f"%{value}", dtype="fp32"))
        weights.close()
        file.flush()
        main = function({"x": ("float32", (ROWS, size.width))}, operations, ["y"])
        write_package(path, model(main), Path(file.name))
    return path


def measure(size: Size, scheme: str, scratch: Path) -> dict[str, Any]:
    """One row: bytes of the file, the bound's parts and the peak."""
    path = package(scratch / f"{scheme}.mlpackage", size, scheme)
    stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", _WEIGH, str(path), str(ROWS), str(size.width)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout)
    largest = size.classes * size.width * 4
    activations = ROWS * (size.classes + size.width) * 4 * 2
    bound = stored + largest + activations + GIB
    return {
        "scheme": scheme,
        "file_gib": round(stored / GIB, 2),
        "largest_gib": round(largest / GIB, 2),
        "peak_gib": round(found["peak"] / GIB, 2),
        "of_that_before_gib": round(found["before"] / GIB, 2),
        "bound_gib": round(bound / GIB, 2),
        "seconds": round(found["seconds"], 1),
        "finite": found["finite"],
        "within": found["finite"] and found["peak"] <= bound,
    }


def main() -> int:
    """Print a row per scheme as JSON; 1 when the bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=32000)
    parser.add_argument("--schemes", nargs="+", default=["fp16", "int4"], choices=("fp16", "int4"))
    given = parser.parse_args()
    size = Size(layers=given.layers, width=given.width, classes=given.classes)
    rows = []
    for scheme in given.schemes:
        with tempfile.TemporaryDirectory(prefix="edgebake-") as scratch:
            rows.append(measure(size, scheme, Path(scratch)))
            print(json.dumps(rows[-1]), flush=True)
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
