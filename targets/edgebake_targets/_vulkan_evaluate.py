"""Computes the graph of a Vulkan delegate in torch: what it says, not what a GPU's kernels make of it.

Operators are torch's of the same name and schema, quantised ones those of ExecuTorch's Vulkan backend
(backends/vulkan/custom_ops_lib.py and runtime/graph/ops/glsl of v1.4.1 say what they compute). Every result is rounded
to the type that the graph declares; sums are taken in float32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from edgebake_targets.inspectors import _vulkan_graph as graph

if TYPE_CHECKING:
    import torch

_NUMBERS: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "floordiv": operator.floordiv,
    "sym_size.int": lambda value, axis: value.shape[axis],
}


def lacking(program: graph.Program) -> set[str]:
    """The operators of ``program`` that nothing here computes."""
    return {call.name for call in program.calls if _function(call.name) is None}


def run(program: graph.Program, inputs: Sequence[Any]) -> list[Any]:
    """Outputs of ``program``, in its order; tensors are float32 or int64 with the values of their declared types."""
    held: dict[int, Any] = {}
    for number, value in zip(program.inputs, inputs, strict=True):
        _keep(program, number, value, held)
    for call in program.calls:
        *arguments, to = call.args
        function = _function(call.name)
        if function is None:
            raise NotImplementedError(call.name)
        _keep(program, to, function([_value(program, number, held) for number in arguments]), held)
    return [_value(program, number, held) for number in program.outputs]


def _value(program: graph.Program, number: int, held: dict[int, Any]) -> Any:
    if number in held:
        return held[number]
    value = program.values[number]
    if isinstance(value, graph.Values):
        return [_value(program, item, held) for item in value.items]
    if isinstance(value, graph.Tensor) and value.constant is not None:
        held[number] = _constant(value)
        return held[number]
    return value


def _keep(program: graph.Program, number: int, value: Any, held: dict[int, Any]) -> None:
    declared = program.values[number]
    if isinstance(declared, graph.Values):
        for item, part in zip(declared.items, value, strict=False):  # some results are not used and not declared
            _keep(program, item, part, held)
    else:
        held[number] = _rounded(value, declared.dtype) if isinstance(declared, graph.Tensor) else value


def _rounded(value: torch.Tensor, dtype: str) -> torch.Tensor:
    """``value`` in the precision of ``dtype``, held in the widest type that torch computes everything in."""
    import torch

    if dtype == "bool":
        return value.bool()
    if not dtype.startswith("float"):
        return value.to(torch.int64)
    return value.to(getattr(torch, dtype)).to(torch.float32)


def _constant(value: graph.Tensor) -> torch.Tensor:
    import torch

    dtype = getattr(torch, value.dtype)
    data = value.constant.data if value.constant is not None else memoryview(b"")
    if not len(data):
        return torch.empty(value.shape, dtype=dtype)
    found = torch.frombuffer(data, dtype=dtype)[: prod(value.shape)].reshape(value.shape)
    return _rounded(found, value.dtype)


def _function(name: str) -> Callable[[list[Any]], Any] | None:
    """What computes ``name`` from a list of its arguments; None when nothing here does."""
    import torch

    if name in _NUMBERS:
        return lambda arguments: _NUMBERS[name](*arguments)
    if name in _OWN:
        return lambda arguments: _OWN[name](*arguments)
    space, _, rest = name.partition(".")
    base, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, base, None), overload or "default", None) if space == "aten" else None
    return None if found is None else partial(_torch, found)


def _torch(function: Any, arguments: list[Any]) -> Any:
    """Call torch's operator: the graph lists all arguments in the schema's order, types and layouts as None."""
    schema = function._schema.arguments
    pairs = list(zip(schema, arguments, strict=True))
    named = {argument.name: value for argument, value in pairs if argument.kwarg_only and value is not None}
    return function(*(value for argument, value in pairs if not argument.kwarg_only), **named)


def _clamped_convolution(*arguments: Any) -> torch.Tensor:
    import torch

    *convolution, lowest, highest = arguments
    result = torch.ops.aten.convolution.default(*convolution)
    most = torch.finfo(result.dtype).max  # one side of a ReLU is the largest double
    return torch.clamp(result, max(lowest, -most), min(highest, most))


def _int8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``weight``: (outputs, inputs); ``scales``: (outputs,)."""
    import torch

    return torch.nn.functional.linear(x, weight.float() * scales[:, None])


def _int4_columns(packed: torch.Tensor) -> torch.Tensor:
    """(rows, columns) of values in -8..7 from (rows, columns / 2) with the even column in the low half."""
    import torch

    return (torch.stack([packed & 15, packed >> 4], -1).flatten(1) - 8).float()


def _int4_group_linear(
    x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor, group: int, bias: torch.Tensor | None
) -> torch.Tensor:
    """``scales``: (groups, outputs, padded to 4); ``packed`` may be padded to 8 columns, ``bias`` to 4 values."""
    import torch

    outputs, inputs = packed.shape[0], x.shape[-1]
    columns = scales.T[:outputs].repeat_interleave(group, 1)[:, :inputs]
    weight = _int4_columns(packed)[:, :inputs] * columns
    return torch.nn.functional.linear(x, weight, None if bias is None else bias[:outputs])


def _int4_embedding(
    packed: torch.Tensor, scales: torch.Tensor, group: int, ids: torch.Tensor, is_linear_weight: bool
) -> torch.Tensor:
    """``scales``: (rows, groups); only what ``is_linear_weight`` says of the order of halves is written by 1.4.1."""
    rows = packed[ids.flatten()]
    values = _int4_columns(rows if is_linear_weight else (rows >> 4) | ((rows & 15) << 4))
    found = values * scales.reshape(packed.shape[0], -1)[ids.flatten()].repeat_interleave(group, 1)
    return found.reshape(*ids.shape, -1)


def _same(value: Any, *_: Any) -> Any:
    return value


_OWN: Mapping[str, Callable[..., Any]] = {
    graph.PREPACK: _same,
    "aten._to_copy.default": _same,  # the declared type of the result does it
    "dim_order_ops._to_dim_order_copy.default": _same,
    "et_vk.conv_with_clamp.default": _clamped_convolution,
    "aten._weight_int8pack_mm.default": _int8_linear,
    "et_vk.linear_q4gsw.default": _int4_group_linear,
    "et_vk.embedding_q4gsw.default": _int4_embedding,
}
