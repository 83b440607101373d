"""ONNX files for ONNX Runtime's CPU provider: Android, Apple, Windows and Linux apps without an accelerator."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from edgebake.target import LowerRequest, Missing, Option, Support
from edgebake.types import Delegation, Lowered, Traced
from edgebake_targets import _ranges
from edgebake_targets._onnx_options import CALIBRATION

if TYPE_CHECKING:
    import onnx

FORMAT = "onnx"
DISTRIBUTIONS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
SOURCES = (
    *(
        f"edgebake_targets._onnx{part}"
        for part in ("", "_graph", "_half", "_lower", "_options", "_quantize", "_ranges", "_static")
    ),
    "edgebake_targets._ranges",
)

SUPPORTS = (
    Support(scheme="fp32", kinds=("linear", "conv", "embedding")),
    Support(
        scheme="fp16",
        kinds=("linear", "conv", "embedding"),
        note="halves the file; ONNX Runtime computes most of it in float32 on CPUs without half arithmetic",
    ),
    Support(
        scheme="w8",
        kinds=("linear", "conv", "embedding"),
        note="ONNX Runtime 1.31 rounds activations to int8 too unless session.qdq_matmulnbits_accuracy_level is 1",
    ),
    Support(
        scheme="w8a8",
        kinds=("linear", "conv"),
        note="int8 per channel and int8 activations (QDQ); ranges from samples.calibration",
    ),
    Support(
        scheme="w8a8d",
        kinds=("linear",),
        note="DynamicQuantizeMatMul; convolutions have no fast kernel (ConvInteger depthwise: 25 times as slow)",
    ),
    Support(scheme="w4g32a8d", kinds=("linear",), note="MatMulNBits, accuracy level 4; input width a multiple of 32"),
    Support(scheme="w4g32", kinds=("linear",), note="MatMulNBits, float products; input width a multiple of 32"),
)

OPTIONS = (
    Option(name="opset", default=20, help="version of the ONNX operator set", choices=(18, 19, 20, 21, 22, 23)),
    *CALIBRATION,
)


refusals = _ranges.refused


def missing() -> Missing | None:
    """Whether onnx, onnxscript and onnxruntime are installed."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if not absent:
        return None
    return Missing(reason=f"not installed: {', '.join(absent)}", remedy=f"pip install {' '.join(absent)}")


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """One ``.onnx`` file per method, compressed as ``request.assignment`` says, with the signature's names."""
    from edgebake_targets._onnx import file_name, fixed, refuse_states, save
    from edgebake_targets._onnx_lower import compressed_models, summary

    refuse_states(traced)
    traced = replace(traced, signature=fixed(traced.signature))
    models: dict[str, onnx.ModelProto] = compressed_models(traced, request, int(request.options["opset"]))
    files: list[str] = []
    for method, model in models.items():
        files += save(model, request.folder / file_name(method, models))
    encodings: dict[str, Any] = summary(traced, request)
    return Lowered(
        files=tuple(files),
        entry="model.onnx" if list(models) == ["forward"] else ".",
        signature=traced.signature,
        delegation=Delegation(share=1.0, partitions=1),
        encodings=encodings,
    )
