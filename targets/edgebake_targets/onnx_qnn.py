"""ONNX Runtime on Qualcomm's NPU (Snapdragon, HTP): a context binary for one chip, and plain ONNX for all others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from edgebake.target import Asked, LowerRequest, Option, Refusal, Support
from edgebake.types import Lowered, Traced
from edgebake_targets import _htp, _qnn, _ranges
from edgebake_targets._onnx_options import CALIBRATION

if TYPE_CHECKING:
    import onnx

    from edgebake_targets._onnx_static import Feed

FORMAT = "onnx"
DISTRIBUTIONS = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "onnxruntime-qnn", "numpy")
SOURCES = (
    *(
        f"edgebake_targets._onnx{part}"
        for part in (
            "",
            "_graph",
            "_half",
            "_lower",
            "_macs",
            "_options",
            "_quantize",
            "_ranges",
            "_static",
            "_units",
            "_wide",
            "_widths",
        )
    ),
    *(f"edgebake_targets._onnx_qnn_{part}" for part in ("compile", "quantize", "rewrites", "shared")),
    "edgebake_targets._qnn",
    "edgebake_targets._ranges",
    "edgebake_targets._units",
    "edgebake_targets._wide",
    *(
        f"edgebake_targets.inspectors.{part}"
        for part in ("onnx", "_flatbuffers", "_pte_file", "_qnn_binary", "_qnn_context")
    ),
    "edgebake_targets._qnn_compiler",
    "edgebake_targets._qnn_shared",
    "edgebake_targets._htp",
)
DEVICES = {"vendor": ("qualcomm",), "soc_model": ()}
CONTEXT_FILE, PLAIN_FILE = "model.onnx", "model.plain.onnx"
OPSET = 23  # the first with RMSNormalization

SUPPORTS = (
    _htp.FP16,
    Support(
        scheme="w8a16",
        kinds=("linear", "conv", "embedding"),
        note="int8 weights per channel, tables of 8 bits (16 where a rule says fp32), 16-bit activations",
    ),
    Support(
        scheme="w8a8",
        kinds=("linear", "conv", "embedding"),
        note="everything in 8 bits but what wide_activations names or finds; attention loses too much, take w8a16",
    ),
    _htp.W4A16,
)

OPTIONS = (
    *CALIBRATION,
    _htp.WIDE,
    Option(
        name="cpu_fallback",
        default=False,
        help="operators that the NPU does not take run on the CPU instead of failing the build",
    ),
    Option(
        name="embed",
        default=True,
        help="the binary inside model.onnx; false: in a file beside it, which also holds more than 2 GiB",
    ),
    Option(
        name="optimization",
        default=3,
        help="how long the vendor's compiler searches: 1 short, 2 longer, 3 longest with the fastest binary",
        choices=(1, 2, 3),
    ),
    Option(
        name="share_weights",
        default=False,
        help="one binary beside model.onnx for a component of several methods: equal weights lie in it once",
    ),
    Option(name="vtcm_mib", default=0, help="fast memory of the NPU that the binary may use; 0: what the vendor takes"),
)

missing = _qnn.missing


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no weight needs to be read for: fixed shapes, methods, one width of activations."""
    yield from _htp.refused_shapes(asked)
    yield from _refused_sharing(asked)
    if asked.options["vtcm_mib"] < 0:
        yield Refusal(what="vtcm_mib cannot be negative", fix="0 is what the vendor takes", key="options.vtcm_mib")
    wanted, there = asked.options["vtcm_mib"], (asked.device or {}).get("vtcm_mib")
    if asked.device is not None and there is not None and wanted > there:
        what = f"{wanted} MiB of VTCM on {asked.device['name']}, which has {there}"
        yield Refusal(what=what, fix=f"at most {there}; 0 is what the vendor takes", key="options.vtcm_mib")
    yield from _ranges.refused(asked)
    yield from _htp.refused_widths(asked, SUPPORTS, floats=("fp16", "fp32"))


def _refused_sharing(asked: Asked) -> Iterator[Refusal]:
    yield from _htp.refused_sharing(asked)
    if len(asked.inputs) > 1 and not asked.options["share_weights"]:
        what = f"onnx-qnn takes networks of one method, not {', '.join(asked.inputs)}"
        yield Refusal(what=what, fix="make a component of each method, or options: {share_weights: true}")
    if asked.options["share_weights"] and asked.options["cpu_fallback"]:
        what = "share_weights compiles whole methods for the NPU, and cpu_fallback splits them"
        yield Refusal(what=what, fix="leave one of the two out", key="options.share_weights")


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """``model.onnx`` with the context binary for ``request.device``, and ``model.plain.onnx`` it was compiled from."""
    from edgebake_targets._onnx import fixed, refuse_states, save
    from edgebake_targets._onnx_lower import compressed_models, readers, summary
    from edgebake_targets._onnx_qnn_compile import compile_context
    from edgebake_targets._onnx_qnn_rewrites import rewrite
    from edgebake_targets.inspectors.onnx import inspect

    refuse_states(traced)
    if request.options["share_weights"]:
        return _lower_shared(traced, request)
    device: Mapping[str, Any] = request.device or {}
    signature = fixed(traced.signature)
    traced = replace(traced, signature=signature)
    notes: list[str] = []
    (model,) = compressed_models(traced, request, OPSET, prepare=rewrite, static=partial(_static, notes)).values()
    written = save(model, request.folder / PLAIN_FILE)
    compiled = compile_context(
        model,
        request.folder / CONTEXT_FILE,
        provider_options(request.options, device),
        str(device["name"]),
        cpu_fallback=bool(request.options["cpu_fallback"]),
        embed=bool(request.options["embed"]),
    )
    beside = tuple(dict.fromkeys(compiled.facts.files))
    files = {"context": CONTEXT_FILE, **({"binary": beside[0]} if beside else {}), "plain": PLAIN_FILE}
    weights = sum(w.bytes + w.scale_bytes for w in inspect(request.folder / PLAIN_FILE).weights)
    return Lowered(
        files=(CONTEXT_FILE, *beside, *written),
        entry=CONTEXT_FILE,
        signature=signature,
        delegation=compiled.delegation,
        encodings={
            **summary(traced, request),
            "files": files,
            "runtime": _runtime(compiled.facts, device),
            "plain_runtime": readers(model),
            "compiled_from": weights,
        },
        notes=tuple(notes),
    )


def _lower_shared(traced: Traced, request: LowerRequest) -> Lowered:
    """``<method>.onnx`` for each method, which lead into one binary beside them, and their plain files."""
    from edgebake_targets._onnx import fixed, save
    from edgebake_targets._onnx_lower import compressed_models, readers, summary
    from edgebake_targets._onnx_qnn_rewrites import rewrite
    from edgebake_targets._onnx_qnn_shared import compile_shared
    from edgebake_targets._qnn_shared import context_name, plain_name
    from edgebake_targets.inspectors.onnx import inspect

    _htp.refuse_sharing_alone(traced.programs)
    device: Mapping[str, Any] = request.device or {}
    traced = replace(traced, signature=fixed(traced.signature))
    notes: list[str] = []
    models = compressed_models(traced, request, OPSET, prepare=rewrite, static=partial(_static, notes))
    plain = [name for method, model in models.items() for name in save(model, request.folder / plain_name(method))]
    shared = compile_shared(models, request.folder, provider_options(request.options, device), str(device["name"]))
    methods = list(models)
    weights = {
        w.digest: w.bytes + w.scale_bytes for m in methods for w in inspect(request.folder / plain_name(m)).weights
    }
    said = _htp.sizes(methods, shared.bytes, shared.separate_bytes, "one for each")
    return Lowered(
        files=(*shared.files, *plain),
        entry=context_name(methods[0]),
        signature=traced.signature,
        delegation=shared.delegation,
        encodings={
            **summary(traced, request),
            "files": {"context": shared.binary, "plain": plain_name(methods[0])},
            "shared": {"methods": methods, "bytes": shared.bytes, "separate_bytes": shared.separate_bytes},
            "runtime": _runtime(shared.facts, device),
            "plain_runtime": readers(models[methods[0]]),
            "compiled_from": sum(weights.values()),
        },
        notes=(*notes, said),
    )


def _static(
    notes: list[str],
    model: onnx.ModelProto,
    nodes: Mapping[str, str],
    calls: Iterable[Feed],
    count: int,
    request: LowerRequest,
) -> onnx.ModelProto:
    from edgebake_targets._onnx_qnn_quantize import quantize

    quantized, said = quantize(model, nodes, calls, count, request)
    notes += said
    return quantized


def provider_options(options: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, str]:
    """What the vendor's provider is told, as text."""
    told = {
        "soc_model": str(device["soc_model"]),
        "htp_graph_finalization_optimization_mode": str(options["optimization"]),
        # Rounding of the inputs and outputs belongs to the binary: left to the CPU it would be an operator outside.
        "offload_graph_io_quantization": "0",
    }
    return told | ({"vtcm_mb": str(options["vtcm_mib"])} if options["vtcm_mib"] else {})


def _runtime(facts: _qnn.ContextFacts, device: Mapping[str, Any]) -> dict[str, str]:
    """Who wrote the binary and who reads it: QAIRT reads what its own and older releases wrote, not newer ones."""
    return {
        "written_by": f"QAIRT {facts.sdk}",
        "oldest_reader": f"QAIRT {facts.sdk}",
        "device": str(device["name"]),
        "soc_model": facts.soc_model,
    }
