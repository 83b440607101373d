"""The weights of a Core AI program: which constants belong together, in which format, and what they decode to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake_targets._coreai_program import Program, Stored, array_of, stored_of, walk

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Operators that only unpack constants, and which operand of theirs holds one entry per weight.
_UNPACKING = ("coreai.blockwise_shift_scale", "coreai.lut_to_dense", "coreai.sparse_to_dense")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight as the network uses it: ``main`` holds an entry per value, ``others`` scales, offsets and tables.

    ``operation`` unpacks them; None for a weight that is stored as it is. ``program`` is kept alive: Core AI ends the
    process when something of a program is used that is gone.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    main: Stored
    others: tuple[Stored, ...]
    operation: Any
    stored: Mapping[Any, Stored]
    program: Program


def weights_of(program: Program) -> tuple[Weight, ...]:
    """Compressed weights, then large constants that are stored as they are; the small rest is graph."""
    stored = stored_of(program)
    found: list[Weight] = []
    used: set[str] = set()
    for operation in walk(program.module.operation):
        if operation.name in _UNPACKING and not _unpacked_again(operation):
            leaves = [stored[value] for value in _leaves(operation, stored)]
            used.update(leaf.name for leaf in leaves)
            if leaves:
                found.append(_compressed(program, operation, leaves, stored))
    rest = {s.name: s for s in stored.values() if s.blob is not None and s.name not in used}
    plain = [
        Weight(
            name=s.name,
            shape=s.shape,
            format=s.dtype,
            main=s,
            others=(),
            operation=None,
            stored=stored,
            program=program,
        )
        for s in rest.values()
    ]
    return (*found, *plain)


def _unpacked_again(operation: Any) -> bool:
    """Whether another such operator alone takes the result: it is that one's weight."""
    users = [use.owner.operation if hasattr(use.owner, "operation") else use.owner for use in operation.results[0].uses]
    return len(users) == 1 and users[0].name in _UNPACKING


def _leaves(operation: Any, stored: Mapping[Any, Stored]) -> Iterator[Any]:
    """Values of constants below ``operation``, the one with an entry per weight first."""
    for value in operation.operands:
        if value in stored:
            yield value
        elif (inner := _owner(value)) is not None and inner.name in _UNPACKING:
            yield from _leaves(inner, stored)


def _owner(value: Any) -> Any:
    """The operation that gives ``value``; None for an argument of a function."""
    owner = value.owner
    operation = getattr(owner, "operation", owner)
    return operation if hasattr(operation, "operands") else None


def _compressed(program: Program, operation: Any, leaves: list[Stored], stored: Mapping[Any, Stored]) -> Weight:
    main, *others = leaves
    innermost = operation
    while (inner := _owner(innermost.operands[0])) is not None and inner.name in _UNPACKING:
        innermost = inner
    shape = tuple(innermost.operands[0].type.shape)
    kind = {"coreai.lut_to_dense": f"palette{main.bits}", "coreai.sparse_to_dense": f"sparse-{main.dtype}"}
    return Weight(
        name=main.name,
        shape=shape,
        format=kind.get(innermost.name, main.dtype),
        main=main,
        others=tuple(others),
        operation=operation,
        stored=stored,
        program=program,
    )


def decode(weight: Weight) -> NDArray[np.float32] | None:
    """The values that the network sees, as float32; None for a format that is not decoded here."""
    import numpy as np

    values = array_of(weight.main) if weight.operation is None else _evaluated(weight.operation, weight.stored)
    return None if values is None else np.asarray(values, np.float32)


def _evaluated(operation: Any, stored: Mapping[Any, Stored]) -> NDArray[Any] | None:
    operands = [_operand(value, stored) for value in operation.operands]
    if any(operand is None for operand in operands):
        return None
    if operation.name == "coreai.blockwise_shift_scale":
        return _shifted(*operands)
    return _looked_up(*operands[:2]) if operation.name == "coreai.lut_to_dense" else None


def _operand(value: Any, stored: Mapping[Any, Stored]) -> NDArray[Any] | None:
    if value in stored:
        return array_of(stored[value])
    inner = _owner(value)
    return _evaluated(inner, stored) if inner is not None and inner.name in _UNPACKING else None


def _shifted(data: Any, scale: Any, shift: Any, offset: Any) -> NDArray[Any]:
    """``(data - shift) * scale + offset``; the last three have one value per block, in the type of ``scale``."""
    dtype = scale.dtype
    exact = data.astype(dtype) - _spread(shift, data.shape).astype(dtype)
    values: NDArray[Any] = exact * _spread(scale, data.shape) + _spread(offset, data.shape).astype(dtype)
    return values


def _looked_up(indices: Any, tables: Any) -> NDArray[Any] | None:
    """Each value from the table of its block; tables have the shape (blocks along each axis, entries, 1)."""
    import numpy as np

    if tables.shape[-1] != 1:
        return None  # entries of several values
    counts = tables.shape[:-2]
    flat = tables.reshape(-1, tables.shape[-2])
    which = _spread(np.arange(len(flat)).reshape(counts), indices.shape)
    return np.asarray(flat[which, indices])


def _spread(values: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """``values``, one per block, repeated to ``shape``."""
    import numpy as np

    for axis, (size, count) in enumerate(zip(shape, values.shape, strict=True)):
        values = np.repeat(values, size // count, axis) if size != count else values
    return np.asarray(values)
