"""Runs ONNX files with Qualcomm's context binaries on the vendor's x86 simulator of the NPU."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.types import RunnerKind, Signature
from edgebake_targets import _onnxruntime, _qnn, _qnn_shared

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

RUNS = ("onnx-qnn",)
KIND: RunnerKind = "simulated"
APART = True  # the vendor's libraries have been seen to crash the process they run in
DISTRIBUTIONS = ("onnx", "onnxruntime", "onnxruntime-qnn", "numpy")
SOURCES = tuple(f"edgebake_targets.{name}" for name in ("_onnxruntime", "_qnn", "_qnn_compiler", "_qnn_shared"))

missing = _qnn.missing
warm_up = _onnxruntime.warm_up


def open(entry: Path, signature: Signature) -> ContextSession | SharedSessions:  # noqa: A001 - the contract's name
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
    if len(signature.methods) > 1:
        return SharedSessions(entry, signature)
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
        return _onnxruntime.run(self.session, self.signature.methods[method], inputs)


class SharedSessions:
    """The entry points of a binary of shared weights, each from its own session.

    The vendor's x86 libraries crash on loading such a binary; the sessions that compile it run. So the artifact's plain
    files are compiled again, and what comes out must be the artifact's binary, byte by byte.
    """

    def __init__(self, entry: Path, signature: Signature) -> None:
        import tempfile

        import onnx

        self.signature = signature
        told = {p.key: p.value for p in onnx.ModelProto.FromString(entry.read_bytes()).metadata_props}
        if _qnn_shared.COMPILED_WITH not in told:
            what = "the file does not say what its binary was compiled with"
            raise ArtifactDamaged(what, where=str(entry), fix="build it again")
        asked = json.loads(told[_qnn_shared.COMPILED_WITH])
        with tempfile.TemporaryDirectory(prefix="edgebake-qnn-") as scratch:
            _qnn_shared.copy_plain(entry.parent, Path(scratch), asked["methods"])
            with contextlib.chdir(scratch):  # graphs are named after the path they are read from
                self.sessions = _qnn_shared.sessions(asked["provider"], asked["methods"])
            _same_binaries(entry.parent, Path(scratch), asked["methods"])

    def call(self, method: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run once; outputs by the signature's names in the signature's dtypes."""
        return _onnxruntime.run(self.sessions[method], self.signature.methods[method], inputs)


def _same_binaries(artifact: Path, again: Path, methods: Sequence[str]) -> None:
    """ArtifactDamaged when a method of ``artifact`` leads elsewhere than what its plain file compiles to."""
    import onnx

    for method in methods:
        nodes = [_context(onnx.load_model(at / _qnn_shared.context_name(method))) for at in (artifact, again)]
        name = nodes[1][0]
        if nodes[0] != nodes[1] or (artifact / name).read_bytes() != (again / name).read_bytes():
            raise ArtifactDamaged(
                f"what {_qnn_shared.plain_name(method)} compiles to is not the artifact's {name}",
                where=str(artifact / _qnn_shared.context_name(method)),
                fix="build it again with this onnxruntime-qnn",
            )


def _context(model: onnx.ModelProto) -> tuple[str, str]:
    """Binary and entry point of the one compiled part."""
    (node,) = model.graph.node
    told = {a.name: a.s.decode() for a in node.attribute if a.s}
    return told["ep_cache_context"], told["partition_name"]
