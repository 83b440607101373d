"""Writing an onnxruntime-genai folder from safetensors: peak memory and bytes of source weights a second.

The source is a checkpoint of a published shape (recipes/llm/configs) in bfloat16, one file a layer as large checkpoints
are split, sparse on disk: its values are zeros, which quantise as fast as others, and reading holes costs no disk. A
process of its own writes the folder and says its peak (Linux). The folder is as large as a real one.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "export"), str(ROOT / "targets")]

LEAST_MB_S = 40
MOST_MEMORY = 2.5e9

_WRITE = """
import json, sys, time
from pathlib import Path
from edgebake.llm.shards import Shards
from edgebake_targets._genai_graph import write_decoder
begin, cpu = time.perf_counter(), time.process_time()
source = Path(sys.argv[1])
write_decoder(source, Shards(source), Path(sys.argv[2]), context=8192, scheme=sys.argv[3])
line = next(ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith("VmHWM"))
took = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
print(json.dumps({**took, "peak_bytes": int(line.split()[1]) * 1024}))
"""


def tensors(config: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors."""
    from edgebake.llm.fit_shape import read_config

    found: dict[str, tuple[int, ...]] = {}
    for weight in read_config(config).weights:
        name = weight.name.replace("norm0", "input_layernorm").replace("norm1", "post_attention_layernorm")
        if not weight.tied:
            found[f"{name}.weight"] = weight.shape
        if weight.bias:
            found[f"{name}.bias"] = weight.shape[:1]
    return found


def write_source(config: Path, folder: Path) -> tuple[int, int]:
    """A sparse checkpoint in ``folder``; bytes of all tensors and of the largest."""
    files: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, shape in tensors(config).items():
        file = f"layer-{name.split('.')[2]}" if ".layers." in name else "outside"
        files[file][name] = shape
    for file, held in files.items():
        header: dict[str, Any] = {}
        end = 0
        for name, shape in held.items():
            begin, end = end, end + 2 * prod(shape)
            header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header).encode()
        with (folder / f"{file}.safetensors").open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + end)
    shutil.copyfile(config / "config.json", folder / "config.json")
    sizes = [2 * prod(shape) for held in files.values() for shape in held.values()]
    return sum(sizes), max(sizes)


def measured(name: str, scheme: str, work: Path) -> dict[str, Any]:
    """One shape written once."""
    source, made = work / "source", work / "made"
    for folder in (source, made):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    total, largest = write_source(ROOT / "recipes/llm/configs" / name, source)
    command = [sys.executable, "-c", _WRITE, str(source), str(made), scheme]
    path = os.pathsep.join([str(ROOT / "export"), str(ROOT / "targets")])
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    took = json.loads(done.stdout)
    written = sum(file.stat().st_size for file in made.iterdir())
    return {
        "shape": name,
        "scheme": scheme,
        "source_bytes": total,
        "largest_tensor_bytes": largest,
        "written_bytes": written,
        "mb_s": total / took["seconds"] / 1e6,
        "memory_limit_bytes": MOST_MEMORY + largest,
        **took,
    }


def main() -> int:
    """Print a JSON line per shape; 1 when one is too slow or too large."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=["llama-3.2-1b"], help="folders of recipes/llm/configs")
    parser.add_argument("--scheme", default="w4g32")
    parser.add_argument("--work", type=Path, help="folder with room for the written model; default a temporary one")
    asked = parser.parse_args()
    missed = False
    with tempfile.TemporaryDirectory() as temporary:
        for name in asked.shapes:
            found = measured(name, asked.scheme, asked.work or Path(temporary))
            missed |= found["mb_s"] < LEAST_MB_S or found["peak_bytes"] > found["memory_limit_bytes"]
            print(json.dumps({**found, "load": os.getloadavg()[0]}), flush=True)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
