"""Integers that a weight was made of are found again, and in nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from edgebake import lattice


def made(bits: int, groups: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Integers of ``bits`` and scales with a mantissa of 8 bits."""
    rng = np.random.default_rng(seed)
    low, high = lattice.bounds(bits)
    mantissa, exponent = rng.integers(128, 256, groups), rng.integers(-14, 3, groups)
    return rng.integers(low, high + 1, (groups, size)), np.ldexp(mantissa, exponent - 8).astype(np.float32)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (4, 576), (8, 64), (2, 16), (3, 5)])
def test_integers_times_a_scale_come_back_bit_for_bit(bits: int, size: int) -> None:
    q, scale = made(bits, 300, size)
    weight = q.astype(np.float32) * scale[:, None]
    got, step, found = lattice.integers(weight, bits)
    used = np.abs(q).max(1) > 0
    assert np.array_equal(found, used)
    assert np.array_equal((got * step[:, None])[found], weight[found])
    low, high = lattice.bounds(bits)
    assert got.min() >= low and got.max() <= high


def test_a_group_that_uses_few_integers_comes_back_as_well() -> None:
    q = np.array([[6, -3, 0, 5], [2, 4, -6, 0], [-8, 8 - 1, 1, 0], [1, 1, -1, 1]])
    weight = (q * np.float32(0.37109375)).astype(np.float32)
    got, step, found = lattice.integers(weight, 4)
    assert found.all()
    assert np.array_equal(got * step[:, None], weight)


def test_float_weights_and_zeros_are_not_taken_for_integers() -> None:
    floats = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    near = np.array([[1, 2, 3, 7]], np.float32) * np.float32(0.1) + np.float32(1e-6)
    for weight in (floats, np.zeros((3, 8), np.float32), near, np.full((1, 4), np.inf, np.float32)):
        q, scale, found = lattice.integers(weight, 4)
        assert not found.any() and not q.any() and (scale == 1).all()


def test_a_group_beyond_the_bits_is_not_found() -> None:
    q = np.array([[8, -8, 1, 3], [9, 1, 0, 2]])  # 8 is no integer of four bits, and no smaller scale has 1 and 3
    assert not lattice.integers((q * np.float32(0.5)).astype(np.float32), 4)[2].any()


def test_denormal_groups_do_no_harm() -> None:
    weight = np.full((1, 4), 1e-45, np.float32) * np.array([1, 1, 0, 1], np.float32)
    q, scale, found = lattice.integers(weight, 8)
    assert found.all() and np.array_equal(q * scale[:, None], weight)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, 64)])
def test_scales_of_any_mantissa_come_back_with_their_integers(bits: int, size: int) -> None:
    q, _ = made(bits, 2000, size)
    scale = np.random.default_rng(1).uniform(1e-4, 3, 2000).astype(np.float32)
    weight = q.astype(np.float32) * scale[:, None]
    got, step, found = lattice.integers(weight, bits)
    assert found.all() and np.array_equal(got * step[:, None], weight)
    top = np.abs(q).max(1) > 2 ** (bits - 2)  # others may come back as twice the integers and half the scale
    assert top.mean() > 0.9 and np.array_equal(got[top], q[top])
    assert np.abs(step[top] / scale[top] - 1).max() < 2**-21


def test_the_least_integer_of_eight_bits_is_found_though_nothing_is_rounded_to_it() -> None:
    q = np.array([[-128, 127, 3, 0], [-128, 5, 64, 1], [-64, 63, 1, 0]])
    weight = (q * np.float32(0.0123)).astype(np.float32)
    got, step, found = lattice.integers(weight, 8)
    assert found.all() and np.array_equal(got[:2], q[:2]) and got[2].min() >= -127
    assert np.array_equal(got * step[:, None], weight)
