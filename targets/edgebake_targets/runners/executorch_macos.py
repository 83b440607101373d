"""Runs .pte files in ExecuTorch's runtime on a Mac with Apple silicon, with Core ML's and MLX's backends."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path

from edgebake.target import Missing, NotMeasured, Session
from edgebake.types import RunnerKind, Signature

RUNS = ("executorch-coreml", "executorch-mlx")
KIND: RunnerKind = "device"
DISTRIBUTIONS = ("executorch", "torch")
SOURCES = (
    "edgebake_targets._executorch_runtime",
    *(
        f"edgebake_targets.inspectors.{name}"
        for name in (
            "_coreml_delegate",
            "_flatbuffers",
            "_mlx_graph",
            "_pte_file",
            "_xnnpack_graph",
            "mlpackage",
            "pte",
        )
    ),
)


def missing() -> Missing | None:
    """None on a Mac with Apple silicon and executorch."""
    if (platform.system(), platform.machine()) != ("Darwin", "arm64"):
        return Missing(
            reason="MLX and ExecuTorch's Core ML backend execute on Macs with Apple silicon only",
            remedy="copy the component's folder to such a Mac and run `edgebake verify` there",
        )
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
    """Load the program at ``entry``. NotMeasured names a backend that this executorch was built without."""
    from edgebake_targets import _executorch_runtime
    from edgebake_targets.inspectors import pte

    there = set(_executorch_runtime.bindings()._get_registered_backend_names())
    absent = sorted(set(pte.inspect(entry).delegates) - there)
    if absent:
        raise NotMeasured(f"the installed executorch was built without {', '.join(absent)}")
    return _executorch_runtime.opened(entry, signature)
