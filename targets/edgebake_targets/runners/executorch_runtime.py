"""Runs .pte files in the ExecuTorch runtime of the executorch wheel, on this machine's CPU."""

from __future__ import annotations

from pathlib import Path

from edgebake.target import Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _executorch_session

RUNS = ("executorch-xnnpack",)
KIND: RunnerKind = "executed"
DISTRIBUTIONS = _executorch_session.DISTRIBUTIONS
SOURCES = ("edgebake_targets._decoders", "edgebake_targets._executorch_session")

missing = _executorch_session.missing
warm_up = _executorch_session.warm_up


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods."""
    return _executorch_session.opened(entry, signature)
