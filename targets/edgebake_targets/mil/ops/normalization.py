"""Normalisation over channels, axes or neighbours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator, Unsupported
from edgebake_targets.mil.half import half_sum, to_half
from edgebake_targets.mil.ops._shapes import positions


def _batch_norm(call: Call) -> Tensor:
    x, mean, variance = call["x"], call["mean"], call["variance"]
    gamma, beta, epsilon = call.get("gamma"), call.get("beta"), call.number("epsilon", 1e-5)
    if not call.half_sums:
        return functional.batch_norm(x, mean, variance, gamma, beta, training=False, eps=epsilon)
    scale = torch.rsqrt(variance + epsilon) * (1.0 if gamma is None else gamma)
    shift = (0.0 if beta is None else beta) - mean * scale
    column = (-1, *[1] * (x.ndim - 2))
    return to_half(to_half(x * to_half(scale).reshape(column)) + to_half(shift).reshape(column))


def _instance_norm(call: Call) -> Tensor:
    x, column = call["x"], [-1] + [1] * (call["x"].ndim - 2)
    return _normalized(call, list(range(2, x.ndim)), column)


def _layer_norm(call: Call) -> Tensor:
    x = call["x"]
    axes = positions(call, call.integers("axes", range(x.ndim)), x.ndim)
    shape = [x.shape[axis] for axis in axes]
    if not call.half_sums and axes == list(range(x.ndim - len(axes), x.ndim)):
        gamma, beta = (None if v is None else v.reshape(shape) for v in (call.get("gamma"), call.get("beta")))
        return functional.layer_norm(x, shape, gamma, beta, call.number("epsilon", 1e-5))
    return _normalized(call, axes, [n if d in axes else 1 for d, n in enumerate(x.shape)])


def _normalized(call: Call, axes: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(x - mean) / sqrt(variance + epsilon) * gamma + beta, gamma and beta seen in this shape."""
    x, gamma, beta, epsilon = call["x"], call.get("gamma"), call.get("beta"), call.number("epsilon", 1e-5)
    if call.half_sums:
        return _half_normalized(x, axes, epsilon, *(None if v is None else v.reshape(shape) for v in (gamma, beta)))
    variance, mean = torch.var_mean(x, dim=list(axes), correction=0, keepdim=True)
    result = (x - mean) * torch.rsqrt(variance + epsilon)
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def _half_normalized(
    x: Tensor, axes: Sequence[int], epsilon: float, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """The same with every intermediate value rounded: a square above 65504 makes the whole row infinite or zero."""
    count = math.prod(x.shape[axis] for axis in axes)
    mean = to_half(half_sum(x, axes, keepdim=True) / count)
    centred = to_half(x - mean)
    variance = to_half(half_sum(to_half(centred * centred), axes, keepdim=True) / count)
    result = to_half(centred * to_half(torch.rsqrt(to_half(variance + epsilon))))
    result = result if gamma is None else to_half(result * to_half(gamma))
    return result if beta is None else to_half(result + to_half(beta))


def _l2_norm(call: Call) -> Tensor:
    x, epsilon = call["x"], call.number("epsilon", 1e-6)
    if x.ndim < 3:
        raise Unsupported(f"l2_norm of rank {x.ndim}: it takes the last three dimensions")
    if call.half_sums:
        total = half_sum(to_half(x * x), [-3, -2, -1], keepdim=True)
        return to_half(x / to_half(torch.sqrt(to_half(total + epsilon))))
    return x / torch.sqrt((x * x).sum((-3, -2, -1), keepdim=True) + epsilon)


def _local_response_norm(call: Call) -> Tensor:
    """The window of ``size`` channels is centred; of an even size the larger part lies before, as in torch.

    Rank 3 is documented alike, but values measured on Macs (coremltools' own test) see no neighbour there.
    """
    x, size = call["x"], call.integer("size")
    if x.ndim != 4:
        raise Unsupported(f"local_response_norm of rank {x.ndim}: over what it sums is only certain for rank 4")
    alpha, beta, k = call.number("alpha", 1e-4), call.number("beta", 0.75), call.number("k", 1.0)
    squares = functional.pad(x * x, [0] * 2 * (x.ndim - 2) + [size // 2, (size - 1) // 2])
    neighbours = squares.unfold(1, size, 1)
    if call.half_sums:
        return to_half(x / to_half((k + to_half(alpha / size * half_sum(to_half(neighbours), [-1]))) ** beta))
    return x / (k + alpha / size * neighbours.sum(-1)) ** beta


OPERATORS: Mapping[str, Operator] = {
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "l2_norm": _l2_norm,
    "layer_norm": _layer_norm,
    "local_response_norm": _local_response_norm,
}
