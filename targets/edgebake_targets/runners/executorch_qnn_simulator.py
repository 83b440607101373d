"""Runs .pte files with Qualcomm's context binaries in ExecuTorch's runtime, on the vendor's simulator of the NPU."""

from __future__ import annotations

from pathlib import Path

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _executorch_session, _qnn_toolchain

RUNS = ("executorch-qnn",)
KIND: RunnerKind = "simulated"
APART = True  # the libraries' folder must be known before Python starts, and a failed start brings the process down
DISTRIBUTIONS = _executorch_session.DISTRIBUTIONS
SOURCES = tuple(f"edgebake_targets.{name}" for name in ("_decoders", "_executorch_session", "_qnn_toolchain"))

environment = _qnn_toolchain.environment
warm_up = _executorch_session.warm_up


def missing() -> Missing | None:
    """None when executorch and Qualcomm's libraries, private or the user's, are here."""
    return _executorch_session.missing() or _qnn_toolchain.missing()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods."""
    return _executorch_session.opened(entry, signature)
