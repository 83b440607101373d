"""Multiply-accumulates of the operators of a program for ExecuTorch, symbolic sizes at their upper bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any


def dims(value: Any) -> tuple[int, ...]:
    """Shape of a node or a fake tensor, symbolic sizes at their upper bound."""
    tensor = value.meta.get("val") if hasattr(value, "meta") else value
    shape = getattr(tensor, "shape", ())
    return tuple(_upper(size) for size in shape)


def _upper(size: Any) -> int:
    if isinstance(size, int):
        return size
    symbolic = size.node
    bound = symbolic.shape_env.bound_sympy(symbolic.expr).upper
    return int(bound) if bound.is_Integer else int(symbolic.hint)


def _output(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val")
    return dims(value[0] if isinstance(value, (tuple, list)) else value)


def _contracted(operand: int) -> Callable[[Any], int]:
    """Output elements times the last axis of argument ``operand``."""
    return lambda node: math.prod(_output(node)) * dims(node.args[operand])[-1]


def _convolution(node: Any) -> int:
    """Output elements times the weights of an output channel."""
    return math.prod(_output(node)) * math.prod(dims(node.args[1])[1:])


def _transposed(node: Any) -> int:
    """Input elements times the weights of an input channel."""
    return math.prod(dims(node.args[0])) * math.prod(dims(node.args[1])[1:])


def _either(node: Any) -> int:
    return _transposed(node) if node.args[6] else _convolution(node)  # (x, w, b, stride, padding, dilation, transposed)


def _attention(node: Any) -> int:
    query, key, value = (dims(argument) for argument in node.args[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _cached_attention(node: Any) -> int:
    query, keys = (dims(argument) for argument in node.args[:2])  # (1, tokens, heads, width), (1, context, ...)
    return 2 * math.prod(query) * keys[1]


_MACS: Mapping[str, Callable[[Any], int]] = {
    "aten.linear": _contracted(0),
    "aten.mm": _contracted(0),
    "aten.bmm": _contracted(0),
    "aten.matmul": _contracted(0),
    "aten.addmm": _contracted(1),
    "aten.baddbmm": _contracted(1),
    "aten.scaled_dot_product_attention": _attention,
    "llama.custom_sdpa": _cached_attention,
    "aten.convolution": _either,
    **{f"aten.conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"aten.conv_transpose{n}d": _transposed for n in (1, 2, 3)},
}


def count(operator: str, node: Any) -> int:
    """Those of ``node``, which calls ``operator``, such as ``aten.linear``; 0 where nothing is multiplied."""
    counted = _MACS.get(operator)
    return counted(node) if counted else 0
