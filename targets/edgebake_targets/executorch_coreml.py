"""ExecuTorch with Core ML: .pte files for iPhones, iPads and Macs whose parts run on CPU, GPU or Neural Engine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgebake.errors import Problem, RecipeError
from edgebake.target import LowerRequest, Missing, Option, Support, unmet
from edgebake.types import Lowered, Signature, Traced, Verdict, rule_for
from edgebake_targets import _executorch, _executorch_coreml_llm, _executorch_llm
from edgebake_targets._coreml_rows import ALL, FP32, INT4, W8, add_states, encodings, grouped_palettes, palette

FORMAT = "pte"
DECODES = True
DEVICES = {"vendor": ("apple",)}
DISTRIBUTIONS = (*_executorch.DISTRIBUTIONS, "coremltools", "numpy", "protobuf")
SOURCES = _executorch.SOURCES

SUPPORTS = (
    FP32,
    Support(scheme="fp16", kinds=ALL, note="operators that Core ML does not take stay float32, outside"),
    Support(scheme="w8", kinds=ALL, note=W8),
    *INT4,
    *(Support(scheme=f"palette{bits}", kinds=ALL, note=palette(bits)) for bits in (2, 4, 6, 8)),
    *grouped_palettes(((4, 8), (4, 16), (4, 32))),
)

OPTIONS = (
    Option(
        name="minimum_os",
        default="iOS17",
        help="oldest system that has to load the parts; macOS13..macOS15 mean iOS16..iOS18, which came with them",
        choices=("iOS16", "iOS17", "iOS18", "macOS13", "macOS14", "macOS15"),
    ),
    Option(
        name="compute_precision",
        default="auto",
        help="what operators compute in; auto is fp32 for the scheme fp32 and fp16 otherwise",
        choices=("auto", "fp16", "fp32"),
    ),
    Option(
        name="compute_units",
        default="all",
        help="what ExecuTorch's runtime loads the parts with; kept in the file",
        choices=("all", "cpu_only", "cpu_and_gpu", "cpu_and_ne"),
    ),
)

_PACKAGES = {
    "torch": "torch>=2.13",
    "torchao": "torchao>=0.18",
    "executorch": "executorch>=1.4.1",
    "coremltools": "coremltools==9.0",
}
_LOGS = ("coremltools", "executorch.backends.apple.coreml")
refusals = _executorch_coreml_llm.refusals


def missing() -> Missing | None:
    """None when torch, torchao, executorch and coremltools are installed; it lowers on Linux and macOS."""
    return _executorch.missing_packages(_PACKAGES)


def lower(traced: Traced, request: LowerRequest) -> Lowered:
    """Write ``model.pte`` and ``weights.check.json``, against which ``structure`` holds its weights later.

    RecipeError for what the chosen system cannot hold; StageFailed, naming the modules, when a module that is to be
    compressed did not come out compressed in a Core ML part.
    """
    from edgebake_targets import _coreml_checks, _coreml_rewrites, _coreml_states, _executorch_coreml
    from edgebake_targets._coremltools import quiet

    request = _canonical(request)
    traced = _executorch_coreml_llm.stepwise(traced)
    _executorch.refuse_states(traced)
    system = str(request.options["minimum_os"])
    partitioner = _executorch_coreml.partitioner(request, traced.programs.values())
    with quiet(), _quiet_logs(), _coreml_rewrites.translations():
        programs = {method: _executorch_coreml.prepared(program) for method, program in traced.programs.items()}
        states = {method: _coreml_states.states_of(program, system) for method, program in programs.items()}
        metadata = _executorch_llm.metadata(traced.signature)
        edge = _executorch.to_edge(programs, (partitioner,), metadata)
        parts: dict[str, dict[str, Any]] = {}
        for method, program in traced.programs.items():
            weights, specs = _executorch_coreml.weights_of(program, request), traced.signature.methods[method]
            found = _executorch_coreml.rewrite_packages(edge, method, weights, specs, states[method], request)
            states[method] = {name: buffer for part in found.values() for name, buffer in part["states"].items()}
            parts |= found
    delegation = _executorch.delegation(edge, {}, "Core ML's converter does not take it")
    lowered = _executorch.emitted(edge, request, traced.signature, delegation, _encodings(request, states))
    checks = {"version": _coreml_checks.VERSION, "parts": parts}
    _coreml_checks.write_checks(request.folder / _coreml_checks.CHECKS_FILE, checks)
    notes = tuple(_coreml_states.coarse(traced.programs.values(), states))
    return replace(lowered, files=(*lowered.files, _coreml_checks.CHECKS_FILE), notes=notes)


def _canonical(request: LowerRequest) -> LowerRequest:
    """``request`` in the words of one generation of systems; RecipeError for what the system or the parts lack."""
    from edgebake_targets import _coreml_options

    problems = list(_refusals(request))
    if problems:
        raise RecipeError(problems)
    # Precision by module is what the parts lack: ExecuTorch hands the converter one for all operators.
    found = _coreml_options.canonical(replace(request, options={**request.options, "keep_float32": "", "chunk_mib": 0}))
    halves = request.assignment.of("fp16")
    if halves and _coreml_options.precision_of(found) == "fp32":
        raise RecipeError(
            f"{halves[0]} is to be float16 in a program that computes in float32, and ExecuTorch's Core ML parts have "
            "one precision",
            fix=f"leave the rule out: {rule_for(halves[0], 'fp32')}; or choose the scheme fp16; or the target coreml",
        )
    return found


def _refusals(request: LowerRequest) -> Iterator[Problem]:
    """Schemes that the system does not take, also when no recipe's check came before."""
    for row in SUPPORTS:
        if row.scheme in {request.scheme, *request.assignment.schemes.values()}:
            for what, fix in unmet("executorch-coreml", row, request.options):
                yield Problem(what=what, fix=fix)


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Keep back what the partitioner tells of every operator and every part; errors still show."""
    loggers = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict) if name.startswith(_LOGS)]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _encodings(request: LowerRequest, states: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    found = encodings(request, "weights of the Core ML parts that are not compressed")
    add_states(found, states)
    return found


def read_checks(folder: Path) -> Mapping[str, Any]:
    """What ``lower`` recorded in the artifact ``folder``: of the float weights, for ``structure``, and of modules."""
    from edgebake_targets import _coreml_checks

    return _coreml_checks.read_checks(folder / _coreml_checks.CHECKS_FILE)


def structure(entry: Path, signature: Signature, checks: Mapping[str, Any]) -> tuple[Verdict, ...]:
    """Hold the program ``entry`` against the promised ``signature`` and its Core ML weights against those recorded.

    Limits: ``structure.loads``, ``structure.inputs``, ``structure.outputs`` and, for each part, ``structure.weights``.
    Needs no training model and no Mac; it says nothing about what the program computes.
    """
    from edgebake_targets import _executorch_coreml_checks

    return _executorch_coreml_checks.structure(entry, signature, checks)
