"""Small networks, and what the stages do to lower them for XNNPACK."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asking import defaults, lower_request
from edgebake.compress import cast, pt2e, quantize_weights
from edgebake.target import GraphRequest, LowerRequest, ModuleRequest
from edgebake.trace import dynamic_shapes
from edgebake.types import Assignment, DimBounds, Lowered, MethodSignature, ModuleKind, Signature, TensorSpec, Traced
from edgebake_targets import executorch_xnnpack as target
from edgebake_targets.inspectors import pte
from edgebake_targets.runners import executorch_runtime

Built = tuple[Lowered, Path]


class Wrapper(torch.nn.Module):
    """As model sources wrap networks: the network is ``wrapped``, outputs are a tuple."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.wrapped = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.wrapped(*inputs),)


class Text(torch.nn.Module):
    """Embedding, linear layers and attention, for all linear schemes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(100, 64, padding_idx=0)
        self.up = torch.nn.Linear(64, 96)
        self.down = torch.nn.Linear(96, 64)
        self.head = torch.nn.Linear(64, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1]) + 1  # integer arithmetic that quantisers must leave alone
        hidden = self.table(ids) + self.table(positions)[None]
        hidden = hidden + self.down(torch.relu(self.up(hidden)))
        scores = torch.softmax(hidden @ hidden.transpose(-1, -2) / 8, -1)
        return self.head(scores @ hidden)


class Vision(torch.nn.Module):
    """Convolutions with batch norm, one of them used twice, a residual sum, a depthwise one, a pool, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(16)
        self.twice = torch.nn.Conv2d(16, 16, 1)
        self.depthwise = torch.nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = torch.nn.Linear(16, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.stem(image)))
        hidden = hidden + self.twice(self.twice(hidden))
        hidden = torch.nn.functional.relu6(self.depthwise(hidden))
        return self.head(torch.nn.functional.adaptive_avg_pool2d(hidden, 1).flatten(1))


TEXT_KINDS: dict[str, ModuleKind] = {"table": "embedding", "up": "linear", "down": "linear", "head": "linear"}


VISION_KINDS: dict[str, ModuleKind] = {"stem": "conv", "twice": "conv", "depthwise": "conv", "head": "linear"}


TEXT = Signature(
    methods={
        "forward": MethodSignature(
            inputs=(TensorSpec(name="ids", shape=(1, "seq"), dtype="int64"),),
            outputs=(TensorSpec(name="scores", shape=(1, "seq", 10), dtype="float32"),),
        )
    },
    dims={"seq": DimBounds(min=2, max=32)},
)


VISION = Signature(
    methods={
        "forward": MethodSignature(
            inputs=(TensorSpec(name="image", shape=(1, 3, 32, 32), dtype="float32"),),
            outputs=(TensorSpec(name="scores", shape=(1, 10), dtype="float32"),),
        )
    }
)


def text_network() -> torch.nn.Module:
    torch.manual_seed(0)
    return Wrapper(Text()).eval()


def vision_network() -> torch.nn.Module:
    torch.manual_seed(0)
    module = Vision()
    with torch.no_grad():
        for _ in range(5):
            module(torch.randn(8, 3, 32, 32))  # running statistics that are not the default
    return Wrapper(module).eval()


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, (1, length), generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, 32, 32, generator=generator) for _ in range(count)]


def request_for(assignment: Assignment, folder: Path, **options: Any) -> LowerRequest:
    return lower_request(folder, defaults(target) | options, assignment=assignment)


def build(
    module: torch.nn.Module,
    signature: Signature,
    schemes: Mapping[str, str],
    kinds: Mapping[str, ModuleKind],
    samples: list[torch.Tensor],
    folder: Path,
    **options: Any,
) -> Built:
    """What the stages compress, trace and lower do, for one method."""
    assignment = Assignment(schemes=schemes, kinds=kinds)
    module = copy.deepcopy(module)
    for method in (quantize_weights, cast):
        module = method.apply(
            ModuleRequest(module=module, assignment=assignment, options={}, run_calibration=lambda _: None)
        )
    dims = dynamic_shapes(signature.methods["forward"], signature.dims)
    shapes = None if dims is None else (dims,)  # one group: Wrapper.forward takes *inputs
    program = torch.export.export(module, (samples[0],), dynamic_shapes=shapes, strict=False)
    request = request_for(assignment, folder, **options)
    if assignment.of("w8a8", "w8a8d"):
        program = pt2e.apply(
            GraphRequest(
                program=program,
                dynamic_shapes=shapes,
                quantizer=target.quantizer(request),
                calibration=[[(sample,)] for sample in samples],
                options={},
            )
        )
    return target.lower(Traced(programs={"forward": program}, signature=signature), request), folder


def sqnr_db(want: torch.Tensor, got: np.ndarray) -> float:
    reference = want.detach().double().numpy()
    return float(10 * np.log10((reference**2).sum() / ((reference - got) ** 2).sum()))


def dtypes(folder: Path) -> dict[str, int]:
    """Weight elements of the artifact by dtype."""
    counts: dict[str, int] = {}
    for record in pte.inspect(folder / "model.pte").weights:
        counts[record.dtype] = counts.get(record.dtype, 0) + int(np.prod(record.shape))
    return counts


def text_sqnr(built: Built) -> float:
    """Over two lengths that calibration and tracing did not use."""
    lowered, folder = built
    session = executorch_runtime.open(folder / lowered.entry, TEXT)
    network = text_network()
    found = []
    for length in (7, 25):
        got = session.call("forward", {"ids": ids(length, seed=9).numpy()})["scores"]
        assert got.shape == (1, length, 10)
        found.append(sqnr_db(network(ids(length, seed=9))[0], got))
    return min(found)
