"""A traced decoder's graph in terms that Core ML runs well; what it computes stays the same.

* A cache is a state of (1, heads, context, width), written by ``slice_update`` at the position that a call is told, and
  attention runs over all of its rows under a mask: no shape depends on a value.
* Heads that share keys and values become rows of one query, (1, shared heads, group * tokens, width), instead of keys
  and values being repeated (grouped-query attention, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245). The fused
  operator of iOS 18 knows no scale but 1/sqrt(width): another one is multiplied into the query.
* What depends on the position alone is looked up in tables (``_decoder_positions``).
* ``x * rsqrt(mean(x^2) + eps)`` (RMSNorm, Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) becomes the layer
  normalisation of (x, -x), whose mean is 0 and whose variance is mean(x^2): squares of x above 255 leave float16, and
  the fused operator sums them in a wider type.
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgebake_targets._decoder_positions import context_of, tabulated, unused_dropped
from edgebake_targets._decoders import CACHES, heads_first

if TYPE_CHECKING:
    import torch

NAMESPACE = "edgebake_coreml"
WRITE = "write_rows"
_SCHEMA = f"{WRITE}(Tensor cache, Tensor rows, Tensor position) -> Tensor"
_HIDDEN = -4e4  # added to scores of rows that a token does not see: finite in float16, and exp gives 0 exactly


@lru_cache
def register() -> Any:
    """Make ``torch.ops.edgebake_coreml``; what is returned, torch's library of it, keeps it."""
    import torch

    made: Any = torch.library.Library
    library = made(NAMESPACE, "DEF")
    library.define(_SCHEMA)
    library.impl(WRITE, _written, "CPU")
    library.impl(WRITE, lambda cache, _rows, _position: torch.empty_like(cache), "Meta")
    return library


def _written(cache: torch.Tensor, rows: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """A copy of ``cache``, (1, heads, context, width), with ``rows``, (1, heads, n, width), from ``position`` (1,)."""
    start, made = int(position[0]), cache.clone()
    made[:, :, start : start + rows.shape[2]] = rows
    return made


def translate_write(context: Any, node: Any) -> None:
    """``write_rows`` in MIL."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    cache, rows, position = _get_inputs(context, node, expected=3)
    zero = np.zeros(1, np.int32)
    begin = mb.concat(values=[zero, zero, position, zero], axis=0)
    last = mb.add(x=position, y=np.int32(rows.shape[2]))
    sizes = [np.array([cache.shape[axis]], np.int32) for axis in (0, 1, 3)]
    end = mb.concat(values=[sizes[0], sizes[1], last, sizes[2]], axis=0)
    context.add(mb.slice_update(x=cache, update=rows, begin=begin, end=end, name=node.name))


def rewritten(program: torch.export.ExportedProgram) -> torch.fx.GraphModule:
    """A module of its own, ``(tokens (1, n), input_pos (1,)) -> logits (1, n, words)``, to be exported for any n.

    StageFailed where what depends on the position alone cannot be tabulated.
    """
    register()
    module, position, rows = tabulated(program)
    graph = module.graph
    _merge_norms(graph)
    _use_states(module, position, rows, context_of(module))
    unused_dropped(graph, put)
    graph.lint()
    module.recompile()
    return module


def _merge_norms(graph: torch.fx.Graph) -> None:
    import torch

    aten = torch.ops.aten
    for node in list(graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
        for x, other in (node.args, node.args[::-1]):
            epsilon = _epsilon_of_rms(x, other)
            if epsilon is not None:
                with graph.inserting_before(node):
                    normed = graph.call_function(_normalised, (x, epsilon))
                normed.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
                node.replace_all_uses_with(normed)
                break


def _epsilon_of_rms(x: Any, other: Any) -> float | None:
    """``eps`` where ``other`` is ``rsqrt(mean(x ** 2, -1, keepdim) + eps)``."""
    import torch

    aten = torch.ops.aten
    chain: list[Any] = []
    for target in (aten.rsqrt.default, aten.add.Tensor, aten.mean.dim, aten.pow.Tensor_Scalar):
        if not isinstance(other, torch.fx.Node) or other.target is not target:
            return None
        chain.append(other)
        other = other.args[0]
    _, added, mean, power = chain
    last = x.meta["val"].dim() - 1 if isinstance(x, torch.fx.Node) and "val" in x.meta else None
    axes = [axis for axis in mean.args[1] if axis in (-1, last)]
    fits = other is x and power.args[1] == 2 and len(axes) == len(mean.args[1]) == 1 and mean.args[2:3] == (True,)
    return float(added.args[1]) if fits and isinstance(added.args[1], float | int) else None


def _normalised(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    import torch

    width = x.shape[-1]
    return torch.nn.functional.layer_norm(torch.cat([x, -x], -1), (2 * width,), eps=epsilon)[..., :width]


def _use_states(module: Any, position: torch.fx.Node, rows: torch.fx.Node, context: int) -> None:
    import torch

    heads_first(module)
    graph, masks = module.graph, {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).endswith(CACHES):
            node.meta.pop("val", None)
        elif node.target is torch.ops.edgebake.update_cache.default:
            value, cache, _ = node.args
            node.target, node.args = put, (cache, value, position)
        elif node.target is torch.ops.edgebake.cached_attention.default:
            query, keys, values, _, scale = node.args
            group = query.meta["val"].shape[2] // _shape(module, keys.target)[1]
            if group not in masks:
                with graph.inserting_after(rows):
                    masks[group] = graph.call_function(_mask, (rows, context, group))
                masks[group].meta["nn_module_stack"] = rows.meta["nn_module_stack"]
            node.target, node.args = _attend, (query, keys, values, masks[group], scale)


def _shape(module: Any, name: Any) -> tuple[int, ...]:
    return tuple(operator.attrgetter(str(name))(module).shape)


def put(cache: torch.Tensor, value: torch.Tensor, position: torch.Tensor) -> None:
    """Write ``value``, (1, tokens, heads, width), into ``cache``, (1, heads, context, width), from ``position`` on."""
    import torch

    cache.copy_(getattr(torch.ops, NAMESPACE).write_rows(cache, value.transpose(1, 2), position))


def _mask(rows: torch.Tensor, context: int, group: int) -> torch.Tensor:
    """(1, 1, group * n, context): 0 where a token at one of ``rows``, (n,), sees a row of the cache."""
    import torch

    hidden = torch.arange(context)[None] > rows[:, None]  # a product: of where the converter stores both sides whole
    return (hidden.to(torch.float32) * _HIDDEN).repeat(group, 1)[None, None]


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """(1, tokens, heads, width) each for query and result; caches (1, shared heads, context, width)."""
    import torch

    _, tokens, heads, width = query.shape
    shared = keys.shape[1]
    grouped = query.transpose(1, 2).reshape(1, shared, heads // shared * tokens, width)
    if not math.isclose(scale * math.sqrt(width), 1.0, rel_tol=1e-6):
        grouped = grouped * (scale * math.sqrt(width))
    found = torch.nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return found.reshape(1, heads, tokens, values.shape[-1]).transpose(1, 2)
