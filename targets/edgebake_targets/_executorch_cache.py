"""Keys and values of a decoder in int8 in a .pte: a scale and a zero point for each token and head.

As ExecuTorch's own recipe of a quantised cache has it (``QuantizedKVCache`` and ``QuantizedSDPA`` of
examples/models/llama/source_transformation, asymmetric): a row is quantised as it is written
(``q = round(x / scale) + zero``), and attention works on the integers, queries quantised alike
(``llama::custom_quantized_sdpa``). Of head width w a token's head takes w + 5 bytes instead of 4 w.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.export.graph_signature import ExportGraphSignature

_LOW, _HIGH = -128, 127
_SCALES, _ZEROS = "_scales", "_zero_points"


@dataclass(frozen=True)
class _Rows:
    """Placeholders of a cache, (1, context, heads, width) int8, and of (1, context, heads, 1) float32 and int8."""

    values: torch.fx.Node
    scales: torch.fx.Node
    zeros: torch.fx.Node


def in_int8(
    program: torch.export.ExportedProgram, graph: torch.fx.Graph
) -> tuple[ExportGraphSignature, dict[str, Any]]:
    """Rewrite ``graph``, a copy of ``program``'s, to int8 caches; its signature and constants, which are new."""
    import torch
    from torch.ao.quantization.fx._decomposed import quantized_decomposed_lib  # noqa: F401  registers its operators

    signature, constants = copy.deepcopy(program.graph_signature), dict(program.constants)
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    own = torch.ops.edgebake
    names = {n.args[1].name for n in graph.find_nodes(op="call_function", target=own.update_cache.default)}
    caches: dict[str, _Rows] = {}
    fake = next(iter(nodes.values())).meta["val"].fake_mode
    fake.shape_env.pending_fresh_unbacked_symbols.clear()  # what lowering the same program before left there
    for spec in list(signature.input_specs):
        if spec.arg.name in names:
            caches[spec.arg.name] = _cache(graph, nodes[spec.arg.name], spec, signature, constants)
    for node in list(graph.nodes):
        if node.target is own.update_cache.default:
            _write(graph, node, caches[node.args[1].name])
        elif node.target is own.cached_attention.default:
            _attend(graph, node, caches[node.args[1].name], caches[node.args[2].name])
    return signature, constants


def _cache(
    graph: torch.fx.Graph,
    node: torch.fx.Node,
    spec: Any,
    signature: ExportGraphSignature,
    constants: dict[str, Any],
) -> _Rows:
    """An int8 buffer in the place of the float one of ``spec``, and two more behind it."""
    import torch
    from torch.export.graph_signature import InputSpec, TensorArgument

    held: torch.Tensor = constants[spec.target]
    fake = node.meta["val"].fake_mode
    constants[spec.target] = torch.zeros(held.shape, dtype=torch.int8)
    node.meta = {**node.meta, "val": fake.from_tensor(constants[spec.target], static_shapes=True)}
    made = [node]
    for ending, dtype in ((_SCALES, torch.float32), (_ZEROS, torch.int8)):
        buffer = torch.ones((*held.shape[:-1], 1), dtype=dtype)
        constants[spec.target + ending] = buffer
        with graph.inserting_after(made[-1]):
            beside = graph.placeholder(node.name + ending)
        beside.meta = {**node.meta, "val": fake.from_tensor(buffer, static_shapes=True)}
        place = next(i for i, s in enumerate(signature.input_specs) if s.arg.name == made[-1].name) + 1
        signature.input_specs.insert(
            place,
            InputSpec(
                kind=spec.kind, arg=TensorArgument(name=beside.name), target=spec.target + ending, persistent=False
            ),
        )
        made.append(beside)
    return _Rows(*made)


def _write(graph: torch.fx.Graph, node: torch.fx.Node, rows: _Rows) -> None:
    """The rows of ``node``, which writes them in float, as integers into ``rows``."""
    import torch

    value, _, start = node.args
    update = torch.ops.llama.update_cache.default
    with graph.inserting_before(node):
        for part, cache in zip(_quantised(graph, value), (rows.values, rows.scales, rows.zeros), strict=True):
            _in_place_of(graph, node, update, part, cache, start)
    graph.erase_node(node)


def _attend(graph: torch.fx.Graph, node: torch.fx.Node, keys: _Rows, values: _Rows) -> None:
    """Causal attention over integers in the place of ``node``."""
    import torch

    query, _, _, start, scale = node.args
    with graph.inserting_before(node):
        integers, scales, zeros = _quantised(graph, query)
        beside = (zeros, scales, keys.zeros, keys.scales, values.zeros, values.scales)
        attend = torch.ops.llama.custom_quantized_sdpa.default
        given = (integers, keys.values, values.values, start, None, 0.0, True, scale, *beside)
        made = _in_place_of(graph, node, attend, *given)
    node.replace_all_uses_with(made)
    graph.erase_node(node)


def _quantised(graph: torch.fx.Graph, value: Any) -> tuple[torch.fx.Node, torch.fx.Node, torch.fx.Node]:
    """Of ``value``, (1, tokens, heads, width) float32: int8 integers, float32 scales, int8 zero points."""
    import operator

    import torch

    ops, aten = torch.ops.quantized_decomposed, torch.ops.aten
    both = _called(graph, value, ops.choose_qparams_per_token_asymmetric.default, value, torch.int8)
    scale, zero = (_called(graph, value, operator.getitem, both, index) for index in (0, 1))
    bounds = (_LOW, _HIGH, torch.int8)
    integers = _called(graph, value, ops.quantize_per_token.default, value, scale, zero, *bounds)
    scales = _called(graph, value, aten.to.dtype, scale, torch.float32)
    return integers, scales, _called(graph, value, aten.to.dtype, zero, torch.int8)


def _called(graph: torch.fx.Graph, like: Any, target: Any, *args: Any) -> torch.fx.Node:
    """A call with the value that it has on fake tensors; the rest of what is known of it is as of ``like``."""
    import torch

    made = graph.call_function(target, args)
    fake: Any = like.meta["val"].fake_mode
    given = torch.fx.node.map_arg(args, lambda node: node.meta["val"])
    with fake, fake.shape_env.ignore_fresh_unbacked_symbols():
        made.meta = {**like.meta, "val": target(*given)}
    return made


def _in_place_of(graph: torch.fx.Graph, node: torch.fx.Node, target: Any, *args: Any) -> torch.fx.Node:
    """A call that gives a value like ``node``'s."""
    made = graph.call_function(target, args)
    made.meta = dict(node.meta)
    return made
