"""What ONNX Runtime's CPU kernels take, and the packages that write their files."""

from __future__ import annotations

from importlib.util import find_spec

from edgebake.target import Missing, Option, Support

# What a target reaches that writes for these kernels, this module included.
SOURCES = tuple(
    f"edgebake_targets.{name}"
    for name in (
        "_onnx",
        "_onnx_graph",
        "_onnx_half",
        "_onnx_kernels",
        "_onnx_lower",
        "_onnx_macs",
        "_onnx_options",
        "_onnx_quantize",
        "_onnx_ranges",
        "_onnx_static",
        "_onnx_units",
        "_ranges",
        "_units",
    )
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

OPSET = Option(name="opset", default=20, help="version of the ONNX operator set", choices=(18, 19, 20, 21, 22, 23))


def missing() -> Missing | None:
    """Whether onnx, onnxscript and onnxruntime are installed."""
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if not absent:
        return None
    return Missing(reason=f"not installed: {', '.join(absent)}", remedy=f"pip install {' '.join(absent)}")
