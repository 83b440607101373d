"""Reads any ONNX file: interface, operators and every byte of weights; damaged or hostile files are refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgebake.errors import ArtifactDamaged
from edgebake.target import Missing
from edgebake.types import COMPILED, Inspection, TensorSpec, WeightRecord
from edgebake_targets._onnx_units import CONTEXT, compiled_units, moved_bytes, noted_outside, parts_of
from edgebake_targets._qnn import SOURCES, ContextFacts, facts_of
from edgebake_targets.inspectors._qnn_binary import INSIDE
from edgebake_targets.inspectors._qnn_context import Inside, beside, inside

if TYPE_CHECKING:
    import onnx

SUFFIXES = (".onnx",)
FIX = "fetch or build the file again"
MESSAGE_LIMIT = 2**31  # protobuf's own


def missing() -> Missing | None:
    """Whether onnx is installed."""
    if find_spec("onnx") is not None:
        return None
    return Missing(reason="not installed: onnx", remedy="pip install onnx")


def inspect(path: Path) -> Inspection:
    """Interface, operators and weights of ``path``. ArtifactDamaged when it is not a whole, well-formed ONNX model.

    External data is read only from files inside the model's own folder.
    """
    return described(_parse(path), path)


def described(model: onnx.ModelProto, path: Path) -> Inspection:
    """What ``model``, read from ``path``, holds."""
    graphs = list(_graphs(model.graph, 0))
    tensors = [t for g in graphs for t in g.initializer]
    tensors += [a.t for g in graphs for n in g.node for a in n.attribute if n.op_type == "Constant" and a.HasField("t")]
    payloads = {id(t): _weighed(_payload(t, path)) for t in tensors}
    scales = _scales(graphs)
    given = {i.name for i in model.graph.initializer}
    external = {_external(t, path)[0] for t in tensors if t.data_location == t.EXTERNAL}
    context = facts_of(model)
    read = inside(model, path) if context else Inside()
    compiled = compiled_units(model, {by: read.operators() for by in parts_of(model) if by.encode() in SOURCES})
    parts = _compiled_parts(model, path)
    external |= {path.parent / name for name, part in parts.items() if not part.digest}
    return Inspection(
        format="onnx",
        inputs=tuple(_spec(v) for v in model.graph.input if v.name not in given),
        outputs=tuple(_spec(v) for v in model.graph.output),
        operators=dict(sorted(Counter(_operator(n) for g in graphs for n in g.node).items())),
        delegates={row.by: row.subgraphs for row in compiled if row.subgraphs},
        weights=(*_records(tensors, payloads, scales, graphs), *parts.values()),
        total_bytes=path.stat().st_size + sum(p.stat().st_size for p in external),
        facts={
            "ir_version": model.ir_version,
            "producer": f"{_text(model.producer_name)} {_text(model.producer_version)}".strip(),
            "opsets": {_text(o.domain) or "ai.onnx": o.version for o in model.opset_import},
            **(_compiled(context, read) if context else {}),
        },
        units=compiled,
        border_bytes=moved_bytes(model) if compiled else None,
        left_out=noted_outside(model) if compiled else (),
    )


def _compiled(context: ContextFacts, read: Inside) -> dict[str, Any]:
    """What a context binary says: the chip as QNN numbers them, who compiled it, how large it is, its graphs."""
    counted = {
        name: {"nodes": held.total(), "operators": dict(sorted(held.items()))} for name, held in read.graphs.items()
    }
    return {
        "soc_model": context.soc_model or "not said",
        "compiled_by": f"QAIRT {context.sdk}",
        "context_bytes": context.embedded_bytes,
        **({"context_files": list(context.files)} if context.files else {}),
        "graphs": counted,
        INSIDE: f"not measured: {read.unread}"
        if read.unread
        else "counted by the names of the nodes in the binary, which keeps no types",
    }


def _compiled_parts(model: onnx.ModelProto, path: Path) -> dict[str, WeightRecord]:
    """What a provider compiled, weights and programs in one, by file name where it lies beside the model."""
    found: dict[str, WeightRecord] = {}
    for number, node in enumerate(model.graph.node):
        given = {a.name: a for a in node.attribute} if node.op_type == CONTEXT else {}
        held = given["ep_cache_context"].s if "ep_cache_context" in given else b""
        if "embed_mode" not in given or given["embed_mode"].i:
            name, size, digest = f"{CONTEXT}.{number}", len(held), hashlib.sha256(held).hexdigest()
        else:
            name, digest = held.decode("utf-8", "replace"), ""
            file = beside(path, held)  # a name that leads elsewhere is only shown
            size = file.stat().st_size if file else 0
        if size:
            found[name] = WeightRecord(name=name, shape=(size,), dtype=COMPILED, bytes=size, digest=digest)
    return found


def _parse(path: Path) -> onnx.ModelProto:
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise ArtifactDamaged("there is no such file", where=str(path), fix=FIX)
    if path.stat().st_size >= MESSAGE_LIMIT:
        raise ArtifactDamaged("an ONNX file cannot be larger than 2 GiB", where=str(path), fix=FIX)
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except (DecodeError, ValueError, RecursionError) as error:
        raise ArtifactDamaged("this is not an ONNX file, or it is cut short", where=str(path), fix=FIX) from error
    if not model.ir_version or not model.opset_import or not model.graph.output:
        raise ArtifactDamaged("the file parses but holds no ONNX graph", where=str(path), fix=FIX)
    return model


def _graphs(graph: onnx.GraphProto, depth: int) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.HasField("g") else []
            for deeper in (*inner, *attribute.graphs):
                yield from _graphs(deeper, depth + 1)


def _operator(node: onnx.NodeProto) -> str:
    name = _text(node.op_type)
    return name if node.domain in ("", "ai.onnx") else f"{_text(node.domain)}.{name}"


def _text(value: str | bytes) -> str:
    """Protobuf hands out text that is not UTF-8 as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else _text(d.dim_param) or "?" for d in kind.shape.dim)
    return TensorSpec(name=_text(value.name), shape=shape, dtype=_dtype(kind.elem_type))


def _dtype(code: int) -> str:
    import onnx

    try:
        return str(onnx.helper.tensor_dtype_to_np_dtype(code).name)
    except KeyError:
        return "unknown"


# --- payloads ---------------------------------------------------------------------------------------------------------


def _weighed(data: bytes) -> tuple[int, str]:
    """Length and SHA-256: memory holds one tensor at a time, whatever the file's size."""
    return len(data), hashlib.sha256(data).hexdigest()


def _payload(tensor: onnx.TensorProto, path: Path) -> bytes:
    """The raw bytes of ``tensor``; ArtifactDamaged when they are not as many as its shape and type need."""
    import onnx

    if tensor.data_type not in onnx.TensorProto.DataType.values() or tensor.data_type == onnx.TensorProto.UNDEFINED:
        raise ArtifactDamaged(f"tensor {tensor.name!r} has an unknown type", where=str(path), fix=FIX)
    if tensor.data_type == onnx.TensorProto.STRING:
        return b"\0".join(tensor.string_data)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        data = _external_bytes(tensor, path)
    elif tensor.HasField("raw_data"):
        data = tensor.raw_data
    else:
        data = _listed(tensor, path)
    count = 1
    for size in tensor.dims:
        count *= size
    expected = (count * _bits(tensor.data_type) + 7) // 8
    if min(tensor.dims, default=0) < 0 or len(data) != expected:
        what = f"tensor {tensor.name!r} should hold {expected} bytes by its shape but holds {len(data)}"
        raise ArtifactDamaged(what, where=str(path), fix=FIX)
    return data


def _listed(tensor: onnx.TensorProto, path: Path) -> bytes:
    from onnx import numpy_helper

    try:
        value = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactDamaged(f"tensor {tensor.name!r} cannot be read", where=str(path), fix=FIX) from error
    data: bytes = numpy_helper.from_array(value).raw_data
    return data


def _bits(code: int) -> int:
    import onnx

    names = onnx.TensorProto.DataType
    for suffix, bits in (("4E2M1", 4), ("INT4", 4), ("INT2", 2)):
        if names.Name(code).endswith(suffix):
            return bits
    return 8 * int(onnx.helper.tensor_dtype_to_np_dtype(code).itemsize)


def _external(tensor: onnx.TensorProto, path: Path) -> tuple[Path, int, int | None]:
    entries = {e.key: e.value for e in tensor.external_data}
    where = _text(entries.get("location", ""))
    folder = path.parent.resolve()
    target = (folder / where).resolve()
    if not where or Path(where).is_absolute() or ".." in Path(where).parts or not target.is_relative_to(folder):
        what = f"tensor {tensor.name!r} wants its data from {where!r}, outside the model's folder"
        raise ArtifactDamaged(what, where=str(path), fix="do not use this file: it tries to read other files")
    if not target.is_file():
        raise ArtifactDamaged(f"the data file {where!r} is not there", where=str(path), fix="keep it beside the .onnx")
    numbers = [_text(entries.get(key, default)) for key, default in (("offset", "0"), ("length", ""))]
    if not all(n.isascii() and (n.isdigit() or not n) for n in numbers):
        raise ArtifactDamaged(f"tensor {tensor.name!r} has a damaged place in {where!r}", where=str(path), fix=FIX)
    return target, int(numbers[0] or 0), int(numbers[1]) if numbers[1] else None


def _external_bytes(tensor: onnx.TensorProto, path: Path) -> bytes:
    target, offset, length = _external(tensor, path)
    size = target.stat().st_size
    if offset + (length or 0) > size:
        what = f"tensor {tensor.name!r} ends beyond the {size} bytes of {target.name!r}"
        raise ArtifactDamaged(what, where=str(path), fix=FIX)
    with target.open("rb") as file:
        file.seek(offset)
        return file.read(size - offset if length is None else length)


# --- which tensor is a scale of which ---------------------------------------------------------------------------------


def _scales(graphs: list[onnx.GraphProto]) -> dict[str, str]:
    """``{scale, zero point or table: the weight it belongs to}``; the weight is empty for scales of activations."""
    owner: dict[str, str] = {}
    for graph in graphs:
        weights = {i.name for i in graph.initializer}
        made_by = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            slots = _SCALE_SLOTS.get(node.op_type, {})
            for weight_slot, scale_slots in slots.items():
                weight = node.input[weight_slot] if weight_slot < len(node.input) else ""
                for name in (node.input[s] for s in scale_slots if s < len(node.input)):
                    if name in weights:
                        owner[name] = weight if weight in weights else owner.get(name, "")
            if node.op_type == "MatMulInteger":
                owner |= _product_scales(node, graph, weights, made_by)
            elif node.op_type == "MatMulNBits":
                owner |= _block_offsets(node, graph, weights, made_by)
    return owner


# Operator -> {input that holds the weight: inputs that hold its scales and zero points}, by their specifications.
_SCALE_SLOTS: dict[str, dict[int, tuple[int, ...]]] = {
    "DequantizeLinear": {0: (1, 2)},
    "QuantizeLinear": {0: (1, 2)},
    "MatMulNBits": {1: (2, 3)},
    "GatherBlockQuantized": {0: (2, 3)},
    "QLinearConv": {0: (1, 2), 3: (4, 5), 9: (6, 7)},
    "QLinearMatMul": {0: (1, 2), 3: (4, 5), 9: (6, 7)},
    "QLinearAdd": {0: (1, 2), 3: (4, 5), 9: (6, 7)},
    "QLinearMul": {0: (1, 2), 3: (4, 5), 9: (6, 7)},
    "QGemm": {0: (1, 2), 3: (4, 5), 9: (7, 8)},
    "MatMulInteger": {0: (2,), 1: (3,)},
    "ConvInteger": {0: (2,), 1: (3,)},
    "DynamicQuantizeMatMul": {1: (2, 3)},
    "MatMulIntegerToFloat": {0: (2, 4), 1: (3, 5)},
}


def _product_scales(
    node: onnx.NodeProto, graph: onnx.GraphProto, weights: set[str], made_by: dict[str, onnx.NodeProto]
) -> dict[str, str]:
    """The scale that multiplies an integer product: MatMulInteger -> Cast -> Mul(., Mul(activation scale, scale))."""
    weight = node.input[1]
    while weight not in weights and weight in made_by and made_by[weight].op_type == "Transpose":
        weight = made_by[weight].input[0]
    reached = {node.output[0]}
    found: dict[str, str] = {}
    for follower in graph.node:
        if follower.op_type == "Cast" and follower.input[0] in reached:
            reached.update(follower.output)
        elif follower.op_type == "Mul" and reached & set(follower.input):
            others = [name for name in follower.input if name not in reached]
            inner = [name for other in others if other in made_by for name in made_by[other].input]
            found |= {name: weight for name in (*others, *inner) if name in weights}
    return found


def _block_offsets(
    node: onnx.NodeProto, graph: onnx.GraphProto, weights: set[str], made_by: dict[str, onnx.NodeProto]
) -> dict[str, str]:
    """What is added to each block's values: MatMulNBits -> Add(., MatMul(sums of a block's inputs, offsets))."""
    found: dict[str, str] = {}
    for follower in graph.node:
        if follower.op_type != "Add" or node.output[0] not in follower.input:
            continue
        products = [made_by[name] for name in follower.input if name in made_by and made_by[name].op_type == "MatMul"]
        for product in products:
            sums = made_by.get(product.input[0])
            if sums is not None and sums.op_type == "ReduceSum" and product.input[1] in weights:
                found[product.input[1]] = node.input[1]
    return found


def _records(
    tensors: list[onnx.TensorProto],
    payloads: dict[int, tuple[int, str]],
    scales: dict[str, str],
    graphs: list[onnx.GraphProto],
) -> tuple[WeightRecord, ...]:
    blocks = {n.input[1]: n for g in graphs for n in g.node if n.op_type == "MatMulNBits"}
    attached: Counter[str] = Counter()
    for tensor in tensors:
        if scales.get(tensor.name):
            attached[scales[tensor.name]] += payloads[id(tensor)][0]
    records = []
    for tensor in tensors:
        owner, (size, digest) = scales.get(tensor.name), payloads[id(tensor)]
        if owner:
            continue
        shape, dtype = tuple(tensor.dims), _dtype(tensor.data_type)
        if tensor.name in blocks:
            shape, dtype = _block_shape(blocks[tensor.name], shape, dtype)
        records.append(
            WeightRecord(
                name=_text(tensor.name),
                shape=shape,
                dtype=dtype,
                bytes=0 if owner == "" else size,
                scale_bytes=attached[tensor.name] + (size if owner == "" else 0),
                digest=digest,
            )
        )
    return tuple(records)


def _block_shape(node: onnx.NodeProto, shape: tuple[int, ...], dtype: str) -> tuple[tuple[int, ...], str]:
    """Rows and columns of a weight that MatMulNBits packs into bytes, and its true type."""
    numbers: dict[str, Any] = {a.name: a.i for a in node.attribute}
    if {"N", "K", "bits"} <= numbers.keys():
        return (int(numbers["N"]), int(numbers["K"])), f"int{numbers['bits']}"
    return shape, dtype
