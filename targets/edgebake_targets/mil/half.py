"""Sums as the worst float16 hardware may form them: every product and every running sum rounded to float16.

The order is fixed and is the worst one allowed: terms are added one after another, by ascending index, into a single
float16 accumulator (no pairwise tree, no wider register). Only sums of more than ``LONGEST`` terms in ``half_sum`` are
split, into runs of that many neighbours whose totals are then added in the same way. What exceeds 65504 becomes
infinite and stays so. Operands are rounded to float16 first, results come back as float32.

torch computes one float16 operation in float32 and rounds once, which is exact for a product and correctly rounded for
a sum, so its float16 tensors on the CPU are the arithmetic wanted here. The terms are walked in Python, everything else
is vectorised: about ten times the cost of a float32 matmul where the outputs are many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgebake_targets.mil.windows import windows

LONGEST = 65536  # steps of a few microseconds each, so that no sum takes minutes


def to_half(x: Tensor) -> Tensor:
    """``x`` rounded to float16 (to nearest even, overflow to infinity), held as float32."""
    return x.half().float()


def half_sum(x: Tensor, dims: Sequence[int], keepdim: bool = False) -> Tensor:
    """The sum over ``dims``, their elements taken in row-major order."""
    axes = sorted(d % x.ndim for d in dims)
    rest = [d for d in range(x.ndim) if d not in axes]
    length = math.prod(x.shape[d] for d in axes)
    terms = x.half().permute(*axes, *rest).reshape(length, *(x.shape[d] for d in rest))
    total = _run(terms).float()
    return total.reshape([1 if d in axes else n for d, n in enumerate(x.shape)]) if keepdim else total


def half_matmul(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y`` with numpy's rules for vectors and batches, summed over ascending inner index."""
    if x.ndim == 1:
        return half_matmul(x[None], y).squeeze(-1 if y.ndim == 1 else -2)
    if y.ndim == 1:
        return half_matmul(x, y[:, None]).squeeze(-1)
    columns = x.half().movedim(-1, 0).contiguous()  # (inner, ..., rows)
    rows = y.half().movedim(-2, 0).contiguous()  # (inner, ..., columns)
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    total = torch.zeros(*batch, x.shape[-2], y.shape[-1], dtype=torch.float16)
    for column, row in zip(columns, rows, strict=True):
        total += column.unsqueeze(-1) * row.unsqueeze(-2)
    return total.float()


def half_conv(x: Tensor, weight: Tensor, *, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Tensor:
    """A convolution of an already padded ``x``, summed over ascending input channel, then kernel position."""
    view = windows(x.half(), weight.shape[2:], strides, dilations)
    spatial = view.shape[2 : x.ndim]
    filters = weight.half().reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    view = view.reshape(x.shape[0], groups, weight.shape[1], *view.shape[2:])
    total = torch.zeros(x.shape[0], *filters.shape[:2], *spatial, dtype=torch.float16)
    ones, everything = [1] * len(spatial), [slice(None)] * len(spatial)
    for channel, *at in np.ndindex(*weight.shape[1:]):
        pixels = view[(slice(None), slice(None), channel, *everything, *at)]
        factor = filters[(slice(None), slice(None), channel, *at)]
        total += pixels.unsqueeze(2) * factor.reshape(1, *factor.shape, *ones)
    return total.flatten(1, 2).float()


def _run(terms: Tensor) -> Tensor:
    """The running float16 sum over the first dimension."""
    if len(terms) > LONGEST:
        missing = -len(terms) % LONGEST
        padded = torch.cat([terms, terms.new_zeros(missing, *terms.shape[1:])])
        return _run(_run(padded.reshape(-1, LONGEST, *terms.shape[1:]).transpose(0, 1)))
    total = terms.new_zeros(terms.shape[1:])
    for term in terms:
        total = total + term
    return total
