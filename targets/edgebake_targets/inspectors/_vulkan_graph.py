"""Reads the graph that ExecuTorch's Vulkan delegate carries: its operators, values and constants with their formats.

Field numbers: executorch/backends/vulkan/serialization/schema.fbs (file identifier VK00, header VH00). Constants lie in
the program's shared data, older files' behind the graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import prod
from typing import Any

from edgebake.types import WeightRecord
from edgebake_targets.inspectors._flatbuffers import Malformed, Table, integer, root

BACKEND = "VulkanBackend"
_MARK = b"VH00"
_IN_SHARED_DATA = 2**64 - 1

DTYPES = {
    0: ("bool", 1),
    1: ("uint8", 1),
    2: ("int8", 1),
    3: ("int32", 4),
    4: ("float16", 2),
    5: ("float32", 4),
    6: ("float64", 8),
    7: ("int64", 8),
}
# Members of the union GraphTypes.
_INT, _DOUBLE, _BOOL, _TENSOR, _INTS, _DOUBLES, _BOOLS, _VALUES, _STRING, _SYM_INT = range(2, 12)

PREPACK = "et_vk.prepack.default"
# Operator -> arguments that hold its weights, and those that hold their scales and sums.
QUANTISED: Mapping[str, tuple[int, tuple[int, ...]]] = {
    "aten._weight_int8pack_mm.default": (1, (2,)),
    "et_vk.linear_qcs4w.default": (1, (2,)),
    "et_vk.linear_q4gsw.default": (1, (2,)),
    "et_vk.linear_dq8ca_q4gsw.default": (3, (4, 5)),
    "et_vk.embedding_q4gsw.default": (0, (1,)),
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Bytes of a constant; ``key`` is that of the shared data they lie in, empty when they lie in this delegate."""

    data: memoryview
    key: str


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """A tensor of the graph: ``dtype`` on the GPU, ``staging`` of what is copied in and out; sizes at upper bounds."""

    dtype: str
    staging: str
    shape: tuple[int, ...]
    constant: Constant | None


@dataclass(frozen=True)
class Values:
    """A list of other values by their numbers."""

    items: tuple[int, ...]


@dataclass(frozen=True)
class SymInt:
    """A size that the GPU's program computes."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One operator: its edge name and the numbers of its arguments, what it returns last."""

    name: str
    args: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Program:
    """A delegate's graph; ``values`` are numbers, texts, lists, ``Tensor``, ``Values``, ``SymInt`` or None."""

    calls: tuple[Call, ...]
    values: tuple[Any, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Graph:
    """``weights`` by a key that is equal for shared data, ``keys`` all the shared data that the graph uses."""

    operators: Mapping[str, int]
    weights: Mapping[str, WeightRecord]
    keys: frozenset[str]


def parse(blob: memoryview, named: Mapping[str, memoryview]) -> Program:
    """The graph in a delegate's bytes, ``named`` being the program's shared data; Malformed when it is none."""
    if bytes(blob[4:8]) != _MARK:
        raise Malformed(f"a Vulkan delegate starts with {bytes(blob[4:8])!r}, not with {_MARK!r}")
    start, size, behind = (integer(blob, at, "I") for at in (10, 14, 18))
    length = integer(blob, 22, "Q")
    if start + size > len(blob) or behind + length > len(blob):
        raise Malformed("a Vulkan delegate is shorter than its header says")
    graph = root(blob[start : start + size])
    constants = [_constant(entry, blob[behind : behind + length], named) for entry in graph.tables(5)]
    values = tuple(_value(entry, constants) for entry in graph.tables(2))
    calls = tuple(Call(name=call.text(1), args=call.wholes(2, "i")) for call in graph.tables(1))
    inputs, outputs = graph.wholes(3, "I"), graph.wholes(4, "I")
    _refuse_strangers(values, calls, (*inputs, *outputs))
    return Program(calls=calls, values=values, inputs=inputs, outputs=outputs)


def read(blob: memoryview, named: Mapping[str, memoryview], label: str) -> Graph:
    """What one delegate holds; ``label`` names constants that have no key. Malformed when it is no Vulkan graph."""
    program = parse(blob, named)
    records = dict(_records(program, label))
    _fold(program, records)
    tensors = (value.constant for value in program.values if isinstance(value, Tensor))
    return Graph(
        operators=dict(sorted(Counter(call.name for call in program.calls if call.name != PREPACK).items())),
        weights={record.name: record for record in records.values()},
        keys=frozenset(constant.key for constant in tensors if constant is not None and constant.key),
    )


def _constant(entry: Table, behind: memoryview, named: Mapping[str, memoryview]) -> Constant:
    offset, size, key = entry.whole(0, "Q"), entry.whole(1, "Q"), entry.text(2)
    if offset != _IN_SHARED_DATA:
        if offset + size > len(behind):
            raise Malformed("a constant of a Vulkan delegate reaches beyond the delegate")
        return Constant(data=behind[offset : offset + size], key="")
    if len(named.get(key, b"")) < size:
        raise Malformed(f"a Vulkan delegate wants the constant {key!r}, which the program does not hold whole")
    return Constant(data=named[key][:size], key=key)


def _value(entry: Table, constants: list[Constant]) -> Any:
    kind, held = entry.whole(0, "B"), entry.table(1)
    if held is None:
        return None
    if kind == _TENSOR:
        return _tensor(held, constants)
    if kind == _INT:
        return held.whole(0, "q")
    if kind == _DOUBLE:
        return held.real(0, "d")
    if kind == _BOOL:
        return bool(held.whole(0, "?"))
    if kind == _STRING:
        return held.text(0)
    if kind == _VALUES:
        return Values(held.wholes(0, "i"))
    if kind == _SYM_INT:
        return SymInt()
    lists = {_INTS: "q", _DOUBLES: "d", _BOOLS: "?"}
    return list(held.wholes(0, lists[kind])) if kind in lists else None


def _tensor(held: Table, constants: list[Constant]) -> Tensor:
    index = held.whole(2, "i")  # negative: computed
    if index >= len(constants):
        raise Malformed(f"a Vulkan tensor points at constant {index} of {len(constants)}")
    dtype, size = DTYPES.get(held.whole(0, "b"), ("unknown", 0))
    shape, constant = held.wholes(1, "I"), constants[index] if index >= 0 else None
    if constant is not None and len(constant.data) < prod(shape) * size:
        raise Malformed(f"a constant of {len(constant.data)} bytes is to hold {list(shape)} of {dtype}")
    staging = DTYPES.get(held.whole(6, "b", 127), (dtype, 0))[0]
    return Tensor(dtype=dtype, staging=staging, shape=shape, constant=constant)


def _refuse_strangers(values: tuple[Any, ...], calls: tuple[Call, ...], others: tuple[int, ...]) -> None:
    """Malformed when something names a value that there is not."""
    lists = (item for value in values if isinstance(value, Values) for item in value.items)
    for number in (*others, *lists, *(number for call in calls for number in call.args)):
        if not 0 <= number < len(values):
            raise Malformed(f"value {number} of {len(values)} is named in a Vulkan delegate")


def _records(program: Program, label: str) -> Iterator[tuple[int, WeightRecord]]:
    for number, value in enumerate(program.values):
        if isinstance(value, Tensor) and value.constant is not None:
            data = value.constant.data
            yield (
                number,
                WeightRecord(
                    name=value.constant.key or f"{label}.{number}",
                    shape=value.shape,
                    dtype=value.dtype,
                    bytes=len(data),
                    digest=sha256(data).hexdigest(),
                ),
            )


def _fold(program: Program, records: dict[int, WeightRecord]) -> None:
    """Show 4-bit weights, two in a byte, as such, and count scales and sums with their weights."""
    packed = {call.args[1]: call.args[0] for call in program.calls if call.name == PREPACK and len(call.args) == 2}
    beside: dict[int, set[int]] = {}
    for call in program.calls:
        weight_at, scales_at = QUANTISED.get(call.name, (0, ()))
        if not scales_at or len(call.args) <= max(weight_at, *scales_at):
            continue
        weight, *scales = (packed.get(call.args[at], call.args[at]) for at in (weight_at, *scales_at))
        if weight in records:
            beside.setdefault(weight, set()).update(number for number in scales if number in records)
    for weight, found in beside.items():
        held, size = records[weight], sum(records[number].bytes for number in found)
        if held.dtype == "uint8" and held.shape:
            held = replace(held, dtype="int4", shape=(*held.shape[:-1], 2 * held.shape[-1]))
        records[weight] = replace(held, scale_bytes=size)
    for number in {number for found in beside.values() for number in found}:
        del records[number]
