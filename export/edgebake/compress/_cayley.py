"""Descent among orthogonal matrices: SGD with momentum whose step is a Cayley transform.

Numerics: Li, Fuxin, Todorovic 2020 (Efficient Riemannian optimization on the Stiefel manifold via the Cayley
transform, arXiv:2002.01113), algorithm 1. The momentum is projected on the tangent space by ``W = What - What^T`` with
``What = M X^T - X (X^T M X^T) / 2`` (equation 4), and ``X`` becomes ``(I - a/2 W)^-1 (I + a/2 W) X`` (equation 2).
They approximate the inverse by two rounds of a fixed point; matrices of these sizes are solved exactly, so that
orthogonality holds to rounding and no retraction is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MOMENTUM = 0.9
_SHORTEST = 1.0  # 2 q with their q = 0.5: a step is never longer than this over the norm of W


@dataclass
class Cayley:
    """One orthogonal matrix (n, n) float64 that learns; ``x`` is its leaf in float32 for the graph."""

    x: torch.Tensor
    momentum: torch.Tensor

    @classmethod
    def of(cls, start: torch.Tensor) -> Cayley:
        """From the orthogonal ``start``."""
        return cls(x=start.double().clone(), momentum=start.double().clone().zero_())

    def leaf(self) -> torch.Tensor:
        """A float32 copy that gathers a gradient."""
        return self.x.float().requires_grad_(True)

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """One step against ``gradient``, which is scaled to norm 1: how steep a loss is says little about curvature."""
        import torch

        norm = float(gradient.norm())
        scaled = gradient.double() / norm if norm > 0 else gradient.double()
        moved = MOMENTUM * self.momentum - scaled
        half = moved @ self.x.T - 0.5 * self.x @ (self.x.T @ moved @ self.x.T)
        skew = half - half.T
        self.momentum = skew @ self.x
        length = min(rate, _SHORTEST / (float(skew.norm()) + 1e-8))
        eye = torch.eye(len(skew), dtype=torch.float64)
        self.x = torch.linalg.solve(eye - 0.5 * length * skew, (eye + 0.5 * length * skew) @ self.x)
