"""Weight formats of ONNX graphs: int8 per channel, dynamic int8 products, 4-bit blocks, half storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgebake import lattice
from edgebake import scheme as schemes
from edgebake.errors import Problem, RecipeError, StageFailed
from edgebake.types import Assignment, rule_for
from edgebake_targets._onnx_graph import MICROSOFT, WEIGHT_SLOT, Graph, WeightUse, attribute, producers, stored_type

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

FLOAT = 1  # TensorProto.FLOAT


def compress(model: onnx.ModelProto, uses: list[WeightUse], assignment: Assignment) -> None:
    """Rewrite every use whose module has a scheme without static activations; others are left to the caller."""
    graph = Graph(model)
    for use in uses:
        scheme = schemes.parse(assignment.schemes.get(use.module, "fp32"))
        if scheme.name == "fp32" or scheme.needs_calibration:
            continue
        if scheme.family == "float":
            _store_half(graph, use)
        elif scheme.group:
            _multiply_blocks(graph, use, scheme)
        elif scheme.dynamic:
            _multiply_int8(graph, use)
        else:
            _store_int8(graph, use)
    graph.commit()
    domains = {o.domain for o in model.opset_import}
    if MICROSOFT not in domains:
        model.opset_import.add(domain=MICROSOFT, version=1)


# --- int8 per channel -------------------------------------------------------------------------------------------------


def symmetric_int8(weight: NDArray[Any], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """``(q, scale)`` with ``weight ~ q * scale``, one scale per index of ``axis``; q in -127..127, scale float32 (n,).

    Symmetric and without -128, as the integer kernels of ONNX Runtime want it. A channel of zeros gets scale 1; one
    that already is such integers times a scale keeps both.
    """
    import numpy as np

    others = tuple(a for a in range(weight.ndim) if a != axis)
    peak = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)
    q = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
    rows = np.moveaxis(q, axis, 0)  # a view of q
    kept, steps, found = lattice.integers(np.moveaxis(weight, axis, 0).reshape(len(rows), -1), 8)
    rows[found] = kept[found].reshape(-1, *rows.shape[1:])
    return q, np.where(found, steps, scale.reshape(-1))


def _quantized(graph: Graph, use: WeightUse) -> tuple[str, str]:
    # The axis is part of the name: a table shared by an embedding and a head is stored once where both want rows.
    name, scale = f"{use.weight}_int8_{use.output_axis}", f"{use.weight}_scale_{use.output_axis}"
    if name not in graph.initializers:
        q, s = symmetric_int8(graph.value(use.weight), use.output_axis)
        graph.add(name, q)
        graph.add(scale, s)
    return name, scale


def _store_int8(graph: Graph, use: WeightUse) -> None:
    if use.kind == "embedding":
        _look_up_int8(graph, use)
        return
    name, scale = _quantized(graph, use)
    made = f"{name}_float_for_{use.node.output[0]}"
    inputs = [name, scale]
    graph.put_before(use.node, graph.make(use.node, "DequantizeLinear", inputs, [made], axis=use.output_axis))
    if use.transposed:
        graph.put_before(use.node, graph.make(use.node, "Transpose", [made], [f"{made}_t"], perm=[1, 0]))
        made += "_t"
    use.node.input[WEIGHT_SLOT[use.node.op_type]] = made


def _look_up_int8(graph: Graph, use: WeightUse) -> None:
    # Dequantizing in front of Gather would expand the whole table on every call; this expands the rows looked up.
    node, output = use.node, use.node.output[0]
    name, scale = _quantized(graph, use)
    columns = f"{scale}_rows"
    graph.add(columns, graph.value(scale).reshape(-1, *[1] * (len(graph.initializers[name].dims) - 1)))
    rows, factors, floats = (f"{output}_{part}" for part in ("rows", "scales", "float"))
    graph.put_before(
        node,
        graph.make(node, "Gather", [name, node.input[1]], [rows], name=node.name),
        graph.make(node, "Gather", [columns, node.input[1]], [factors]),
        graph.make(node, "Cast", [rows], [floats], to=FLOAT),
    )
    graph.replace(node, graph.make(node, "Mul", [floats, factors], [output], name=f"{node.name}_scaled"))


def _multiply_int8(graph: Graph, use: WeightUse) -> None:
    # MatMulInteger -> Cast -> Mul(Mul) is the pattern that ONNX Runtime fuses into DynamicQuantizeMatMul.
    if use.kind != "linear" or not _plain(use.node):
        return
    node, output = use.node, use.node.output[0]
    name, scale = _quantized(graph, use)
    q, q_scale, q_zero = _quantize_input(graph, node)
    product, floats, factors, scaled = (f"{output}_{part}" for part in ("int32", "float", "scales", "scaled"))
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    graph.put_before(
        node,
        graph.make(node, "MatMulInteger", [q, _columns(graph, use, name), q_zero], [product], name=node.name),
        graph.make(node, "Cast", [product], [floats], to=FLOAT),
        graph.make(node, "Mul", [q_scale, scale], [factors]),
    )
    _finish(graph, node, ("Mul", [floats, factors]), scaled, bias)


def _columns(graph: Graph, use: WeightUse, name: str) -> str:
    """The int8 weight as (K, N); turned when it is stored as rows."""
    if use.output_axis == 1:
        return name
    turned = f"{name}_columns"
    if sum(1 for node in graph.model.graph.node if use.weight in node.input) > 1:
        local = f"{turned}_for_{use.node.output[0]}"
        graph.put_before(use.node, graph.make(use.node, "Transpose", [name], [local], perm=[1, 0]))
        return local
    return graph.add(turned, graph.value(name).T)


def _quantize_input(graph: Graph, node: onnx.NodeProto) -> tuple[str, str, str]:
    data = node.input[0]
    names = (f"{data}_uint8", f"{data}_uint8_scale", f"{data}_uint8_zero")
    made = (n for nodes in graph.before.values() for n in nodes)
    if not any(names[0] in n.output for n in made):
        graph.put_before(node, graph.make(node, "DynamicQuantizeLinear", [data], list(names)))
    return names


def _plain(node: onnx.NodeProto) -> bool:
    """Gemm without factors and without a transposed input is a product plus a bias."""
    if node.op_type != "Gemm":
        return True
    return attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1.0 and not attribute(node, "transA", 0)


def _finish(
    graph: Graph, node: onnx.NodeProto, last: tuple[str, list[str]], inner: str, bias: str, **more: Any
) -> None:
    """Let ``last`` produce ``node``'s output, through ``inner`` and an Add where a Gemm had a bias."""
    op_type, inputs = last
    output = node.output[0]
    if not bias:
        graph.replace(node, graph.make(node, op_type, inputs, [output], **more))
        return
    graph.put_before(node, graph.make(node, op_type, inputs, [inner], **more))
    graph.replace(node, graph.make(node, "Add", [inner, bias], [output]))


# --- 4-bit blocks -----------------------------------------------------------------------------------------------------


def symmetric_int4_blocks(weight: NDArray[Any], block: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Rows (N, K) as MatMulNBits wants them: packed (N, K / block, block / 2) and scales (N * K / block,) float32.

    Two values a byte, the first in the low half, implied zero point 8 (ONNX Runtime, docs/ContribOperators.md).
    The value of largest magnitude of a block becomes -8, so that all 16 levels are used. A block that already is such
    integers times a scale keeps both.
    """
    import numpy as np

    rows, columns = weight.shape
    blocks = weight.reshape(rows, columns // block, block).astype(np.float32)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)
    scale = np.where(peak != 0, peak / -8.0, 1.0).astype(np.float32)
    signed, scale = rounded_blocks(blocks, scale, 4)
    q: NDArray[Any] = (signed + 8).astype(np.uint8)
    return q[..., 0::2] | (q[..., 1::2] << 4), scale.reshape(-1)


def rounded_blocks(
    blocks: NDArray[np.float32], scale: NDArray[np.float32], bits: int
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """Integers for ``blocks`` (rows, groups, size) at ``scale`` (rows, groups, 1), and their scales.

    A block that already is integers times a scale keeps both.
    """
    import numpy as np

    kept, steps, found = lattice.integers(blocks.reshape(-1, blocks.shape[-1]), bits)
    at = found.reshape(scale.shape)
    scale = np.where(at, steps.reshape(scale.shape), scale)
    low = -(2 ** (bits - 1))
    return np.where(at, kept.reshape(blocks.shape), np.clip(np.rint(blocks / scale), low, -low - 1)), scale


def _multiply_blocks(graph: Graph, use: WeightUse, scheme: schemes.Scheme) -> None:
    if use.kind != "linear" or not _plain(use.node) or scheme.group is None:
        return
    node, output = use.node, use.node.output[0]
    name, scale = f"{use.weight}_int4_{scheme.group}", f"{use.weight}_int4_{scheme.group}_scale"
    weight = graph.value(use.weight)
    rows = weight if use.output_axis == 0 else weight.T
    if name not in graph.initializers:
        packed, scales = symmetric_int4_blocks(rows, scheme.group)
        graph.add(name, packed)
        graph.add(scale, scales)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    more = {
        "domain": MICROSOFT,
        "K": rows.shape[1],
        "N": rows.shape[0],
        "bits": scheme.weight_bits,
        "block_size": scheme.group,
        # 4: activations are quantized to int8 per block inside the kernel; 1: float32 products.
        "accuracy_level": 4 if scheme.dynamic else 1,
    }
    last = ("MatMulNBits", [node.input[0], name, scale])
    _finish(graph, node, last, f"{output}_product", bias, name=node.name, **more)


def check_blocks(uses: list[WeightUse], model: onnx.ModelProto, assignment: Assignment) -> None:
    """RecipeError naming every linear layer whose input width is not a multiple of its scheme's group."""
    shapes = {i.name: tuple(i.dims) for i in model.graph.initializer}
    problems = []
    for use in uses:
        name = assignment.schemes.get(use.module, "fp32")
        group, width = schemes.parse(name).group, shapes[use.weight][1 - use.output_axis]
        if group and use.kind == "linear" and width % group:
            what = f"{name} needs an input width that is a multiple of {group}; module {use.module!r} has {width}"
            problems.append(Problem(what=what, where="compress", fix=rule_for(use.module, "fp32")))
    if problems:
        raise RecipeError(problems)


# --- half storage -----------------------------------------------------------------------------------------------------


def _store_half(graph: Graph, use: WeightUse) -> None:
    from edgebake_targets._onnx_half import to_half

    node, output = use.node, use.node.output[0]
    name = graph.add(f"{use.weight}_half", to_half(graph.value(use.weight)))
    if use.kind == "embedding":
        rows = f"{output}_half"
        graph.put_before(node, graph.make(node, "Gather", [name, node.input[1]], [rows], name=node.name))
        graph.replace(node, graph.make(node, "Cast", [rows], [output], to=FLOAT))
        return
    made = f"{name}_float_for_{output}"
    graph.put_before(node, graph.make(node, "Cast", [name], [made], to=FLOAT))
    if use.transposed:
        graph.put_before(node, graph.make(node, "Transpose", [made], [f"{made}_t"], perm=[1, 0]))
        made += "_t"
    node.input[WEIGHT_SLOT[node.op_type]] = made


# --- no silent fallback -----------------------------------------------------------------------------------------------


def check_compressed(
    model: onnx.ModelProto, planned: Mapping[str, list[str]], assignment: Assignment, live: frozenset[str]
) -> None:
    """StageFailed naming every module that has a scheme, is used, and yet is not stored in that scheme's type.

    ``planned`` maps module to the names of the nodes that read its weight before compression.
    """
    by_name = {node.name: node for node in model.graph.node}
    made_by = producers(model)
    left = []
    for module, name in assignment.schemes.items():
        scheme = schemes.parse(name)
        if name == "fp32" or (module not in planned and f"{module}.weight" not in live):
            continue
        wanted = "float16" if scheme.family == "float" else f"int{scheme.weight_bits}"
        nodes = [by_name.get(n) for n in planned.get(module, [])]
        types = [stored_type(model, n, made_by) if n is not None else "missing" for n in nodes] or ["float32"]
        if any(found.removeprefix("u") != wanted for found in types):
            left.append(f"{module} ({name}: stored as {'/'.join(sorted(set(types)))})")
    if left:
        raise StageFailed(
            f"{len(left)} modules did not come out compressed: {', '.join(left[:8])}",
            fix="give them fp32 in compress.modules, or a scheme that this target has for their operators",
        )
