"""Which value of a package each module of the network hands on: recorded when it is written, to find errors inside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from edgebake.types import MethodSignature, module_of_stack_entry

if TYPE_CHECKING:
    import torch

# Operators that hand on what they are given (``getitem``: out of several results); the converter drops their names.
_SAME = re.compile(r"aten\.(alias|clone|contiguous|detach|dropout|_to_copy|lift_fresh_copy)\.|.*getitem")


def handed_on(program: torch.export.ExportedProgram, method: MethodSignature) -> dict[str, list[str]]:
    """For each module, names of the value that it hands to the rest of ``program``, the most likely one first."""
    graph: Any = program.graph
    modules = {node: _modules(node) for node in graph.nodes if node.op == "call_function"}
    handed: dict[str, torch.fx.Node] = {}
    for node, inside in modules.items():
        for module in inside:
            if any(module not in modules.get(user, ()) for user in node.users):
                handed[module] = node
    outputs = _outputs(program, method)
    return {module: list(_names(node, outputs)) for module, node in handed.items()}


def _modules(node: torch.fx.Node) -> set[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return {path for entry in stack.values() if (path := module_of_stack_entry(entry))}


def _outputs(program: torch.export.ExportedProgram, method: MethodSignature) -> dict[str, str]:
    """Name of the node -> name of the output that it is."""
    return dict(zip(program.graph_signature.user_outputs, (spec.name for spec in method.outputs), strict=False))


def _names(node: torch.fx.Node, outputs: Mapping[str, str]) -> Iterable[str]:
    while True:
        if node.name in outputs:
            yield outputs[node.name]
        yield node.name
        source = node.args[0] if node.args and _SAME.match(str(node.target)) else None
        if not hasattr(source, "users") or isinstance(source, str):
            return
        node = source  # type: ignore[assignment]


def stem(value: str) -> str:
    """The name of a value before the converter changed its precision."""
    return re.sub(r"(_cast_[a-z]+\d+)+$", "", value)


def found_among(values: Iterable[str], wanted: Mapping[str, list[str]]) -> dict[str, str]:
    """The value of the package for each module; modules whose value the converter fused away are absent.

    The converter writes a first ``linear`` as ``linear_0`` and appends ``_cast_fp16`` where it changes the precision.
    """
    stems: dict[str, str] = {}
    for value in values:
        stems[stem(value)] = value
    found = {}
    for module, names in sorted(wanted.items()):
        place = next((stems[n] for name in names for n in (name, f"{name}_0") if n in stems), None)
        if place is not None:
            found[module] = place
    return found
