"""Reads any ExecuTorch program (.pte): inputs, outputs, operators, delegates, and every weight it carries.

Needs neither torch nor executorch. Field numbers: executorch/exir/_serialize/program.fbs (file identifier ET12) and
the extended header eh00 of executorch/schema/extended_header.h.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing
from edgebake.types import Inspection, TensorSpec, WeightRecord
from edgebake_targets.inspectors import _xnnpack_graph
from edgebake_targets.inspectors._flatbuffers import Malformed, Table, integer, root

SUFFIXES = (".pte",)

# ScalarType of scalar_type.fbs: (numpy's name, bytes).
_SCALARS = {
    0: ("uint8", 1),
    1: ("int8", 1),
    2: ("int16", 2),
    3: ("int32", 4),
    4: ("int64", 8),
    5: ("float16", 2),
    6: ("float32", 4),
    7: ("float64", 8),
    11: ("bool", 1),
    12: ("int8", 1),
    13: ("uint8", 1),
    14: ("int32", 4),
    15: ("bfloat16", 2),
    23: ("float8_e5m2", 1),
    24: ("float8_e4m3fn", 1),
    27: ("uint16", 2),
    28: ("uint32", 4),
    29: ("uint64", 8),
}
_INT, _BOOL, _DOUBLE, _TENSOR, _STRING = 2, 3, 4, 5, 6  # members of the union KernelTypes
_KERNEL_CALL, _DELEGATE_CALL = 1, 2  # members of the union InstructionArguments
_INLINE = 0  # DataLocation
_EXTERNAL = 1  # TensorDataLocation

# Kernels that take a quantised table and, behind it, its scales and zero points.
_TABLE_KERNELS = ("quantized_decomposed::embedding_", "quantized_decomposed::dequantize_per_channel")


def missing() -> Missing | None:
    """Always usable."""
    return None


def inspect(path: Path) -> Inspection:
    """What ``path`` holds. Named dimensions of inputs appear at their upper bound; .pte files keep no names of inputs.

    ArtifactDamaged when it is no ExecuTorch program, is cut short, or contradicts itself.
    """
    try:
        data = _mapped(path)
    except OSError as error:
        raise ArtifactDamaged(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    try:
        return _inspect(_open(data))
    except (Malformed, RecursionError) as error:
        raise ArtifactDamaged(
            f"this is no whole ExecuTorch program: {error}", where=str(path), fix="build or copy the file again"
        ) from error


def _mapped(path: Path) -> memoryview:
    """The file's bytes, read when they are looked at: a language model's file need not fit in memory twice."""
    with path.open("rb") as file:
        if not path.stat().st_size:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap(file.fileno(), 0, access=ACCESS_READ))


@dataclass(frozen=True)
class _Program:
    """A program's root table, its segments and its shared data."""

    table: Table
    segments: tuple[memoryview, ...]
    named: Mapping[str, memoryview]
    size: int


def _open(data: memoryview) -> _Program:
    if bytes(data[4:6]) != b"ET":
        raise Malformed(f"it starts with {bytes(data[:8])!r}, not with the mark ET12")
    end, base = len(data), len(data)
    if bytes(data[8:12]) == b"eh00":
        end, base = integer(data, 16, "Q"), integer(data, 24, "Q")
        held = integer(data, 32, "Q") if integer(data, 12, "I") >= 32 else 0
        base = base or len(data)
        if end > len(data) or base > len(data) or base + held > len(data):
            raise Malformed(f"it has {len(data)} bytes and its header speaks of {max(end, base + held)}")
    table = root(data[:end])
    segments = []
    for segment in table.tables(4):
        start, size = base + segment.whole(0, "Q"), segment.whole(1, "Q")
        if start + size > len(data):
            raise Malformed(f"a segment of {size} bytes reaches beyond the file's {len(data)}")
        segments.append(data[start : start + size])
    named = {entry.text(0): _at(segments, entry.whole(1, "I"), "segment") for entry in table.tables(7)}
    return _Program(table=table, segments=tuple(segments), named=named, size=len(data))


def _at(items: Any, index: int, what: str) -> Any:
    if not 0 <= index < len(items):
        raise Malformed(f"{what} {index} of {len(items)} is named")
    return items[index]


def _inspect(program: _Program) -> Inspection:
    plans = program.table.tables(1)
    methods = [plan for plan in plans if plan.count(3) or any(_instructions(plan))]
    several = len(methods) > 1
    operators, delegates, inside = Counter[str](), Counter[str](), Counter[str]()
    weights: dict[str, WeightRecord] = {}
    blobs: dict[str, int] = {}
    scales: set[str] = set()
    for plan in methods:
        operators.update(_operators(plan))
        for call in _delegate_calls(plan):
            delegates[_at(plan.tables(7), call, "delegate").text(0)] += 1
        for number, delegate in enumerate(plan.tables(7)):
            label, blob = f"{plan.text(0)}.delegate{number}", _blob(program, delegate)
            blobs[delegate.text(0)] = blobs.get(delegate.text(0), 0) + len(blob)
            if delegate.text(0) == "XnnpackBackend":
                graph = _xnnpack_graph.read(blob, program.named, label)
                inside.update(graph.operators)
                scales |= graph.scale_keys
                weights = {**graph.weights, **weights}
        weights = {**_constants(program, plan), **weights}
    weights = {**weights, **_others(program, {*weights, *scales})}
    return Inspection(
        format="pte",
        inputs=tuple(spec for plan in methods for spec in _signature(plan, 3, "input", several)),
        outputs=tuple(spec for plan in methods for spec in _signature(plan, 4, "output", several)),
        operators=dict(sorted(operators.items())),
        delegates=dict(sorted(delegates.items())),
        weights=tuple(weights.values()),
        total_bytes=program.size,
        facts={
            "methods": [plan.text(0) for plan in methods],
            "constants": {plan.text(0): _constant_outputs(plan) for plan in plans if plan not in methods},
            "planned_bytes": {plan.text(0): sum(plan.wholes(8, "q")) for plan in methods},
            "delegate_operators": dict(sorted(inside.items())),
            "delegate_bytes": blobs,
        },
    )


def _instructions(plan: Table) -> Iterator[tuple[int, Table]]:
    """Kind and arguments of every instruction."""
    for chain in plan.tables(5):
        for instruction in chain.tables(2):
            arguments = instruction.table(1)
            if arguments is not None:
                yield instruction.whole(0, "B"), arguments


def _kernel_calls(plan: Table) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name of the kernel and indices of its values, call by call."""
    kernels = plan.tables(6)
    for kind, call in _instructions(plan):
        if kind == _KERNEL_CALL:
            kernel = _at(kernels, call.whole(0, "i"), "operator")
            yield kernel.text(0), call.wholes(1, "i")


def _operators(plan: Table) -> Counter[str]:
    return Counter(name for name, _ in _kernel_calls(plan))


def _delegate_calls(plan: Table) -> Iterator[int]:
    return (call.whole(0, "i") for kind, call in _instructions(plan) if kind == _DELEGATE_CALL)


def _blob(program: _Program, delegate: Table) -> memoryview:
    """What a delegate is built from."""
    reference = delegate.table(1)
    if reference is None:
        return memoryview(b"")
    index = reference.whole(1, "I")
    if reference.whole(0, "b") == _INLINE:
        inline: Table = _at(program.table.tables(3), index, "inline delegate")
        return inline.blob(0)
    segment: memoryview = _at(program.segments, index, "segment")
    return segment


def _tensor(plan_values: tuple[Table, ...], index: int) -> Table | None:
    value: Table = _at(plan_values, index, "value")
    return value.table(1) if value.whole(0, "B") == _TENSOR else None


def _signature(plan: Table, field: int, what: str, several: bool) -> Iterator[TensorSpec]:
    values = plan.tables(2)
    prefix = f"{plan.text(0)}." if several else ""
    for number, index in enumerate(plan.wholes(field, "i")):
        tensor = _tensor(values, index)
        shape = tensor.wholes(2, "i") if tensor is not None else ()
        kind = _at(values, index, "value").whole(0, "B")
        dtype = {_INT: "int64", _BOOL: "bool", _DOUBLE: "float64"}.get(kind, "none")
        if tensor is not None:
            dtype = _SCALARS.get(tensor.whole(0, "b"), ("unknown", 0))[0]
        yield TensorSpec(name=f"{prefix}{what}_{number}", shape=shape, dtype=dtype)


def _constant_outputs(plan: Table) -> Any:
    """What a method without instructions returns: a number, a string, or a list of them."""
    found: list[Any] = []
    values = plan.tables(2)
    for index in plan.wholes(4, "i"):
        value: Table = _at(values, index, "value")
        kind, held = value.whole(0, "B"), value.table(1)
        if held is None:
            continue
        if kind == _INT:
            found.append(held.whole(0, "q"))
        elif kind == _BOOL:
            found.append(bool(held.whole(0, "?")))
        elif kind == _DOUBLE:
            found.append(held.real(0, "d"))
        elif kind == _STRING:
            found.append(held.text(0))
    return found[0] if len(found) == 1 else found


def _constants(program: _Program, plan: Table) -> dict[str, WeightRecord]:
    """Constants of the kernels outside delegates; scales of int8 tables are counted with their table."""
    values = plan.tables(2)
    records: dict[int, tuple[str, WeightRecord]] = {}
    for index in range(len(values)):
        tensor = _tensor(values, index)
        found = _constant(program, tensor, f"{plan.text(0)}.constant{index}") if tensor is not None else None
        if found is not None:
            records[index] = found
    for kernel, arguments in _kernel_calls(plan):
        if kernel.startswith(_TABLE_KERNELS) and arguments and arguments[0] in records:
            scales = [index for index in arguments[1:3] if index in records]
            key, table = records[arguments[0]]
            size = sum(records.pop(index)[1].bytes for index in scales)
            records[arguments[0]] = key, replace(table, scale_bytes=table.scale_bytes + size)
    return dict(records.values())


def _constant(program: _Program, tensor: Table, label: str) -> tuple[str, WeightRecord] | None:
    """Key (equal for shared data) and record of a tensor whose data is in the file; None for activations."""
    index, extra = tensor.whole(5, "I"), tensor.table(9)
    name = extra.text(1) if extra is not None else ""
    external = extra is not None and extra.whole(2, "b") == _EXTERNAL
    mutable = tensor.table(6) is not None
    if not index and not external:
        return None
    dtype, width = _SCALARS.get(tensor.whole(0, "b"), ("unknown", 0))
    shape = tensor.wholes(2, "i")
    size = prod(shape) * width
    if external:
        data, key = program.named.get(name, memoryview(b""))[:size], f"named:{name}"
    elif mutable:
        data, key = _mutable(program, extra.whole(0, "Q") if extra is not None else 0, index, size), f"mutable:{label}"
    else:
        data, key = _in_constants(program, index, size), f"constant:{index}"
    if len(data) < size and not external:
        raise Malformed(f"constant {index} of {size} bytes reaches beyond its segment")
    digest = sha256(data).hexdigest() if len(data) else ""
    return key, WeightRecord(name=name or label, shape=shape, dtype=dtype, bytes=len(data), digest=digest)


def _in_constants(program: _Program, index: int, size: int) -> memoryview:
    held = program.table.table(5)
    offsets = held.wholes(1, "Q") if held is not None else ()
    if held is None or not offsets:
        inline: Table = _at(program.table.tables(2), index, "constant")
        return inline.blob(0)
    start = _at(offsets, index, "constant")
    segment: memoryview = _at(program.segments, held.whole(0, "I"), "segment")
    return segment[start : start + size]


def _mutable(program: _Program, group: int, index: int, size: int) -> memoryview:
    held: Table = _at(program.table.tables(6), group, "mutable segment")
    start = _at(held.wholes(1, "Q"), index, "mutable tensor")
    segment: memoryview = _at(program.segments, held.whole(0, "I"), "segment")
    return segment[start : start + size]


def _others(program: _Program, known: set[str]) -> dict[str, WeightRecord]:
    """Shared data that no reader here understands (other backends' weights), at its size."""
    return {
        key: WeightRecord(
            name=key, shape=(len(data),), dtype="opaque", bytes=len(data), digest=sha256(data).hexdigest()
        )
        for key, data in program.named.items()
        if key not in known and f"named:{key}" not in known
    }
