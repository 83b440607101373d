"""Arithmetic, comparisons, logic and functions of one element, against numpy and scipy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.special

from edgebake_targets.mil.call import Mode, Unsupported
from mil_ops import assert_close, run

Array = npt.NDArray[Any]

PAIRS = [((), ()), ((1,), (5,)), ((3, 1), (1, 4)), ((2, 3, 4), (4,)), ((2, 1, 3, 1), (5, 1, 2)), ((0, 3), (1, 3))]
PAIRS += [((1, 1, 1, 1, 2), (2, 3, 1, 2, 1))]
SHAPES = [(), (1,), (7,), (2, 3), (1, 4, 1), (2, 2, 3, 2), (1, 2, 1, 3, 2), (0, 2)]


def _random(shape: tuple[int, ...], seed: int, dtype: Any = np.float32, low: float = -4.0, high: float = 4.0) -> Array:
    values = np.random.default_rng([seed, *shape]).uniform(low, high, shape)
    return (values * (5 if np.issubdtype(dtype, np.integer) else 1)).astype(dtype)


ARITHMETIC = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
COMPARISONS = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_arithmetic(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> None:
    x, y = _random(shapes[0], 1, dtype), _random(shapes[1], 2, dtype)
    result = run(name, x=x, y=y)
    assert result.numpy().dtype == dtype
    assert_close(result, ARITHMETIC[name](x.astype(np.float64), y.astype(np.float64)))


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_comparisons(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> None:
    x, y = (np.round(_random(shape, seed)).astype(dtype) for seed, shape in enumerate(shapes))
    np.testing.assert_array_equal(run(name, x=x, y=y).numpy(), COMPARISONS[name](x, y), strict=True)


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("name", ["logical_and", "logical_or", "logical_xor"])
def test_logic(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = (_random(shape, seed) > 0 for seed, shape in enumerate(shapes))
    np.testing.assert_array_equal(run(name, x=x, y=y).numpy(), getattr(np, name)(x, y), strict=True)
    np.testing.assert_array_equal(run("logical_not", x=x).numpy(), ~x, strict=True)


@pytest.mark.parametrize("shapes", PAIRS)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_divisions(shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: Any) -> None:
    """Floors go down and remainders take the sign of the divisor, for every combination of signs."""
    x, y = _random(shapes[0], 1, dtype), _random(shapes[1], 2, dtype)
    y = np.where(y == 0, 3, y).astype(dtype)
    exact = x.astype(np.float64) / y.astype(np.float64)
    assert_close(run("floor_div", x=x, y=y), np.floor(exact))
    assert_close(run("mod", x=x, y=y), x.astype(np.float64) - np.floor(exact) * y)
    assert_close(run("real_div", x=x, y=y), exact if dtype == np.float32 else np.trunc(exact))


def test_divisions_at_their_edges() -> None:
    signs = [7, -7, 7, -7], [2, 2, -2, -2]
    assert run("floor_div", x=signs[0], y=signs[1]).tolist() == [3, -4, -4, 3]
    assert run("mod", x=signs[0], y=signs[1]).tolist() == [1, 1, -1, -1]
    assert run("real_div", x=signs[0], y=signs[1]).tolist() == [3, -3, -3, 3]
    assert run("real_div", x=[1.0, -1.0], y=[0.0, 0.0]).tolist() == [np.inf, -np.inf]
    assert run("floor_div", x=2**31 - 1, y=1).tolist() == 2**31 - 1
    for name, expected in (("floor_div", -(2**31)), ("real_div", -(2**31)), ("mod", 0)):  # a trap on some processors
        assert run(name, x=[-(2**31)] * 9, y=[-1] * 9).tolist() == [expected] * 9
    for name in ("floor_div", "mod", "real_div"):
        with pytest.raises(Unsupported, match=f"{name} of an integer by zero"):
            run(name, x=[1, 2], y=[1, 0])


@pytest.mark.parametrize("shapes", PAIRS)
def test_pow(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = _random(shapes[0], 1, low=0.1), _random(shapes[1], 2)
    assert_close(run("pow", x=x, y=y), np.power(x.astype(np.float64), y.astype(np.float64)))
    integers = _random(shapes[0], 3, np.int32), np.abs(_random(shapes[1], 4, np.int32)) % 4
    np.testing.assert_array_equal(run("pow", x=integers[0], y=integers[1]).numpy(), np.power(*integers), strict=True)


def test_pow_of_an_integer_needs_a_positive_exponent() -> None:
    with pytest.raises(Unsupported, match="negative exponent"):
        run("pow", x=[2, 2], y=[1, -1])


UNARY = {
    "abs": (np.abs, -4, 4),
    "acos": (np.arccos, -1, 1),
    "asin": (np.arcsin, -1, 1),
    "atan": (np.arctan, -9, 9),
    "atanh": (np.arctanh, -0.99, 0.99),
    "ceil": (np.ceil, -4, 4),
    "cos": (np.cos, -9, 9),
    "cosh": (np.cosh, -4, 4),
    "erf": (scipy.special.erf, -3, 3),
    "exp": (np.exp, -5, 5),
    "exp2": (np.exp2, -5, 5),
    "floor": (np.floor, -4, 4),
    "inverse": (lambda x: 1 / (x + 1e-4), 0.1, 4),
    "log": (np.log, 0.01, 9),
    "round": (np.round, -4, 4),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 0.1, 9),
    "sign": (np.sign, -4, 4),
    "sin": (np.sin, -9, 9),
    "sinh": (np.sinh, -4, 4),
    "sqrt": (np.sqrt, 0, 9),
    "square": (np.square, -4, 4),
    "tan": (np.tan, -1.4, 1.4),
    "tanh": (np.tanh, -4, 4),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str, shape: tuple[int, ...]) -> None:
    function, low, high = UNARY[name]
    x = _random(shape, 5, low=low, high=high)
    assert_close(run(name, x=x), function(x.astype(np.float64)))


def test_unary_at_their_edges() -> None:
    assert run("round", x=[0.5, 1.5, 2.5, -0.5, -1.5]).tolist() == [0, 2, 2, 0, -2]
    assert run("sign", x=[0.0, -2.0, 3.0]).tolist() == [0, -1, 1]
    assert run("sqrt", x=[-1.0]).isnan().all()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("abs", [3, 0, 4]), ("sign", [-1, 0, 1]), ("square", [9, 0, 16]), ("exp2", [0, 1, 16])],
)
def test_integers_stay_integers(name: str, expected: list[int]) -> None:
    result = run(name, x=[-3, 0, 4])
    assert result.tolist() == expected
    assert not result.is_floating_point()


@pytest.mark.parametrize("shape", SHAPES)
def test_epsilon_is_added_before_the_function(shape: tuple[int, ...]) -> None:
    x = _random(shape, 6, low=0.1, high=2)
    wide = x.astype(np.float64)
    assert_close(run("inverse", x=x, epsilon=0.5), 1 / (wide + 0.5))
    assert_close(run("log", x=x, epsilon=0.5), np.log(wide + 0.5))
    assert_close(run("rsqrt", x=x, epsilon=0.5), 1 / np.sqrt(wide + 0.5))


def test_the_default_epsilon_has_the_type_of_the_result() -> None:
    assert_close(run("rsqrt", x=0.0), 1e6)
    assert_close(run("log", x=0.0), np.log(np.float64(np.float32(1e-45))))
    assert run("rsqrt", x=0.0, outputs=("float16",)) == np.inf
    assert run("log", x=0.0, outputs=("float16",)) == -np.inf
    assert_close(run("inverse", x=0.0, outputs=("float16",)), 1 / np.float64(np.float16(1e-4)))


@pytest.mark.parametrize("shape", SHAPES)
def test_limits(shape: tuple[int, ...]) -> None:
    x = _random(shape, 7)
    np.testing.assert_array_equal(run("clip", x=x, alpha=-1.5, beta=2.25).numpy(), np.clip(x, -1.5, 2.25))
    np.testing.assert_array_equal(run("threshold", x=x, alpha=0.5).numpy(), np.maximum(x, 0.5))
    integers = _random(shape, 8, np.int32)
    np.testing.assert_array_equal(run("threshold", x=integers, alpha=3).numpy(), np.maximum(integers, 3), strict=True)


def test_clip_needs_ordered_limits_since_ios17() -> None:
    assert run("clip", x=[0.0, 5.0], alpha=2.0, beta=1.0, opset="CoreML6").tolist() == [1.0, 1.0]
    with pytest.raises(Unsupported, match=r"clip to 2.0 .. 1.0: since iOS 17"):
        run("clip", x=[0.0], alpha=2.0, beta=1.0, opset="CoreML7")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32"])
def test_cast_of_floats_drops_the_fraction(shape: tuple[int, ...], dtype: Any) -> None:
    x = np.abs(_random(shape, 9)) * (1 if dtype.startswith("u") else -20)
    np.testing.assert_array_equal(run("cast", x=x, dtype=dtype).numpy(), np.trunc(x).astype(dtype))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32"])
def test_cast_of_integers_wraps(dtype: Any) -> None:
    x = np.array([0, 1, -1, 127, 128, -129, 255, 256, 70000, -70000, 2**31 - 1, -(2**31)], np.int32)
    np.testing.assert_array_equal(run("cast", x=x, dtype=dtype).numpy(), x.astype(dtype))


def test_cast_to_bool_and_floats() -> None:
    assert run("cast", x=[0.0, -0.0, 0.5, np.nan], dtype="bool").tolist() == [False, False, True, True]
    assert run("cast", x=np.array([True, False]), dtype="int32").tolist() == [1, 0]
    for dtype in ("fp16", "fp32"):
        result = run("cast", x=[1, 70000, 2**24 + 1], dtype=dtype)
        assert result.tolist() == [1.0, 70000.0, 2.0**24]
        assert result.is_floating_point()


@pytest.mark.parametrize(("x", "dtype"), [(np.nan, "int32"), (np.inf, "int32"), (300.0, "uint8"), (-1.0, "uint16")])
def test_cast_of_what_the_type_cannot_hold_is_refused(x: float, dtype: Any) -> None:
    with pytest.raises(Unsupported, match=f"cast to {dtype} of a value that is not finite or outside"):
        run("cast", x=[0.0, x], dtype=dtype)


def test_cast_to_a_string_is_refused() -> None:
    with pytest.raises(Unsupported, match="cast to string"):
        run("cast", x=[1.0], dtype="string")


def test_elementwise_operators_leave_rounding_to_the_walk() -> None:
    result = run("add", x=[1.0], y=[2.0**-20], outputs=("float16",), rounding=Mode.FP16_WORST)
    assert result.item() == 1.0 + 2.0**-20
