"""Small networks with their signatures and samples, lowered to ONNX and compared with their float selves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asking import defaults, lower_request
from edgebake.types import (
    Assignment,
    Call,
    DimBounds,
    Lowered,
    MethodSignature,
    Sample,
    SampleSet,
    Signature,
    TensorSpec,
    Traced,
    canonical_module_name,
)
from edgebake_targets import onnx_cpu
from edgebake_targets.runners import onnxruntime_cpu

KINDS = {torch.nn.Linear: "linear", torch.nn.Conv2d: "conv", torch.nn.Embedding: "embedding"}


class Wrapper(torch.nn.Module):
    def __init__(self, wrapped: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.wrapped(*inputs)
        return result if isinstance(result, tuple) else (result,)


class TinyText(torch.nn.Module):
    """An embedding, one attention layer, a tied head, and a pooler that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(96, 64)
        self.query, self.key, self.value = (torch.nn.Linear(64, 64) for _ in range(3))
        self.dense = torch.nn.Linear(64, 64)
        self.norm = torch.nn.LayerNorm(64)
        self.pooler = torch.nn.Linear(64, 64)
        self.head = torch.nn.Linear(64, 96, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.words(ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 8.0
        scores = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(torch.float32).min)
        x = self.norm(x + self.dense(scores.softmax(-1) @ self.value(x)))
        self.pooler(x)
        return x, self.head(x)


class TinyImage(torch.nn.Module):
    """Convolution, BatchNorm, ReLU6, a residual join and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.stem_norm = torch.nn.BatchNorm2d(16)
        self.depth = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = torch.nn.Conv2d(16, 16, 1)
        self.classifier = torch.nn.Linear(16, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.relu6(self.stem_norm(self.stem(image)))
        x = x + self.point(torch.relu(self.depth(x)))
        classes: torch.Tensor = self.classifier(x.mean((2, 3)))
        return classes


class Counter(torch.nn.Module):
    """``total`` grows by what the input maps to: the state of a streaming network."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = total + torch.relu(self.cell(x + 0.1 * total))
        return total * 0.5, total


TEXT = Signature(
    methods={
        "forward": MethodSignature(
            inputs=(
                TensorSpec(name="input_ids", shape=(1, "seq"), dtype="int64"),
                TensorSpec(name="attention_mask", shape=(1, "seq"), dtype="int64"),
            ),
            outputs=(
                TensorSpec(name="hidden", shape=(1, "seq", 64), dtype="float32"),
                TensorSpec(name="logits", shape=(1, "seq", 96), dtype="float32"),
            ),
        )
    },
    dims={"seq": DimBounds(min=4, max=32)},
)


IMAGE = Signature(
    methods={
        "forward": MethodSignature(
            inputs=(TensorSpec(name="image", shape=(1, 3, 16, 16), dtype="float32"),),
            outputs=(TensorSpec(name="classes", shape=(1, 8), dtype="float32"),),
        )
    }
)


def kinds_of(module: torch.nn.Module) -> dict[str, Any]:
    named = ((canonical_module_name(name), child) for name, child in module.named_modules())
    return {name: KINDS[type(child)] for name, child in named if type(child) in KINDS}


def seeded(module: type[torch.nn.Module]) -> Wrapper:
    torch.manual_seed(0)
    network = module()
    for child in network.modules():
        if isinstance(child, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(child.get_buffer("running_mean"), 0, 0.2)
            torch.nn.init.uniform_(child.get_buffer("running_var"), 0.5, 2)
    return Wrapper(network).eval()


def export_text(module: torch.nn.Module, *, dynamic: bool = True) -> torch.export.ExportedProgram:
    seq = torch.export.Dim("seq", min=4, max=32)
    # Two tensors: torch.export takes one tensor given twice for one input.
    args = (torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64))
    return torch.export.export(module, args, dynamic_shapes=(({1: seq}, {1: seq}),) if dynamic else None, strict=False)


def traced_text() -> tuple[Wrapper, Traced]:
    """The text network with seeded weights, and its program of a dynamic length."""
    module = seeded(TinyText)
    return module, Traced(programs={"forward": export_text(module)}, signature=TEXT)


def traced_image() -> tuple[Wrapper, Traced]:
    """The image network with seeded weights, and its program."""
    module = seeded(TinyImage)
    program = torch.export.export(module, (torch.randn(1, 3, 16, 16),), strict=False)
    return module, Traced(programs={"forward": program}, signature=IMAGE)


def text_inputs(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 32, count)
    return [{"input_ids": rng.integers(0, 96, (1, n)), "attention_mask": np.ones((1, n), np.int64)} for n in lengths]


def image_inputs(count: int, seed: int = 1) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [{"image": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(count)]


def samples(inputs: list[dict[str, np.ndarray]]) -> SampleSet:
    return SampleSet(samples=tuple(Sample(calls=(Call(inputs=i),), source=str(n)) for n, i in enumerate(inputs)))


def lower(
    traced: Traced,
    module: torch.nn.Module,
    folder: Path,
    schemes: Mapping[str, str],
    *,
    default: str = "fp32",
    calibration: SampleSet | None = None,
    **options: Any,
) -> Lowered:
    assignment = Assignment(schemes=schemes, kinds=kinds_of(module))
    given = defaults(onnx_cpu) | options
    request = lower_request(folder, given, scheme=default, assignment=assignment, calibration=calibration)
    return onnx_cpu.lower(traced, request)


def uniform(module: torch.nn.Module, scheme: str) -> dict[str, str]:
    support = next(row for row in onnx_cpu.SUPPORTS if row.scheme == scheme)
    return {name: scheme for name, kind in kinds_of(module).items() if kind in support.kinds}


def sqnr(module: torch.nn.Module, folder: Path, lowered: Lowered, inputs: list[dict[str, np.ndarray]]) -> float:
    """Signal to noise over all outputs, in dB."""
    session = onnxruntime_cpu.open(folder / lowered.entry, lowered.signature)
    signal = noise = 0.0
    for given in inputs:
        with torch.no_grad():
            wanted = module(*(torch.from_numpy(v) for v in given.values()))
        got = session.call("forward", given)
        for value, spec in zip(wanted, lowered.signature.methods["forward"].outputs, strict=True):
            assert np.isfinite(got[spec.name]).all()
            signal += float((value.numpy().astype(np.float64) ** 2).sum())
            noise += float(((value.numpy().astype(np.float64) - got[spec.name]) ** 2).sum())
    return float(10 * np.log10(signal / max(noise, 1e-30)))
