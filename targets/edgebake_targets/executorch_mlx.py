"""ExecuTorch with MLX: .pte files for the GPU of Macs with Apple silicon."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgebake.target import LowerRequest, Missing, Option, Support
from edgebake.types import Lowered, ModuleKind, Signature, Traced, Verdict
from edgebake_targets import _executorch, _executorch_llm, _mlx

FORMAT = "pte"
DEVICES = {"vendor": ("apple",)}
DISTRIBUTIONS = (*_executorch.DISTRIBUTIONS, "flatbuffers")
DECODES = True
SOURCES = (*_executorch.SOURCES, *(f"edgebake_targets.{name}" for name in ("_mlx", "_mlx_llm", "_mlx_weights")))

_ALL: tuple[ModuleKind, ...] = ("linear", "conv", "embedding")
_INTEGER: tuple[ModuleKind, ...] = ("linear", "embedding")

SUPPORTS = (
    Support(scheme="fp32", kinds=_ALL, note="runs on Macs with Apple silicon only"),
    Support(scheme="fp16", kinds=_ALL, method="cast", note="normalisations stay float32"),
    Support(
        scheme="w8",
        kinds=_INTEGER,
        method="quantize_weights",
        note="int8 per row, its scale repeated for each 128, 64 or 32 input features, which must be divisible by 32",
    ),
    *(
        Support(
            scheme=f"w4g{group}",
            kinds=_INTEGER,
            method="quantize_weights",
            note=f"int4 in groups of {group}; input features must be divisible by {group}",
        )
        for group in (32, 64, 128)
    ),
)
OPTIONS: tuple[Option, ...] = ()

_PACKAGES = {"torch": "torch>=2.13", "torchao": "torchao>=0.18", "executorch": "executorch>=1.4.1"}


def missing() -> Missing | None:
    """None when torch, torchao and an executorch with its MLX backend are installed; it lowers on Linux and macOS."""
    absent = _executorch.missing_packages(_PACKAGES)
    if absent is not None:
        return absent
    folder = _mlx.installed()
    if folder is None:
        return Missing(reason="the executorch wheel holds no MLX backend", remedy=_mlx.FIX)
    if not _mlx.is_whole(folder) and _mlx.compiler(folder) is None:
        return Missing(reason="flatc, which completes the MLX backend, is not installed", remedy=_mlx.FIX)
    return None


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` with one method per program; StageFailed for weights that stayed float or changed."""
    from edgebake_targets import _executorch_checks, _mlx_llm, _mlx_weights

    _mlx.prepare()
    traced = _mlx_llm.with_own_operators(traced)
    _executorch.refuse_states(traced)
    with _quiet():
        from executorch.backends.mlx import MLXPartitioner

        # Copies: the backend takes constants out of the program that it is given, to hold each only once.
        programs = {method: program.run_decompositions({}) for method, program in traced.programs.items()}
        metadata = _executorch_llm.metadata(traced.signature)
        edge = _executorch.to_edge(programs, (MLXPartitioner(),), metadata, _mlx.passes())
    delegation = _executorch.delegation(edge, {}, "MLX's backend has no such operator")
    encodings = {"schemes": request.assignment.by_scheme()}
    lowered = _executorch.emitted(edge, request, traced.signature, delegation, encodings)
    del edge
    _executorch_checks.refuse_lost_integers(
        request,
        traced,
        fix="MLX takes integer weights whose input features are divisible by 32: give these modules fp16",
    )
    _mlx_weights.refuse_changed(request.folder / lowered.entry, traced)
    return lowered


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the partitioner prints of every operator; warnings still show.

    The backend sets its logger up when it is imported, so the import comes first.
    """
    import executorch.backends.mlx  # noqa: F401

    log = logging.getLogger("executorch.backends.mlx")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(level)


def read_checks(_folder: Path) -> Mapping[str, Any]:
    """Nothing is recorded beside the program: ``lower`` refuses weights that are not as promised."""
    return {}


def structure(entry: Path, signature: Signature, _checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature``; it says nothing about what it computes.

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs``. Needs no Mac.
    """
    from edgebake_targets import _executorch_checks

    return _executorch_checks.structure(entry, signature)
