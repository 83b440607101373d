"""Attention."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from edgebake_targets.mil.call import Call, Operator
from edgebake_targets.mil.half import half_matmul, to_half
from edgebake_targets.mil.ops.activation import half_softmax


def _scaled_dot_product_attention(call: Call) -> Tensor:
    """softmax(query @ keyᵀ / sqrt(E) + mask) @ value; a truth value in the mask says whether to look there.

    A row that may look nowhere is 0 / 0 by this definition, so it is not a number here.
    """
    query, key, value = call["query"], call["key"], call["value"]
    mask = call.get("attn_mask")
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    if call.half_sums:
        scores = to_half(half_matmul(query, key.transpose(-1, -2)) / math.sqrt(query.shape[-1]))
        scores = scores if mask is None else to_half(scores + mask)
        return half_matmul(half_softmax(scores, -1), value)
    if mask is None:
        return functional.scaled_dot_product_attention(query, key, value)
    whole = mask.expand(*query.shape[:-1], key.shape[-2])
    result = functional.scaled_dot_product_attention(query, key, value, attn_mask=whole)
    blind = (mask == -math.inf).all(-1, keepdim=True)  # torch makes zeros of these
    return result.masked_fill(blind, math.nan) if bool(blind.any()) else result


OPERATORS: Mapping[str, Operator] = {"scaled_dot_product_attention": _scaled_dot_product_attention}
