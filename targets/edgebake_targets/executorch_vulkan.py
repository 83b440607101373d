"""ExecuTorch with Vulkan: .pte files for the GPUs of Android phones (Adreno, Mali, Immortalis, Xclipse)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgebake.errors import StageFailed
from edgebake.target import LowerRequest, Missing, Option, Support
from edgebake.types import Assignment, Lowered, ModuleKind, Signature, Traced, Verdict
from edgebake_targets import _executorch, _vulkan

FORMAT = "pte"
DEVICES = {"platform": ("android",)}
DISTRIBUTIONS = _executorch.DISTRIBUTIONS
SOURCES = (*_executorch.SOURCES, "edgebake_targets._vulkan")

_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")
_TABLES: tuple[ModuleKind, ...] = ("linear", "embedding")

SUPPORTS = (
    Support(scheme="fp32", kinds=_ALL, note="GPUs may compute it at lower precision"),
    Support(
        scheme="fp16",
        kinds=_ALL,
        note="the whole network or nothing: every float value on the GPU is float16, normalisations too; values beyond "
        "65504 are clamped",
    ),
    Support(
        scheme="w8",
        kinds=("linear",),
        method="quantize_weights",
        note="int8 per channel. Vulkan has no kernel with int8 weights and activations of run-time scales (w8a8d): "
        "ExecuTorch 1.4 delegates it, and the app ends when it loads it",
    ),
    Support(
        scheme="w4",
        kinds=("linear",),
        method="quantize_weights",
        note="int4 per channel; input features must be divisible by 8, output features by 4, and a batch must be 1",
    ),
    *(
        Support(
            scheme=f"w4g{group}",
            kinds=_TABLES,
            method="quantize_weights",
            note=f"int4 in groups of {group}; input features must be divisible by {group}; of linear layers, output "
            "features by 4, and a batch must be 1",
        )
        for group in (32, 64, 128)
    ),
)
OPTIONS = (
    Option(
        name="floats",
        default="float32",
        help="what the GPU computes in; float16 holds for every float value of the network, whatever the scheme",
        choices=("float32", "float16"),
    ),
)

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}


def missing() -> Missing | None:
    """None when torch, torchao and executorch are installed."""
    return _executorch.missing_packages(_PACKAGES)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program; StageFailed for what a phone would refuse to load."""
    from edgebake_targets import _executorch_checks

    _executorch.refuse_writes(traced, "Vulkan loses such writes")  # each call finds what was there at first
    half = _is_half(request)
    with _vulkan.quietly() as reasons:
        programs = {method: _vulkan.per_channel_linears(program) for method, program in traced.programs.items()}
        if problems := [problem for each in programs.items() for problem in _vulkan.refused_linears(*each)]:
            raise StageFailed(problems)
        edge = _executorch.to_edge(programs, (_vulkan.partitioner({"force_fp16": half}),))
        delegation = _executorch.delegation(edge, _vulkan.reasons_by_node(edge, reasons), "Vulkan has no such operator")
        program = _executorch.to_executorch(edge, fuse_quantised=False)
    entry = _executorch.write(program, request.folder)
    planned = _executorch.planned_memory(program)
    del edge, program
    _refuse_unloadable(request)
    _executorch_checks.refuse_lost_integers(
        request,
        traced,
        fix="Vulkan takes integer weights of linear layers and, in groups, of embeddings: give these modules fp32",
    )
    return Lowered(
        files=(entry,),
        entry=entry,
        signature=traced.signature,
        delegation=delegation,
        planned_memory_bytes=planned,
        encodings={"schemes": request.assignment.by_scheme(), "floats": "float16" if half else "float32"},
    )


def _is_half(request: LowerRequest) -> bool:
    """Whether the whole network computes in float16; StageFailed when the rules ask for a part of it."""
    if request.options["floats"] == "float16":
        return True
    halves, kept = request.assignment.of("fp16"), _floats(request.assignment)
    if halves and kept:
        raise StageFailed(
            f"{kept[0]} is kept in float32 and {halves[0]} is to be float16, and Vulkan computes a whole network in "
            "one of the two",
            where="lower",
            fix=f"drop the rule that keeps {kept[0]}, or give the float modules fp32",
        )
    return bool(halves)


def _floats(assignment: Assignment) -> list[str]:
    return sorted(set(assignment.kinds) - set(assignment.schemes))


def _refuse_unloadable(request: LowerRequest) -> None:
    """StageFailed naming delegated operators that no Vulkan runtime has: an app that loads them ends."""
    from edgebake_targets.inspectors import pte

    found = pte.inspect(request.folder / _executorch.ARTIFACT).facts["delegate_operators"]
    absent = sorted(set(found) & _vulkan.UNFUSED)
    if absent:
        raise StageFailed(
            f"ExecuTorch delegated operators that its Vulkan runtime lacks: {', '.join(absent)}",
            where="lower",
            fix="give the quantised modules another scheme: Vulkan takes integer weights that only linear layers read, "
            "and int4 ones that only embeddings read",
        )


def read_checks(_folder: Path) -> Mapping[str, Any]:
    """Nothing is recorded beside the program: ``lower`` refuses weights that are not as promised."""
    return {}


def structure(entry: Path, signature: Signature, _checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature``; it says nothing about what it computes.

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``. Needs no phone.
    """
    from edgebake_targets import _executorch_checks

    return _executorch_checks.structure(entry, signature)
