"""Whether an artifact decides as the float model does, with 95 % intervals that respect where samples come from.

Decisions of one source (crops of a photo, sentences of a text) resemble each other, so intervals resample whole
sources with replacement: the cluster bootstrap of Davison & Hinkley, "Bootstrap Methods", 1997, section 3.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgebake.bootstrap import difference_interval, product_interval, share_interval
from edgebake.errors import StageFailed
from edgebake.metrics import require_alike, to_json

if TYPE_CHECKING:
    from edgebake.recipe import Agreement

PAIRS = 2048  # similarities compared: enough for a stable rank correlation, few enough for 2000 resamples in 0.1 s
RANKABLE = 1e-9  # similarities that spread less hold only the rounding of float32, not an order

Array = NDArray[Any]
Floats = NDArray[np.float64]


def _rows(name: str, array: Array) -> Floats:
    """(..., classes) -> (decisions, classes) float64: classes are the last axis."""
    if array.ndim == 0 or array.shape[-1] < 2:
        raise StageFailed(
            f"top-1 needs at least two classes on the last axis; the shape is {list(array.shape)}",
            where=f"output {name!r}",
            fix="use the metric `binary`, or name the output that holds the classes with `output:`",
        )
    return array.reshape(-1, array.shape[-1]).astype(np.float64)


def _decided(rows: Floats) -> NDArray[np.bool_]:
    """Rows that decide something: finite, and not the same number for every class."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.isfinite(rows).all(axis=1) & (rows.max(axis=1) > rows.min(axis=1)))


def _places(rows: Floats, classes: NDArray[np.intp]) -> NDArray[np.intp]:
    """Place (0: first) of ``classes[i]`` in row i; equal scores rank by class number, as argmax does."""
    score = np.take_along_axis(rows, classes[:, None], axis=1)
    earlier = np.arange(rows.shape[1])[None, :] < classes[:, None]
    return np.asarray(((rows > score) | ((rows == score) & earlier)).sum(axis=1))


@dataclass(kw_only=True)
class _Tally:
    """Sums per source, columns of (sources, columns)."""

    columns: int
    _by_source: dict[str, Floats] = field(default_factory=dict, init=False)

    def add(self, source: str, *counts: float) -> None:
        row = self._by_source.setdefault(source, np.zeros(self.columns))
        row += counts

    @property
    def table(self) -> Floats:
        return np.array(list(self._by_source.values())).reshape(-1, self.columns)


@dataclass(kw_only=True)
class Top1Meter:
    """Top-1 agreement on an output whose last axis is the classes; each row of the other axes is a decision.

    A flip is a near-tie when the float model itself hardly prefers its class ``f`` over the artifact's class ``a``:
    ``r[f] - r[a] < tie_margin * (max(r) - mean(r))``, r the float row. Near-ties are neither agreement nor
    disagreement: ``value = same / (count - near_ties)``; ``raw = same / count`` is reported beside it. Rows that are
    constant or not finite never agree; a constant float row decides nothing and is left out of ``count``.
    """

    output: str
    tie_margin: float = 0.01
    # columns: same, compared, near-ties, float's class among the artifact's first five
    _tally: _Tally = field(default_factory=lambda: _Tally(columns=4), init=False)
    _classes: set[int] = field(default_factory=set, init=False)
    _undecided: int = field(default=0, init=False)
    _wide: bool = field(default=False, init=False)

    def add(self, source: str, reference: Array, artifact: Array) -> None:
        """Take in one call; both (..., classes)."""
        require_alike(self.output, reference, artifact)
        r, a = _rows(self.output, reference), _rows(self.output, artifact)
        constant = np.isfinite(r).all(axis=1) & ~_decided(r)
        self._undecided += int(constant.sum())
        r, a = r[~constant], a[~constant]
        if not len(r):
            return
        sound = _decided(r) & _decided(a)
        first, other = r.argmax(axis=1), a.argmax(axis=1)
        same = sound & (first == other)
        with np.errstate(invalid="ignore"):
            margin = r.max(axis=1) - np.take_along_axis(r, other[:, None], axis=1)[:, 0]
            ties = sound & ~same & (margin < self.tie_margin * (r.max(axis=1) - r.mean(axis=1)))
            top5 = sound & (_places(a, first) < 5)
        self._wide = self._wide or r.shape[1] > 5
        self._classes.update(int(c) for c in np.unique(first[_decided(r)]))
        self._tally.add(source, same.sum(), len(r) - ties.sum(), ties.sum(), top5.sum())

    def measurements(self, seed: int = 0) -> dict[str, Any]:
        """``measurements["agreement"]``."""
        table = self._tally.table
        same, compared, ties, top5 = (float(s) for s in table.sum(axis=0))
        count = int(compared + ties)
        found = _proportion("top1", self.output, table[:, 0], table[:, 1], seed)
        found |= {"count": count, "near_ties": int(ties), "raw": to_json(same / count if count else math.nan)}
        if self._wide and count:
            found["top5"] = top5 / count
        if self._undecided:
            found["undecided"] = self._undecided
        if not count:
            found["undefined"] = "the float model decides nothing: every class scores the same"
        elif len(self._classes) < 2:
            found["undefined"] = "the float model picks one class on every sample, which any constant matches"
        return found


@dataclass(kw_only=True)
class BinaryMeter:
    """Agreement of ``value > threshold`` on every element of an output; NaN never agrees."""

    output: str
    threshold: float = 0.5
    _tally: _Tally = field(default_factory=lambda: _Tally(columns=3), init=False)  # same, compared, float says yes

    def add(self, source: str, reference: Array, artifact: Array) -> None:
        """Take in one call; arrays of any shape."""
        require_alike(self.output, reference, artifact)
        r, a = np.ravel(reference).astype(np.float64), np.ravel(artifact).astype(np.float64)
        yes = r > self.threshold
        same = (yes == (a > self.threshold)) & np.isfinite(r) & np.isfinite(a)
        self._tally.add(source, same.sum(), r.size, yes.sum())

    def measurements(self, seed: int = 0) -> dict[str, Any]:
        """``measurements["agreement"]``."""
        table = self._tally.table
        found = _proportion("binary", self.output, table[:, 0], table[:, 1], seed)
        count, yes = table[:, 1].sum(), table[:, 2].sum()
        found |= {"count": int(count), "threshold": self.threshold}
        if not count:
            found["undefined"] = "there is nothing to decide on"
        elif yes in (0, count):
            found["undefined"] = (
                f"the float model stays on one side of {self.threshold:g} on every sample, which any constant matches"
            )
        return found


def _proportion(metric: str, output: str, hits: Floats, counts: Floats, seed: int) -> dict[str, Any]:
    total = float(counts.sum())
    low, high = share_interval(hits, counts, seed)
    return {
        "metric": metric,
        "value": to_json(float(hits.sum()) / total if total else math.nan),
        "low": to_json(low),
        "high": to_json(high),
        "sources": len(counts),
        "output": output,
    }


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse], np.float64)


def spearman(left: Floats, right: Floats) -> float:
    """Spearman's rank correlation, ties by average rank; NaN when a side is constant or holds NaN."""
    if len(left) < 3 or np.isnan(left).any() or np.isnan(right).any():
        return math.nan
    x, y = average_ranks(left), average_ranks(right)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale else math.nan


def pairing(samples: int, seed: int) -> NDArray[np.intp]:
    """(pairs, 2) distinct pairs of samples: all of them while they are few, else each sample equally often."""
    if samples * (samples - 1) // 2 <= PAIRS:
        return np.stack(np.triu_indices(samples, k=1), axis=1)
    order = np.random.default_rng(seed).permutation(samples)
    shifts = range(1, max(1, PAIRS // samples) + 1)
    return np.concatenate([np.stack([order, np.roll(order, -shift)], axis=1) for shift in shifts])


@dataclass(kw_only=True)
class SpearmanMeter:
    """Do similar samples stay similar: rank correlation of cosines between pairs of embeddings.

    An embedding is the mean of an output over all axes but the last, so (1, width) is taken as it is.
    """

    output: str
    _sources: list[str] = field(default_factory=list, init=False)
    _reference: list[Floats] = field(default_factory=list, init=False)
    _artifact: list[Floats] = field(default_factory=list, init=False)

    def add(self, source: str, reference: Array, artifact: Array) -> None:
        """Take in one call; both (..., width)."""
        require_alike(self.output, reference, artifact)
        if reference.ndim == 0 or reference.shape[-1] < 2:
            raise StageFailed(
                f"an embedding needs a last axis of at least 2; the shape is {list(reference.shape)}",
                where=f"output {self.output!r}",
                fix="name the output that holds the embedding with `output:`",
            )
        self._sources.append(source)
        for kept, array in ((self._reference, reference), (self._artifact, artifact)):
            kept.append(array.reshape(-1, array.shape[-1]).astype(np.float64).mean(axis=0))

    def measurements(self, seed: int = 0) -> dict[str, Any]:
        """``measurements["agreement"]``; ``count`` is the number of pairs, ``samples`` that of embeddings."""
        samples = len(self._sources)
        names, source = np.unique(np.array(self._sources, dtype=str), return_inverse=True)
        pairs = pairing(samples, seed)
        left, right = _similarities(self._reference, pairs), _similarities(self._artifact, pairs)
        value = spearman(left, right)
        low = high = math.nan
        if not math.isnan(value):
            low, high = product_interval(average_ranks(left), average_ranks(right), source[pairs], len(names), seed)
        found = {
            "metric": "spearman",
            "value": to_json(value),
            "low": to_json(low),
            "high": to_json(high),
            "count": len(pairs),
            "samples": samples,
            "sources": len(names),
            "output": self.output,
        }
        if np.isnan(left).any() or np.isnan(right).any():
            return found
        if len(pairs) < 3:
            found["undefined"] = f"{samples} samples make {len(pairs)} pairs; a rank correlation needs 3"
        elif np.ptp(left) < RANKABLE:
            found["undefined"] = "the float model finds every pair equally similar"
        return found


def meter_of(agreement: Agreement, output: str) -> Top1Meter | BinaryMeter | SpearmanMeter:
    """The meter that a recipe's ``limits.agreement`` asks for, reading ``output``."""
    if agreement.metric == "top1":
        return Top1Meter(output=output, tie_margin=agreement.tie_margin)
    if agreement.metric == "binary":
        return BinaryMeter(output=output, threshold=agreement.threshold)
    return SpearmanMeter(output=output)


def _similarities(vectors: Sequence[Floats], pairs: NDArray[np.intp]) -> Floats:
    """(pairs,) cosines; NaN for a vector that is zero or not finite."""
    if not len(pairs):
        return np.zeros(0)
    stacked = np.stack(vectors)  # (samples, width)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        unit = stacked / np.linalg.norm(stacked, axis=1, keepdims=True)
        return np.asarray((unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(axis=1))


@dataclass(kw_only=True)
class TaskMeter:
    """Share of labelled samples whose label is among the first ``k`` classes, for the float model and the artifact."""

    metric: str  # "top1" or "top5"
    output: str
    # columns: float right, artifact right, labelled
    _tally: _Tally = field(default_factory=lambda: _Tally(columns=3), init=False)

    def add(self, source: str, label: int, reference: Array, artifact: Array) -> None:
        """Take in one labelled sample; both (1, classes)."""
        require_alike(self.output, reference, artifact)
        r, a = _rows(self.output, reference), _rows(self.output, artifact)
        first = {"top1": 1, "top5": 5}[self.metric]
        if len(r) != 1 or r.shape[1] <= first or not 0 <= label < r.shape[1]:
            raise StageFailed(
                f"{self.metric} of label {label} needs one row of more than {max(first, label)} classes; "
                f"the shape is {list(reference.shape)}",
                where=f"output {self.output!r}",
                fix="name the output that holds the classes with `output:`, or check the labels",
            )
        right = [bool(_decided(x)[0] and _places(x, np.array([label]))[0] < first) for x in (r, a)]
        self._tally.add(source, *right, 1)

    def measurements(self, seed: int = 0) -> dict[str, Any]:
        """``measurements["task"]``; ``drop`` is float minus artifact, its interval is paired."""
        table = self._tally.table
        count = float(table[:, 2].sum())
        low, high = difference_interval(table[:, 0] - table[:, 1], table[:, 2], seed)
        shares = [to_json(float(table[:, i].sum()) / count if count else math.nan) for i in (0, 1)]
        drop = None if shares[0] is None or shares[1] is None else shares[0] - shares[1]
        return {
            "metric": self.metric,
            "float": shares[0],
            "artifact": shares[1],
            "drop": drop,
            "drop_low": to_json(low),
            "drop_high": to_json(high),
            "count": int(count),
            "sources": len(table),
            "output": self.output,
        }
