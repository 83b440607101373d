"""Runs ONNX files with Qualcomm's context binaries on the vendor's x86 simulator of the NPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _qnn

if TYPE_CHECKING:
    from numpy.typing import NDArray

RUNS = ("onnx-qnn",)
KIND: RunnerKind = "simulated"
APART = True  # the vendor's libraries have been seen to crash the process they run in
DISTRIBUTIONS = ("onnx", "onnxruntime", "onnxruntime-qnn", "numpy")
SOURCES = ("edgebake_targets._qnn",)

missing = _qnn.missing


def warm_up() -> None:
    """Import ONNX Runtime."""
    import onnxruntime  # noqa: F401


def open(entry: Path, signature: Signature) -> ContextSession:  # noqa: A001 - the contract's name
    """Open the ``.onnx`` file ``entry``. ArtifactDamaged when it is not there or holds no context binary."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    fix = "build it again"
    if not entry.is_file():
        raise ArtifactDamaged("the artifact's file is not there", where=str(entry), fix=fix)
    try:
        facts = _qnn.facts_of(onnx.ModelProto.FromString(entry.read_bytes()))
    except DecodeError as error:
        raise ArtifactDamaged("this is not an ONNX file, or it is cut short", where=str(entry), fix=fix) from error
    if facts is None:  # ONNX Runtime would run it on the CPU and say nothing
        raise ArtifactDamaged("the file holds no context binary for an NPU", where=str(entry), fix=fix)
    return ContextSession(entry, signature)


class ContextSession:
    """One ONNX Runtime session on the simulator."""

    def __init__(self, entry: Path, signature: Signature) -> None:
        import onnxruntime
        from onnxruntime.capi import onnxruntime_pybind11_state as state

        self.signature = signature
        options = _qnn.session_options({}, cpu_fallback=True)  # what the build left to the CPU is in the file
        try:
            self.session = onnxruntime.InferenceSession(str(entry), options)
        except (state.Fail, state.EPFail, state.InvalidGraph, state.RuntimeException) as error:
            first = str(error).strip().splitlines()[0]
            what = f"Qualcomm's runtime cannot load the context binary: {first}"
            raise ArtifactDamaged(what, where=str(entry), fix="build it again with this onnxruntime-qnn") from error

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; outputs by the signature's names in the signature's dtypes."""
        import numpy as np

        taken = {i.name for i in self.session.get_inputs()}
        feed = {name: np.ascontiguousarray(value) for name, value in inputs.items() if name in taken}
        specs = self.signature.methods[method].outputs
        values = self.session.run([spec.name for spec in specs], feed)
        return {spec.name: value.astype(spec.dtype, copy=False) for spec, value in zip(specs, values, strict=True)}
