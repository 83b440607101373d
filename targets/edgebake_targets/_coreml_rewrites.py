"""What coremltools 9.0 lacks for torch 2.13 and numpy 2.4: operators it translates wrongly, graphs it reads badly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgebake_targets._coreml_decoder_graph import NAMESPACE, WRITE, translate_write

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Translation:
    """How the converter turns the torch operators ``names`` into MIL, and why its own way does not do."""

    names: tuple[str, ...]
    why: str
    translate: Callable[[Any, Any], None]


def _new_ones(context: Any, node: Any) -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import NUM_TO_DTYPE_STRING, _get_inputs, _get_kwinputs
    from coremltools.converters.mil.mil import types

    inputs = _get_inputs(context, node, min_expected=2)
    shape = mb.concat(values=inputs[1], axis=0) if isinstance(inputs[1], (list, tuple)) else inputs[1]
    asked = _get_kwinputs(context, node, "dtype", default=[None])[0]
    dtype = types.builtin_to_string(inputs[0].dtype) if asked is None else NUM_TO_DTYPE_STRING[asked.val]
    filled = mb.fill(shape=shape, value=1.0)
    context.add(mb.cast(x=filled, dtype=dtype, name=node.name))


def _alias(context: Any, node: Any) -> None:
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    context.add(mb.identity(x=_get_inputs(context, node, expected=1)[0], name=node.name))


def _fmod(context: Any, node: Any) -> None:
    """The remainder has the sign of the dividend, where MIL's ``mod`` gives it that of the divisor."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs, promote_input_dtypes

    x, y = promote_input_dtypes(_get_inputs(context, node, expected=2))
    rest = mb.mod(x=mb.abs(x=x), y=mb.abs(x=y))
    context.add(mb.mul(x=mb.sign(x=x), y=rest, name=node.name))


TRANSLATIONS = (
    Translation(names=("new_ones",), why="not translated by coremltools 9.0", translate=_new_ones),
    Translation(names=("alias",), why="not translated by coremltools 9.0", translate=_alias),
    Translation(names=("fmod",), why="not translated by coremltools 9.0", translate=_fmod),
    Translation(
        names=(f"{NAMESPACE}::{WRITE}", f"{NAMESPACE}.{WRITE}"),  # as coremltools and as ExecuTorch name it
        why="an operator of edgebake's own for caches",
        translate=translate_write,
    ),
)


@contextmanager
def translations() -> Iterator[None]:
    """The converter's table of operators with those of TRANSLATIONS that it lacks; as it was afterwards."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    table = _TORCH_OPS_REGISTRY.name_to_func_mapping
    before = dict(table)
    for entry in TRANSLATIONS:
        for name in entry.names:
            table.setdefault(name, entry.translate)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def rewrite_attention(program: torch.export.ExportedProgram) -> None:
    """Bring each ``scaled_dot_product_attention`` of ``program`` (changed in place) to what Core ML can express.

    * ``scale`` equal to 1/sqrt(head size) is dropped: with it the converter never uses iOS 18's fused operator.
    * ``enable_gqa`` is carried out by repeating keys and values, since the converter ignores it.
    """
    import torch

    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
            continue
        kwargs = dict(node.kwargs)
        scale, size = kwargs.get("scale"), node.args[0].meta["val"].shape[-1]
        if scale is not None and math.isclose(scale, 1.0 / math.sqrt(size), rel_tol=1e-6):
            del kwargs["scale"]
        if kwargs.pop("enable_gqa", False):
            _repeat_heads(graph, node)
        node.kwargs = kwargs
    program.graph_module.recompile()


def state_sizes(program: torch.export.ExportedProgram) -> None:
    """Write known sizes in place of -1 into ``view`` and ``expand``, and drop an ``expand`` that changes nothing.

    From a -1 the converter infers nothing: every later shape becomes unknown, attention is wrapped in broadcasts and
    a ``tile`` with computed counts stands for each ``expand``. ``program`` is changed in place.
    """
    import torch

    aten = torch.ops.aten
    targets = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target not in targets:
            continue
        source, known = node.args[0], node.meta["val"].shape
        # As text: comparing symbolic sizes would add a guard to the program.
        if node.target is aten.expand.default and list(map(str, source.meta["val"].shape)) == list(map(str, known)):
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            continue
        sizes = zip(node.args[1], known, strict=True)
        node.update_arg(1, [size if isinstance(size, int) else asked for asked, size in sizes])
    program.graph_module.recompile()


def _repeat_heads(graph: torch.fx.Graph, node: torch.fx.Node) -> None:
    import torch

    aten = torch.ops.aten
    query, *shared = (argument for argument in node.args[:3] if isinstance(argument, torch.fx.Node))
    heads = query.meta["val"].shape[-3]
    times = heads // shared[0].meta["val"].shape[-3]
    if times == 1:
        return

    def call(target: Any, *arguments: Any) -> torch.fx.Node:
        made = graph.call_function(target, arguments)
        known = [a.meta["val"] if isinstance(a, torch.fx.Node) else a for a in arguments]
        made.meta["val"] = target(*known)
        return made

    for position, tensor in enumerate(shared, start=1):
        batch, _, length, size = tensor.meta["val"].shape
        with graph.inserting_before(node):
            apart = call(aten.expand.default, call(aten.unsqueeze.default, tensor, 2), [-1, -1, times, -1, -1])
            sizes = [
                known if isinstance(known, int) else call(aten.sym_size.int, tensor, axis)
                for axis, known in ((0, batch), (2, length))
            ]
            together = graph.call_function(aten.reshape.default, (apart, [sizes[0], heads, sizes[1], size]))
            together.meta["val"] = apart.meta["val"].reshape(batch, heads, length, size)
        node.update_arg(position, together)
