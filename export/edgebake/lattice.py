"""Weights that already are integers times one scale per group: their scale is found again, so that nothing is lost.

A compression method that chooses integers itself (GPTQ) leaves ``q * scale`` in the weight. A quantiser that then took
its scale from the largest value would round once more wherever that value is not the largest integer: every quantiser
asks here first, and takes what it is told. A group is only recognised where each of its values comes back bit for bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_FIRST = 4  # columns that are looked at before a whole group is: hardly any other group passes them


def bounds(bits: int) -> tuple[int, int]:
    """Least and greatest integer of ``bits`` in weights; -128 is left out, integer kernels of 8 bits do without it."""
    high = 2 ** (bits - 1) - 1
    return (-high if bits == 8 else -high - 1), high


def integers(groups: NDArray[Any], bits: int) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.bool_]]:
    """``(q, scale, found)`` of ``groups`` (n, size): ``q * scale`` in float32 is the group where ``found`` (n,) is.

    Of several scales the smallest; a group of zeros is not found. Elsewhere q is 0 and scale 1.
    """
    import numpy as np

    values = np.asarray(groups, np.float32)
    q, scale = np.zeros(values.shape, np.int8), np.ones(len(values), np.float32)
    found = np.zeros(len(values), np.bool_)
    low, high = bounds(bits)
    first = np.ascontiguousarray(values[:, :_FIRST])
    peak = np.maximum(values.max(axis=1, initial=0), -values.min(axis=1, initial=0))
    open_ = np.isfinite(peak) & (peak > 0)
    for largest in range(max(-low, high), 0, -1):
        step = np.asarray(np.where(open_, peak, 1) / largest, np.float32)
        # A denormal peak may have no step.
        tried = np.flatnonzero(open_ & (step > 0) & (_rest(first, step, low, high) == 0).all(1))
        taken = step[tried]
        whole = (_rest(values[tried], taken, low, high) == 0).all(1)
        at = tried[whole]
        q[at], scale[at] = _quotients(values[at], step[at]), step[at]
        found[at], open_[at] = True, False
    return q, scale, found


def _quotients(values: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.float32]:
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.asarray(np.rint(values / step[:, None]), np.float32)


def _rest(values: NDArray[np.float32], step: NDArray[np.float32], low: int, high: int) -> NDArray[np.float32]:
    """How far ``values`` are from integers in ``low .. high`` times ``step``; not 0 beyond them."""
    import numpy as np

    q = np.clip(_quotients(values, step), low, high)
    return np.abs(values - q * step[:, None])
