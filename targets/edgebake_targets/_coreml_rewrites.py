"""What coremltools 9.0 lacks for torch 2.13 and numpy 2.4: operators it translates wrongly, graphs it reads badly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Translation:
    """How the converter turns the torch operators ``names`` into MIL, and why its own way does not do."""

    names: tuple[str, ...]
    why: str
    translate: Callable[[Any, Any], None]


def _scalar_cast(context: Any, node: Any, kind: type, name: str) -> None:
    """As upstream's ``_cast``, but takes the one element of a constant out of its array first."""
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs

    x = _get_inputs(context, node, expected=1)[0]
    if any(size != 1 for size in x.shape):
        raise ValueError(f"{node.kind} of a tensor of shape {x.shape}: only one element can become a number")
    if x.can_be_folded_to_const():
        value = x.val.item() if hasattr(x.val, "item") else x.val
        context.add(mb.const(val=kind(value), name=node.name), node.name)
        return
    flat = mb.squeeze(x=x, name=f"{node.name}_item") if x.shape else x
    context.add(mb.cast(x=flat, dtype=name, name=node.name), node.name)


def _int(context: Any, node: Any) -> None:
    _scalar_cast(context, node, int, "int32")


def _bool(context: Any, node: Any) -> None:
    _scalar_cast(context, node, bool, "bool")


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
    Translation(names=("int", "_int"), why="int(np.array([3])) raises on numpy 2.4", translate=_int),
    Translation(names=("bool", "_bool"), why="the same for bool", translate=_bool),
    Translation(names=("new_ones",), why="not translated by coremltools 9.0", translate=_new_ones),
    Translation(names=("alias",), why="not translated by coremltools 9.0", translate=_alias),
    Translation(names=("fmod",), why="not translated by coremltools 9.0", translate=_fmod),
)


@contextmanager
def translations() -> Iterator[None]:
    """The converter's table of operators with TRANSLATIONS in it; as it was afterwards."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY

    table = _TORCH_OPS_REGISTRY.name_to_func_mapping
    before = dict(table)
    for entry in TRANSLATIONS:
        table.update(dict.fromkeys(entry.names, entry.translate))
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

    query, *shared = (argument for argument in node.args[:3] if isinstance(argument, torch.fx.Node))
    times = query.meta["val"].shape[-3] // shared[0].meta["val"].shape[-3]
    if times == 1:
        return
    for position, tensor in enumerate(shared, start=1):
        with graph.inserting_before(node):
            value = tensor
            for target, arguments in (
                (torch.ops.aten.unsqueeze.default, (2,)),
                (torch.ops.aten.expand.default, ([-1, -1, times, -1, -1],)),
                (torch.ops.aten.flatten.using_ints, (1, 2)),
            ):
                known = value.meta["val"]
                value = graph.call_function(target, (value, *arguments))
                value.meta["val"] = target(known, *arguments)
        node.update_arg(position, value)
