"""Each operator that sums does so in half where the mode asks for it: what overflows there is finite elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgebake_targets.mil.call import Mode
from mil_ops import run

BIG = 200.0  # twice its square is more than float16 holds, once is not
PAIR = {"kernel_sizes": [2], "pad_type": "valid"}
STATE = {"initial_h": np.zeros((1, 1)), "weight_hh": np.zeros((1, 1)), "activation": "linear"}
CASES: dict[str, Any] = {
    "linear": {"x": np.full((1, 2), BIG), "weight": np.full((1, 2), BIG)},
    "matmul": {"x": np.full((1, 2), BIG), "y": np.full((2, 1), BIG)},
    "einsum": {
        "values": (np.full((1, 1, 2), BIG), np.full((2, 1, 1), BIG)),
        "equation": "chw,whr->chr",
    },
    "conv": {"x": np.full((1, 2, 1), BIG), "weight": np.full((1, 2, 1), BIG)},
    "conv_transpose": {"x": np.full((1, 2, 1), BIG), "weight": np.full((2, 1, 1), BIG)},
    "avg_pool": {"x": np.full((1, 1, 2), 40000.0), **PAIR},
    "l2_pool": {"x": np.full((1, 1, 2), BIG), **PAIR},
    "batch_norm": {"x": np.full((1, 1, 1), 60000.0), "mean": [-60000.0], "variance": [4.0], "gamma": [4.0]},
    "instance_norm": {"x": np.array([[[40000.0, 50000.0]]])},
    "layer_norm": {"x": np.array([40000.0, 50000.0])},
    "l2_norm": {"x": np.full((1, 1, 2), BIG)},
    "local_response_norm": {"x": np.full((1, 1, 1, 2), 400.0), "size": 1},
    "rnn": {"x": np.full((1, 1, 2), BIG), "weight_ih": np.full((1, 2), BIG), **STATE},
    "gru": {
        "x": np.full((1, 1, 2), BIG),
        **STATE,
        "weight_ih": np.array([[0, 0], [BIG, BIG], [0, 0]]),
        "weight_hh": np.zeros((3, 1)),
    },
    "lstm": {
        "x": np.full((1, 1, 2), BIG),
        **STATE,
        "initial_c": np.zeros((1, 1)),
        "weight_ih": np.array([[0, 0], [0, 0], [0, 0], [BIG, BIG]]),
        "weight_hh": np.zeros((4, 1)),
        "cell_activation": "linear",
    },
    "scaled_dot_product_attention": {name: np.full((1, 1, 2), BIG) for name in ("query", "key", "value")},
}


def _values(operator: str, **options: Any) -> torch.Tensor:
    result = run(operator, **CASES[operator], **options)
    return torch.cat([r.reshape(-1) for r in (result if isinstance(result, tuple) else (result,))])


@pytest.mark.parametrize("operator", CASES)
def test_only_half_sums_overflow(operator: str) -> None:
    exact = _values(operator, outputs=("float16",) * 3, rounding=Mode.DECLARED)
    assert torch.isfinite(exact).all()
    assert exact.abs().max() > 0
    wide = _values(operator, outputs=("float32",) * 3, rounding=Mode.FP16_WORST)
    assert torch.equal(wide, exact)  # a sum declared float32 is one
    worst = _values(operator, outputs=("float16",) * 3, rounding=Mode.FP16_WORST)
    lost = ~torch.isfinite(worst) | ((worst == 0) & (exact != 0))  # something divided by infinity is gone
    assert lost.any()
