"""Small networks lowered by executorch-qnn, with the toolchain that is here or one made for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from asking import defaults, lower_request
from edgebake import devices
from edgebake.types import Assignment, Lowered, Traced
from edgebake_targets import _qnn_toolchain, executorch_qnn
from onnx_cases import kinds_of, samples
from qnn_cases import Inputs

RUNNER = "executorch-qnn-simulator"


@contextmanager
def toolchain(folder: Path) -> Iterator[Path]:
    """The store whose toolchain can be used: the user's, or ``folder`` where it has been made."""
    with pytest.MonkeyPatch.context() as patch:
        if executorch_qnn.missing() is not None:
            patch.delenv(_qnn_toolchain.VARIABLE, raising=False)
            patch.setenv("EDGEBAKE_STORE", str(folder))
            executorch_qnn.fix(folder / "toolchains")
        assert executorch_qnn.missing() is None
        yield folder


def lower(
    traced: Traced,
    module: torch.nn.Module,
    folder: Path,
    scheme: str,
    calibration: Inputs,
    device: str = "sm8650",
    **options: Any,
) -> Lowered:
    """``scheme`` for every module that takes it, for a Snapdragon 8 Gen 3."""
    kinds = kinds_of(module)
    row = next(row for row in executorch_qnn.SUPPORTS if row.scheme == scheme)
    assignment = Assignment(schemes={n: scheme for n, kind in kinds.items() if kind in row.kinds}, kinds=kinds)
    given = defaults(executorch_qnn) | options
    request = lower_request(folder, given, scheme=scheme, assignment=assignment, calibration=samples(calibration))
    return executorch_qnn.lower(traced, replace(request, device=devices.row(device)))
