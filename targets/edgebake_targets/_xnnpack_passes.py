"""The preparation of XNNPACK's partitions without what cannot change them: it was most of a decoder's lowering.

Before ExecuTorch's backend writes a partition it runs seventeen passes over it, each of which evaluates the partition
again; and each partition that is taken out has the whole program's graph copied and its code generated, so that the
time grows with the square of the layers. The file is the same to the byte.
"""

from __future__ import annotations

import operator
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from edgebake_targets._executorch import op_name

if TYPE_CHECKING:
    import torch
    from torch.export import ExportedProgram

# What none of the seventeen passes of ExecuTorch 1.4 looks for: they convert, fuse or decompose matrix products,
# convolutions, normalisations, poolings, padding, ReLUs, resampling, attention, long concatenations and copies.
_PLAIN = frozenset(
    f"aten.{name}"
    for name in (
        *(
            "abs",
            "add",
            "cat",
            "ceil",
            "div",
            "exp",
            "floor",
            "gelu",
            "log",
            "maximum",
            "mean",
            "minimum",
            "mul",
            "neg",
        ),
        *("permute_copy", "pow", "rsqrt", "sigmoid", "slice_copy", "sqrt", "sub", "tanh", "unsqueeze_copy"),
    )
)
_JOINED = 5
# A product with nothing but its quantisation: a pass acts where an activation or a normalisation is beside it, or where
# the product was decomposed.
_PRODUCT = ("aten.linear", "getitem")
_QUANTISATION = ("choose_qparams", "quantize_", "dequantize_")


@contextmanager
def needed_only() -> Iterator[None]:
    """Lowering inside skips the passes over partitions that none can change, and sorts the program where it stands."""
    from executorch.backends.xnnpack import xnnpack_preprocess
    from executorch.exir import lowered_backend_module

    preprocess: Any = xnnpack_preprocess
    lowered: Any = lowered_backend_module
    manager, sort = preprocess.XNNPACKPassManager, lowered.legalize_graph

    class Needed(manager):  # type: ignore[misc, valid-type]
        def transform(self) -> ExportedProgram:
            program: ExportedProgram = (
                self.exported_program if unchanged(self.exported_program) else super().transform()
            )
            return program

    preprocess.XNNPACKPassManager, lowered.legalize_graph = Needed, sort_in_place
    try:
        yield
    finally:
        preprocess.XNNPACKPassManager, lowered.legalize_graph = manager, sort


def forget() -> None:
    """Let go of programs that were partitioned: ExecuTorch keeps nodes of them, and through those their weights."""
    from executorch.exir.backend import utils

    utils.is_same_node.cache_clear()
    for name, module in list(sys.modules.items()):
        why = getattr(module, "why", None) if name.startswith("executorch.backends.xnnpack") else None
        if isinstance(why, utils.WhyNoPartition):
            why.node = None


def unchanged(program: ExportedProgram) -> bool:
    """Whether no pass of the backend finds anything to change in the partition ``program``."""
    nodes = list(program.graph.nodes)
    if any(node.op not in ("placeholder", "call_function", "output") or "custom" in node.meta for node in nodes):
        return False
    names = {op_name(node) for node in nodes if node.op == "call_function"}
    quantised = {name for name in names if name.rpartition(".")[2].startswith(_QUANTISATION)}
    known = names <= _PLAIN or (bool(quantised) and names - quantised <= set(_PRODUCT))
    return known and not any(_channels_last(node) or _long(node) for node in nodes)


def _long(node: torch.fx.Node) -> bool:
    """Whether ``node`` joins more tensors than XNNPACK's operator takes."""
    given: Any = node.args
    return node.op == "call_function" and op_name(node) == "aten.cat" and len(given[0]) > _JOINED


def _channels_last(node: torch.fx.Node) -> bool:
    """Whether a copy in another order of dimensions may be wanted around ``node``."""
    from executorch.backends.xnnpack._passes.channels_last_tagged_reshape_pass import ChannelsLastTaggedReshapePass

    value = node.meta.get("val")
    return getattr(value, "ndim", 0) == 4 and bool(ChannelsLastTaggedReshapePass._is_nhwc_tensor(value))


def sort_in_place(module: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """What ``torch.fx.passes.tools_common.legalize_graph`` makes of ``module``'s graph, without copying a node.

    Kahn 1962, "Topological sorting of large networks": first in, first out, arithmetic on sizes before all else. The
    module's code is left as it was: lowering reads graphs, and what follows it compiles them anew.
    """
    graph, urgent = module.graph, _urgent()
    waits = {node: len(node.all_input_nodes) for node in graph.nodes}
    queue = deque(node for node, count in waits.items() if not count)
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for user in node.users:
            waits[user] -= 1
            if not waits[user]:
                (queue.appendleft if user.op == "call_function" and user.target in urgent else queue.append)(user)
    if len(order) < len(waits):
        raise RuntimeError(f"the graph has cycles: {[node for node, count in waits.items() if count]}")
    _arrange(graph, order)
    return module


def _arrange(graph: torch.fx.Graph, order: Sequence[torch.fx.Node]) -> None:
    """Put the nodes of ``graph`` into ``order``, and the users of each too: the next sort goes by those."""
    for node in order:
        graph._root.prepend(node)
        node.users.clear()
    for node in order:
        for given in node.all_input_nodes:
            given.users[node] = None


def _urgent() -> frozenset[Any]:
    """What ``legalize_graph`` places as soon as it can: assertions about sizes, before what depends on them."""
    import torch

    aten = torch.ops.aten
    return frozenset(
        (
            *(operator.add, operator.mul, operator.sub, operator.floordiv, operator.truediv, operator.mod),
            *(operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne),
            *(aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default, aten._assert_async.msg),
            *(aten.scalar_tensor.default, aten._assert_scalar.default),
        )
    )
