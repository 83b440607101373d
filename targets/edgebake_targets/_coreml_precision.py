"""What each operator computes in: the precision of the package, and another one for modules that are named."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from edgebake.errors import Problem, RecipeError
from edgebake.target import LowerRequest
from edgebake.types import Assignment, module_of_stack_entry
from edgebake_targets._coreml_options import ITSELF, kept_float32, precision_of
from edgebake_targets._coreml_weights import float_weights, locate

if TYPE_CHECKING:
    import torch

Origins = Mapping[int, str]  # mark of an operator of the torch program -> the innermost module that it belongs to


def mark(program: torch.export.ExportedProgram) -> dict[int, str]:
    """Mark each operator of ``program``, in place; the converter hands the mark on to what it makes of it."""
    modules = {}
    for number, node in enumerate(program.graph.nodes):
        if node.op == "call_function":
            node.meta["debug_handle"] = number
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            modules[number] = module_of_stack_entry(stack[-1]) if stack else ""
    return modules


def origin(operation: Any, origins: Origins) -> str:
    """The module that ``operation`` of a MIL program was made from; empty for what belongs to none."""
    from coremltools.converters.mil.mil.scope import ScopeSource

    marks = operation.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or [None]
    return origins.get(marks[0], "")


def inside(program: Any, origins: Origins) -> dict[str, str]:
    """The module that computes each value of the MIL ``program``, by the value's name."""
    found = {}
    for operation in program.functions["main"].operations:
        module = origin(operation, origins)
        if module and operation.op_type != "const":
            found.update({output.name: module for output in operation.outputs})
    return found


def kept_modules(program: torch.export.ExportedProgram, request: LowerRequest) -> list[str]:
    """Modules that the option ``keep_float32`` names; RecipeError for a glob that matches no module with operators."""
    names = _modules(program)
    globs = kept_float32(request)
    problems = [
        Problem(what=f"keep_float32: no module with operators matches {glob!r}", fix=_nearest(glob, names))
        for glob in globs
        if not any(_is_named(name, glob) for name in names)
    ]
    if problems:
        raise RecipeError(problems)
    return [name for name in names if any(_is_named(name, glob) for glob in globs)]


def _is_named(name: str, glob: str) -> bool:
    """A pattern is about modules; operators outside them are named by themselves alone."""
    return name == glob or (name != ITSELF and fnmatchcase(name, glob))


def _nearest(glob: str, names: list[str]) -> str:
    near = get_close_matches(glob, names, 1) or names[:1]
    return f"name one with an operator of its own, such as {near[0]!r}" if near else "leave keep_float32 out"


def _modules(program: torch.export.ExportedProgram) -> list[str]:
    nodes = (node for node in program.graph.nodes if node.op == "call_function")
    stacks = (list((node.meta.get("nn_module_stack") or {}).values()) for node in nodes)
    return sorted({(module_of_stack_entry(stack[-1]) if stack else "") or ITSELF for stack in stacks})


def precision(
    ct: Any, program: torch.export.ExportedProgram, request: LowerRequest, origins: Origins, kept: Iterable[str]
) -> Any:
    """coremltools' precision; for modules that compute in another one, a choice by operator."""
    half = precision_of(request) == "fp16"
    apart = frozenset(kept)
    weights = float_weights(program, _apart(request.assignment, "fp32" if half else "fp16", apart), apart)
    if not weights and not apart:
        return ct.precision.FLOAT16 if half else ct.precision.FLOAT32
    return ct.transform.FP16ComputePrecision(op_selector=_selector(half, weights, origins, apart))


def _selector(half: bool, weights: Any, origins: Origins, apart: frozenset[str]) -> Callable[[Any], bool]:
    """Whether an operator computes in float16. A weight tells a convolution that took in its normalisation."""

    def selected(operation: Any) -> bool:
        weight = operation.inputs.get("x" if operation.op_type == "gather" else "weight")
        constant = getattr(weight, "op", None)
        differs = constant is not None and constant.op_type == "const" and bool(locate([constant], weights)[0])
        return half != (differs or (origin(operation, origins) or ITSELF) in apart)

    return selected


def _apart(assignment: Assignment, scheme: str, kept: frozenset[str]) -> Assignment:
    ruled = {module: s for module, s in assignment.schemes.items() if s == scheme}
    return replace(assignment, schemes={**ruled, **dict.fromkeys(sorted(kept), scheme)})
