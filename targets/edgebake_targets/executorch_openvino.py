"""ExecuTorch with Intel's OpenVINO: .pte files for PCs with x86 CPUs, executed here as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Lowered, ModuleKind, Signature, Traced, Verdict
from edgebake_targets import _executorch, _openvino, _ranges

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

FORMAT = "pte"
DEVICES = {"vendor": ("intel",)}  # no phone has what it runs on
DISTRIBUTIONS = (*_executorch.DISTRIBUTIONS, *_openvino.VERSIONS)
SOURCES = (
    *_executorch.SOURCES,
    *(f"edgebake_targets.{name}" for name in ("_observers", "_openvino", "_ranges", "_xnnpack_quantizer")),
)

_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")
_ROUNDS = "ExecuTorch's runtime leaves the precision to OpenVINO, which computes in bfloat16 on CPUs that have it"

SUPPORTS = (
    Support(scheme="fp32", kinds=_ALL, note=_ROUNDS),
    Support(scheme="fp16", kinds=_ALL, method="cast", note=f"weights of half the size; {_ROUNDS}"),
    Support(
        scheme="w8a8",
        kinds=("linear", "conv"),
        method="pt2e",
        note=f"int8 per channel, activation ranges from calibration; between such modules {_ROUNDS}",
    ),
)
OPTIONS: tuple[Option, ...] = (
    Option(
        name="activation_range",
        default="histogram",
        help="w8a8: how calibration chooses an activation's range; minmax keeps outliers, histogram is torchao's",
        choices=("histogram", *_ranges.METHODS),
    ),
    _ranges.PERCENTILE,
)

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}


def missing() -> Missing | None:
    """None when ExecuTorch and OpenVINO are installed."""
    return _executorch.missing_packages(_PACKAGES) or _openvino.missing()


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no weight needs to be read for: fixed shapes, and what the options of ranges need."""
    for name in asked.varying:
        fix = f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}"
        yield Refusal(what=f"executorch-openvino takes fixed shapes only, and {name!r} varies", fix=fix, key="dims")
    yield from _ranges.refused(asked)


def quantizer(request: LowerRequest) -> Quantizer:
    """XNNPACK's PT2E quantizer, whose kind of scales OpenVINO takes: int8 per channel, activations per tensor."""
    from edgebake_targets._xnnpack_quantizer import build

    made = build(request.assignment, str(request.options["activation_range"]), float(request.options["percentile"]))
    made.fold_quantize = False  # OpenVINO knows a rounded weight by the pair of operators, and folds it itself
    return made


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program.

    StageFailed when OpenVINO takes no operator, does not compile a part, or an assigned module's weights stayed float.
    """
    _executorch.refuse_writes(traced, "OpenVINO keeps nothing between calls")
    with _openvino.compiled_apart() as held:
        edge = _executorch.to_edge(traced.programs, (_openvino.partitioner(),))
    delegation = _executorch.delegation(edge, {}, "OpenVINO's frontend has no such operator")
    if not delegation.partitions:
        names = ", ".join(row.op for row in delegation.left_out)
        raise StageFailed(
            f"OpenVINO takes none of the network's operators: {names}",
            where="lower",
            fix="build this network for executorch-xnnpack",
        )
    encodings = {"schemes": request.assignment.by_scheme(), "openvino": {"device": _openvino.DEVICE}}
    lowered = _executorch.emitted(edge, request, traced.signature, delegation, encodings)
    del edge
    _refuse_lost_integers(traced, request, held)
    return lowered


def _refuse_lost_integers(traced: Traced, request: LowerRequest, held: Counter[tuple[str, int]]) -> None:
    """StageFailed naming the modules whose weights OpenVINO's compiler was not given as integers."""
    sizes: dict[str | None, int] = {}
    for program in traced.programs.values():
        for node in program.graph.nodes:
            if _executorch.op_name(node) == "quantized_decomposed.quantize_per_channel":
                (back,) = node.users
                sizes[_executorch.innermost_module(next(iter(back.users)))] = node.meta["val"].numel()
    lost = [name for name in request.assignment.of("w8a8") if not held["int8", sizes.get(name, 0)]]
    if lost:
        raise StageFailed(
            f"integer weights came out of lowering as floats: {', '.join(sorted(lost))}",
            where="lower",
            fix="OpenVINO takes integer weights of linear layers and convolutions: give these modules fp32",
        )


def read_checks(_folder: Path) -> Mapping[str, Any]:
    """Nothing is recorded: the program is executed."""
    return {}


def structure(entry: Path, signature: Signature, _checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature``; it says nothing about what it computes.

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``. Needs no runtime.
    """
    from edgebake_targets import _executorch_checks

    return _executorch_checks.structure(entry, signature)
