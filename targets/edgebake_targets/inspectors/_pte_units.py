"""Which backend runs how many parts of an ExecuTorch program, and what passes between the parts.

Kernels and delegates are called with the numbers of values; a value that the program neither holds nor is given is
written by the first call that names it (executorch/schema/program.fbs: KernelCall, DelegateCall).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from edgebake.types import UnitWork
from edgebake_targets._units import EXECUTORCH_KERNELS, UNIT_OF, UNKNOWN, border_bytes
from edgebake_targets.inspectors._flatbuffers import Table
from edgebake_targets.inspectors._pte_file import (
    DELEGATE,
    KERNEL,
    OPTIONALS,
    SCALARS,
    TENSOR,
    TENSORS,
    Program,
    at,
    instructions,
    stored,
)


def units_of(
    calls: Mapping[str, int], inside: Mapping[str, Counter[str]], outside: Mapping[str, int]
) -> tuple[UnitWork, ...]:
    """A row for each backend with ``calls`` and what is known of its operators, and one for the kernels ``outside``."""
    rows = [
        UnitWork(
            unit=UNIT_OF.get(backend, UNKNOWN),
            by=backend,
            operators=dict(sorted(inside.get(backend, Counter()).items())),
            macs=None,
            subgraphs=count,
        )
        for backend, count in sorted(calls.items())
    ]
    if outside:
        kernels = dict(sorted(outside.items()))
        rows.append(UnitWork(unit="CPU", by=EXECUTORCH_KERNELS, operators=kernels, macs=None, subgraphs=0))
    return tuple(rows)


def moved_bytes(program: Program, plans: Sequence[Table]) -> int | None:
    """Bytes that pass between the delegates and what lies outside them when each of ``plans`` is called once.

    None where the size of a tensor cannot be told.
    """
    sizes = [_moved(program, plan) for plan in plans]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _moved(program: Program, plan: Table) -> int | None:
    values = plan.tables(2)
    given = set(plan.wholes(3, "i"))
    made_in: dict[str, str] = {}
    reads: list[tuple[str, str]] = []
    for number, (kind, call) in enumerate(instructions(plan)):
        if kind not in (KERNEL, DELEGATE):
            continue
        part = str(number) if kind == DELEGATE else ""
        for index in _tensors(values, call.wholes(1, "i")):
            if str(index) in made_in:
                reads.append((part, str(index)))
            elif index not in given and not _held(program, values[index]):
                made_in[str(index)] = part
    return border_bytes(made_in, reads, lambda name: _bytes(values[int(name)]))


def _tensors(values: Sequence[Table], numbers: Sequence[int]) -> Iterator[int]:
    """Numbers of the tensors among ``numbers``, those inside lists too."""
    for number in numbers:
        value: Table = at(values, number, "value")
        kind, held = value.whole(0, "B"), value.table(1)
        if kind == TENSOR:
            yield number
        elif kind in (TENSORS, OPTIONALS) and held is not None:
            for item in held.wholes(0, "i"):
                if item >= 0 and at(values, item, "value").whole(0, "B") == TENSOR:
                    yield item


def _held(program: Program, value: Table) -> bool:
    """Whether the program holds the tensor's data: a constant, or a state with a start."""
    tensor = value.table(1)
    return tensor is not None and stored(program, tensor, "") is not None


def _bytes(value: Table) -> int | None:
    """Size of a tensor at its upper bounds; None for a type that is not known here."""
    tensor = value.table(1)
    known = SCALARS.get(tensor.whole(0, "b")) if tensor is not None else None
    return prod(tensor.wholes(2, "i")) * known[1] if tensor is not None and known else None
