"""Reads the graph that ExecuTorch's XNNPACK delegate carries: its operators and its constants with their formats.

Field numbers: executorch/backends/xnnpack/serialization/schema.fbs (file identifier XN01, header XH00).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from edgebake.types import WeightRecord
from edgebake_targets.inspectors._flatbuffers import Malformed, Table, integer, root

_HEADER, _PLAIN = b"XH00", b"XN01"
_NO_OFFSET = 2**64 - 1

_DTYPES = {
    1: "float32",
    2: "float16",
    3: "int8",
    4: "uint8",
    5: "int32",
    6: "int8",
    7: "int32",
    8: "int4",
    9: "int8",
    10: "int4",
    11: "int8",
    12: "int32",
    13: "float32",
    14: "bfloat16",
}

# In the order of the union XNodeUnion.
_OPERATORS = (
    *("none", "add", "fully_connected", "softmax", "sigmoid", "transpose", "clamp", "conv2d", "div"),
    *("resize_bilinear2d", "constant_pad", "avg_pool2d", "minimum", "depthwise_conv2d", "max_pool2d", "multiply"),
    *("subtract", "floor", "convert", "global_avg_pool2d", "reshape", "argmax_pool2d", "square_root", "ceiling"),
    *("hardswish", "leaky_relu", "maximum", "negate", "square", "elu", "abs", "prelu", "concatenate", "concatenate"),
    *("concatenate", "slice", "scaled_dot_product_attention", "batch_matrix_multiply", "concatenate"),
    *("conv_transpose2d", "reciprocal_square_root", "log", "gelu", "tanh", "exp", "sin", "copy", "cos"),
)

_PER_CHANNEL, _PER_TENSOR, _PER_GROUP = 1, 2, 4  # members of the union XNNQuantParams
_QUANTISED = 2  # member of the union XValueUnion; the other one is a plain tensor


@dataclass(frozen=True)
class Constant:
    """Bytes of one constant and the key it is shared under (empty: it belongs to this delegate alone)."""

    data: memoryview
    key: str


@dataclass(frozen=True)
class Graph:
    """What one delegate holds; ``weights`` by a key that is equal for constants shared between delegates.

    ``scale_keys`` are the shared constants that hold scales: they are counted with their weights.
    """

    operators: Counter[str]
    weights: Mapping[str, WeightRecord]
    scale_keys: frozenset[str]


def read(blob: memoryview, named: Mapping[str, memoryview], label: str) -> Graph:
    """Parse a delegate's blob; ``named`` is the program's shared data, ``label`` names constants that have no key.

    Raises Malformed when the blob is not a whole XNNPACK graph.
    """
    data, base = _split(blob)
    graph = root(data)
    constants = [_constant(entry, base, named) for entry in graph.tables(8)]
    weights: dict[str, WeightRecord] = {}
    scales: set[str] = set()
    for index, value in enumerate(graph.tables(2)):
        scales.add(_scale_key(value, constants))
        found = _weight(value, constants, f"{label}.{index}")
        if found is not None:
            weights.setdefault(*found)
    kinds = (node.whole(0, "B") for node in graph.tables(1))
    return Graph(
        operators=Counter(_OPERATORS[kind] if kind < len(_OPERATORS) else f"operator_{kind}" for kind in kinds),
        weights=weights,
        scale_keys=frozenset(scales - {""}),
    )


def _split(blob: memoryview) -> tuple[memoryview, memoryview]:
    """The graph and the constants behind it."""
    magic = bytes(blob[4:8])
    if magic == _PLAIN:
        return blob, blob[:0]
    if magic != _HEADER:
        raise Malformed(f"an XNNPACK delegate starts with {magic!r}, not with {_HEADER!r} or {_PLAIN!r}")
    start, size, constants = (integer(blob, at, "I") for at in (10, 14, 18))
    length = integer(blob, 22, "Q")
    if start + size > len(blob) or constants + length > len(blob):
        raise Malformed("an XNNPACK delegate is shorter than its header says")
    return blob[start : start + size], blob[constants : constants + length]


def _constant(entry: Table, base: memoryview, named: Mapping[str, memoryview]) -> Constant:
    offset, size, key = entry.whole(0, "Q"), entry.whole(1, "Q"), entry.text(2)
    if key:
        if key not in named:
            raise Malformed(f"an XNNPACK delegate wants the constant {key!r}, which the program does not hold")
        return Constant(named[key], key)
    if offset == _NO_OFFSET or size == 0:
        return Constant(base[:0], "")
    if offset + size > len(base):
        raise Malformed("a constant of an XNNPACK delegate reaches beyond the delegate")
    return Constant(base[offset : offset + size], "")


def _weight(value: Table, constants: list[Constant], fallback: str) -> tuple[str, WeightRecord] | None:
    """Key and record of a constant value; None for activations."""
    kind, held = value.whole(0, "B"), value.table(1)
    if held is None:
        return None
    tensor = held.table(0) if kind == _QUANTISED else held
    index = tensor.whole(3, "I") if tensor is not None else 0
    if tensor is None or not index:
        return None
    if index >= len(constants):
        raise Malformed(f"an XNNPACK value points at constant {index} of {len(constants)}")
    constant = constants[index]
    datatype = tensor.whole(0, "h")
    record = WeightRecord(
        name=constant.key or fallback,
        shape=tuple(tensor.wholes(2, "I")),
        dtype=_DTYPES.get(datatype, f"xnn{datatype}"),
        bytes=len(constant.data),
        scale_bytes=_scale_bytes(held, constants) if kind == _QUANTISED else 0,
        digest=sha256(constant.data).hexdigest(),
    )
    return constant.key or fallback, record


def _scale_constant(parameters: Table, kind: int, constants: list[Constant]) -> Constant | None:
    """The constant that holds the scales, where they are not in the graph itself."""
    if kind not in (_PER_CHANNEL, _PER_GROUP):
        return None
    index = parameters.whole(4 if kind == _PER_GROUP else 2, "I")
    return constants[index] if 0 < index < len(constants) else None


def _scale_key(value: Table, constants: list[Constant]) -> str:
    held = value.table(1) if value.whole(0, "B") == _QUANTISED else None
    parameters = held.table(2) if held is not None else None
    if held is None or parameters is None:
        return ""
    constant = _scale_constant(parameters, held.whole(1, "B"), constants)
    return constant.key if constant is not None else ""


def _scale_bytes(value: Table, constants: list[Constant]) -> int:
    kind, parameters = value.whole(1, "B"), value.table(2)
    if parameters is None:
        return 0
    if kind == _PER_TENSOR:
        return 8  # a float32 scale and an int32 zero point
    constant = _scale_constant(parameters, kind, constants)
    if constant is not None:
        return len(constant.data)
    if kind == _PER_GROUP:
        return 4 * parameters.count(0) + 2 * parameters.count(3, 2)
    return 4 * parameters.count(0) if kind == _PER_CHANNEL else 0
