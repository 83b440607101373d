"""ExecuTorch with VGF: .pte files for neural accelerators in Arm's GPUs, through TOSA and Vulkan's ML extensions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Lowered, ModuleKind, Signature, Traced, Verdict
from edgebake_targets import _arm, _executorch, _vgf

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

FORMAT = "pte"
DEVICES = {"platform": ("android",), "vendor": ("google", "mediatek")}  # who build Arm's GPUs into their chips
DISTRIBUTIONS = (*_executorch.DISTRIBUTIONS, *_vgf.VERSIONS)
SOURCES = (*_executorch.SOURCES, *(f"edgebake_targets.{name}" for name in ("_arm", "_tosa", "_vgf")))

_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")
_LOADS = (
    "only systems whose Vulkan driver has VK_ARM_tensors and VK_ARM_data_graph load the file; of the listed devices "
    "none is known to"
)

SUPPORTS = (
    Support(scheme="fp32", kinds=_ALL, note=_LOADS),
    Support(
        scheme="fp16",
        kinds=_ALL,
        method="cast",
        note=f"half precision; inputs and outputs are cast by ExecuTorch's kernels; {_LOADS}",
    ),
    Support(
        scheme="w8a8",
        kinds=("linear", "conv"),
        method="pt2e",
        note=f"int8 per channel, activation ranges from calibration; {_LOADS}",
    ),
)
OPTIONS: tuple[Option, ...] = ()

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}


def missing() -> Missing | None:
    """None when ExecuTorch and Arm's packages are installed."""
    return _executorch.missing_packages(_PACKAGES) or _vgf.missing()


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no weight needs to be read for: fixed shapes."""
    for name in asked.varying:
        fix = f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}"
        yield Refusal(what=f"VGF takes fixed shapes only, and {name!r} varies", fix=fix, key="dims")


def quantizer(request: LowerRequest) -> Quantizer:
    """Arm's PT2E quantizer for ``request.assignment``."""
    return _vgf.quantizer(request.assignment)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program, and beside it the TOSA graph of each of its VGF parts.

    StageFailed when VGF takes no operator, or an assigned module's weights stayed float.
    """
    _executorch.refuse_writes(traced, "VGF keeps nothing between calls")
    with _vgf.kept_parts(request.folder) as graphs, _arm.told_reasons() as reasons:
        edge = _executorch.to_edge(traced.programs, (_vgf.partitioner(),))
    delegation = _executorch.delegation(edge, reasons, "Arm's TOSA backend does not take this operator")
    if not delegation.partitions:
        names = ", ".join(row.op for row in delegation.left_out)
        raise StageFailed(
            f"Arm's TOSA backend takes none of the network's operators: {names}",
            where="lower",
            fix="build this network for executorch-vulkan or executorch-xnnpack",
        )
    program = _executorch.to_executorch(edge, fuse_quantised=False)
    entry = _executorch.write(program, request.folder)
    _arm.refuse_lost_integers(traced, request, graphs)
    return Lowered(
        files=(entry, *sorted(set(graphs))),
        entry=entry,
        signature=traced.signature,
        delegation=delegation,
        planned_memory_bytes=_executorch.planned_memory(program),
        encodings={"schemes": request.assignment.by_scheme(), "tosa_graphs": len(set(graphs))},
    )


def read_checks(_folder: Path) -> Mapping[str, Any]:
    """Nothing is recorded but the TOSA graphs, which the runner holds against the program's parts."""
    return {}


def structure(entry: Path, signature: Signature, _checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature``; it says nothing about what it computes.

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``. Needs no phone.
    """
    from edgebake_targets import _executorch_checks

    return _executorch_checks.structure(entry, signature)
