"""A traced decoder's graph in terms that Core ML runs well; what it computes stays the same.

* A cache is a state of (1, heads, context, width), written by ``slice_update`` at the position that a call is told, and
  attention runs over all of its rows under a mask: no shape depends on a value.
* Heads that share keys and values become rows of one query, (1, shared heads, group * tokens, width), instead of keys
  and values being repeated (grouped-query attention, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245). The fused
  operator of iOS 18 knows no scale but 1/sqrt(width): another one is multiplied into the query.
* What depends on the position alone, such as the angles of rotary embeddings (Su et al. 2021,
  https://arxiv.org/abs/2104.09864), is looked up in tables of ``context`` rows that are computed here in float32:
  in float16 position 2049 and 2048 are the same.
* ``x * rsqrt(mean(x^2) + eps)`` (RMSNorm, Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467) becomes the layer
  normalisation of (x, -x), whose mean is 0 and whose variance is mean(x^2): squares of x above 255 leave float16, and
  the fused operator sums them in a wider type.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake_targets._decoders import CACHES

if TYPE_CHECKING:
    import torch

NAMESPACE = "edgebake_coreml"
WRITE = "write_rows"
_SCHEMA = f"{WRITE}(Tensor cache, Tensor rows, Tensor position) -> Tensor"
_HIDDEN = -4e4  # added to scores of rows that a token does not see: finite in float16, and exp gives 0 exactly
_KEEP_VALUES = ("alias", "clone", "contiguous", "to", "unsqueeze", "_to_copy")


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
    import torch

    register()
    module: Any = program.module(check_guards=False)
    graph: torch.fx.Graph = module.graph
    tokens, position = graph.find_nodes(op="placeholder")
    context = _context(module)
    _drop_checks(graph)
    with graph.inserting_after(position):
        size = graph.call_function(torch.ops.aten.sym_size.int, (tokens, 1))
    with graph.inserting_after(size):
        rows = graph.call_function(_rows, (position, size))
    for node in (size, rows):
        node.meta["nn_module_stack"] = _outermost(graph)
    _tabulate(module, tokens, position, rows, context)
    _merge_norms(graph)
    _use_states(module, position, rows, context)
    unused_dropped(graph)
    graph.lint()
    module.recompile()
    return module  # type: ignore[no-any-return]


def _rows(position: torch.Tensor, size: int) -> torch.Tensor:
    import torch

    return position + torch.arange(size)


def _outermost(graph: torch.fx.Graph) -> Any:
    stacks = (node.meta.get("nn_module_stack") for node in graph.nodes if node.op == "call_function")
    return next((dict(list(stack.items())[:1]) for stack in stacks if stack), {})


def _context(module: torch.nn.Module) -> int:
    return next(int(buffer.shape[1]) for name, buffer in module.named_buffers() if name.endswith(CACHES))


def _drop_checks(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        if "_assert" in str(node.target) or "sym_constrain" in str(node.target):
            graph.erase_node(node)


def unused_dropped(graph: torch.fx.Graph) -> None:
    """Values that nothing reads; what writes to a cache is read by nobody either."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and node.target is not put:
            graph.erase_node(node)


def _tabulate(module: Any, tokens: torch.fx.Node, position: torch.fx.Node, rows: torch.fx.Node, context: int) -> None:
    """Look up in tables what the network computes from the position and its own constants."""
    import torch

    graph = module.graph
    known, free = _told_by_position(module, tokens, position)
    edge = [n for n in known if _is_float(n) and any(user not in known for user in n.users)]
    roots = list(dict.fromkeys(_without_views(node) for node in edge))
    if not roots:
        return
    values = _evaluated(module, known | free, tokens, position, context)
    for number, root in enumerate(roots):
        value = values[root]
        axes = [a for a, n in enumerate(value.shape) if n == context and root.meta["val"].shape[a] is not context]
        if len(axes) != 1:
            raise StageFailed(
                f"{root.name} depends on the position in a way that no table of {context} rows holds",
                where="lower",
                fix="use executorch-xnnpack for this network",
            )
        module.register_buffer(f"position_table_{number}", value.contiguous(), persistent=False)
        with graph.inserting_before(root):
            table = graph.get_attr(f"position_table_{number}")
            found = graph.call_function(torch.ops.aten.index_select.default, (table, axes[0], rows))
        table.meta["val"], found.meta["val"] = value, root.meta["val"]
        found.meta["nn_module_stack"] = root.meta.get("nn_module_stack", {})
        root.replace_all_uses_with(found)


def _told_by_position(
    module: torch.nn.Module, tokens: torch.fx.Node, position: torch.fx.Node
) -> tuple[dict[torch.fx.Node, None], dict[torch.fx.Node, None]]:
    """Nodes that depend on the position and on constants alone, and those on constants and sizes alone; in order."""
    import torch

    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known: dict[torch.fx.Node, None] = {position: None}
    free: dict[torch.fx.Node, None] = {}
    for node in module.graph.nodes:  # type: ignore[union-attr]
        if node.op == "get_attr":
            if node.target not in parameters and not str(node.target).endswith(CACHES):
                free[node] = None
        elif node.op == "call_function" and node.target is not _rows:
            sized = node.target is torch.ops.aten.sym_size.int and node.args[0] is tokens
            inputs = [] if sized else node.all_input_nodes
            if all(given in known or given in free for given in inputs):
                (known if any(given in known for given in inputs) else free)[node] = None
    return known, free


def _is_float(node: torch.fx.Node) -> bool:
    dtype = getattr(node.meta.get("val"), "dtype", None)
    return dtype is not None and bool(dtype.is_floating_point)


def _without_views(node: torch.fx.Node) -> torch.fx.Node:
    """Where the values of ``node`` were computed."""
    while str(node.target).removeprefix("aten.").split(".")[0] in _KEEP_VALUES:
        source = node.all_input_nodes[0]
        if not _is_float(source):
            break
        node = source
    return node


def _evaluated(
    module: Any, wanted: Iterable[torch.fx.Node], tokens: torch.fx.Node, position: torch.fx.Node, context: int
) -> dict[torch.fx.Node, Any]:
    """Values for every position from 0 to ``context`` - 1, in the place of those of one call's tokens."""
    import torch

    chosen = set(wanted)
    varies = any(node.target is torch.ops.aten.sym_size.int and node.args[0] is tokens for node in chosen)
    values: dict[torch.fx.Node, Any] = {position: torch.zeros(1) if varies else torch.arange(context)}
    values[position] = values[position].to(torch.int64)
    with torch.no_grad():
        for node in module.graph.nodes:
            if node not in chosen or node is position:
                continue
            if node.op == "get_attr":
                values[node] = operator.attrgetter(node.target)(module)
            elif node.target is torch.ops.aten.sym_size.int and node.args[0] is tokens:
                values[node] = context
            else:
                given = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*given[0], **given[1])
    return values


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

    graph, masks = module.graph, {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).endswith(CACHES):
            owner, _, name = str(node.target).rpartition(".")
            _, _, heads, width = node.meta["val"].shape if "val" in node.meta else _shape(module, node.target)
            module.get_submodule(owner).register_buffer(name, torch.zeros(1, heads, context, width), persistent=False)
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
