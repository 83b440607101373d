"""Attention against numpy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from edgebake_targets.mil.call import Mode
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

ATTENTION = "scaled_dot_product_attention"
WORST = {"outputs": ("float16",), "rounding": Mode.FP16_WORST}


def _random(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def _expected(query: Array, key: Array, value: Array, added: Array | None) -> Array:
    scores = np.einsum("...le,...se->...ls", query.astype(np.float64), key) / np.sqrt(query.shape[-1])
    scores = scores if added is None else scores + added
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    result: Array = np.einsum("...ls,...sv->...lv", shares / shares.sum(-1, keepdims=True), value)
    return result


@pytest.mark.parametrize(
    ("batch", "queries", "keys", "width", "values", "mask"),
    [
        ((1,), 1, 1, 1, 1, (1, 1)),
        ((2,), 3, 5, 4, 6, (5,)),
        ((2, 3), 4, 4, 8, 8, (4, 4)),
        ((2, 3), 2, 7, 4, 3, (2, 1, 2, 7)),
        ((2, 3), 2, 7, 4, 3, (3, 1, 7)),
        ((1, 2, 2), 3, 2, 5, 4, (2, 3, 2)),
    ],
)
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_attention(
    batch: tuple[int, ...], queries: int, keys: int, width: int, values: int, mask: tuple[int, ...], kind: str
) -> None:
    query, key = _random((*batch, queries, width)), _random((*batch, keys, width), 1)
    value = _random((*batch, keys, values), 2)
    given = _random(mask, 3) if kind == "float" else None
    added = given
    if kind == "bool":
        given = _random(mask, 4) > 0
        given[..., 0] = True
        added = np.where(given, 0.0, -np.inf)
    expected = _expected(query, key, value, added)
    inputs = {"query": query, "key": key, "value": value, "attn_mask": given}
    assert_close(run(ATTENTION, **inputs), expected)
    assert_close(run(ATTENTION, **inputs, **WORST), expected, 0.01)


def test_agrees_with_torch_on_a_causal_mask() -> None:
    query, key, value = (torch.tensor(_random((2, 4, 6, 8), seed)) for seed in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert_close(run(ATTENTION, query=query, key=key, value=value, attn_mask=mask), expected.numpy())


def test_a_row_that_may_look_nowhere_is_not_a_number() -> None:
    x = _random((1, 2, 4))
    result = run(ATTENTION, query=x, key=x, value=x, attn_mask=np.array([[True, False], [False, False]]))
    assert torch.isfinite(result[0, 0]).all()
    assert result[0, 1].isnan().all()


def test_scores_overflow_in_half() -> None:
    x = np.full((1, 1, 64), 40.0)
    assert_close(run(ATTENTION, query=x, key=x, value=x), x)
    assert run(ATTENTION, query=x, key=x, value=x, **WORST).isnan().all()
