"""From a decoder's configuration to a .pte for XNNPACK: wall seconds and peak memory, edgebake against other routes.

edgebake and the plain route make the same network with random weights in float32 and the same scheme: 4 bits in groups
of 32 with activation scales at run time inside the layers, 8 bits per channel in embedding and head. edgebake's side is
the stages of a build that make the artifact (load, trace, compress, lower), with what they check and store; the float
reference and the judging of the artifact, which the plain route has not, are left out. The plain route is the same
network with the same cache, torchao's ``quantize_``, ``torch.export`` and ``to_edge_transform_and_lower`` with the
partitioner for dynamic products before the general one. ``export_llm`` is ExecuTorch's own, from its wheel: its Llama
with random weights, the same context and embedding, and all products at 4 bits, the head's too (it has no scheme of its
own there). Each side runs in a process of its own, which says its peak (Linux).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "export"), str(ROOT / "targets")]

WALL_LIMITS = {"plain": 0.5, "export_llm": 1.0}  # edgebake's seconds by those of the other side
CONTEXT, ONCE = 8192, 128
MOST_MEMORY = 5e9  # for llama-3.2-1b and what is smaller
SEED = 0
SIDES = ("ours", "plain", "export_llm")
_PARAMS = {  # ExecuTorch's names of what config.json says
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
}


def ours(name: str, work: Path, more: Sequence[str] = ()) -> Path:
    """The artifact by the stages of a build, with ``more`` settings of the recipe."""
    from edgebake import devices, stages
    from edgebake.check import check
    from edgebake.commands._shared import read_recipes
    from edgebake.keys import stage_keys
    from edgebake.store import Store
    from edgebake.workbench import Bench

    def tell(kind: str, **what: Any) -> None:
        if kind == "stage":
            print(f"{time.perf_counter():.1f} {what['stage']} {what['state']}, peak {peak() / 1e6:.0f} MB", flush=True)

    settings = [f"model.path={work / 'network'}", f"model.seed={SEED}", *more]
    files = read_recipes([str(ROOT / f"recipes/llm/{name}-random.yaml")], settings)
    units = [unit for unit in check(files, trust=False)[0] if unit.target == "executorch-xnnpack"]
    bench = Bench(store=Store(work / "store"), emit=tell, trust=False, device=devices.row)
    keys = stage_keys(units[0], bench.store.file_digest, devices.row(units[0].device))
    _, entry = stages.lower(bench, units[0], keys)
    return entry.folder / str(entry.meta["lowered"]["entry"])


def plain(context: int, work: Path) -> Path:
    """The artifact by direct calls of the libraries."""
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    import torch
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup
    from transformers import AutoConfig, AutoModelForCausalLM

    from edgebake.llm import decoder
    from edgebake_targets import _executorch_llm

    torch.manual_seed(SEED)
    config = AutoConfig.from_pretrained(work / "network")
    network: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    decoder.with_caches(network, context)
    table, head = network.get_input_embeddings(), network.get_output_embeddings()
    four_bits: Any = getattr(torch, "int4")  # noqa: B009  torch declares no type for it
    layers = Int8DynamicActivationIntxWeightConfig(weight_dtype=four_bits, weight_granularity=PerGroup(32))
    of_head = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    table.padding_idx = None
    whole_rows = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
    quantize_(table, whole_rows, filter_fn=lambda module, _: module is table)
    quantize_(head, of_head, filter_fn=lambda module, _: module is head)
    quantize_(network.model, layers)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, tokens: torch.Tensor, input_pos: torch.Tensor) -> torch.Tensor:
            return decoder.call(self.network, {"tokens": tokens, "input_pos": input_pos})["logits"]

    with torch.no_grad():
        example = (torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, dtype=torch.int64))
        sizes = ({1: torch.export.Dim("seq", min=1, max=128)}, None)
        traced = torch.export.export(Step(), example, dynamic_shapes=sizes, strict=False)
        program = _executorch_llm._rewritten(traced, "fp32")
    with torch.no_grad():
        products = XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True)
        edge = to_edge_transform_and_lower(
            program,
            partitioner=[products, XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        made = edge.to_executorch(ExecutorchBackendConfig(do_quant_fusion_and_const_prop=True))
    with (work / "plain.pte").open("wb") as file:
        made.write_to_file(file)
    return work / "plain.pte"


def export_llm(work: Path) -> Path:
    """The artifact by ``executorch.extension.llm.export.export_llm``, called behind its command line."""
    from executorch.examples.models.llama.export_llama_lib import export_llama
    from executorch.extension.llm.export.config.llm_config import LlmConfig, ModelType

    config = json.loads((work / "network/config.json").read_text("utf-8"))
    params = {theirs: config[name] for theirs, name in _PARAMS.items()}
    (work / "params.json").write_text(json.dumps({**params, "use_scaled_rope": True}), "utf-8")
    asked = LlmConfig()
    asked.base.model_class, asked.base.params = ModelType.llama3_2, str(work / "params.json")
    asked.model.use_kv_cache = asked.model.use_sdpa_with_kv_cache = True
    asked.export.max_seq_length, asked.export.max_context_length = ONCE, CONTEXT
    asked.export.output_name = str(work / "export_llm.pte")  # alone: it ignores output_dir beside a name of .pte
    asked.backend.xnnpack.enabled = asked.backend.xnnpack.extended_ops = True
    asked.quantization.qmode, asked.quantization.group_size = "8da4w", 32
    asked.quantization.embedding_quantize = "8,0"
    export_llama(asked)
    return work / "export_llm.pte"


def peak() -> int:
    """Most resident bytes of this process so far."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def run_side(side: str, name: str, work: Path) -> dict[str, Any]:
    """What this process takes for one side."""
    begin, cpu = time.perf_counter(), time.process_time()
    tempfile.tempdir = str(work)
    made = ours(name, work) if side == "ours" else plain(CONTEXT, work) if side == "plain" else export_llm(work)
    used = {"wall_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    return {**used, "peak_bytes": peak(), "file_bytes": made.stat().st_size}


def measured(side: str, name: str, layers: int | None, work: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    from edgebake.unit import ENVIRONMENT

    shutil.rmtree(work / side, ignore_errors=True)
    network = work / side / "network"
    shutil.copytree(ROOT / "recipes/llm/configs" / name, network)
    config = json.loads((network / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    (network / "config.json").write_text(json.dumps(config), "utf-8")
    path = os.pathsep.join([str(ROOT / "export"), str(ROOT / "targets")])
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    command = [sys.executable, __file__, name, "--work", str(work / side), "--inside", side]
    log = work / f"{side}.log"
    with log.open("w") as output:
        subprocess.run(command, check=True, stdout=output, stderr=output, env=environment)
    found: dict[str, Any] = json.loads(log.read_text("utf-8").splitlines()[-1])
    return found


def main() -> int:
    """Print both sides and their ratios; 1 when edgebake takes too long or too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", nargs="?", default="llama-3.2-1b", help="a folder of recipes/llm/configs")
    parser.add_argument("--layers", type=int, help="instead of those of the shape")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=["ours", "plain"])
    parser.add_argument("--work", type=Path, help="folder with room for stored programs; default a temporary one")
    parser.add_argument("--inside", choices=SIDES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(run_side(asked.inside, asked.shape, asked.work)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        work = asked.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sides = {side: measured(side, asked.shape, asked.layers, work) for side in asked.sides}
    ratios = {
        other: {name: sides["ours"][name] / sides[other][name] for name in sides["ours"]}
        for other in sides
        if other != "ours" and "ours" in sides
    }
    said = {"shape": asked.shape, "layers": asked.layers, **sides, "ratios": ratios, "load": os.getloadavg()[0]}
    print(json.dumps(said))
    too_much = "ours" in sides and sides["ours"]["peak_bytes"] > MOST_MEMORY
    return int(too_much or any(found["wall_s"] > WALL_LIMITS[other] for other, found in ratios.items()))


if __name__ == "__main__":
    sys.exit(main())
