"""ONNX files for ONNX Runtime's CPU provider: Android, Apple, Windows and Linux apps without an accelerator."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgebake.target import LowerRequest
from edgebake.types import Delegation, Lowered, Traced
from edgebake_targets import _onnx_kernels, _ranges
from edgebake_targets._onnx_options import CALIBRATION

if TYPE_CHECKING:
    import onnx

FORMAT = "onnx"
DISTRIBUTIONS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
SOURCES = _onnx_kernels.SOURCES
SUPPORTS = _onnx_kernels.SUPPORTS
OPTIONS = (_onnx_kernels.OPSET, *CALIBRATION)

refusals = _ranges.refused
missing = _onnx_kernels.missing


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """One ``.onnx`` file per method, compressed as ``request.assignment`` says, with the signature's names."""
    from edgebake_targets._onnx import file_name, fixed, refuse_states, save
    from edgebake_targets._onnx_lower import compressed_models, summary
    from edgebake_targets._onnx_units import on_the_cpu

    refuse_states(traced)
    traced = replace(traced, signature=fixed(traced.signature))
    models: dict[str, onnx.ModelProto] = compressed_models(traced, request, int(request.options["opset"]))
    files: list[str] = []
    for method, model in models.items():
        files += save(model, request.folder / file_name(method, models))
    encodings: dict[str, Any] = summary(traced, request)
    sizes = {name: bounds.max for name, bounds in traced.signature.dims.items()}
    return Lowered(
        files=tuple(files),
        entry=file_name(next(iter(models)), models),  # the others lie beside it
        signature=traced.signature,
        delegation=Delegation(share=1.0, partitions=1, units=on_the_cpu(models, sizes), border_bytes=0),
        encodings=encodings,
    )
