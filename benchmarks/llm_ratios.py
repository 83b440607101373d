"""A decoder's compressed .pte against the same network in bfloat16 and float32: size, peak memory, prefill and decode.

edgebake's artifacts are 4 bits in groups of 32 with activation scales at run time, 8 bits in embedding and head, and
float32, both lowered to XNNPACK. The bfloat16 one is the network with the same cache by direct library calls (edgebake
has no bfloat16); XNNPACK takes none of its products, which run in ExecuTorch's optimised kernels. All have random
weights. Each is built, and then run, in a process of its own, after the other, in ExecuTorch's runtime on this CPU: x86
may run bfloat16 artificially slowly, so float32 stands beside it. Size and memory gate, speeds are reported; the
published ratios of a phone are the goals.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "export"), str(ROOT / "targets"), str(ROOT / "benchmarks")]

# Of Llama 3.2 1B by SpinQuant against bfloat16 on a OnePlus 12 (its model card, section "Quantized models").
SMALLER, LESS_MEMORY, FASTER_DECODE, FASTER_PREFILL = 0.56, 0.41, 2.5, 2.0
SIDES = ("w4g32a8d", "bf16", "fp32")
CONTEXT = 2048  # the card's
PROMPT, NEW, PROMPTS = 32, 8, 3  # products of bfloat16 are slow


def bfloat16(work: Path) -> Path:
    """The artifact in bfloat16 by direct calls of the libraries; float32 logits.

    XNNPACK's partitioner takes float32 and float16: products are those of ExecuTorch's own kernels, kept whole, since
    a decomposed one copies its weight at every call. Lowering leaves out the passes and copies edgebake needs not.
    """
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
    import torch
    from executorch.exir import EdgeCompileConfig, to_edge
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgebake.llm import decoder
    from edgebake_targets import _executorch, _executorch_llm, _xnnpack_partitioner, _xnnpack_passes

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(work / "network")
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    network = decoder.with_caches(network, CONTEXT).to(torch.bfloat16)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
            return decoder.call(self.network, {"tokens": tokens, "input_pos": input_pos})["logits"].float()

    example = (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    sizes = ({1: torch.export.Dim("seq", min=1, max=128)}, None)
    whole = [torch.ops.aten.linear.default]
    with torch.no_grad(), _executorch._shared_weights(), _xnnpack_passes.needed_only():
        traced = torch.export.export(Step(), example, dynamic_shapes=sizes, strict=False)
        settings = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True, preserve_ops=whole)
        edge = to_edge(_executorch_llm._rewritten(traced, "fp32"), compile_config=settings)
        made = edge.to_backend(_xnnpack_partitioner.partitioner(dynamic=False)).to_executorch()
    entry = work / "bf16.pte"
    with entry.open("wb") as file:
        made.write_to_file(file)
    return entry


def built(side: str, shape: str, work: Path) -> Path:
    """The artifact of ``side``: in bfloat16 by direct calls, the others by the stages of a build."""
    import llm_export

    if side == "bf16":
        return bfloat16(work)
    scheme = [] if side == "w4g32a8d" else ["compress={scheme: fp32, modules: {}}"]
    return llm_export.ours(shape, work, [f"model.context={CONTEXT}", *scheme])


def run(entry: Path) -> dict[str, Any]:
    """Bytes, peak memory of this process and tokens a second: medians of two prompts after a first."""
    import numpy as np
    from llm_export import peak

    from edgebake_targets import _executorch_session as runtime

    runtime._bindings()
    runtime._register_cache_operators()
    method = runtime._program(entry).load_method("forward")
    import torch

    def call(words: Any, start: int) -> Any:
        return method((torch.from_numpy(words), torch.tensor([start])))[0]

    numbers = np.random.default_rng(0)
    prompts = numbers.integers(3, 1000, (PROMPTS, 1, PROMPT))
    prefill, decode = [], []
    for number, prompt in enumerate(prompts):
        begin = time.perf_counter()
        logits = call(prompt, 0)
        read = time.perf_counter()
        for place in range(NEW):
            word = logits[:, -1].argmax(-1, keepdim=True).numpy()
            logits = call(word, PROMPT + place)
        if number:
            prefill.append(PROMPT / (read - begin))
            decode.append(NEW / (time.perf_counter() - read))
    speeds = {"prefill_tokens_s": statistics.median(prefill), "decode_tokens_s": statistics.median(decode)}
    return {"bytes": entry.stat().st_size, "peak_bytes": peak(), **speeds}


def apart(work: Path, *arguments: str) -> dict[str, Any]:
    """What this file says of ``arguments`` in a process of its own; its words stay in ``log``."""
    from edgebake.unit import ENVIRONMENT

    path = os.pathsep.join(sys.path[:3])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    log = work / "log"
    with log.open("w") as output:
        command = [sys.executable, __file__, "--work", str(work), "--inside", *arguments]
        subprocess.run(command, check=True, stdout=output, stderr=output, env=environment)
    found: dict[str, Any] = json.loads(log.read_text("utf-8").splitlines()[-1])
    return found


def compared(shape: str, layers: int | None, work: Path, sides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each side, built and then run, one after the other; what was built before is not built again."""
    made = work / f"{shape}-{layers or 'all'}"
    for side in sides:
        if not (made / f"{side}.pte").exists():
            build(side, shape, layers, made)
    return {side: apart(made, "run", str(made / f"{side}.pte"), shape) for side in sides}


def build(side: str, shape: str, layers: int | None, made: Path) -> None:
    """Write ``side`` into the folder ``made``; what it was made from goes, and stays when it is stopped."""
    work = made / side
    network = work / "network"
    shutil.copytree(ROOT / "recipes/llm/configs" / shape, network, dirs_exist_ok=True)
    config = json.loads((network / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (network / "config.json").write_text(json.dumps(config), "utf-8")
    entry = Path(apart(work, "build", side, shape)["entry"])
    entry.replace(made / f"{side}.pte")
    shutil.rmtree(work)


def main() -> int:
    """Print all sides and the ratios; 1 when the artifact is too large or takes too much memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="?", default="llama-3.2-1b", help="a folder of recipes/llm/configs")
    parser.add_argument("--layers", type=int, help="instead of those of the shape")
    parser.add_argument(
        "--work", type=Path, help="a folder with room, where artifacts stay for the next run; default a temporary one"
    )
    parser.add_argument("--beside", nargs="+", choices=SIDES[1:], default=SIDES[1:], help="default: both")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        what, given, shape = asked.inside
        if what == "run":
            print(json.dumps(run(Path(given))))
        else:
            print(json.dumps({"entry": str(built(given, shape, asked.work))}))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sides = compared(asked.shape, asked.layers, work, (SIDES[0], *asked.beside))
    ours = sides[SIDES[0]]
    ratios = {side: {name: ours[name] / sides[side][name] for name in ours} for side in asked.beside}
    goals = {
        "bytes": lambda ratio: 1 - ratio >= SMALLER,
        "peak_bytes": lambda ratio: 1 - ratio >= LESS_MEMORY,
        "decode_tokens_s": lambda ratio: ratio >= FASTER_DECODE,
        "prefill_tokens_s": lambda ratio: ratio >= FASTER_PREFILL,
    }
    reached = {name: holds(ratios["bf16"][name]) for name, holds in goals.items() if "bf16" in ratios}
    said = {"shape": asked.shape, "layers": asked.layers, "load": os.getloadavg()[0]}
    print(json.dumps({**said, "sides": sides, "ratios": ratios, "reached": reached}, indent=1))
    return 0 if all(reached.get(name) for name in ("bytes", "peak_bytes")) else 1


if __name__ == "__main__":
    sys.exit(main())
