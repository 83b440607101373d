"""The ``coreai`` target: a Core AI model (.aimodel) for iPhones, iPads and Macs from system 27 on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgebake.target import LowerRequest, Missing, Option, Support
from edgebake.types import Delegation, Lowered, ModuleKind, Signature, Traced, Verdict
from edgebake_targets import _coreai_packages

_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")
_FLOAT = "activations stay float32"

SUPPORTS = (
    Support(scheme="fp32", kinds=_ALL, note="this and all others: from iOS 27, macOS 27"),
    Support(
        scheme="fp16",
        kinds=_ALL,
        method="cast",
        note="normalisations compute in float32, inputs and outputs stay float32",
    ),
    Support(scheme="w8", kinds=_ALL, note=f"int8, one scale per output channel; {_FLOAT}"),
    Support(scheme="w4", kinds=_ALL, note=f"int4, one scale per output channel; {_FLOAT}"),
    *(
        Support(
            scheme=f"w4g{group}",
            kinds=_ALL,
            note=f"int4, one scale per output channel and {group} input channels, which must be divisible by {group}; "
            + _FLOAT,
        )
        for group in (16, 32, 64, 128)
    ),
    *(
        Support(scheme=f"palette{bits}", kinds=_ALL, note=f"one table of {2**bits} values per weight; {_FLOAT}")
        for bits in (1, 2, 4, 6, 8)
    ),
    *(
        Support(
            scheme=f"palette{bits}g{group}",
            kinds=_ALL,
            note=f"one table of {2**bits} values per {group} output channels, which must be divisible by {group}; "
            + _FLOAT,
        )
        for bits, group in ((2, 16), (4, 8), (4, 16), (4, 32), (6, 16))
    ),
)

OPTIONS = (
    Option(name="author", default="", help="metadata"),
    Option(name="description", default="", help="metadata; the recipe's description where this is empty"),
    Option(name="licence", default="", help="metadata; the model's licence where this is empty"),
)

CARRIES_ABOUT = True
DEVICES = {"vendor": ("apple",)}

FORMAT = "aimodel"
DEVICES = {"vendor": ("apple",)}
DISTRIBUTIONS = ("coreai-core", "coreai-torch", "coremltools", "torch", "numpy")
SOURCES = (
    "edgebake_targets._coreai",
    "edgebake_targets._coreai_asset",
    "edgebake_targets._coreai_checks",
    "edgebake_targets._coreai_compress",
    "edgebake_targets._coreai_constants",
    "edgebake_targets._coreai_packages",
    "edgebake_targets._coreai_program",
    "edgebake_targets._coreml_compress",
    "edgebake_targets._coreml_schemes",
    "edgebake_targets._coreml_weights",
    "edgebake_targets._coremltools",
    "edgebake_targets._weight_record",
)

_PACKAGES = {"coreai": "coreai-core", "coreai_torch": "coreai-torch", "coremltools": "coremltools"}


def missing() -> Missing | None:
    """None when Core AI's packages are installed, and coremltools, whose k-means the palettes come from."""
    return _coreai_packages.missing(_PACKAGES)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.aimodel`` and ``weights.check.json``, against which ``structure`` holds the weights later.

    StageFailed when the converter refuses the network, naming what it says, and for each module that is to be
    compressed and did not come out compressed.
    """
    from edgebake_targets import _coreai, _coreai_checks

    for method in traced.signature.methods.values():
        _coreai.check_names(method)
    methods = {name: _coreai.lowered_specs(method) for name, method in traced.signature.methods.items()}
    converted = _coreai.convert(traced, request)
    program = _coreai.write(converted, request, request.folder / "model.aimodel")
    _coreai_checks.write_checks(request.folder, _coreai_checks.record(program, converted.weights))
    return Lowered(
        files=("model.aimodel", _coreai_checks.CHECKS_FILE),
        entry="model.aimodel",
        signature=replace(traced.signature, methods=methods),
        delegation=Delegation(share=None, reason="which unit computes what is decided on the device"),
        encodings={"schemes": request.assignment.by_scheme()},
    )


def read_checks(folder: Path) -> Mapping[str, Any]:
    """What ``lower`` recorded of the weights in the artifact ``folder``."""
    from edgebake_targets import _coreai_checks

    return _coreai_checks.read_checks(folder)


def structure(entry: Path, signature: Signature, checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the asset ``entry`` against the promised ``signature`` and the recorded weights (``read_checks``).

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``, ``structure.weights``.
    """
    from edgebake_targets import _coreai_checks

    return _coreai_checks.structure(entry, signature, checks)
