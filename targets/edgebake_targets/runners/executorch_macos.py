"""Runs .pte files in ExecuTorch's runtime on a Mac with Apple silicon, with Core ML's and MLX's backends."""

from __future__ import annotations

import platform
from importlib import import_module
from pathlib import Path

from edgebake.target import Missing, NotMeasured, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _decoder_session, _executorch, _executorch_session

RUNS = ("executorch-coreml", "executorch-mlx")
KIND: RunnerKind = "device"
DISTRIBUTIONS = _executorch_session.DISTRIBUTIONS
SOURCES = _executorch.SOURCES


def missing() -> Missing | None:
    """None on a Mac with Apple silicon and executorch."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return Missing(
            reason="MLX and ExecuTorch's Core ML backend execute on Macs with Apple silicon only",
            remedy="copy the component's folder to such a Mac and run `edgebake verify` there",
        )
    return _executorch_session.missing()


def warm_up() -> None:
    """Import the runtime and the torch whose tensors it takes."""
    _executorch_session.warm_up()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``. NotMeasured names a backend that this executorch was built without."""
    from edgebake_targets.inspectors import pte

    there = set(import_module("executorch.extension.pybindings._portable_lib")._get_registered_backend_names())
    absent = sorted(set(pte.inspect(entry).delegates) - there)
    if absent:
        raise NotMeasured(f"the installed executorch was built without {', '.join(absent)}")
    return _decoder_session.of_single_tokens(_executorch_session.opened(entry, signature), signature)
