"""Where input channels of a decoder's linear layers can be scaled: what writes them takes the inverse factors in.

The weight of a normalisation (q, k, v; gate, up; the head), rows of ``v_proj`` (o; one factor for the query heads that
share a row) and of ``up_proj`` (down). Exact in real arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgebake.compress import _decoder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Group:
    """Linear layers with one input, and what writes it: a normalisation or a linear layer."""

    before: torch.nn.Module
    linears: tuple[torch.nn.Linear, ...]
    head: int = 0  # of an attention head whose values several query heads share; 0: rows and columns are one to one


def groups(decoder: _decoder.Decoder) -> Iterator[Group]:
    """Four of each layer, in the order in which they compute."""
    for layer in decoder.layers:
        yield Group(layer.attention_norm, (layer.q, layer.k, layer.v))
        yield Group(layer.v, (layer.o,), head=layer.head)
        yield Group(layer.mlp_norm, (layer.gate, layer.up))
        yield Group(layer.up, (layer.down,))


def head(decoder: _decoder.Decoder) -> Group:
    """The head behind the final normalisation; scaled, it shares no weight with the table any more."""
    return Group(decoder.norm, (decoder.head,))


def apart(size: torch.Tensor, group: Group) -> torch.Tensor:
    """``size`` of each input channel of o as (key-value heads, queries of each, head): queries share a row of v."""
    rows = int(group.before.get_parameter("weight").shape[0])
    return size.reshape(rows // group.head, -1, group.head)


def multiply(group: Group, factor: torch.Tensor) -> None:
    """Multiply the input channels of the group's linear layers by ``factor``, (channels,), and divide what writes them.

    Query heads that share a row of v must have one factor.
    """
    for linear in group.linears:
        _decoder.put(linear, "weight", linear.weight.detach() * factor)
    before = group.before
    weight = before.get_parameter("weight").detach()
    if group.head:
        factor = apart(factor, group)[:, 0].reshape(-1)
    _decoder.put(before, "weight", weight / (factor if weight.ndim == 1 else factor[:, None]))
    bias = getattr(before, "bias", None)
    if bias is not None:
        _decoder.put(before, "bias", bias.detach() / factor)
