"""A small network with its signature, and what is asked of the Core ML target."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from asking import defaults, lower_request
from edgebake.compress import pt2e
from edgebake.target import GraphRequest, LowerRequest
from edgebake.trace import dynamic_shapes, trace
from edgebake.types import (
    Assignment,
    DimBounds,
    Loaded,
    Lowered,
    MethodSignature,
    ModuleKind,
    Signature,
    TensorSpec,
    Traced,
    Verdict,
)
from edgebake_targets import coreml
from edgebake_targets._coreml_constants import constants
from edgebake_targets._coreml_package import array_of, open_package, payload_of
from edgebake_targets.inspectors import mlpackage

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
_ENTRY = struct.Struct("<IIQQQ")  # of a weight file: sentinel, dtype, bytes, offset, padding

KINDS: dict[str, ModuleKind] = {"embed": "embedding", "conv": "conv", "up": "conv", "first": "linear", "last": "linear"}


class Network(nn.Module):
    """An embedding, a convolution and a transposed one with batch normalisation, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.conv, self.norm = nn.Conv1d(16, 32, 3, padding=1), nn.BatchNorm1d(32)
        self.up, self.up_norm = nn.ConvTranspose1d(32, 24, 3, padding=1), nn.BatchNorm1d(24)
        self.first, self.last = nn.Linear(24, 16), nn.Linear(16, 20, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids: (1, sequence)."""
        x = self.embed(ids).transpose(1, 2)
        x = torch.relu(self.norm(self.conv(x)))
        hidden = self.first(self.up_norm(self.up(x)).transpose(1, 2))
        return hidden, self.last(torch.relu(hidden))


class Wrapper(nn.Module):
    """As models/ wraps a network."""

    def __init__(self, wrapped: nn.Module) -> None:
        super().__init__()
        self.wrapped = wrapped

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A tuple whatever the network returns."""
        out = self.wrapped(x)
        return out if isinstance(out, tuple) else (out,)


def network() -> Network:
    torch.manual_seed(0)
    net = Network()
    for norm in (net.norm, net.up_norm):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    with torch.no_grad():
        net.last.weight[3] = 0  # a dead channel: its scale would be 0 / 127
    return net.eval()


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, shape=shape, dtype=dtype)


def traced_of(net: nn.Module, inputs: list[TensorSpec], outputs: list[TensorSpec], **dims: DimBounds) -> Traced:
    method = MethodSignature(inputs=tuple(inputs), outputs=tuple(outputs))
    signature = Signature(methods={"forward": method}, dims=dims)
    return trace(Loaded(methods={"forward": Wrapper(net).eval()}, signature=signature, facts={}))


def traced_network() -> Traced:
    outputs = [spec("hidden", 1, "seq", 16), spec("logits", 1, "seq", 20)]
    return traced_of(network(), [spec("ids", 1, "seq", dtype="int64")], outputs, seq=DimBounds(min=4, max=64))


def ask(
    folder: Path,
    schemes: Mapping[str, str],
    scheme: str = "fp16",
    system: str = "iOS17",
    precision: str = "auto",
    **options: str | float,
) -> LowerRequest:
    folder.mkdir(parents=True, exist_ok=True)
    return lower_request(
        folder,
        {**defaults(coreml), "minimum_os": system, "compute_precision": precision, **options},
        scheme=scheme,
        assignment=Assignment(schemes=schemes, kinds=dict.fromkeys(schemes, "linear")),
    )


def everywhere(scheme: str) -> dict[str, str]:
    return dict.fromkeys(KINDS, scheme)


def verdicts(folder: Path, lowered: Lowered) -> dict[str, Verdict]:
    found = coreml.structure(folder / lowered.entry, lowered.signature, coreml.read_checks(folder))
    return {verdict.limit: verdict for verdict in found}


def stored_part(package: Path, constant: str, part: str) -> tuple[int, np.ndarray[Any, Any]]:
    """Offset in the weight file and stored values, to be changed, of one part of a constant."""
    opened = open_package(package)
    payload = payload_of(opened, constants(opened)[constant].parts[part])
    assert payload.key is not None
    blob = (package / WEIGHTS).read_bytes()
    return _ENTRY.unpack_from(blob, payload.key[1])[3], np.array(array_of(payload))


def overwrite(package: Path, at: int, values: np.ndarray[Any, Any]) -> None:
    """Put other values there; they must differ."""
    blob, raw = bytearray((package / WEIGHTS).read_bytes()), values.tobytes()
    assert bytes(blob[at : at + len(raw)]) != raw, "nothing would change"
    blob[at : at + len(raw)] = raw
    (package / WEIGHTS).write_bytes(blob)


def operations_of(package: Any) -> Any:
    """The operations of an opened package's main function, to be changed."""
    function = package.spec.mlProgram.functions["main"]
    return function.block_specializations[function.opset].operations


def formats(package: Path) -> dict[str, str]:
    return {record.name: record.dtype for record in mlpackage.inspect(package).weights}


FORMATS = {"w8": "int8", "w4": "int4", "fp16": "float16", "fp32": "float32"}


MIXED = {**everywhere("w8"), "first": "palette6", "last": "fp32"}


def calibrated(traced: Traced, request: LowerRequest, calls: Sequence[tuple[torch.Tensor, ...]]) -> Traced:
    """``traced`` as the stage that compresses leaves it for a scheme with static activations."""
    signature, programs = traced.signature, {}
    for name, program in traced.programs.items():
        programs[name] = pt2e.apply(
            GraphRequest(
                program=program,
                dynamic_shapes=dynamic_shapes(signature.methods[name], signature.dims),
                quantizer=coreml.quantizer(request),
                calibration=[[call] for call in calls],
                options={},
            )
        )
    return replace(traced, programs=programs)
