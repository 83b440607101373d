"""Small networks lowered for Qualcomm's NPU and run on its simulator, in the processes that a build uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asking import defaults, lower_request
from edgebake import devices, reference, runclient, signatures
from edgebake.types import (
    Assignment,
    Lowered,
    MethodSignature,
    ReferenceCall,
    Signature,
    TensorSpec,
    Traced,
)
from edgebake_targets import onnx_qnn
from onnx_cases import TEXT, TinyText, Wrapper, export_text, kinds_of, samples, seeded, traced_image

Inputs = list[dict[str, np.ndarray]]


class Normed(torch.nn.Module):
    """Two linear layers around a root mean square norm, written out as many networks write it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.weight = torch.nn.Parameter(torch.rand(64) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.sized(self.up(x))
        result: torch.Tensor = self.down(x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * self.weight)
        return result

    def sized(self, x: torch.Tensor) -> torch.Tensor:
        """What is normalised, of (batch, rows, 64) values near one."""
        return x * 8


class Determined(torch.nn.Module):
    """A determinant between two linear layers: the HTP has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.first(x)
        result: torch.Tensor = self.second(hidden * torch.linalg.det(hidden.reshape(1, 8, 8)))
        return result


class Bent(torch.nn.Module):
    """Between two linear layers an error function, which the backend has no builder for, and more axes than QNN has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.erf(self.first(x)).reshape(1, 2, 2, 2, 2, 4).permute(0, 5, 4, 3, 2, 1)
        result: torch.Tensor = self.second(hidden.reshape(1, 64))
        return result


def vector(width: int, *shape: int) -> Signature:
    """``x`` of ``shape`` and 64 values in, ``y`` with ``width`` out."""
    given = TensorSpec(name="x", shape=(*shape, 64), dtype="float32")
    made = TensorSpec(name="y", shape=(*shape, width), dtype="float32")
    return Signature(methods={"forward": MethodSignature(inputs=(given,), outputs=(made,))})


def vectors(count: int, *shape: int) -> Inputs:
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(size=(*shape, 64)).astype(np.float32)} for _ in range(count)]


def traced_vector(module: torch.nn.Module, signature: Signature) -> Traced:
    shape = tuple(int(d) for d in signature.methods["forward"].inputs[0].shape)
    program = torch.export.export(module, (torch.randn(shape),), strict=False)
    return Traced(programs={"forward": program}, signature=signature)


image = traced_image


def text() -> tuple[Wrapper, Traced]:
    """TinyText at 8 tokens; its mask is the lowest float."""
    module = seeded(TinyText)
    signature = replace(TEXT, dims={"seq": replace(TEXT.dims["seq"], min=8, max=8)})
    return module, Traced(programs={"forward": export_text(module, dynamic=False)}, signature=signature)


def padded_text(count: int) -> Inputs:
    """Sentences of 4 to 8 tokens, padded to 8."""
    rng = np.random.default_rng(4)
    masks = [(np.arange(8) < n).astype(np.int64)[None] for n in rng.integers(4, 9, count)]
    return [{"input_ids": rng.integers(0, 96, (1, 8)), "attention_mask": mask} for mask in masks]


def lower(
    traced: Traced,
    module: torch.nn.Module,
    folder: Path,
    scheme: str,
    calibration: Inputs,
    target: Any = onnx_qnn,
    device: str = "sm8650",
    **options: Any,
) -> Lowered:
    """``scheme`` for every module that takes it, for a Snapdragon 8 Gen 3 if nothing else is said."""
    kinds = kinds_of(module)
    row = next(row for row in target.SUPPORTS if row.scheme == scheme)
    assignment = Assignment(schemes={n: scheme for n, kind in kinds.items() if kind in row.kinds}, kinds=kinds)
    given = defaults(target) | options
    request = lower_request(folder, given, scheme=scheme, assignment=assignment, calibration=samples(calibration))
    lowered: Lowered = target.lower(traced, replace(request, device=devices.row(device)))
    return lowered


def sqnr(
    module: torch.nn.Module, folder: Path, lowered: Lowered, inputs: Inputs, runner: str = "onnxruntime-qnn"
) -> float:
    """Signal to noise over all outputs on the simulator, in dB; it runs in a process of its own."""
    names = [spec.name for spec in lowered.signature.methods["forward"].outputs]
    wanted = []
    for given in inputs:
        with torch.no_grad():
            values = module(*(torch.from_numpy(v) for v in given.values()))
        outputs = {name: value.numpy() for name, value in zip(names, values, strict=True)}
        wanted.append((ReferenceCall(method="forward", inputs=given, outputs=outputs),))
    kept = folder / "reference"
    kept.mkdir()
    reference.write(kept, samples(inputs), wanted, {})
    signature = signatures.to_json(lowered.signature)
    signal = noise = 0.0
    with runclient.opened(runner, folder / lowered.entry, signature, kept, inside=True) as client:
        found = client.outputs()
        for index, (call,) in enumerate(wanted):
            for name, value in call.outputs.items():
                got = found[f"{index}.0.{name}"].astype(np.float64)
                assert np.isfinite(got).all()
                signal += float((value.astype(np.float64) ** 2).sum())
                noise += float(((value - got) ** 2).sum())
    return float(10 * np.log10(signal / max(noise, 1e-30)))
