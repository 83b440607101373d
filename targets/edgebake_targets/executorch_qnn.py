"""ExecuTorch on Qualcomm's NPU (Snapdragon, HTP): a .pte with a context binary for one chip."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from edgebake.errors import StageFailed
from edgebake.target import Asked, LowerRequest, Missing, Option, Refusal, Support
from edgebake.types import Lowered, ModuleKind, Traced
from edgebake_targets import _executorch, _htp, _qnn_toolchain, _ranges
from edgebake_targets._decoders import decodes
from edgebake_targets._wide import SEARCH

FORMAT = "pte"
DECODES = True
DISTRIBUTIONS = _executorch.DISTRIBUTIONS
SOURCES = (
    *_executorch.SOURCES,
    *(f"edgebake_targets.{name}" for name in ("_htp", "_observers", "_ranges", "_wide")),
    *(
        f"edgebake_targets._qnn_{part}"
        for part in ("decoder", "graph", "lowerer", "lowering", "norms", "quantizer", "reasons", "toolchain", "wide")
    ),
)
# QNN's numbers of the chips that ExecuTorch 1.4.1 compiles for (QcomChipset in its qc_schema.py).
CHIPS = (30, 36, 39, 42, 43, 45, 46, 52, 53, 57, 58, 69, 72, 75, 77, 87, 93, 95, 96, 97)
DEVICES = {"vendor": ("qualcomm",), "soc_model": CHIPS, "htp_arch": ()}
_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")

SUPPORTS = (
    _htp.FP16,
    Support(
        scheme="w8a16",
        kinds=_ALL,
        note="int8 weights per channel, tables of 16 bits, 16-bit activations",
    ),
    Support(
        scheme="w8a8",
        kinds=_ALL,
        note="everything in 8 bits but what wide_activations names or finds; attention loses too much, take w8a16",
    ),
    _htp.W4A16,
)

OPTIONS = (
    Option(
        name="activation_range",
        default="auto",
        help="how calibration chooses an activation's range; minmax keeps outliers, histogram is torchao's and trims "
        "them; auto: minmax where activations have 16 bits, levels enough for both",
        choices=("auto", "histogram", *_ranges.METHODS),
    ),
    _ranges.PERCENTILE,
    _htp.WIDE,
    Option(
        name="share_weights",
        default=False,
        help="equal weights of a component's methods lie in the binary once; outputs of such a binary are not measured "
        "here, since the vendor's libraries load it on phones only",
    ),
)

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}
fix = _qnn_toolchain.fix
versions = _qnn_toolchain.versions


def missing() -> Missing | None:
    """None when executorch and Qualcomm's libraries, private or the user's, are here."""
    return _executorch.missing_packages(_PACKAGES) or _qnn_toolchain.missing()


def refusals(asked: Asked) -> Iterator[Refusal]:
    """What no weight needs to be read for: fixed shapes, one width of activations, a percentile, nothing to share."""
    if not decodes(asked):  # whose lengths lowering fixes
        yield from _htp.refused_shapes(asked)
    elif asked.options["wide_activations"] == SEARCH:
        what = "wide_activations: auto would keep the caches behind every calibration token, which no memory holds"
        yield Refusal(what=what, fix="name modules, or scheme: w8a16", key="options.wide_activations")
    yield from _htp.refused_sharing(asked)
    yield from _ranges.refused(asked)
    yield from _htp.refused_widths(asked, SUPPORTS)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """``model.pte`` with a context binary for ``request.device``, which holds a graph for each method.

    A decoder takes one token a call.
    StageFailed when the NPU takes nothing, or different numbers of parts of the methods.
    """
    from edgebake_targets import _qnn_decoder
    from edgebake_targets._qnn_lowering import lowered

    device: Mapping[str, Any] = request.device or {}
    traced = _qnn_decoder.stepwise(traced)
    _executorch.refuse_writes(traced, "executorch-qnn keeps nothing between calls")
    if request.options["share_weights"]:
        _htp.refuse_sharing_alone(traced.programs)
    written = lowered(traced, request, int(device["soc_model"]))
    if not written.delegation.partitions:
        names = ", ".join(f"{row.op} ({row.reason})" for row in written.delegation.left_out)
        raise StageFailed(
            f"the NPU of {device['name']} takes none of the network's operators: {names}",
            where="lower",
            fix="build this network for executorch-xnnpack",
        )
    return Lowered(
        files=(_executorch.ARTIFACT,),
        entry=_executorch.ARTIFACT,
        signature=traced.signature,
        delegation=written.delegation,
        planned_memory_bytes=written.planned,
        encodings={
            "schemes": request.assignment.by_scheme(),
            **({"shared": written.shared} if written.shared else {}),
            "runtime": {
                "written_by": _qnn_toolchain.versions()["qnn"],
                "device": str(device["name"]),
                "soc_model": str(device["soc_model"]),
            },
        },
        notes=written.notes,
    )
