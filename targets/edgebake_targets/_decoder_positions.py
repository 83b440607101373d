"""A traced decoder's graph in which no shape depends on a value, and the position is looked up and not computed with.

What depends on the position alone, such as the angles of rotary embeddings (Su et al. 2021,
https://arxiv.org/abs/2104.09864), stands in tables of ``context`` rows that are computed here in float32: in float16
position 2049 and 2048 are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from edgebake.errors import StageFailed
from edgebake_targets._decoders import CACHES

if TYPE_CHECKING:
    import torch

_KEEP_VALUES = ("alias", "clone", "contiguous", "to", "unsqueeze", "_to_copy")


def tabulated(program: torch.export.ExportedProgram) -> tuple[torch.fx.GraphModule, torch.fx.Node, torch.fx.Node]:
    """A module of its own, ``(tokens (1, n), input_pos (1,)) -> logits (1, n, words)``, weights shared.

    With its nodes for the position of the first token and for those of all tokens, (n,). What writes to caches and
    attends over them is as it was traced. StageFailed where what depends on the position alone cannot be tabulated.
    """
    import torch

    module: Any = program.module(check_guards=False)
    graph: torch.fx.Graph = module.graph
    tokens, position = graph.find_nodes(op="placeholder")
    _drop_checks(graph)
    with graph.inserting_after(position):
        size = graph.call_function(torch.ops.aten.sym_size.int, (tokens, 1))
    with graph.inserting_after(size):
        rows = graph.call_function(_rows, (position, size))
    for node in (size, rows):
        node.meta["nn_module_stack"] = _outermost(graph)
    _tabulate(module, tokens, position, rows, context_of(module))
    return module, position, rows


def _rows(position: torch.Tensor, size: int) -> torch.Tensor:
    import torch

    return position + torch.arange(size)


def _outermost(graph: torch.fx.Graph) -> Any:
    stacks = (node.meta.get("nn_module_stack") for node in graph.nodes if node.op == "call_function")
    return next((dict(list(stack.items())[:1]) for stack in stacks if stack), {})


def context_of(module: torch.nn.Module) -> int:
    """Rows of the caches of a decoder as it was traced."""
    return next(int(buffer.shape[1]) for name, buffer in module.named_buffers() if name.endswith(CACHES))


def _drop_checks(graph: torch.fx.Graph) -> None:
    for node in list(graph.nodes):
        if "_assert" in str(node.target) or "sym_constrain" in str(node.target):
            graph.erase_node(node)


def unused_dropped(graph: torch.fx.Graph, writes: Any) -> None:
    """Without values that nothing reads but what ``writes`` to caches gives."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and node.target is not writes:
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
