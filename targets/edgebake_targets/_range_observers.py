"""PT2E's observers whose ranges are chosen as those of ONNX files are, by the same words (``_ranges``)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from edgebake_targets import _ranges

if TYPE_CHECKING:
    import torch


@lru_cache
def range_observer() -> Any:
    """A class of observers, for ``with_args(method=..., percentile=..., bits=..., eps=...)``."""
    from torchao.quantization.pt2e.observer import UniformQuantizationObserverBase

    class RangeObserver(UniformQuantizationObserverBase):  # type: ignore[misc]  # torchao's classes are untyped
        """Watches one tensor; one scale and zero point for all of it, by one of ``_ranges.METHODS``."""

        def __init__(self, method: str, percentile: float, bits: int, **given: Any) -> None:
            super().__init__(**given)
            self.method, self.percentile, self.bits = method, percentile, bits
            self.seen = _ranges.Seen(counted=method != "minmax")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """``x`` itself, counted."""
            self.seen.add(x.detach().numpy())
            return x

        def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
            """Scale and zero point."""
            import torch

            low, high = _ranges.chosen(self.seen, self.method, self.bits, self.percentile)
            found: tuple[torch.Tensor, torch.Tensor] = self._calculate_qparams(torch.tensor(low), torch.tensor(high))
            return found

    return RangeObserver
