"""A network with two methods of the same weights, lowered for Qualcomm's NPU and run on its simulator."""

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
    Call,
    Lowered,
    MethodSignature,
    ReferenceCall,
    Sample,
    SampleSet,
    Signature,
    Traced,
)
from onnx_cases import kinds_of
from qnn_cases import vector

ROWS = {"prefill": 16, "decode": 1}  # what each method takes at once


def calls(count: int) -> list[tuple[str, dict[str, np.ndarray]]]:
    rng = np.random.default_rng(3)
    return [(m, {"x": rng.normal(size=(n, 64)).astype(np.float32)}) for _ in range(count) for m, n in ROWS.items()]


def sample_set(count: int) -> SampleSet:
    made = [Sample(calls=(Call(method=m, inputs=given),), source=str(n)) for n, (m, given) in enumerate(calls(count))]
    return SampleSet(samples=tuple(made))


def network() -> torch.nn.Sequential:
    torch.manual_seed(0)
    wide = [layer for _ in range(4) for layer in (torch.nn.Linear(256, 256), torch.nn.ReLU())]
    return torch.nn.Sequential(torch.nn.Linear(64, 256), *wide, torch.nn.Linear(256, 8)).eval()


def traced_methods() -> Traced:
    module = network()
    programs = {m: torch.export.export(module, (torch.randn(n, 64),), strict=False) for m, n in ROWS.items()}
    methods: dict[str, MethodSignature] = {m: vector(8, n).methods["forward"] for m, n in ROWS.items()}
    return Traced(programs=programs, signature=Signature(methods=methods))


def lowered_into(folder: Path, target: Any, *, share: bool) -> Lowered:
    kinds = kinds_of(network())
    request = lower_request(
        folder,
        defaults(target) | {"share_weights": share},
        scheme="w8a16",
        assignment=Assignment(schemes=dict.fromkeys(kinds, "w8a16"), kinds=kinds),
        calibration=sample_set(8),
    )
    lowered: Lowered = target.lower(traced_methods(), replace(request, device=devices.row("sm8650")))
    return lowered


def opened(folder: Path, lowered: Lowered, kept: Path, runner: str) -> Any:
    """The artifact in a process of ``runner``, with the calls of two samples of each method and their float outputs."""
    module, wanted = network(), []
    for method, given in calls(2):
        with torch.no_grad():
            outputs = {"y": module(torch.from_numpy(given["x"])).numpy()}
        wanted.append((ReferenceCall(method=method, inputs=given, outputs=outputs),))
    reference.write(kept, sample_set(2), wanted, {})
    return runclient.opened(runner, folder / lowered.entry, signatures.to_json(lowered.signature), kept, inside=True)


def decibels(found: dict[str, np.ndarray]) -> list[float]:
    """Signal to noise of each call of :func:`opened`, in their order."""
    module, made = network(), []
    for index, (method, given) in enumerate(calls(2)):
        with torch.no_grad():
            value = module(torch.from_numpy(given["x"])).numpy()
        got = found[f"{index}.0.y"]
        assert got.shape == (ROWS[method], 8)
        made.append(float(10 * np.log10((value**2).sum() / ((value - got) ** 2).sum())))
    return made
