"""linear, matmul, einsum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import half_matmul, to_half

# The two equations that the operator knows, letters numbered by first appearance.
_EQUATIONS = {"abcd,adce->abce": (1, 2), "abc,cbd->abd": (0, 1)}


def _linear(call: Call) -> Tensor:
    x, weight, bias = call["x"], call["weight"], call.get("bias")
    if call.half_sums:
        product = half_matmul(x, weight.transpose(0, 1))
        return product if bias is None else to_half(product + to_half(bias))
    if x.is_floating_point():
        return functional.linear(x, weight.float(), None if bias is None else bias.float())
    product = x @ _same_dtype(call, x, weight).transpose(0, 1)
    return product if bias is None else product + _same_dtype(call, x, bias)


def _matmul(call: Call) -> Tensor:
    x, y = call["x"], call["y"]
    if call.flag("transpose_x", False) and x.ndim > 1:
        x = x.transpose(-1, -2)
    if call.flag("transpose_y", False) and y.ndim > 1:
        y = y.transpose(-1, -2)
    return half_matmul(x, y) if call.half_sums else torch.matmul(x, _same_dtype(call, x, y))


def _einsum(call: Call) -> Tensor:
    """Both equations are one matmul per row: the channels of x by the columns of y, batched over the rows."""
    equation = call.text("equation")
    moved = _EQUATIONS.get(_canonical(equation))
    if moved is None:
        raise Unsupported(f"einsum with the equation {equation}; the operator knows nchw,nwhu->nchu and chw,whr->chr")
    x, y = (operand.transpose(*moved) for operand in call.many("values"))
    product = half_matmul(x, y) if call.half_sums else torch.matmul(x, y)
    return product.transpose(*moved)


def _canonical(equation: str) -> str:
    names: dict[str, str] = {}
    letters = [c if c in ",->" else names.setdefault(c, chr(ord("a") + len(names))) for c in equation if c != " "]
    return "".join(letters)


def _same_dtype(call: Call, x: Tensor, other: Tensor) -> Tensor:
    if x.is_floating_point() != other.is_floating_point():
        raise Unsupported(f"{call.operator} of integers and floats in one product")
    return other.to(x.dtype)


OPERATORS: Mapping[str, Operator] = {"linear": _linear, "matmul": _matmul, "einsum": _einsum}
