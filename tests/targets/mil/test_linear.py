"""Products of matrices against numpy in float64, and the worst half order against its own loops (test_half)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

WORST = {"outputs": ("float16",), "rounding": Mode.FP16_WORST}


def _random(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> Array:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return (values * (6 if dtype == np.int32 else 1)).astype(dtype)


@pytest.mark.parametrize("shape", [(4,), (1,), (3, 5), (2, 3, 4), (1, 1, 6), (0, 3)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_linear(shape: tuple[int, ...], with_bias: bool, dtype: Any) -> None:
    x, weight = _random(shape, 0, dtype), _random((7, shape[-1]), 1, dtype)
    bias = _random((7,), 2, dtype) if with_bias else None
    expected = np.einsum("...i,oi->...o", x.astype(np.float64), weight) + (0 if bias is None else bias)
    result = run("linear", x=x, weight=weight, bias=bias)
    assert result.numpy().dtype == dtype
    assert_close(result, expected)
    if dtype == np.float32:
        assert_close(run("linear", x=x, weight=weight, bias=bias, **WORST), expected, 0.01)


@pytest.mark.parametrize(
    ("x_shape", "y_shape"),
    [
        ((4,), (4,)),
        ((4,), (4, 3)),
        ((4,), (2, 4, 3)),
        ((3, 4), (4,)),
        ((2, 3, 4), (4,)),
        ((3, 4), (4, 2)),
        ((1, 1), (1, 1)),
        ((10, 4, 3), (5, 10, 3, 2)),
        ((5, 1, 2, 3), (4, 3, 2)),
        ((2, 0, 3), (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_matmul(x_shape: tuple[int, ...], y_shape: tuple[int, ...], dtype: Any) -> None:
    x, y = _random(x_shape, 0, dtype), _random(y_shape, 1, dtype)
    expected = np.matmul(x.astype(np.float64), y.astype(np.float64))
    assert_close(run("matmul", x=x, y=y), expected)
    turned = {"transpose_x": x.ndim > 1, "transpose_y": y.ndim > 1}
    flipped = [v.swapaxes(-1, -2) if v.ndim > 1 else v for v in (x, y)]
    assert_close(run("matmul", x=flipped[0], y=flipped[1], **turned), expected)
    if dtype == np.float32:
        assert_close(run("matmul", x=x, y=y, **WORST), expected, 0.01)


def test_transposing_a_vector_has_no_effect() -> None:
    assert run("matmul", x=[1.0, 2.0], y=[3.0, 4.0], transpose_y=True).item() == 11.0


@pytest.mark.parametrize(
    ("equation", "x_shape", "y_shape"),
    [
        ("nchw,nwhu->nchu", (2, 3, 4, 5), (2, 5, 4, 6)),
        ("abcd,adce->abce", (1, 3, 4, 5), (2, 5, 1, 6)),
        ("nchw, nwhr -> nchr", (2, 1, 1, 1), (1, 1, 4, 1)),
        ("chw,whr->chr", (3, 4, 5), (5, 4, 6)),
        ("abc,cbd->abd", (1, 4, 2), (2, 1, 3)),
    ],
)
def test_einsum(equation: str, x_shape: tuple[int, ...], y_shape: tuple[int, ...]) -> None:
    x, y = _random(x_shape), _random(y_shape, 1)
    batch = np.broadcast_shapes(x_shape[:-3], y_shape[:-3])
    expected = np.zeros((*batch, x_shape[-3], max(x_shape[-2], y_shape[-2]), y_shape[-1]))
    for at in np.ndindex(expected.shape):
        batch, (c, h, u) = at[:-3], at[-3:]
        for w in range(x_shape[-1]):
            left = x[(*(b % n for b, n in zip(batch, x_shape, strict=False)), c, h % x_shape[-2], w)]
            right = y[(*(b % n for b, n in zip(batch, y_shape, strict=False)), w, h % y_shape[-2], u)]
            expected[at] += float(left) * float(right)
    assert_close(run("einsum", values=(x, y), equation=equation), expected)
    assert_close(run("einsum", values=(x, y), equation=equation, **WORST), expected, 0.01)


def test_other_equations_are_refused() -> None:
    with pytest.raises(Unsupported, match="einsum with the equation ij,jk->ik; the operator knows"):
        run("einsum", values=(np.ones((2, 2)), np.ones((2, 2))), equation="ij,jk->ik")


def test_integers_and_floats_do_not_mix() -> None:
    with pytest.raises(Unsupported, match="linear of integers and floats"):
        run("linear", x=[1, 2], weight=[[1.0, 2.0]])


def test_half_sums_overflow_where_float32_sums_do_not() -> None:
    x, weight = np.full((1, 64), 60.0), np.full((1, 64), 60.0)
    assert run("linear", x=x, weight=weight).item() == 230400.0
    assert run("linear", x=x, weight=weight, **WORST).item() == np.inf
    assert run("linear", x=x, weight=weight, outputs=("float16",), rounding=Mode.DECLARED).item() == 230400.0
