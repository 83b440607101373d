"""What of an ONNX graph runs where: operators outside compiled parts, and what passes between these and the parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import TYPE_CHECKING, Any

from edgebake.types import LeftOut, UnitWork
from edgebake_targets._onnx_macs import Shapes, macs_of, shapes_of, stated_shapes
from edgebake_targets._units import ONNX_RUNTIME_KERNELS, UNIT_OF, UNKNOWN, Tally, border_bytes

if TYPE_CHECKING:
    import onnx

CONTEXT = "EPContext"  # domain com.microsoft: a part that a provider has compiled
COMPILED_AS = (
    "edgebake.compiled_as"  # metadata: JSON of the parts' operators, which they hide, and of what lies outside
)
_LONGEST = 1 << 20  # letters of it that are read


def parts_of(model: onnx.ModelProto) -> dict[str, int]:
    """Compiled parts of ``model`` by the provider that compiled them, as the parts name it."""
    found: dict[str, int] = {}
    for node in model.graph.node:
        if node.op_type == CONTEXT:
            source = next((a.s.decode("utf-8", "replace") for a in node.attribute if a.name == "source"), "")
            found[source] = found.get(source, 0) + 1
    return dict(sorted(found.items()))


def compiled_units(model: onnx.ModelProto, counted: Mapping[str, Mapping[str, int]]) -> tuple[UnitWork, ...]:
    """The rows of a model with compiled parts, empty for one without.

    ``counted``: by provider, what its binaries say of the operators inside; empty where they cannot be read. Metadata
    knows their types, and is believed where it counts as many.
    """
    parts = parts_of(model)
    noted = _noted(model)[0] if len(parts) == 1 else {}

    def held(by: str) -> Mapping[str, int]:
        own = counted.get(by, {})
        return noted if noted and sum(own.values()) in (0, sum(noted.values())) else dict(sorted(own.items()))

    rows = [
        UnitWork(unit=UNIT_OF.get(by, UNKNOWN), by=by or UNKNOWN, operators=held(by), macs=None, subgraphs=count)
        for by, count in parts.items()
    ]
    left = outside(model, stated_shapes(model), {}) if rows else Tally()  # inference is not for files of strangers
    return (*rows, *([left.work(ONNX_RUNTIME_KERNELS)] if left.operators else []))


def note(model: onnx.ModelProto, operators: Mapping[str, int], left_out: Sequence[LeftOut]) -> None:
    """Write into ``model`` what its compiled parts hold and what lies outside, with the reasons."""
    told = {"operators": dict(operators), "left_out": [asdict(row) for row in left_out]}
    model.metadata_props.add(key=COMPILED_AS, value=json.dumps(told, sort_keys=True))


def noted_outside(model: onnx.ModelProto) -> tuple[LeftOut, ...]:
    """What :func:`note` wrote of what lies outside; nothing where it is not there or not what it writes."""
    return _noted(model)[1]


def _noted(model: onnx.ModelProto) -> tuple[dict[str, int], tuple[LeftOut, ...]]:
    text = next((p.value for p in model.metadata_props if p.key == COMPILED_AS), "")
    try:
        told = json.loads(text) if 0 < len(text) < _LONGEST else {}
        operators = {str(name): int(count) for name, count in told.get("operators", {}).items()}
        rows = (
            LeftOut(op=str(row["op"]), count=int(row["count"]), macs=int(row["macs"]), reason=str(row["reason"]))
            for row in told.get("left_out", ())
        )
        return operators, tuple(rows)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):  # somebody else's; the file is whole
        return {}, ()


def outside(model: onnx.ModelProto, shapes: Shapes, reasons: Mapping[str, str]) -> Tally:
    """The operators that no part of ``model`` holds; ``reasons``, by node, why."""
    tally = Tally()
    for node in model.graph.node:
        if node.op_type != CONTEXT:
            tally.add(operator_of(node), macs_of(node, shapes), reasons.get(node.name, ""))
    return tally


def operator_of(node: onnx.NodeProto) -> str:
    """``Det``, or ``com.microsoft.MatMulNBits`` of another operator set than ONNX's own."""
    return str(node.op_type) if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def on_the_cpu(models: Mapping[str, onnx.ModelProto], sizes: Mapping[str, int]) -> tuple[UnitWork, ...]:
    """The one row of ``models`` that ONNX Runtime's CPU provider runs as a whole; ``sizes`` of named dimensions."""
    tally = Tally(subgraphs=len(models))
    for model in models.values():
        shapes = shapes_of(model, sizes)
        for node in model.graph.node:
            tally.add(operator_of(node), macs_of(node, shapes))
    return (tally.work(ONNX_RUNTIME_KERNELS),)


def moved_bytes(model: onnx.ModelProto) -> int | None:
    """Bytes that pass between the compiled parts of ``model`` and what lies outside them."""
    made_in: dict[str, str] = {}
    reads: list[tuple[str, str]] = []
    for number, node in enumerate(model.graph.node):
        part = f"{CONTEXT} {number}" if node.op_type == CONTEXT else ""
        made_in |= {name: part for name in node.output if name}
        reads += [(part, name) for name in node.input]
    sizes = {value.name: _bytes(value.type.tensor_type) for value in model.graph.value_info}
    return border_bytes(made_in, reads, sizes.get)


def _bytes(tensor: Any) -> int | None:
    from onnx import helper

    dims = tensor.shape.dim
    if not tensor.HasField("shape") or not all(d.HasField("dim_value") for d in dims):
        return None
    try:
        itemsize = int(helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize)
    except KeyError:  # a type that this onnx does not know
        return None
    return prod(int(d.dim_value) for d in dims) * itemsize
