"""Runs .pte files in the ExecuTorch runtime of the executorch wheel, on this machine's CPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature

RUNS = ("executorch-xnnpack",)
KIND: RunnerKind = "executed"
DISTRIBUTIONS = ("executorch", "torch")
SOURCES = ("edgebake_targets._executorch_runtime",)


def missing() -> Missing | None:
    """None when the executorch wheel is installed."""
    if find_spec("executorch") is None:
        return Missing(
            reason="the Python package 'executorch' is not installed", remedy="pip install 'executorch>=1.4.1'"
        )
    return None


def warm_up() -> None:
    """Import the runtime and the torch whose tensors it takes."""
    from edgebake_targets import _executorch_runtime

    _executorch_runtime.bindings()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods."""
    from edgebake_targets import _executorch_runtime

    return _executorch_runtime.opened(entry, signature)
