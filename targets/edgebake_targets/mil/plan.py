"""A function made ready to be evaluated: constants set apart, operators looked up, last uses known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake_targets.mil.call import Operator, Unsupported
from edgebake_targets.mil.constants import Lazy
from edgebake_targets.mil.operators import operators
from edgebake_targets.mil.program import Binding, Block, Constant, Function, Operation

Source = str | Lazy  # the name of a value that is computed, or a constant

# Parameters that take a tuple even where it holds one value.
_TUPLES = frozenset({"loop_vars", "values"})


@dataclass(frozen=True, kw_only=True)
class Step:
    """One operation. ``frees``: values that nothing reads after it."""

    operation: Operation
    operator: Operator
    inputs: tuple[tuple[str, Source | tuple[Source, ...]], ...]
    declared: tuple[Any, ...]
    frees: tuple[str, ...]
    blocks: tuple[Plan, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a block, the names its inputs are known by, and what it returns."""

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Source, ...]


def plan_of(function: Function) -> Plan:
    """The plan of ``function``; Unsupported names every operator that cannot be evaluated, and how often it occurs."""
    known = operators()
    absent = Counter(op.operator for op in function.block.walk() if op.operator != "const" and op.operator not in known)
    if absent:
        listed = ", ".join(f"operator {name} ({count} times)" for name, count in sorted(absent.items()))
        raise Unsupported(f"{listed} cannot be interpreted")
    return _plan(function.block, {})


def _plan(block: Block, outside: Mapping[str, Lazy]) -> Plan:
    lazies = dict(outside)
    drafts = []
    for operation in block.operations:
        constants = _lazies(operation, lazies)
        if constants is not None:
            lazies |= {output.name: lazy for output, lazy in zip(operation.outputs, constants, strict=True)}
            continue
        drafts.append((operation, _inputs(operation, lazies), tuple(_plan(b, lazies) for b in operation.blocks)))
    outputs = tuple(lazies.get(name, name) for name in block.outputs)
    kept = {name for name in outputs if isinstance(name, str)}
    own = {value.name for value in block.inputs} | {out.name for op, _, _ in drafts for out in op.outputs}
    steps: list[Step] = []
    for operation, inputs, blocks in reversed(drafts):
        read = _read(inputs, blocks) | {output.name for output in operation.outputs}
        frees = (read & own) - kept
        kept |= read
        steps.append(
            Step(
                operation=operation,
                operator=operators()[operation.operator],
                inputs=inputs,
                declared=tuple(output.type for output in operation.outputs),
                frees=tuple(frees),
                blocks=blocks,
            )
        )
    return Plan(inputs=tuple(v.name for v in block.inputs), steps=tuple(reversed(steps)), outputs=outputs)


def _lazies(operation: Operation, lazies: Mapping[str, Lazy]) -> list[Lazy] | None:
    """The outputs of ``operation`` as constants; None when it depends on a value that is computed."""
    constant = operation.operator == "const"
    if not constant and not operation.operator.startswith("constexpr_"):
        return None
    if constant:
        if len(operation.outputs) != 1:
            raise ArtifactDamaged(f"the constant {operation.name} has {len(operation.outputs)} outputs")
        stored = operation.attributes.get("val")
        if stored is None:
            raise ArtifactDamaged(f"the constant {operation.name} has no value")
        if stored.payload is not None and stored.type != operation.outputs[0].type:
            raise ArtifactDamaged(f"the constant {operation.name} is declared as another type than its value's")
        return [Lazy(stored=stored)]
    parts: dict[str, tuple[Lazy, ...]] = {}
    for name, bound in _bound(operation):
        sources = tuple(_source(binding, lazies) for binding in bound)
        parts[name] = tuple(source for source in sources if isinstance(source, Lazy))
        if len(parts[name]) < len(sources):
            return None
    return [Lazy(operation=operation, parts=parts, output=number) for number in range(len(operation.outputs))]


def _bound(operation: Operation) -> list[tuple[str, tuple[Binding, ...]]]:
    stored: list[tuple[str, tuple[Binding, ...]]] = [(name, (held,)) for name, held in operation.attributes.items()]
    return [*stored, *operation.inputs.items()]


def _inputs(operation: Operation, lazies: Mapping[str, Lazy]) -> tuple[tuple[str, Source | tuple[Source, ...]], ...]:
    found: list[tuple[str, Source | tuple[Source, ...]]] = []
    for name, bound in _bound(operation):
        sources = tuple(_source(binding, lazies) for binding in bound)
        found.append((name, sources if len(sources) != 1 or name in _TUPLES else sources[0]))
    return tuple(found)


def _source(binding: Binding, lazies: Mapping[str, Lazy]) -> Source:
    return Lazy(stored=binding) if isinstance(binding, Constant) else lazies.get(binding, binding)


def _read(inputs: tuple[tuple[str, Source | tuple[Source, ...]], ...], blocks: tuple[Plan, ...]) -> set[str]:
    """Names that a step reads, those that its nested blocks read included."""
    flat = [s for _, source in inputs for s in (source if isinstance(source, tuple) else (source,))]
    read = {source for source in flat if isinstance(source, str)}
    for block in blocks:
        read |= {name for name in block.outputs if isinstance(name, str)}
        for step in block.steps:
            read |= _read(step.inputs, step.blocks)
    return read
