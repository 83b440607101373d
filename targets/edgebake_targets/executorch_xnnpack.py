"""ExecuTorch on the CPU through XNNPACK: .pte files for Android, iOS, macOS and Linux, executed here as they are."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, StageFailed
from edgebake.scheme import parse
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Assignment, Lowered, Traced, canonical_module_name
from edgebake_targets import (
    _executorch,
    _executorch_llm,
    _ranges,
    _xnnpack_order,
    _xnnpack_partitioner,
    _xnnpack_passes,
)
from edgebake_targets._decoders import decodes

if TYPE_CHECKING:
    import torch
    from torchao.quantization.pt2e.quantizer import Quantizer

FORMAT = "pte"
DISTRIBUTIONS = _executorch.DISTRIBUTIONS
DECODES = True
SOURCES = (
    *_executorch.SOURCES,
    *(
        f"edgebake_targets.{name}"
        for name in (
            "_observers",
            "_ranges",
            "_xnnpack_gelu",
            "_xnnpack_order",
            "_xnnpack_partitioner",
            "_xnnpack_passes",
            "_xnnpack_quantizer",
        )
    ),
)

SUPPORTS = (
    Support(scheme="fp32", kinds=("linear", "conv", "embedding")),
    Support(
        scheme="fp16",
        kinds=("linear", "conv", "embedding"),
        method="cast",
        note="needs a CPU with half-precision arithmetic (Armv8.2; AVX2 with F16C on x86). Normalisations stay float32 "
        "and ExecuTorch writes convolution weights as float32: half the arithmetic there, not half the size",
    ),
    Support(
        scheme="w8a8",
        kinds=("linear", "conv"),
        method="pt2e",
        note="int8 per channel, activation ranges from calibration; additions and products between such modules are "
        "int8 too; no grouped transposed convolutions",
    ),
    Support(
        scheme="w8a8d",
        kinds=("linear",),
        method="pt2e",
        note="int8 per channel, activation scales at run time; XNNPACK has no such kernels for depthwise convolutions",
    ),
    Support(
        scheme="w4g32a8d",
        kinds=("linear",),
        method="quantize_weights",
        note="int4 in groups of 32, activation scales at run time; input features must be divisible by 32",
    ),
    Support(
        scheme="w8",
        kinds=("embedding",),
        method="quantize_weights",
        override_only=True,
        note="int8 rows in ExecuTorch's own embedding kernel; XNNPACK has no linear or convolution with int8 weights "
        "and float activations (ExecuTorch 1.4 lowers such a linear at float size and computes garbage): use w8a8d",
    ),
)

OPTIONS = (
    Option(
        name="activation_range",
        default="histogram",
        help="w8a8: how calibration chooses an activation's range; minmax keeps outliers, histogram is torchao's",
        choices=("histogram", *_ranges.METHODS),
    ),
    _ranges.PERCENTILE,
    Option(
        name="cache",
        default="fp32",
        help="how a language model's keys and values are kept; int8 with a scale and zero point per head and token",
        choices=("fp32", "int8"),
    ),
)

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}
_PARTITIONER_LOG = "executorch.backends.xnnpack.partition"


def refusals(asked: Asked) -> Iterator[Refusal]:
    """Ranges that do not go with the schemes, and a kind of cache for what keeps none."""
    yield from _ranges.refused(asked)
    if asked.options["cache"] != "fp32" and not decodes(asked):
        what = f"cache: {asked.options['cache']} is how a language model keeps keys and values, and this one keeps none"
        fix = "take it out, or give the model task: text-generation and context:"
        yield Refusal(what=what, fix=fix, key="options.cache")


def missing() -> Missing | None:
    """None when torch, torchao and executorch are installed."""
    return _executorch.missing_packages(_PACKAGES)


def quantizer(request: LowerRequest) -> Quantizer:
    """XNNPACK's PT2E quantizer, held to the modules that ``request.assignment`` gives w8a8 and w8a8d.

    Both may stand in one model. Additions, products, concatenations and pools are int8 when all that flows into them
    is (w8a8 only), so that a residual branch needs no detour through float.
    """
    from edgebake_targets._xnnpack_quantizer import build

    return build(request.assignment, str(request.options["activation_range"]), float(request.options["percentile"]))


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program; StageFailed when an assigned module's weights stayed float."""
    if request.assignment.of("w8", "w4g32a8d") or request.options["cache"] == "int8":
        import executorch.kernels.quantized  # noqa: F401  registers int8 embeddings and caches for the emitter

    from edgebake_targets import _xnnpack_gelu

    traced = _executorch_llm.with_own_operators(traced, str(request.options["cache"]))
    traced = _xnnpack_gelu.spelled_out(traced)
    _executorch.refuse_states(traced)
    for method, program in traced.programs.items():
        _refuse_float(method, program, request.assignment)
        _refuse_half_norms(method, program)
    with _refusals() as reasons, _xnnpack_passes.needed_only():
        metadata = _executorch_llm.metadata(traced.signature)
        dynamic = bool(request.assignment.of("w8a8d", "w4g32a8d"))
        edge = _executorch.to_edge(traced.programs, (_xnnpack_partitioner.partitioner(dynamic=dynamic),), metadata)
    delegation = _executorch.delegation(edge, reasons, "XNNPACK has no such operator")
    encodings, fuse = _encodings(traced, request.assignment), bool(request.assignment.of("w8"))
    with _xnnpack_order.heaviest_first(edge):
        lowered = _executorch.emitted(edge, request, traced.signature, delegation, encodings, fuse_quantised=fuse)
    del edge
    _xnnpack_passes.forget()
    _refuse_lost_integers(request, traced)
    return lowered


@contextmanager
def _refusals() -> Iterator[Mapping[str, str]]:
    """Why the partitioner left nodes out, by node name; it only tells its debug log."""
    reasons: dict[str, str] = {}

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            node = getattr(record.msg, "node", None)
            if node is not None:
                reasons[node.name] = str(getattr(record.msg, "reason", ""))  # the last partitioner decides

    log, handler = logging.getLogger(_PARTITIONER_LOG), Keep()
    level, propagate = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
    try:
        yield reasons
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
        log.propagate = propagate


def _refuse_float(method: str, program: torch.export.ExportedProgram, assignment: Assignment) -> None:
    """StageFailed naming the assigned modules whose weights are still plain float parameters that something uses."""
    import torch

    names = program.graph_signature.inputs_to_parameters | program.graph_signature.inputs_to_buffers
    problems = []
    for node in program.graph.nodes:
        path = names.get(node.name, "") if node.op == "placeholder" and node.users else ""
        module, _, leaf = path.rpartition(".")
        name = canonical_module_name(module)
        scheme = assignment.schemes.get(name, "fp32")
        if leaf != "weight" or parse(scheme).family == "float":
            continue
        value = program.state_dict.get(path)
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_floating_point():
            problems.append(
                Problem(
                    what=f"the weights of {name} stayed {str(value.dtype).removeprefix('torch.')} instead of {scheme}",
                    where=f"lower: method {method}",
                    fix=f"XNNPACK has no kernel for this module under {scheme}: give it another scheme, "
                    f'modules: {{"{name}": fp32}}',
                )
            )
    if problems:
        raise StageFailed(problems)


def _refuse_half_norms(method: str, program: torch.export.ExportedProgram) -> None:
    """ExecuTorch 1.4's layer_norm returns garbage in half (measured: -0.2 dB on N(1, 3) over 384 features)."""
    import torch

    names = [
        _executorch.innermost_module(node) or "the network"
        for node in program.graph.nodes
        if node.op == "call_function"
        and _executorch.op_name(node) in ("aten.layer_norm", "aten.native_layer_norm")
        and getattr(node.args[0].meta.get("val"), "dtype", None) == torch.float16
    ]
    if names:
        raise StageFailed(
            f"{names[0]} normalises in half precision, which ExecuTorch's layer_norm computes wrongly",
            where=f"lower: method {method}",
            fix="call torch.nn.LayerNorm as a module (it then stays float32), or choose fp32 or an integer scheme",
        )


def _refuse_lost_integers(request: LowerRequest, traced: Traced) -> None:
    """StageFailed when an integer weight of the program is not one in the file: the backend widened it."""
    from edgebake_targets.inspectors import pte

    written = {
        (record.digest, prod(record.shape))
        for record in pte.inspect(request.folder / _executorch.ARTIFACT).weights
        if record.dtype in ("int4", "int8", "uint8")
    }
    found = Counter(size for _, size in written)
    weights = (w for program in traced.programs.values() for w in _executorch.integer_weights(program))
    expected = {(w.digest, w.count): w for w in weights}
    lost = Counter(size for _, size in expected) - found
    names = sorted({w.module for w in expected.values() if w.count in lost})
    if names:
        raise StageFailed(
            f"{sum(lost.values())} integer weights came out of lowering as floats, among: {', '.join(names)}",
            where="lower",
            fix="give these modules another scheme; the file would have had the float size",
        )


def _encodings(traced: Traced, assignment: Assignment) -> dict[str, Any]:
    """How many modules got which scheme, and how many static activation scales were chosen in each method."""
    scales = {
        method: sum(str(node.target).endswith(".quantize_per_tensor.default") for node in program.graph.nodes)
        for method, program in traced.programs.items()
    }
    return {
        **assignment.counted(),
        "static_activation_scales": {method: count for method, count in scales.items() if count},
    }
