"""Weights that already are integers times one scale per group: their scale is found again, so that nothing is lost.

A compression method that chooses integers itself (GPTQ), or a model source that reads a checkpoint of integers, leaves
``q * scale`` in the weight. A quantiser that then took its scale from the largest value would round once more wherever
that value is not the largest integer: every quantiser asks here first, and takes what it is told. A group is only
recognised where each of its values comes back bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIRST = 4  # columns that are looked at before a whole group is: hardly any other group passes them
_LAST_PLACES = 2  # that a scale may be off which is a quotient of the largest value


def bounds(bits: int) -> tuple[int, int]:
    """Least and greatest integer that weights of ``bits`` are rounded to; kernels of 8 bits do without -128."""
    high = 2 ** (bits - 1) - 1
    return (-high if bits == 8 else -high - 1), high


def integers(groups: NDArray[Any], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.bool_]]:
    """``(q, scale, found)`` of ``groups`` (n, size): ``q * scale`` in float32 is the group where ``found`` (n,) is.

    Of several scales the smallest; a group of zeros is not found. Elsewhere q is 0 and scale 1. -128 is found where
    nothing else fits: files that others wrote hold it.
    """
    import numpy as np

    values = np.asarray(groups, np.float32)
    q, scale = np.zeros(values.shape, np.int8), np.ones(len(values), np.float32)
    found = np.zeros(len(values), np.bool_)
    low, high = bounds(bits)
    first = np.ascontiguousarray(values[:, :_FIRST])
    peak = np.maximum(values.max(axis=1, initial=0), -values.min(axis=1, initial=0))
    open_ = np.isfinite(peak) & (peak > 0)
    for largest in [*range(max(-low, high), 0, -1), *([high + 1] if -low == high else [])]:
        low = min(low, -largest)
        step = np.asarray(np.where(open_, peak, 1) / largest, np.float32)
        # A denormal peak may have no step.
        tried = np.flatnonzero(open_ & (step > 0) & _near(first, step, low, high))
        if tried.size:
            whole, taken = _exact(values[tried], step[tried], low, high)
            at = tried[whole]
            q[at], scale[at] = _quotients(values[at], taken[whole]), taken[whole]
            found[at], open_[at] = True, False
    return q, scale, found


def _quotients(values: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.rint(values / step[:, None]), np.float32)


def _near(values: NDArray[np.float32], step: NDArray[np.float32], low: int, high: int) -> NDArray[np.bool_]:
    """Which rows of ``values`` may be integers in ``low .. high`` times a scale next to ``step``."""
    import numpy as np

    q = np.clip(_quotients(values, step), low, high)
    peak = np.float32(max(-low, high))
    rest = np.abs(values - q * step[:, None]) <= step[:, None] * (peak * np.float32(2**-20))
    return np.asarray(rest.all(1))


def _exact(
    values: NDArray[np.float32], step: NDArray[np.float32], low: int, high: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which rows of ``values`` are integers in ``low .. high`` times a scale, and the scale.

    The largest value is an integer times the scale, rounded to float32, and ``step`` a quotient of it, rounded again:
    together they are off by at most two units in the last place. ``step`` itself comes first, then the nearest.
    """
    import numpy as np

    q = np.clip(_quotients(values, step), low, high)
    whole, taken = np.zeros(len(values), np.bool_), step.copy()
    below = above = step
    tried = [step]
    for _ in range(_LAST_PLACES):
        below, above = np.nextafter(below, np.float32(0)), np.nextafter(above, np.float32(np.inf))
        tried += [below, above]
    for scale in tried:
        left = np.flatnonzero(~whole)
        fits = (values[left] == q[left] * scale[left, None]).all(1)
        at = left[fits]
        whole[at], taken[at] = True, scale[at]
    return whole & (taken > 0), taken
