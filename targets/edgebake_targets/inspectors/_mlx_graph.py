"""Reads the graph that ExecuTorch's MLX delegate carries: its operators and its constants with their formats.

Field numbers: executorch/backends/mlx/serialization/schema.fbs (header MLX0). Constants lie in the program's shared
data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256

from edgebake.types import WeightRecord
from edgebake_targets.inspectors._flatbuffers import Malformed, Table, root
from edgebake_targets.inspectors._pte_file import SCALARS

BACKEND = "MLXBackend"
_HEADER, _MARK = 24, b"MLX0"

# In the order of the union OpNode.
_OPERATORS = (
    *("none", "noop", "id_copy", "addmm", "item_int", "expand_dims", "tile", "take_along_axis", "take", "rms_norm"),
    *("layer_norm", "rope", "sdpa", "add", "add_int", "subtract_int", "multiply_int", "floor_divide_int", "sym_size"),
    *("multiply", "divide", "subtract", "conv1d", "conv2d", "conv3d", "gelu", "arange", "silu", "sigmoid", "tanh"),
    *("squeeze", "split", "rsqrt", "maximum", "minimum", "log", "softmax", "broadcast_to", "pad", "where", "reshape"),
    *("transpose", "as_strided", "contiguous", "gather", "slice", "as_type", "concatenate", "full", "full_like"),
    *("argmax", "slice_update", "index_copy", "dequantize", "less", "less_equal", "greater", "greater_equal", "equal"),
    *("not_equal", "logical_not", "logical_and", "logical_or", "tri", "tril", "triu", "floor", "ceil", "square"),
    *("exp", "sin", "cos", "tan", "arcsin", "arccos", "arctan", "sinh", "cosh", "arcsinh", "arccosh", "arctanh"),
    *("log2", "log10", "log1p", "erf", "expm1", "round", "reciprocal", "sqrt", "abs", "neg", "atan2", "log_add_exp"),
    *("floor_divide", "power", "log_sum_exp", "sum", "mean", "var", "std", "prod", "max", "min", "argmin", "median"),
    *("mod_int", "remainder", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "clip", "cumsum", "stack"),
    *("sign", "any", "all", "repeat", "sort", "argsort", "partition", "arg_partition", "quantized_matmul"),
    *("scatter_add", "gather_mm", "gather_qmm", "scan", "metal_kernel", "bitwise_invert", "roll", "bitwise_and"),
    *("bitwise_or", "bitwise_xor", "if", "random_bits"),
)
# Operator -> fields of its packed weights, their scales, their biases, their bits.
_QUANTISED = {"quantized_matmul": (1, 2, 4, 6), "dequantize": (0, 1, 3, 5), "gather_qmm": (1, 2, 5, 10)}
_TAKE_FROM, _TAKE_OUT = 0, 1


@dataclass(frozen=True, kw_only=True)
class Graph:
    """``weights`` by the key of the shared data that holds them, ``keys`` all the shared data that the graph uses."""

    operators: Mapping[str, int]
    weights: Mapping[str, WeightRecord]
    keys: frozenset[str]


def read(blob: memoryview, named: Mapping[str, memoryview]) -> Graph:
    """The graph of one delegate; Malformed when it is none."""
    if bytes(blob[4:8]) != _MARK:
        raise Malformed("an MLX delegate does not carry the mark MLX0")
    graph = root(blob[_HEADER:])
    operations = list(_operations(graph))
    metas = graph.tables(14)
    slots = {entry.text(0): slot for entry in graph.tables(13) if (slot := _index(entry)) is not None}
    records = {}
    for name, slot in slots.items():
        if name in named and slot < len(metas):
            records[slot] = name, _record(name, metas[slot], named[name])
    _fold(operations, records)
    return Graph(
        operators=dict(sorted(Counter(name for name, _ in operations).items())),
        weights=dict(records.values()),
        keys=frozenset(name for name in slots if name in named),
    )


def _operations(graph: Table) -> Iterator[tuple[str, Table]]:
    for chain in graph.tables(7):
        for instruction in chain.tables(0):
            kind, held = instruction.whole(0, "B"), instruction.table(1)
            if held is not None:
                yield _OPERATORS[kind] if kind < len(_OPERATORS) else f"operator {kind}", held


def _index(entry: Table) -> int | None:
    """The tensor that a name stands for; None for numbers."""
    slot = entry.table(1)
    return slot.whole(0, "I") if slot is not None and not slot.whole(1, "b") else None


def _record(name: str, meta: Table, data: memoryview) -> WeightRecord:
    shape = tuple(size.whole(0, "i", -1) for size in meta.tables(0))
    dtype = SCALARS.get(meta.whole(1, "b"), ("unknown", 0))[0]
    return WeightRecord(name=name, shape=shape, dtype=dtype, bytes=len(data), digest=sha256(data).hexdigest())


def _fold(operations: list[tuple[str, Table]], records: dict[int, tuple[str, WeightRecord]]) -> None:
    """Show packed weights (uint32) with their own bits and count scales and biases with them.

    An embedding takes rows of all three first and unpacks those.
    """
    rows_of: dict[int, int] = {}
    for name, operation in operations:
        if name == "take":
            rows_of[_tid(operation, _TAKE_OUT)] = _tid(operation, _TAKE_FROM)
        if name not in _QUANTISED:
            continue
        *fields, bits = _QUANTISED[name]
        weight, scales, biases = (rows_of.get(tid, tid) for tid in (_tid(operation, field) for field in fields))
        width, held = operation.whole(bits, "i"), records.get(weight)
        if held is None or not 0 < width < 32 or not held[1].shape or held[1].dtype != "uint32":
            continue
        beside = [records.pop(slot)[1].bytes for slot in {scales, biases} if slot in records]
        *rows, words = held[1].shape
        shape, size = (*rows, words * 32 // width), held[1].scale_bytes + sum(beside)
        records[weight] = held[0], replace(held[1], dtype=f"int{width}", shape=shape, scale_bytes=size)


def _tid(operation: Table, field: int) -> int:
    """A tensor's number; -1 where it is left out."""
    found = operation.struct(field, "I")
    return -1 if found is None else found
