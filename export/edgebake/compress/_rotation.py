"""How a rotation of a decoder's values becomes part of its weights.

Numerics: Ashkboos et al. 2024 (QuaRot, arXiv:2404.00456), section 3 and 4.1. ``R1`` turns the residual stream, which
RMSNorm without weights leaves alone: ``rms(x R) = rms(x) R``. What reads the stream becomes ``W R1`` (torch's ``y = x
W^T``), what writes to it ``R1^T W``. ``R2`` turns the values of each attention head: rows of v in blocks of the head's
size by ``R2^T``, columns of o by ``R2``; all heads of a layer share it, as the rows of v that several query heads
share must.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from edgebake.compress._decoder import Decoder, put

if TYPE_CHECKING:
    import torch

    Matrix = torch.Tensor | None  # None: no rotation

Role = Literal["reads", "writes", "value", "output"]


@dataclass(frozen=True)
class Turned:
    """A linear layer, which part it has, and the decoder layer it stands in."""

    linear: torch.nn.Linear
    role: Role
    layer: int


def turned(decoder: Decoder) -> Iterator[Turned]:
    """All linear layers inside the decoder layers."""
    for index, layer in enumerate(decoder.layers):
        for linear in (layer.q, layer.k, layer.gate, layer.up):
            yield Turned(linear, "reads", index)
        yield Turned(layer.v, "value", index)
        yield Turned(layer.o, "output", index)
        yield Turned(layer.down, "writes", index)


def weight_of(weight: torch.Tensor, role: Role, r1: Matrix, r2: Matrix) -> torch.Tensor:
    """``weight`` (rows, columns) after both rotations; differentiable in them."""
    if role in ("reads", "value"):
        weight = weight if r1 is None else weight @ r1
    else:
        weight = weight if r1 is None else r1.T @ weight
    if r2 is None or role not in ("value", "output"):
        return weight
    rows, columns, head = *weight.shape, len(r2)
    if role == "value":
        return (r2.T @ weight.reshape(rows // head, head, columns)).reshape(rows, columns)
    return (weight.reshape(rows, columns // head, head) @ r2).reshape(rows, columns)


def bias_of(bias: torch.Tensor, role: Role, r1: Matrix, r2: Matrix) -> torch.Tensor:
    """``bias`` (rows,) after both rotations."""
    if role == "value":
        return bias if r2 is None else (bias.reshape(-1, len(r2)) @ r2).reshape(-1)
    return bias @ r1 if role in ("writes", "output") and r1 is not None else bias


def merge(decoder: Decoder, r1: Matrix, r2: Sequence[Matrix]) -> None:
    """Rotate all weights of ``decoder``, whose normalisations have no weights any more; computed in float64."""
    for part in turned(decoder):
        second = r2[part.layer]
        bias = part.linear.bias
        put(part.linear, "weight", weight_of(part.linear.weight.detach().double(), part.role, r1, second))
        if bias is not None:
            put(part.linear, "bias", bias_of(bias.detach().double(), part.role, r1, second))
    if r1 is not None:
        put(decoder.table, "weight", decoder.table.weight.detach().double() @ r1)
        put(decoder.head, "weight", decoder.head.weight.detach().double() @ r1)
