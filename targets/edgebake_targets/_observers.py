"""PT2E observers by the words of recipes: torchao's own, and one that chooses its range as the ONNX targets do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgebake_targets._ranges import Seen, chosen

if TYPE_CHECKING:
    import torch


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
