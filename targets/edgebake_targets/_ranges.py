"""Ranges of activations from calibration: a histogram for each tensor, and four ways to say where it is cut.

Every target that rounds activations to integers chooses their ranges here, by the same words. Memory does not grow with
the number of samples: a histogram whose values outgrow it doubles its span and joins its bins in pairs, which moves no
value to a bin that does not hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgebake.target import Asked, Option, Refusal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BINS = 2048
METHODS = ("minmax", "percentile", "entropy", "mse")
PERCENTILE = Option(
    name="percentile", default=99.99, help="share of values inside a range that is a percentile, in percent"
)
_SHARES = 100  # ends that are tried for a range, evenly spread between nothing and the end of what was seen
_ROUNDS = 2  # of trying one end while the other one stays
_EMPTY = 1e-6  # probability of what the rounded distribution lacks: log(0) would forbid every cut

Range = tuple[float, float]
Cost = Callable[[float, float], float]


def refused(asked: Asked) -> Iterator[Refusal]:
    """A percentile that is none."""
    if not 0 < asked.options["percentile"] <= 100:
        yield Refusal(what="percentile is a share in percent", fix="99.99, say", key="options.percentile")


@dataclass
class Seen:
    """What calibration saw of one tensor: its ends and, with ``counted``, how often each value between them.

    Zeros are counted apart: each range holds zero exactly, so that they cost nothing however they are rounded.
    """

    counted: bool = True
    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    start: float = 0.0
    span: float = 0.0
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        import numpy as np

        self.counts = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count ``values``, of any shape; those that are not finite have no place in a range."""
        import numpy as np

        flat = values.reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        if not np.isfinite(low) or not np.isfinite(high):
            self.add(flat[np.isfinite(flat)])
            return
        self.low, self.high = min(self.low, low), max(self.high, high)
        if self.counted and self.high > self.low:
            self._count(flat)
        else:
            self.zeros += flat.size

    def _count(self, flat: NDArray[Any]) -> None:
        import numpy as np

        self._widen()
        zeros = int(flat.size - np.count_nonzero(flat))
        index = ((flat - np.float64(self.start)) * (BINS / self.span)).astype(np.intp)
        self.counts += np.bincount(np.clip(index, 0, BINS - 1), minlength=BINS)
        self.counts[self.bin(0.0)] -= zeros
        self.zeros += zeros

    def _widen(self) -> None:
        import numpy as np

        if self.span == 0.0:
            self.start, self.span = self.low, self.high - self.low
        while self.high > self.start + self.span:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.span *= 2
        while self.low < self.start:
            self.counts = np.concatenate([np.zeros(BINS // 2, np.int64), self.counts.reshape(-1, 2).sum(1)])
            self.start -= self.span
            self.span *= 2

    def bin(self, value: float) -> int:
        """Index of the bin that holds ``value``."""
        return min(max(int((value - self.start) * (BINS / self.span)), 0), BINS - 1)

    def middles(self) -> NDArray[Any]:
        """The value in the middle of each bin."""
        import numpy as np

        middles: NDArray[Any] = self.start + (np.arange(BINS) + 0.5) * (self.span / BINS)
        return middles


def chosen(seen: Seen, method: str, bits: int, percentile: float = 99.99) -> Range:
    """``(low, high)`` of the range that ``method`` chooses for integers of ``bits``; zero lies in it.

    ``minmax`` keeps all that was seen, ``percentile`` that share of the values, ``entropy`` and ``mse`` what their
    measures of loss say. KeyError for another method.
    """
    if method not in METHODS:
        raise KeyError(method)
    if method == "minmax" or seen.high <= seen.low:
        return seen.low, seen.high
    if method == "percentile":
        return _percentile(seen, percentile)
    return _mse(seen, 2**bits) if method == "mse" else _entropy(seen, 2**bits)


def _percentile(seen: Seen, percentile: float) -> Range:
    """Half of what is cut on either side, to the outer edge of the bin where the cut falls."""
    import numpy as np

    counts = seen.counts.copy()
    counts[seen.bin(0.0)] += seen.zeros
    shares = np.cumsum(counts) / counts.sum()
    cut = (1.0 - percentile / 100.0) / 2.0
    width = seen.span / BINS
    low = seen.start + width * int(np.searchsorted(shares, cut, side="right"))
    high = seen.start + width * (int(np.searchsorted(shares, 1.0 - cut)) + 1)
    return min(max(low, seen.low), 0.0), max(min(high, seen.high), 0.0)


def _mse(seen: Seen, levels: int) -> Range:
    """The least squared error: of rounding, ``step^2 / 12`` a value, and of clipping, from the histogram.

    Banner, Nahshan, Soudry 2019 (Post-training 4-bit quantization), section 2, with what was counted in the place of
    their Laplace distribution.
    """
    import numpy as np

    middles, counts = seen.middles(), seen.counts.astype(np.float64)

    def cost(low: float, high: float) -> float:
        beyond = middles - np.clip(middles, low, high)
        rounding = ((high - low) / (levels - 1)) ** 2 / 12.0
        return float((counts * np.where(beyond == 0.0, rounding, beyond**2)).sum())

    return _searched(seen, cost)


def _entropy(seen: Seen, levels: int) -> Range:
    """The least Kullback-Leibler divergence of the rounded distribution from the one seen, what is cut piled up at its
    ends.

    Migacz 2017 (8-bit Inference with TensorRT, GTC), for ranges with two ends. With as many levels as bins there is
    nothing to tell, and all that was seen is kept.
    """
    import numpy as np

    if levels >= BINS:
        return seen.low, seen.high
    counts = seen.counts.astype(np.float64)

    def cost(low: float, high: float) -> float:
        first, last = seen.bin(low), seen.bin(high)
        inside = counts[first : last + 1]
        if len(inside) < levels or not inside.any():
            return float("inf")
        wanted = inside.copy()
        wanted[0] += counts[:first].sum()
        wanted[-1] += counts[last + 1 :].sum()
        return _divergence(wanted / wanted.sum(), _spread(inside, levels) / inside.sum())

    return _searched(seen, cost)


def _spread(inside: NDArray[Any], levels: int) -> NDArray[Any]:
    """``inside`` after rounding to ``levels``: each level's count, evenly over its bins that were not empty."""
    import numpy as np

    level = np.arange(len(inside)) * levels // len(inside)
    filled = inside > 0
    totals = np.bincount(level, weights=inside, minlength=levels)
    shares = totals / np.maximum(np.bincount(level, weights=filled, minlength=levels), 1)
    spread: NDArray[Any] = np.where(filled, shares[level], 0.0)
    return spread


def _divergence(wanted: NDArray[Any], got: NDArray[Any]) -> float:
    import numpy as np

    there = wanted > 0
    return float((wanted[there] * np.log(wanted[there] / np.maximum(got[there], _EMPTY))).sum())


def _searched(seen: Seen, cost: Cost) -> Range:
    """The range of least ``cost``, one end after the other; of equal ones the widest."""
    low, high = seen.low, seen.high
    shares = [count / _SHARES for count in range(_SHARES, 0, -1)]
    for _ in range(_ROUNDS):
        if high:
            high = min((cost(low, seen.high * share), -share, seen.high * share) for share in shares)[2]
        if low:
            low = min((cost(seen.low * share, high), -share, seen.low * share) for share in shares)[2]
    return low, high
