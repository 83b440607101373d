"""Stands in for Arm's GPUs, which no Linux machine has: the TOSA graphs of a .pte's VGF parts on Arm's reference model.

The graphs lie beside the program. Each is converted again and must give the very bytes of the part that it stands for.
"""

from __future__ import annotations

from pathlib import Path

from edgebake.target import Missing, Session
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _executorch, _tosa_session, _vgf

RUNS = ("executorch-vgf",)
KIND: RunnerKind = "stand-in"
APART = True  # the reference model is native code that ends its process where a graph is wrong
DISTRIBUTIONS = ("executorch", "torch", *_vgf.VERSIONS)
SOURCES = (*_executorch.SOURCES, *_tosa_session.SOURCES, "edgebake_targets._vgf")

warm_up = _tosa_session.warm_up


def missing() -> Missing | None:
    """None when torch, ExecuTorch and Arm's packages are installed."""
    return _executorch.missing_packages({"torch": "torch>=2.13", "executorch": "executorch>=1.4.1"}) or _vgf.missing()


def open(entry: Path, signature: Signature) -> Session:  # noqa: A001  the contract's name
    """Read the program at ``entry``; ArtifactDamaged when a part is not what the graph beside it converts to."""
    return _tosa_session.opened(entry, signature, _vgf.BACKEND, _vgf.graph_of)
