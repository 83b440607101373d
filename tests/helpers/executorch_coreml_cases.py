"""Small networks lowered to ExecuTorch with Core ML parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from asking import defaults, lower_request
from coreml_cases import spec, traced_of
from edgebake.types import Assignment, DimBounds, Lowered, Traced
from edgebake_targets import executorch_coreml as target
from edgebake_targets.runners import executorch_coreml_interpreter as runner


def lower(traced: Traced, folder: Path, scheme: str, schemes: Mapping[str, str] = {}, **options: Any) -> Lowered:
    """As a recipe of ``scheme`` lowers it; ``schemes`` by module."""
    folder.mkdir(parents=True, exist_ok=True)
    assignment = Assignment(schemes=schemes, kinds=dict.fromkeys(schemes, "linear"))
    request = lower_request(folder, defaults(target) | options, scheme=scheme, assignment=assignment)
    return target.lower(traced, request)


def opened(folder: Path, lowered: Lowered) -> Any:
    """What was lowered into ``folder``, ready to run."""
    return runner.open(folder / lowered.entry, lowered.signature)


class Pieces(nn.Module):
    """Two layers for Core ML, and between and behind them operators that it does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("scale", torch.linspace(0.5, 2, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: (1, sequence, 8) -> (1, sequence, 4) and the place of the largest value."""
        hidden = self.first(x)
        hidden = torch.asinh(hidden) + torch.sin(hidden)
        hidden = torch.asinh(hidden * self.scale)
        return self.last(hidden), hidden.argmax()


def pieces() -> tuple[Pieces, Traced]:
    torch.manual_seed(0)
    network = Pieces().eval()
    outputs = [spec("y", 1, "seq", 4), spec("best", dtype="int64")]
    return network, traced_of(network, [spec("x", 1, "seq", 8)], outputs, seq=DimBounds(min=2, max=16))
