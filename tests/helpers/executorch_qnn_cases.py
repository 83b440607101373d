"""Small networks lowered by executorch-qnn and run on the vendor's simulator, in the processes that a build uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asking import defaults, lower_request
from edgebake import devices
from edgebake.types import Assignment, Lowered, Traced
from edgebake_targets import executorch_qnn
from onnx_cases import kinds_of, samples

Inputs = list[dict[str, np.ndarray]]


def lower(
    traced: Traced, module: torch.nn.Module, folder: Path, scheme: str, calibration: Inputs, **options: Any
) -> Lowered:
    """``scheme`` for every module that takes it, for a Snapdragon 8 Gen 3."""
    kinds = kinds_of(module)
    row = next(row for row in executorch_qnn.SUPPORTS if row.scheme == scheme)
    assignment = Assignment(schemes={n: scheme for n, kind in kinds.items() if kind in row.kinds}, kinds=kinds)
    given = defaults(executorch_qnn) | options
    request = lower_request(folder, given, scheme=scheme, assignment=assignment, calibration=samples(calibration))
    return executorch_qnn.lower(traced, replace(request, device=devices.row("sm8650")))
