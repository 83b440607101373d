"""Runs .pte files with Qualcomm's context binaries in ExecuTorch's runtime, on the vendor's simulator of the NPU."""

from __future__ import annotations

from pathlib import Path

from edgebake.target import Missing, NotMeasured, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _decoder_session, _executorch, _executorch_session, _qnn_toolchain

RUNS = ("executorch-qnn",)
KIND: RunnerKind = "simulated"
APART = True  # the libraries' folder must be known before Python starts, and a failed start brings the process down
DISTRIBUTIONS = _executorch_session.DISTRIBUTIONS
SOURCES = (*_executorch.SOURCES, "edgebake_targets._qnn_toolchain")

environment = _qnn_toolchain.environment
warm_up = _executorch_session.warm_up


def missing() -> Missing | None:
    """None when executorch and Qualcomm's libraries, private or the user's, are here."""
    return _executorch_session.missing() or _qnn_toolchain.missing()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Load the program at ``entry``; ArtifactDamaged when the runtime refuses it or it lacks one of the methods.

    NotMeasured for a binary of shared weights: QNN 2.49 has no buffer for them on x86 (error 1000 of
    QnnContext_createFromBinary), and ExecuTorch has no way to run the graphs that it was compiled from.
    """
    from edgebake_targets.inspectors import pte

    if len(signature.methods) > 1 and pte.inspect(entry).facts.get("shares_weights"):
        raise NotMeasured(
            "Qualcomm's x86 libraries load no binary of shared weights (QNN 2.49: Shared weights buffer isn't "
            "supported on this platform); built without share_weights, the same graphs are measured"
        )
    return _decoder_session.of_single_tokens(_executorch_session.opened(entry, signature), signature)
