"""Observers of PT2E choose the ranges that the targets of ONNX choose, and keep integers that weights are made of."""

from __future__ import annotations

import pytest
import torch

from edgebake_targets import _ranges
from edgebake_targets._observers import observer as observer_of
from edgebake_targets._observers import weight_observer

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


def test_channels_that_are_integers_keep_them_and_others_are_rounded_by_their_largest_value() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (4, 40), generator=generator)
    q[0, 0], q[1, 3] = 64, -128  # the first has no 127, the second the one that nothing is rounded to
    steps = torch.tensor([0.013, 0.37, 0.0021, 0.5])
    weight = q * steps[:, None]
    weight[3] = torch.randn(40, generator=generator)
    given = {"dtype": torch.int8, "qscheme": torch.per_channel_symmetric, "quant_min": -127, "quant_max": 127}
    observer = weight_observer(2.0**-20)(ch_axis=0, **given)
    assert observer(observer(weight)) is weight
    scale, zero = observer.calculate_qparams()
    assert torch.equal(torch.round(weight / scale[:, None])[:3].int(), q[:3].int()) and not zero.any()
    assert torch.equal(torch.round(weight / scale[:, None])[:3] * scale[:3, None], weight[:3])
    assert float(scale[3]) == pytest.approx(float(weight[3].abs().max()) / 127, rel=1e-6)
    assert (observer.quant_min, observer.quant_max) == (-128, 127)


def test_without_integers_nothing_is_rounded_to_the_least_one() -> None:
    observer = weight_observer(2.0**-20)(
        ch_axis=1, dtype=torch.int8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    observer(weight)
    assert torch.allclose(observer.calculate_qparams()[0], weight.abs().amax(0) / 127)
    assert observer.quant_min == -127
