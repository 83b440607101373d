"""Runs .pte files with OpenVINO's parts in ExecuTorch's runtime, on this machine's CPU."""

from __future__ import annotations

from pathlib import Path

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _executorch_session, _openvino

RUNS = ("executorch-openvino",)
KIND: RunnerKind = "executed"
APART = True  # the runtime looks for OpenVINO's library once, where the process was told
DISTRIBUTIONS = (*_executorch_session.DISTRIBUTIONS, *_openvino.VERSIONS)
SOURCES = tuple(f"edgebake_targets.{name}" for name in ("_decoders", "_executorch_session", "_openvino"))

environment = _openvino.environment
warm_up = _executorch_session.warm_up


def missing() -> Missing | None:
    """None when executorch and OpenVINO are installed."""
    return _executorch_session.missing() or _openvino.missing()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods."""
    return _executorch_session.opened(entry, signature)
