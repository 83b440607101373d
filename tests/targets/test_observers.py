"""Observers of PT2E choose the ranges that the targets of ONNX choose."""

from __future__ import annotations

import pytest
import torch

from edgebake_targets import _ranges
from edgebake_targets._observers import observer as observer_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.mark.parametrize("method", _ranges.METHODS)
def test_scale_and_zero_point_hold_the_range_that_was_chosen(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    calls = [torch.randn(64, 500, generator=generator) + 0.5 for _ in range(3)]
    calls[1][0, 0] = 60.0
    make = observer_of(method, 99.0).with_args(dtype=torch.uint8, eps=2.0**-14)
    observer, seen = make(quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine), _ranges.Seen()
    for call in calls:
        assert observer(call) is call
        seen.add(call.numpy())
    low, high = _ranges.chosen(seen, method, 8, 99.0)
    scale, zero_point = (float(value) for value in observer.calculate_qparams())
    assert scale == pytest.approx((high - low) / 255, rel=1e-5)
    assert zero_point == round(-low / scale)
    outside = sum(int(((call < low) | (call > high)).sum()) for call in calls) / sum(call.numel() for call in calls)
    if method == "percentile":
        assert outside == pytest.approx(0.01, rel=0.25)  # whole bins, and the outlier makes them wide
    assert (high > 59) == (method == "minmax")
