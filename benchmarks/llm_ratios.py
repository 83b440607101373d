"""A decoder's compressed .pte against the same network in bfloat16 and float32: size, peak memory, prefill and decode.

edgebake's artifact is 4 bits in groups of 32 with activation scales at run time, 8 bits in embedding and head. The two
floating ones are the network with the same cache, exported and lowered to XNNPACK by direct library calls (edgebake
has no bfloat16). All have random weights of one seed. Each runs in a process of its own, after the other, in
ExecuTorch's runtime on this CPU: x86 may run bfloat16 artificially slowly, so float32 stands beside it. Size and
memory gate, speeds are reported; the published ratios of a phone are the goals.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "export"), str(ROOT / "targets"), str(ROOT / "benchmarks")]

# Of Llama 3.2 1B by SpinQuant against bfloat16 on a OnePlus 12 (its model card, section "Quantized models").
SMALLER, LESS_MEMORY, FASTER_DECODE, FASTER_PREFILL = 0.56, 0.41, 2.5, 2.0
SIDES = ("w4g32a8d", "bf16", "fp32")
CONTEXT = 2048  # the card's
PROMPT, NEW = 64, 16


def floating(name: str, work: Path) -> Path:
    """The artifact in float32 or bfloat16 by direct calls of the libraries; float32 logits."""
    import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  registers torch.ops.llama
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgebake.llm import decoder
    from edgebake_targets import _executorch_llm

    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(work / "network")
    network: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    network = decoder.with_caches(network, CONTEXT).to(dtype)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
            return decoder.call(self.network, {"tokens": tokens, "input_pos": input_pos})["logits"].float()

    example = (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
    sizes = ({1: torch.export.Dim("seq", min=1, max=128)}, None)
    with torch.no_grad():
        traced = torch.export.export(Step(), example, dynamic_shapes=sizes, strict=False)
        edge = to_edge_transform_and_lower(
            _executorch_llm._rewritten(traced),
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        made = edge.to_executorch()
    with (work / f"{name}.pte").open("wb") as file:
        made.write_to_file(file)
    return work / f"{name}.pte"


def compressed(shape: str, work: Path) -> Path:
    """The artifact by the stages of a build."""
    import llm_export

    return llm_export.ours(shape, work, [f"model.context={CONTEXT}"])


def run(entry: Path) -> dict[str, Any]:
    """Bytes, peak memory of this process and tokens a second: medians of three prompts, the first call left out."""
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
    prompts = numbers.integers(3, 1000, (4, 1, PROMPT))
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


def compared(shape: str, layers: int | None, work: Path) -> dict[str, dict[str, Any]]:
    """Each side, built and then run; built ones are deleted at the end."""
    network = work / "network"
    shutil.copytree(ROOT / "recipes/llm/configs" / shape, network)
    config = json.loads((network / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (network / "config.json").write_text(json.dumps(config), "utf-8")
    made = {side: str(apart(work, "build", side, shape)["entry"]) for side in SIDES}
    return {side: apart(work, "run", entry, shape) for side, entry in made.items()}


def main() -> int:
    """Print all sides and the ratios; 1 when the artifact is too large or takes too much memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="?", default="llama-3.2-1b", help="a folder of recipes/llm/configs")
    parser.add_argument("--layers", type=int, help="instead of those of the shape")
    parser.add_argument(
        "--work", type=Path, help="an empty folder with room for the artifacts; default a temporary one"
    )
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        what, given, shape = asked.inside
        if what == "run":
            print(json.dumps(run(Path(given))))
        else:
            made = floating(given, asked.work) if given in SIDES[1:] else compressed(shape, asked.work)
            print(json.dumps({"entry": str(made)}))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sides = compared(asked.shape, asked.layers, work)
    ours = sides[SIDES[0]]
    ratios = {side: {name: ours[name] / sides[side][name] for name in ours} for side in SIDES[1:]}
    reached = {
        "smaller": 1 - ratios["bf16"]["bytes"] >= SMALLER,
        "less_memory": 1 - ratios["bf16"]["peak_bytes"] >= LESS_MEMORY,
        "decode": ratios["bf16"]["decode_tokens_s"] >= FASTER_DECODE,
        "prefill": ratios["bf16"]["prefill_tokens_s"] >= FASTER_PREFILL,
    }
    said = {"shape": asked.shape, "layers": asked.layers, "load": os.getloadavg()[0]}
    print(json.dumps({**said, "sides": sides, "ratios": ratios, "reached": reached}, indent=1))
    return 0 if reached["smaller"] and reached["less_memory"] else 1


if __name__ == "__main__":
    sys.exit(main())
