"""PT2E observers: by the words of recipes, and one of weights that keeps the integers that they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake import lattice
from edgebake_targets._ranges import Seen, chosen

if TYPE_CHECKING:
    import torch


_PART = 1 << 22  # weights that are looked at together


def observer(activation_range: str, percentile: float = 99.99) -> Any:
    """The observer class that finds ranges by ``activation_range``; ``percentile`` counts where that is its name."""
    from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

    if activation_range in ("histogram", "minmax"):
        return HistogramObserver if activation_range == "histogram" else MinMaxObserver

    class RangeObserver(UniformQuantizationObserverBase):  # type: ignore[misc]  # torchao's classes are untyped
        """Counts what flows through and cuts it in the end."""

        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.seen = Seen()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add(x.detach().numpy())
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """Scale and zero point."""
            import torch

            bits = (self.quant_max - self.quant_min + 1).bit_length() - 1
            low, high = chosen(self.seen, activation_range, bits, percentile)
            scale, zero = self._calculate_qparams(torch.tensor(low), torch.tensor(high))
            return scale, zero

    return RangeObserver


def weight_observer(smallest: float) -> Any:
    """The observer class of weights, a scale for each channel, at least ``smallest``.

    A channel that already is integers of 8 bits times a scale (``edgebake.lattice``) keeps both; where such integers
    hold -128, all of the weight may.
    """
    import torch
    from torchao.quantization.pt2e import PerChannelMinMaxObserver

    class WeightObserver(PerChannelMinMaxObserver):  # type: ignore[misc]  # torchao's classes are untyped
        """Takes ranges of channels, and scales of those that need none."""

        chosen: tuple[torch.Tensor, torch.Tensor] | None = None
        quant_min: int

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.chosen is None:  # a weight is the same in every call
                super().forward(x)
                steps, least = _steps(x.detach().movedim(self.ch_axis, 0))
                scale, zero = super().calculate_qparams()
                self.chosen = torch.where(steps >= smallest, steps, scale), zero
                self.quant_min = min(self.quant_min, least)
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """Scale and zero point of each channel."""
            return super().calculate_qparams() if self.chosen is None else self.chosen

    return WeightObserver.with_args(eps=smallest)


def _steps(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The scale of each channel that is integers times it, 0 elsewhere, and the least such integer (0 without any)."""
    import torch

    flat = weight.reshape(len(weight), -1)
    steps, least, rows = torch.zeros(len(flat)), 0, max(1, _PART // max(1, flat.shape[1]))
    for start in range(0, len(flat), rows):
        q, scale, found = lattice.integers(flat[start : start + rows].numpy(), 8)
        steps[start : start + rows] = torch.from_numpy(scale * found)
        least = min(least, int(q.min(initial=0)))
    return steps, least
