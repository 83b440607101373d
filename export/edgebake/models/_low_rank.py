"""Modules that a transformers decoder has beside its own: low-rank adapters, and the rotation before ``down_proj``."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgebake.compress._hadamard import hadamard

if TYPE_CHECKING:
    import torch


@lru_cache
def _matrix() -> Any:
    import torch

    class Matrix(torch.nn.Module):
        """``x -> x weight^T``; no ``Linear``, so that no scheme is given to it."""

        def __init__(self, weight: torch.Tensor) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(weight, requires_grad=False)  # (rows, columns)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.weight)

    return Matrix


@lru_cache
def _adapted() -> tuple[Any, Any]:
    import torch

    matrix = _matrix()

    class Adapter(torch.nn.Module):
        """``x -> b (a x)``, (..., columns) -> (..., rows)."""

        def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
            super().__init__()
            self.a, self.b = matrix(a), matrix(b)  # (rank, columns), (rows, rank)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.b(self.a(x))
            return made

    class AdaptedLinear(torch.nn.Linear):
        """A linear layer beside an adapter, whose outputs are added to its own."""

        adapter: Any

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch's name for it
            made: torch.Tensor = super().forward(input) + self.adapter(input)
            return made

    return Adapter, AdaptedLinear


@lru_cache
def _rotated() -> tuple[Any, Any]:
    import torch

    matrix = _matrix()

    class Rotation(torch.nn.Module):
        """``x -> x H``, H the orthonormal Sylvester matrix of ``size``, a power of two, as two smaller products.

        ``H_ab`` is the Kronecker product of ``H_a`` and ``H_b``: ``x`` as a matrix (a, b) becomes ``H_a x H_b``.
        """

        def __init__(self, size: int) -> None:
            super().__init__()
            power = size.bit_length() - 1
            # Weights like others: a target that only knows a decoder's own has no place for them, and says so.
            self.left, self.right = matrix(_sylvester(power - power // 2)), matrix(_sylvester(power // 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            square = x.reshape(*x.shape[:-1], len(self.left.weight), len(self.right.weight))
            turned = self.right(square).transpose(-1, -2)  # (..., b, a); H is symmetric
            made: torch.Tensor = self.left(turned).transpose(-1, -2).reshape(x.shape)
            return made

    class RotatedMlp(torch.nn.Module):
        """A gated feed-forward layer with a rotation between its product and ``down_proj``."""

        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
            self.act_fn = mlp.act_fn
            self.rotate = Rotation(self.down_proj.in_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.down_proj(self.rotate(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
            return made

    return Rotation, RotatedMlp


def _sylvester(power: int) -> torch.Tensor:
    """(2^power, 2^power) float32, orthonormal and symmetric."""
    made = hadamard(2**power)
    assert made is not None  # of every power of two there is one
    return (made / math.sqrt(len(made))).float()


def rotation(size: int) -> torch.nn.Module:
    """The rotation of ``size`` values, a power of two, by the orthonormal Hadamard matrix of Sylvester's order."""
    made: torch.nn.Module = _rotated()[0](size)
    return made


def rotate_before_down(network: torch.nn.Module) -> None:
    """Put the rotation R4 (SpinQuant, arXiv:2405.16406, section 3.1) before each ``down_proj``; changed in place."""
    for module in [m for m in network.modules() if hasattr(m, "mlp")]:
        module.mlp = _rotated()[1](module.mlp)


def adapt(linear: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor) -> torch.nn.Linear:
    """``linear`` beside the adapter ``x -> b (a x)``: the same weight, which schemes go on to act on alone.

    ``a``: (rank, in features), ``b``: (out features, rank), scale included; LoRA, arXiv:2106.09685, section 4.1.
    """
    adapter, adapted = _adapted()
    made: Any = adapted.__new__(adapted)
    made.__dict__.update(linear.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        made.__dict__[name] = dict(linear.__dict__[name])
    made.adapter = adapter(a, b)
    return made  # type: ignore[no-any-return]
