"""ExecuTorch with NeuroPilot: .pte files for the NPU of MediaTek's Dimensity chips, one file for one chip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake.scheme import parse
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Lowered, ModuleKind, Signature, Traced, Verdict
from edgebake_targets import _executorch, _mediatek

if TYPE_CHECKING:
    from torchao.quantization.pt2e.quantizer import Quantizer

FORMAT = "pte"
DEVICES = {"vendor": ("mediatek",), "npu": _mediatek.NPUS, "platform": ()}  # one file for one chip
DISTRIBUTIONS = (*_executorch.DISTRIBUTIONS, *_mediatek.VERSIONS)
SOURCES = (*_executorch.SOURCES, "edgebake_targets._mediatek")

_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")

SUPPORTS = (
    Support(
        scheme="fp16",
        kinds=_ALL,
        note="MediaTek's compiler lets float networks compute in half precision (--relax-fp32); needs no calibration",
    ),
    Support(
        scheme="w8a16",
        kinds=_ALL,
        method="pt2e",
        note="int8 weights per channel, 16-bit activations and tables",
    ),
    Support(
        scheme="w8a8",
        kinds=_ALL,
        method="pt2e",
        note="everything in 8 bits: convolutional networks; attention loses too much, take w8a16",
    ),
    Support(
        scheme="w4a16",
        kinds=("linear", "conv"),
        method="pt2e",
        note="int4 weights per channel, 16-bit activations; without training only where much may be lost",
    ),
)
OPTIONS: tuple[Option, ...] = ()

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}
_SHARED = "model"  # the key of the weights that several methods share in one file


def missing() -> Missing | None:
    """None when ExecuTorch and MediaTek's NeuroPilot packages are installed."""
    return _executorch.missing_packages(_PACKAGES) or _mediatek.missing()


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no weight needs to be read for: fixed shapes, one integer scheme."""
    for name in asked.varying:
        fix = f"give it one size in this rule: dims: {{{name}: {{min: 64, max: 64}}}}"
        yield Refusal(what=f"the NPU takes fixed shapes only, and {name!r} varies", fix=fix, key="dims")
    for scheme in asked.module_schemes:
        if scheme != asked.scheme and parse(scheme).family == "integer" and parse(asked.scheme).family == "integer":
            what = f"{scheme} in a network of {asked.scheme}: NeuroPilot's quantizer takes one integer scheme"
            yield Refusal(what=what, fix=f"beside {asked.scheme}, modules take fp16", key="modules")


def quantizer(request: LowerRequest) -> Quantizer:
    """NeuroPilot's PT2E quantizer for the integer scheme of ``request.assignment``."""
    return _mediatek.quantizer(request.assignment)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program, compiled for ``request.device``; methods share their weights."""
    _executorch.refuse_states(traced)
    device: Mapping[str, Any] = request.device or {}
    options = {"ExtractSharedBlobKey": _SHARED} if len(traced.programs) > 1 else {}
    with redirect_stdout(StringIO()):  # the partitioner prints each operator that it is told to skip
        edge = _executorch.to_edge(traced.programs, (_mediatek.partitioner(str(device["name"]), options),))
    delegation = _executorch.delegation(edge, {}, "MediaTek's converter does not take this operator")
    if not delegation.partitions:
        raise StageFailed(
            "MediaTek's converter took no operator of the network",
            where="lower",
            fix="choose executorch-xnnpack or executorch-vulkan for this network, or rewrite what is listed as outside",
        )
    program = _executorch.to_executorch(edge, fuse_quantised=False)
    entry = _executorch.write(program, request.folder)
    return Lowered(
        files=(entry,),
        entry=entry,
        signature=traced.signature,
        delegation=delegation,
        planned_memory_bytes=_executorch.planned_memory(program),
        encodings={"schemes": request.assignment.by_scheme(), "platform": device["name"]},
    )


def read_checks(_folder: Path) -> Mapping[str, Any]:
    """Nothing is recorded beside the program: its NPU part is MediaTek's own format."""
    return {}


def structure(entry: Path, signature: Signature, _checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature``; it says nothing about what it computes.

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``. Needs no phone.
    """
    from edgebake_targets import _executorch_checks

    return _executorch_checks.structure(entry, signature)
