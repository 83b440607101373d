"""ONNX Runtime's own format for apps with a reduced build of it: Android and iOS, on the phone's processor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from edgebake.target import Asked, LowerRequest, Option, Refusal
from edgebake.types import Delegation, Lowered, Traced
from edgebake_targets import _onnx_kernels, _ranges
from edgebake_targets._onnx_options import CALIBRATION

FORMAT = "ort"
DISTRIBUTIONS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy", "flatbuffers")
SOURCES = (
    *_onnx_kernels.SOURCES,
    "edgebake_targets._onnx_mobile",
    "edgebake_targets._ort_format",
    "edgebake_targets.inspectors._flatbuffers",
    "edgebake_targets.inspectors._ort_model",
)
DEVICES = {"platform": ("android", "ios")}
ENTRY, CONFIG = "model.ort", "required_operators.config"

# Not float16: the file is laid out where it is built, and processors without half arithmetic turn it into float32.
SUPPORTS = tuple(
    replace(row, note="float activations, whatever the app's session says") if row.scheme == "w8" else row
    for row in _onnx_kernels.SUPPORTS
    if row.scheme != "fp16"
)
OPTIONS = (
    _onnx_kernels.OPSET,
    *CALIBRATION,
    Option(
        name="optimization",
        default="all",
        help="all: fused for the processor; basic: standard operators, which NNAPI, Core ML and XNNPACK can take",
        choices=("all", "basic"),
    ),
)

missing = _onnx_kernels.missing


def refusals(asked: Asked) -> Iterator[Refusal]:
    """One method: a file holds one graph. No percentile that is none."""
    yield from _ranges.refused(asked)
    if len(asked.inputs) > 1:
        what = f"onnx-mobile takes networks of one method, not {', '.join(asked.inputs)}"
        yield Refusal(what=what, fix="make a component of each method, or take onnx-cpu")


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """``model.ort`` and ``required_operators.config``, what a build of ONNX Runtime for it needs."""
    from edgebake_targets import _onnx_mobile
    from edgebake_targets._onnx import fixed, refuse_states
    from edgebake_targets._onnx_lower import compressed_models, summary
    from edgebake_targets._onnx_units import on_the_cpu
    from edgebake_targets.inspectors import _ort_model

    refuse_states(traced)
    traced = replace(traced, signature=fixed(traced.signature))
    models = compressed_models(traced, request, int(request.options["opset"]))
    (model,) = models.values()
    _onnx_mobile.write(model, request.folder / ENTRY, str(request.options["optimization"]))
    written = _ort_model.read(memoryview((request.folder / ENTRY).read_bytes()))
    config = _onnx_mobile.required_operators(written.operators)
    (request.folder / CONFIG).write_text(config, encoding="utf-8", newline="\n")
    found = _onnx_mobile.usability(model)
    sizes = {name: bounds.max for name, bounds in traced.signature.dims.items()}
    return Lowered(
        files=(ENTRY, CONFIG),
        entry=ENTRY,
        signature=traced.signature,
        delegation=Delegation(share=1.0, partitions=1, units=on_the_cpu(models, sizes), border_bytes=0),
        encodings={**summary(traced, request), "providers": found},
        notes=_onnx_mobile.notes(found),
    )
